"""The losses of layers at every k, and of variants of the whole model, on some text."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int

from lexi_search.artifacts.compensation import Maps
from lexi_search.layers.decoder import read_log_probabilities
from lexi_search.layers.moe import corrected_distances, squared_distances
from lexi_search.layers.weights import EndWeights, find_memory
from lexi_search.profiling.forward.layer import MoEOutputs, stack_corrections
from lexi_search.profiling.forward.passes import forward, spread
from lexi_search.profiling.forward.variants import MODEL, Hidden, Kept, Run, Variant, divide, find_leaders

LOGIT_BYTES, LOGIT_SHARE = 256 << 20, 1 / 64  # of float32 logits at a time; there are several arrays of them


class Losses(NamedTuple):
    """Means over the tokens of each sequence, for k = 1..K, float64.

    `squares` of ||y_k - y_K||^2 in each MoE layer, `relative` of the same over ||h||^2, where h is the residual stream
    that the layer's output is added to; of several, the mean of their squares. `divergence` is the KL divergence of
    each variant's next-token distribution from the unreduced model's, in nats.
    """

    squares: Float64[np.ndarray, "layers sequences K"]
    relative: Float64[np.ndarray, "layers sequences K"]
    divergence: Float64[np.ndarray, "variants sequences"]


def measure_losses(
    run: Run,
    tokens: Int[np.ndarray, "sequences length"],
    variants: Sequence[Variant],
    *,
    maps: Maps | None = None,
    apart: int = 0,
    report: Callable[[int], None] = lambda layer: None,
) -> Losses:
    """The losses of every MoE layer at every k, and of all `variants`, on `tokens`; reads the checkpoint once.

    `run.model.routing` and `maps` say how the layers' own losses are weighed and corrected; layers without maps are
    not. A variant brings its own; `apart` is that of `forward`. `report` is called with the index of each decoder layer
    that is done. Not finite where hidden states overflow in `run.dtype`.
    """
    losses: dict[int, dict[int, Array]] = {layer: {} for layer in run.model.layers}  # by the first of the sequences

    def observe(first: int, outputs: MoEOutputs) -> None:
        losses[outputs.layer][first] = _measure_layer(outputs, run, maps)

    chunks = forward(run, tokens, variants, apart=apart, observe=observe, report=report)
    in_order = [[own[first] for first in sorted(own)] for own in losses.values()]
    found = np.asarray(jax.device_get(in_order), np.float64)
    by_layer = found.reshape(len(run.model.layers), len(chunks), 2, -1, run.model.top_k)
    squares, relative = np.moveaxis(by_layer, 2, 0).reshape(2, len(run.model.layers), len(tokens), -1)
    parts = spread(run, chunks, partial(_measure_divergence, run, count=len(variants)))
    divergence = np.concatenate(parts, axis=1)
    leaders = find_leaders(variants, layers=len(run.model.layers), top_k=run.model.top_k)[-1]
    shared = [number if leader == MODEL else leader for number, leader in enumerate(leaders)]
    return Losses(squares, relative, divergence[shared])


def _measure_layer(outputs: MoEOutputs, run: Run, maps: Maps | None) -> Float[Array, "2 chunk K"]:
    # On the device still: the pass does not wait for them.
    layer, top_k, routing = outputs.layer, run.model.top_k, run.model.routing
    if maps is None or (layer, 1) not in maps:
        distances = squared_distances(outputs.outputs, outputs.choice.scores, routing=routing)
    else:
        [device] = outputs.x.devices()
        correction = stack_corrections(layer, range(1, top_k), [maps] * (top_k - 1), top_k, device=device)
        distances = corrected_distances(outputs.outputs, outputs.choice, correction, routing=routing)
    return _average(distances, outputs.hidden)


@jax.jit
def _average(distances: Float[Array, "tokens K"], hidden: Hidden) -> Float[Array, "2 chunk K"]:
    # The stream of a token that the model never saw may be all zero; nothing is relative to that.
    size = jnp.square(hidden.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    if size.ndim == 4:  # of several streams
        size = size.mean(axis=2)
    distances = distances.reshape(*hidden.shape[:2], -1)
    relative = jnp.where(size > 0, distances / jnp.where(size > 0, size, 1.0), 0.0)
    return jnp.stack([distances.mean(axis=1), relative.mean(axis=1)])


def _measure_divergence(
    run: Run, ends: EndWeights, states: dict[int, Kept], *, count: int
) -> Float64[np.ndarray, "variants chunk"]:
    """The KL divergence of each of `count` variants from the model; 0 for one without states of its own."""
    sequences, length, *rest = states[MODEL].shape
    divergence = np.zeros((count, sequences * length))
    [device] = ends.head.weight.devices()

    def read(number: int, some: slice) -> Array:
        hidden = jax.device_put(states[number].reshape(-1, *rest)[some], device)
        return read_log_probabilities(run.decoder, ends, hidden)

    found: list[tuple[int, slice, Array]] = []
    for some in split_tokens(sequences * length, ends):
        model = read(MODEL, some)
        found += [(number, some, _sum_divergence(model, read(number, some))) for number in states.keys() - {MODEL}]
    for number, some, values in found:
        divergence[number, some] = values
    return divergence.reshape(count, sequences, length).mean(axis=2)


def split_tokens(count: int, ends: EndWeights) -> Iterator[slice]:
    """Equal slices of `count` tokens, whose logits take at most `LOGIT_BYTES` or `LOGIT_SHARE` of a device's memory."""
    memory = find_memory()
    space = max(LOGIT_BYTES, int(LOGIT_SHARE * memory)) if memory else LOGIT_BYTES
    size = divide(count, space // (4 * ends.head.weight.shape[0]))
    return (slice(start, start + size) for start in range(0, count, size))


@jax.jit
def _sum_divergence(
    model: Float[Array, "tokens vocabulary"], variant: Float[Array, "tokens vocabulary"]
) -> Float[Array, " tokens"]:
    return (jnp.exp(model) * (model - variant)).sum(axis=-1)
