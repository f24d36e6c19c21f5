"""How far a model's own predictions move when layers have fewer experts: tokens carried through it, layer by layer.

Many ways to run the model go through a layer while its weights are on the device. Those that agree with the model up to
a layer share its hidden states up to there, and what differs there is mixed from one pass over the experts.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int, Int32

from lexi_search.checkpoint.reader import Checkpoint
from lexi_search.errors import InputError
from lexi_search.layers.decoder import Decoder, attend, embed, finish, read_logits
from lexi_search.layers.moe import compute_outputs, mix, squared_distances
from lexi_search.layers.routing import route
from lexi_search.models.decoder_stack import BlockWeights, EndWeights
from lexi_search.models.loading import read_tensors, stream_blocks
from lexi_search.models.model import Model

# Shares of a device's memory: expert outputs of one pass, hidden states of all variants. Where it is not told, bytes.
PASS_SHARE, PASS_BYTES, HIDDEN_SHARE = 1 / 16, 16 << 20, 1 / 4
LOGIT_BYTES = 256 << 20  # of float32 logits at a time
MODEL = -1  # the number of the way that is the model itself

Hidden = Float[Array, "sequences length hidden"]


class Variant(NamedTuple):
    """One way to run the model: the top-k of each MoE layer in order, and a gate exponent or None (see `Routing`)."""

    top_k: tuple[int, ...]
    exponent: float | None = None


class Movement(NamedTuple):
    """Means over the tokens of each sequence, for k = 1..K, float64.

    `squares` of ||y_k - y_K||^2 in each MoE layer, `relative` of the same over ||h||^2, where h is the residual stream
    that the layer's output is added to. `divergence` of each variant's next-token distribution from the model's own,
    Kullback-Leibler, in nats.
    """

    squares: Float64[np.ndarray, "layers sequences K"]
    relative: Float64[np.ndarray, "layers sequences K"]
    divergence: Float64[np.ndarray, "variants sequences"]


class Run(NamedTuple):
    """A checkpoint and how tokens are carried through it: what all passes have in common."""

    checkpoint: Checkpoint
    model: Model
    decoder: Decoder
    dtype: str


class Mixture(NamedTuple):
    """A MoE layer on some tokens: what goes in, each token's K expert outputs and scores, and the residual stream."""

    layer: int  # of the decoder
    x: Float[Array, "tokens hidden"]
    outputs: Float[Array, "tokens K hidden"]
    scores: Float[Array, "tokens K"]
    hidden: Hidden


def measure_movement(
    run: Run,
    tokens: Int[np.ndarray, "sequences length"],
    variants: Sequence[Variant],
    *,
    report: Callable[[int], None] = lambda layer: None,
) -> Movement:
    """Carry `tokens` through the model and all `variants` of it, reading the checkpoint once.

    `run.model.routing` says how the layers' own losses are weighed; a variant brings an exponent of its own. `report`
    hears of each decoder layer that is done. Not finite where hidden states overflow in `run.dtype`.
    """
    losses: list[np.ndarray] = []

    def observe(mixture: Mixture) -> None:
        losses.append(_measure_layer(mixture, run))

    ways = carry(run, tokens, variants, observe=observe, report=report)
    by_layer = np.asarray(losses).reshape(len(run.model.layers), len(ways), 2, -1, run.model.top_k)
    squares, relative = np.moveaxis(by_layer, 2, 0).reshape(2, len(run.model.layers), len(tokens), -1)
    ends = read_tensors(run.checkpoint, run.decoder.ends._replace(embedding=()))
    parts = [_diverge(run, ends, way, len(variants)) for way in ways]
    return Movement(squares, relative, np.concatenate(parts, axis=1))


def carry(
    run: Run,
    tokens: Int[np.ndarray, "sequences length"],
    variants: Sequence[Variant] = (),
    *,
    observe: Callable[[Mixture], None] = lambda mixture: None,
    report: Callable[[int], None] = lambda layer: None,
) -> list[dict[int, Hidden]]:
    """The hidden states after the last layer, for some sequences after others: way -> states.

    A way is `MODEL` or the index of a variant; a variant that is the model itself is not there. `observe` sees each MoE
    layer of the model for those sequences in turn.
    """
    model, whole = run.model, run.model.top_k
    starts = [next((n for n, k in enumerate(v.top_k) if k < whole), None) for v in variants]
    limit = _limit_tokens(run)
    size = _divide(len(tokens), limit // tokens.shape[1])
    together = max(limit // (size * tokens.shape[1]), 1)
    keep = _choose_storage(run, tokens.size * (1 + sum(start is not None for start in starts)))
    ends = read_tensors(run.checkpoint, run.decoder.ends._replace(norm=(), head=()))
    ways: list[dict[int, Any]] = [
        {MODEL: keep(embed(run.decoder, ends, part, dtype=run.dtype))}
        for part in np.split(np.asarray(tokens, np.int32), len(tokens) // size)
    ]
    del ends
    place = 0  # among the MoE layers
    for layer, weights in stream_blocks(run.checkpoint, model, run.decoder):
        moe = weights.moe
        if moe is not None:  # dequantised once
            weights = weights._replace(moe=moe._replace(experts=tuple(moe.experts)))
        step = partial(_pass, run, layer, weights)
        for way in ways:
            others = [number for number in way if number != MODEL]
            starting = [number for number, start in enumerate(starts) if moe is not None and start == place]
            first = [Variant((whole,) * len(model.layers)), *(variants[number] for number in starting)]
            hidden, mixture = step(way[MODEL], [(v.top_k[place] if moe else whole, v.exponent) for v in first])
            for group in _group(others, variants, together):
                ks = [variants[number].top_k[place] if moe else whole for number in group]
                ks += ks[-1:] * (together - len(group))  # one shape, one compilation
                states = [way[number] for number in group]
                states = jnp.concatenate([*states, *states[-1:] * (together - len(group))])
                k = np.repeat(np.asarray(ks, np.int32), size * tokens.shape[1])[:, None]
                [moved], _ = step(states, [(k, variants[group[0]].exponent)])
                way |= zip(group, map(keep, jnp.split(moved, together)), strict=False)
            way |= zip([MODEL, *starting], map(keep, hidden), strict=True)
            if mixture is not None:
                observe(mixture)
        place += moe is not None
        report(layer)
    return ways


def _pass(
    run: Run,
    layer: int,
    weights: BlockWeights,
    hidden: Hidden,
    mixings: Sequence[tuple[int | Int32[np.ndarray, "tokens 1"], float | None]],
) -> tuple[list[Hidden], Mixture | None]:
    """The hidden states after a layer for each of `mixings`: a k, of all tokens or of each, and a gate exponent."""
    block, model, moe = run.decoder.blocks[layer], run.model, weights.moe
    hidden, x = attend(block, weights, jnp.asarray(hidden))
    if moe is None:
        return [finish(block, weights, hidden, x, None)] * len(mixings), None
    plain = model.routing._replace(exponent=None)
    choice = route(x, moe.router, moe.bias, routing=plain, top_k=model.top_k)
    outputs = compute_outputs(x, choice, moe.experts, routing=plain, activation=model.activation)
    results = []
    for k, exponent in mixings:
        mixed = mix(outputs, choice.scores, jnp.asarray(k, jnp.int32), routing=plain._replace(exponent=exponent))
        results.append(finish(block, weights, hidden, x, mixed))
    return results, Mixture(layer, x, outputs, choice.scores, hidden)


def _measure_layer(mixture: Mixture, run: Run) -> Float64[np.ndarray, "2 sequences K"]:
    distances = squared_distances(mixture.outputs, mixture.scores, routing=run.model.routing)
    return np.asarray(_average(distances, mixture.hidden), np.float64)


@jax.jit
def _average(distances: Float[Array, "tokens K"], hidden: Hidden) -> Float[Array, "2 sequences K"]:
    # A token that the model never saw may be all zero, and so is then what the layer makes of it.
    size = jnp.maximum(jnp.square(hidden.astype(jnp.float32)).sum(axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    distances = distances.reshape(*hidden.shape[:2], -1)
    return jnp.stack([distances.mean(axis=1), (distances / size).mean(axis=1)])


def _diverge(
    run: Run, ends: EndWeights, way: dict[int, Hidden], count: int
) -> Float64[np.ndarray, "variants sequences"]:
    """The divergence of each variant from the model; 0 for one that is the model itself."""
    sequences, length, hidden = way[MODEL].shape
    divergence = np.zeros((count, sequences * length))
    for some in split_tokens(sequences * length, ends):
        own = read_log_probabilities(run.decoder, ends, jnp.asarray(way[MODEL]).reshape(-1, hidden)[some])
        for number in way.keys() - {MODEL}:
            states = jnp.asarray(way[number]).reshape(-1, hidden)[some]
            divergence[number, some] = _sum_divergence(own, read_log_probabilities(run.decoder, ends, states))
    return divergence.reshape(count, sequences, length).mean(axis=2)


def split_tokens(count: int, ends: EndWeights) -> Iterator[slice]:
    """Equal slices of `count` tokens whose logits take at most `LOGIT_BYTES`."""
    size = _divide(count, LOGIT_BYTES // (4 * ends.head.weight.shape[0]))
    return (slice(start, start + size) for start in range(0, count, size))


def read_log_probabilities(
    decoder: Decoder, ends: EndWeights, hidden: Float[Array, "tokens hidden"]
) -> Float[Array, "tokens vocabulary"]:
    """Logarithms of the next token's probabilities, float32."""
    return jax.nn.log_softmax(read_logits(decoder, ends, hidden), axis=-1)


@jax.jit
def _sum_divergence(
    own: Float[Array, "tokens vocabulary"], other: Float[Array, "tokens vocabulary"]
) -> Float[Array, " tokens"]:
    return (jnp.exp(own) * (own - other)).sum(axis=-1)


def _limit_tokens(run: Run) -> int:
    """Tokens of one pass."""
    memory = jax.local_devices()[0].memory_stats()
    space = PASS_SHARE * memory["bytes_limit"] if memory else PASS_BYTES
    return int(space // (run.model.top_k * run.model.hidden_size * jnp.dtype(run.dtype).itemsize))


def _choose_storage(run: Run, tokens: int) -> Callable[[Hidden], Any]:
    """Where hidden states of so many tokens wait for the next layer: on the device, or in host memory."""
    memory, size = jax.local_devices()[0].memory_stats(), check_room(run, tokens)
    return (lambda hidden: hidden) if memory is None or size <= HIDDEN_SHARE * memory["bytes_limit"] else np.asarray


def check_room(run: Run, tokens: int) -> int:
    """The bytes of the hidden states of so many tokens, of all ways together; InputError for more than the host has."""
    size = tokens * run.model.hidden_size * jnp.dtype(run.dtype).itemsize
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > host:
        raise InputError(
            f"hidden states under all changes of k take {size / 1e9:.1f} GB, this machine has {host / 1e9:.1f} GB; "
            "lower --samples, or take --layers in parts"
        )
    return size


def _group(numbers: Sequence[int], variants: Sequence[Variant], size: int) -> Iterator[list[int]]:
    """Variants of one exponent each, `size` at a time."""
    for exponent in dict.fromkeys(variants[number].exponent for number in numbers):
        own = [number for number in numbers if variants[number].exponent == exponent]
        yield from (own[start : start + size] for start in range(0, len(own), size))


def _divide(count: int, most: int) -> int:
    """The largest divisor of `count` up to `most`, at least 1."""
    return next(size for size in range(max(min(count, most), 1), 0, -1) if count % size == 0)
