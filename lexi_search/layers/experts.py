"""The outputs of every token's chosen experts: rows are sorted by expert, and each expert takes its own in chunks."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lexi_search.layers.ffn import apply_ffn
from lexi_search.layers.spec import Activation
from lexi_search.layers.weights import Experts, ExpertWeights, LayerWeights, Scales

# Rows in one expert product. Loads are cut into these sizes, so that a few compiled programs serve every expert of
# every layer: few launches for a large load, little padding for a small one.
CHUNK_SIZES = tuple(2**n for n in range(6, 16))
MAX_PADDING = 1 / 8  # of an expert's load, unless that is below the smallest size


def expert_outputs(
    x: Float[Array, "tokens hidden"],
    experts: Int[Array, "tokens K"],
    weights: Experts,
    *,
    activation: Activation,
) -> Float[Array, "tokens K hidden"]:
    """The output of each token's K chosen experts, in `x`'s element type.

    (token, rank) pairs are sorted by expert, and each expert multiplies its own rows in chunks of `CHUNK_SIZES`, driven
    from Python. A masked dense product, which `jax.lax.ragged_dot` becomes on a GPU, would do num_experts / K times the
    work.
    """
    pairs, loads = _sort_by_expert(experts, num_experts=len(weights))
    loads = np.asarray(loads)
    result, start = jnp.zeros((*experts.shape, x.shape[1]), x.dtype), 0
    for expert in np.flatnonzero(loads).tolist():  # one without tokens may not even have been read
        expert_weights = weights[expert]
        for size, used in cut_into_chunks(int(loads[expert])):
            result = _apply_expert(
                result,
                x,
                pairs,
                np.int32(start),
                expert_weights,
                size=size,
                activation=activation,
            )
            start += used
    return result


class _ScaledExperts(Sequence[ExpertWeights]):
    """Experts with the factors of their inputs and outputs in their matrices, multiplied at each access."""

    def __init__(self, experts: Any, scales: Scales):
        self._experts, self._scales = experts, scales

    def __len__(self) -> int:
        return len(self._experts)

    def __getitem__(self, expert: int) -> ExpertWeights:
        return _scale_expert(self._experts[expert], self._scales.experts, self._scales.outputs, np.int32(expert))

    are_plain = False  # an access computes

    def put(self, target: Any) -> "_ScaledExperts":
        """These experts on another device or in host memory."""
        return _ScaledExperts(self._experts.put(target), jax.device_put(self._scales, target))


class _SharingExperts(Sequence[ExpertWeights]):
    """Experts with fields that all of them have in common."""

    def __init__(self, experts: Any, common: Mapping[str, Array]):
        self._experts, self._common = experts, common

    def __len__(self) -> int:
        return len(self._experts)

    def __getitem__(self, expert: int) -> ExpertWeights:
        return self._experts[expert]._replace(**self._common)

    are_plain = False  # no kernel multiplies them

    def put(self, target: Any) -> "_SharingExperts":
        """These experts on another device or in host memory."""
        return _SharingExperts(self._experts.put(target), jax.device_put(self._common, target))


def limit_layer(weights: LayerWeights, limit: float) -> LayerWeights:
    """The layer with a `limit` of its experts."""
    return weights._replace(experts=_SharingExperts(weights.experts, {"limit": jnp.asarray(limit, jnp.float32)}))


def project_layer(
    weights: LayerWeights, input: Float[Array, "latent hidden"], output: Float[Array, "hidden latent"]
) -> LayerWeights:
    """The layer with the maps into the latent space of its experts, and back."""
    return weights._replace(experts=_SharingExperts(weights.experts, {"input": input, "output": output}))


def scale_layer(weights: LayerWeights, scales: Scales) -> LayerWeights:
    """The layer with its factors multiplied into the weights; the router is then float32."""
    width = weights.router.shape[1]
    gain = scales.router.astype(jnp.float32) * jnp.float32(width**-0.5)
    router = weights.router.astype(jnp.float32) * gain[None, :]
    return weights._replace(router=router, experts=_ScaledExperts(weights.experts, scales))


@jax.jit
def _scale_expert(
    weights: ExpertWeights, gain: Float[Array, " hidden"], factors: Float[Array, " experts"], expert: Int[Array, ""]
) -> ExpertWeights:
    def scale(matrix: Array | None, factor: Array) -> Array | None:
        return None if matrix is None else (matrix.astype(jnp.float32) * factor).astype(matrix.dtype)

    gain, factor = gain.astype(jnp.float32)[None, :], factors.astype(jnp.float32)[expert]
    down_bias = scale(weights.down_bias, factor)
    gate, up, down = scale(weights.gate, gain), scale(weights.up, gain), scale(weights.down, factor)
    return weights._replace(gate=gate, up=up, down=down, down_bias=down_bias)


def cut_into_chunks(load: int) -> list[tuple[int, int]]:
    """(chunk size, rows used) pairs that cover `load` rows; only the last may be padded."""
    chunks, left = [], load
    while left > 0:
        covering = next((size for size in CHUNK_SIZES if size >= left), None)
        fitting = max((size for size in CHUNK_SIZES if size <= left), default=None)
        padded = covering is not None and (fitting is None or covering - left <= MAX_PADDING * load)
        size = covering if padded else fitting
        chunks.append((size, min(size, left)))
        left -= size
    return chunks


@partial(jax.jit, static_argnames="num_experts")
def _sort_by_expert(
    experts: Int[Array, "tokens K"], *, num_experts: int
) -> tuple[Int[Array, " padded"], Int[Array, " experts"]]:
    """(token, rank) pairs, numbered token * K + rank, in order of their experts; and the load of each expert.

    The pairs are followed by numbers past the last pair, as padding for the largest chunk.
    """
    pairs = _argsort(experts.reshape(-1), bound=num_experts)
    beyond = jnp.arange(pairs.size, pairs.size + CHUNK_SIZES[-1], dtype=pairs.dtype)
    return jnp.concatenate([pairs, beyond]), jnp.bincount(experts.reshape(-1), length=num_experts)


def _argsort(values: Int[Array, " count"], *, bound: int) -> Int[Array, " count"]:
    """The stable order of values from 0 up to `bound`. Where a value and its place fit into one number of 32 bits,
    these are sorted: on a CPU that takes a quarter of the time."""
    if bound * values.size > 2**32:
        return jnp.argsort(values, stable=True)
    places = jnp.arange(values.size, dtype=jnp.uint32)
    ordered = jnp.sort(values.astype(jnp.uint32) * jnp.uint32(values.size) + places)
    return (ordered % jnp.uint32(values.size)).astype(jnp.int32)


@partial(jax.jit, static_argnames=("size", "activation"), donate_argnums=0)
def _apply_expert(
    result: Float[Array, "tokens K hidden"],
    x: Float[Array, "tokens hidden"],
    pairs: Int[Array, " padded"],
    start: Int[Array, ""],
    weights: ExpertWeights,
    *,
    size: int,
    activation: Activation,
) -> Float[Array, "tokens K hidden"]:
    """Write one expert's outputs for the `size` pairs from `start` on.

    A padded chunk extends into the pairs of the next expert. Experts come in ascending order, so the outputs that it
    writes there are overwritten by the right expert; outputs past the last pair are dropped.
    """
    chosen = jax.lax.dynamic_slice_in_dim(pairs, start, size)
    chunk = x.at[chosen // result.shape[1]].get(mode="clip")
    outputs = apply_ffn(chunk, weights, activation=activation)
    rows = result.reshape(-1, result.shape[2]).at[chosen].set(outputs, mode="drop", unique_indices=True)
    return rows.reshape(result.shape)
