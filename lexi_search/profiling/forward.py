"""The forward pass of a model and of many variants of it at once, layer by layer, reading the checkpoint once.

A variant gives MoE layers a top-k of their own. All variants go through a layer while its weights are on the device.
Those that agree with the model up to a layer share its hidden states up to there, and where they branch off, their
outputs are mixed from one pass over the experts.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int, Int32

from lexi_search.artifacts.compensation import Maps
from lexi_search.checkpoint.reader import Checkpoint
from lexi_search.errors import check_memory
from lexi_search.layers.decoder import Decoder, attend, embed, finish, read_logits
from lexi_search.layers.moe import (
    Correction,
    compute_outputs,
    correct,
    corrected_distances,
    mix,
    squared_distances,
)
from lexi_search.layers.routing import Choice, route
from lexi_search.layers.weights import BlockWeights, EndWeights
from lexi_search.models.loading import read_tensors, stream_blocks
from lexi_search.models.model import Model

# Shares of a device's memory: expert outputs of one pass, hidden states of all variants. Where it is not told, bytes.
PASS_SHARE, PASS_BYTES, HIDDEN_SHARE = 1 / 16, 16 << 20, 1 / 4
LOGIT_BYTES = 256 << 20  # of float32 logits at a time
MODEL = -1  # the variant index of the unreduced model

Hidden = Float[Array, "chunk length hidden"]  # of some of the sequences
Kept = Hidden | Float[np.ndarray, "chunk length hidden"]  # on the device, or in host memory


class Variant(NamedTuple):
    """A top-k for each MoE layer, in order, a gate exponent or None (see `Routing`), and corrections of the layers.

    `maps` has those of every (decoder layer, k below K) of the variant, or is None.
    """

    top_k: tuple[int, ...]
    exponent: float | None = None
    maps: Maps | None = None


class Losses(NamedTuple):
    """Means over the tokens of each sequence, for k = 1..K, float64.

    `squares` of ||y_k - y_K||^2 in each MoE layer, `relative` of the same over ||h||^2, where h is the residual stream
    that the layer's output is added to. `divergence` is the KL divergence of each variant's next-token distribution
    from the unreduced model's, in nats.
    """

    squares: Float64[np.ndarray, "layers sequences K"]
    relative: Float64[np.ndarray, "layers sequences K"]
    divergence: Float64[np.ndarray, "variants sequences"]


class Run(NamedTuple):
    """A checkpoint and the element type of its hidden states: what all forward passes have in common."""

    checkpoint: Checkpoint
    model: Model
    decoder: Decoder
    dtype: str


class MoEOutputs(NamedTuple):
    """A MoE layer on some tokens: its input, each token's choice and K expert outputs, and the residual stream."""

    layer: int  # of the decoder
    x: Float[Array, "tokens hidden"]
    outputs: Float[Array, "tokens K hidden"]
    choice: Choice
    hidden: Hidden


class _Mixing(NamedTuple):
    """How outputs are mixed: a k, of all tokens or of each, a gate exponent, and a correction, as a `Variant` says."""

    k: int | Int32[np.ndarray, "tokens 1"]
    exponent: float | None
    correction: Correction | None


class _Plan(NamedTuple):
    """The cut of a forward pass: `chunk` sequences at a time, `together` variants of them at a time.

    `branches` has for each variant the first MoE layer, counted from 0, in which it differs from the model, or None.
    `keep` moves hidden states to where they wait for the next layer: device or host memory.
    """

    chunk: int
    together: int
    branches: tuple[int | None, ...]
    keep: Callable[[Hidden], Any]


def measure_losses(
    run: Run,
    tokens: Int[np.ndarray, "sequences length"],
    variants: Sequence[Variant],
    *,
    maps: Maps | None = None,
    report: Callable[[int], None] = lambda layer: None,
) -> Losses:
    """The losses of every MoE layer at every k, and of all `variants`, on `tokens`; reads the checkpoint once.

    `run.model.routing` and `maps` say how the layers' own losses are weighed and corrected; layers without maps are
    not. A variant brings its own. `report` is called with the index of each decoder layer that is done. Not finite
    where hidden states overflow in `run.dtype`.
    """
    losses: list[np.ndarray] = []

    def observe(outputs: MoEOutputs) -> None:
        losses.append(_measure_layer(outputs, run, maps))

    chunks = forward(run, tokens, variants, observe=observe, report=report)
    by_layer = np.asarray(losses).reshape(len(run.model.layers), len(chunks), 2, -1, run.model.top_k)
    squares, relative = np.moveaxis(by_layer, 2, 0).reshape(2, len(run.model.layers), len(tokens), -1)
    ends = read_tensors(run.checkpoint, run.decoder.ends._replace(embedding=()))
    parts = [_measure_divergence(run, ends, states, len(variants)) for states in chunks]
    return Losses(squares, relative, np.concatenate(parts, axis=1))


def forward(
    run: Run,
    tokens: Int[np.ndarray, "sequences length"],
    variants: Sequence[Variant] = (),
    *,
    observe: Callable[[MoEOutputs], None] = lambda outputs: None,
    report: Callable[[int], None] = lambda layer: None,
) -> list[dict[int, Kept]]:
    """Hidden states after the last layer, a dict for each chunk of sequences: variant index -> states.

    The unreduced model has the index `MODEL`, -1; a variant that is the same as the model has no states of its own.
    `observe` is called with the outputs of each MoE layer of the model, for one chunk after the other.
    """
    plan = _plan(run, tokens, variants)
    ends = read_tensors(run.checkpoint, run.decoder.ends._replace(norm=(), head=()))
    chunks: list[dict[int, Any]] = [
        {MODEL: plan.keep(embed(run.decoder, ends, chunk, dtype=run.dtype))}
        for chunk in np.split(np.asarray(tokens, np.int32), len(tokens) // plan.chunk)
    ]
    del ends
    for layer, weights in stream_blocks(run.checkpoint, run.model, run.decoder):
        if weights.moe is not None:  # dequantised once
            weights = weights._replace(moe=weights.moe._replace(experts=tuple(weights.moe.experts)))
        for states in chunks:
            outputs = _advance(run, plan, variants, layer, weights, states)
            if outputs is not None:
                observe(outputs)
        report(layer)
    return chunks


def _plan(run: Run, tokens: Int[np.ndarray, "sequences length"], variants: Sequence[Variant]) -> _Plan:
    full, (sequences, length) = run.model.top_k, tokens.shape
    branches = tuple(next((n for n, k in enumerate(variant.top_k) if k < full), None) for variant in variants)
    limit = _limit_tokens(run)
    chunk = _divide(sequences, limit // length)
    keep = _choose_storage(run, tokens.size * (1 + sum(branch is not None for branch in branches)))
    return _Plan(chunk, max(limit // (chunk * length), 1), branches, keep)


def _advance(
    run: Run, plan: _Plan, variants: Sequence[Variant], layer: int, weights: BlockWeights, states: dict[int, Any]
) -> MoEOutputs | None:
    """The model's own outputs in a layer, if it is a MoE layer; takes `states` through it.

    States are replaced one by one, so that never two copies of all are in memory. Variants that branch off in this
    layer share the model's input and expert outputs, and mix them with a k of their own.
    """
    full, is_moe = run.model.top_k, weights.moe is not None
    place = run.model.layers.index(layer) if is_moe else None
    step = partial(_step, run, layer, weights)

    def list_mixings(some: Sequence[Variant]) -> list[_Mixing]:
        return [
            _Mixing(k, variant.exponent, _stack(layer, [k], variant.maps, full))
            for variant in some
            for k in [variant.top_k[place] if is_moe else full]
        ]

    reduced = [number for number in states if number != MODEL]
    branching = [number for number, branch in enumerate(plan.branches) if is_moe and branch == place]
    model = Variant((full,) * len(run.model.layers))
    hidden, outputs = step(states[MODEL], list_mixings([model, *(variants[number] for number in branching)]))
    for group in _group(reduced, variants, plan.together):
        top_k = [variants[number].top_k[place] if is_moe else full for number in group]
        top_k += top_k[-1:] * (plan.together - len(group))  # one shape, one compilation
        joined = [states[number] for number in group]
        joined = jnp.concatenate([*joined, *joined[-1:] * (plan.together - len(group))])
        k = np.repeat(np.asarray(top_k, np.int32), joined.shape[1] * (len(joined) // plan.together))[:, None]
        first = variants[group[0]]
        [moved], _ = step(joined, [_Mixing(k, first.exponent, _stack(layer, top_k, first.maps, full))])
        states |= zip(group, map(plan.keep, jnp.split(moved, plan.together)), strict=False)
    states |= zip([MODEL, *branching], map(plan.keep, hidden), strict=True)
    return outputs


def _stack(layer: int, top_k: Sequence[int], maps: Maps | None, full: int) -> Correction | None:
    """The corrections of a layer at each of `top_k`; None where there are none."""
    if maps is None or all(k == full for k in top_k):
        return None
    some = next(maps[layer, k] for k in top_k if k < full)
    rows = [maps[layer, k] if k < full else tuple(map(np.zeros_like, some)) for k in top_k]
    return Correction(*(jnp.asarray(np.stack(arrays), jnp.float32) for arrays in zip(*rows, strict=True)))


def _step(
    run: Run, layer: int, weights: BlockWeights, hidden: Kept, mixings: Sequence[_Mixing]
) -> tuple[list[Hidden], MoEOutputs | None]:
    """Hidden states after a layer, for each of `mixings`."""
    block, model, moe = run.decoder.blocks[layer], run.model, weights.moe
    hidden, x = attend(block, weights, jnp.asarray(hidden))
    if moe is None:
        return [finish(block, weights, hidden, x, None)] * len(mixings), None
    plain = model.routing._replace(exponent=None)
    choice = route(x, moe.router, moe.bias, routing=plain, top_k=model.top_k)
    outputs = compute_outputs(x, choice, moe.experts, routing=plain, activation=model.activation)
    results = []
    for mixing in mixings:
        k = jnp.asarray(mixing.k, jnp.int32)
        mixed = mix(outputs, choice.scores, k, routing=plain._replace(exponent=mixing.exponent))
        if mixing.correction is not None:
            mixed = mixed + correct(choice, k, mixing.correction, routing=plain)
        results.append(finish(block, weights, hidden, x, mixed))
    return results, MoEOutputs(layer, x, outputs, choice, hidden)


def _measure_layer(outputs: MoEOutputs, run: Run, maps: Maps | None) -> Float64[np.ndarray, "2 chunk K"]:
    layer, top_k, routing = outputs.layer, run.model.top_k, run.model.routing
    if maps is None or (layer, 1) not in maps:
        distances = squared_distances(outputs.outputs, outputs.choice.scores, routing=routing)
    else:
        correction = _stack(layer, range(1, top_k), maps, top_k)
        distances = corrected_distances(outputs.outputs, outputs.choice, correction, routing=routing)
    return np.asarray(_average(distances, outputs.hidden), np.float64)


@jax.jit
def _average(distances: Float[Array, "tokens K"], hidden: Hidden) -> Float[Array, "2 chunk K"]:
    # The stream of a token that the model never saw may be all zero; nothing is relative to that.
    size = jnp.square(hidden.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    distances = distances.reshape(*hidden.shape[:2], -1)
    relative = jnp.where(size > 0, distances / jnp.where(size > 0, size, 1.0), 0.0)
    return jnp.stack([distances.mean(axis=1), relative.mean(axis=1)])


def _measure_divergence(
    run: Run, ends: EndWeights, states: dict[int, Kept], count: int
) -> Float64[np.ndarray, "variants chunk"]:
    """The KL divergence of each of `count` variants from the model; 0 for one that is the model itself."""
    sequences, length, hidden = states[MODEL].shape
    divergence = np.zeros((count, sequences * length))
    for some in split_tokens(sequences * length, ends):
        model = read_log_probabilities(run.decoder, ends, jnp.asarray(states[MODEL]).reshape(-1, hidden)[some])
        for number in states.keys() - {MODEL}:
            reduced = jnp.asarray(states[number]).reshape(-1, hidden)[some]
            divergence[number, some] = _sum_divergence(model, read_log_probabilities(run.decoder, ends, reduced))
    return divergence.reshape(count, sequences, length).mean(axis=2)


def split_tokens(count: int, ends: EndWeights) -> Iterator[slice]:
    """Equal slices of `count` tokens whose logits take at most `LOGIT_BYTES`."""
    size = _divide(count, LOGIT_BYTES // (4 * ends.head.weight.shape[0]))
    return (slice(start, start + size) for start in range(0, count, size))


def read_log_probabilities(
    decoder: Decoder, ends: EndWeights, hidden: Float[Array, "tokens hidden"]
) -> Float[Array, "tokens vocabulary"]:
    """Log-probabilities of the next token, float32."""
    return jax.nn.log_softmax(read_logits(decoder, ends, hidden), axis=-1)


@jax.jit
def _sum_divergence(
    model: Float[Array, "tokens vocabulary"], variant: Float[Array, "tokens vocabulary"]
) -> Float[Array, " tokens"]:
    return (jnp.exp(model) * (model - variant)).sum(axis=-1)


def _limit_tokens(run: Run) -> int:
    """The tokens whose expert outputs are computed at once."""
    memory = jax.local_devices()[0].memory_stats()
    space = PASS_SHARE * memory["bytes_limit"] if memory else PASS_BYTES
    return int(space // (run.model.top_k * run.model.hidden_size * jnp.dtype(run.dtype).itemsize))


def _choose_storage(run: Run, tokens: int) -> Callable[[Hidden], Any]:
    """A function that moves hidden states to where they wait for the next layer: the device, or host memory.

    `tokens` counts them over all variants.
    """
    memory, size = jax.local_devices()[0].memory_stats(), check_room(run, tokens)
    return (lambda hidden: hidden) if memory is None or size <= HIDDEN_SHARE * memory["bytes_limit"] else np.asarray


def check_room(run: Run, tokens: int) -> int:
    """Bytes of the hidden states of so many tokens, over all variants; InputError for more than the host has."""
    size = tokens * run.model.hidden_size * jnp.dtype(run.dtype).itemsize
    check_memory("hidden states under all changes of k", size, "lower --samples, or take --layers in parts")
    return size


def _group(numbers: Sequence[int], variants: Sequence[Variant], size: int) -> Iterator[list[int]]:
    """Groups of at most `size` variants that have the same exponent and maps, as lists of their indices."""
    kinds = {number: (variants[number].exponent, id(variants[number].maps)) for number in numbers}
    for kind in dict.fromkeys(kinds.values()):
        alike = [number for number in numbers if kinds[number] == kind]
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def _divide(count: int, most: int) -> int:
    """The largest divisor of `count` up to `most`, at least 1."""
    return next(size for size in range(max(min(count, most), 1), 0, -1) if count % size == 0)
