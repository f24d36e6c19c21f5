"""The mathematics of one MoE layer in JAX: the outputs at every k from one pass over the experts of the largest.

The experts of top-k are the first k of those of top-K sorted by selection score. So each token's K expert outputs
y_1..y_K are computed once, and every k only mixes them differently: Y_k = sum_j c_k[j] y_j. Distances between outputs
are read off the tokens' K x K Gram matrices G, ||Y_k - Y_K||^2 = (c_k - c_K)^T G (c_k - c_K), which also avoids the
rounding of subtracting two nearly equal outputs. Shared experts add the same to every Y_k and cancel.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lexi_search.architectures import Routing

ACTIVATIONS: Mapping[str, Any] = MappingProxyType(
    {
        "silu": jax.nn.silu,
        "swish": jax.nn.silu,
        "gelu": partial(jax.nn.gelu, approximate=False),
        "gelu_new": partial(jax.nn.gelu, approximate=True),
        "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
        "relu": jax.nn.relu,
    }
)
# Rows in one expert product. Loads are cut into these sizes, so that a handful of compiled programs serves every expert
# of every layer: few launches for a large load, little padding for a small one.
CHUNK_SIZES = tuple(2**n for n in range(6, 16))
MAX_PADDING = 1 / 8  # of an expert's load, unless that is below the smallest size


class ExpertWeights(NamedTuple):
    """One expert, in the checkpoint's own element type: y = down @ (act(gate @ x) * (up @ x))."""

    gate: Float[Array, "width hidden"]
    up: Float[Array, "width hidden"]
    down: Float[Array, "hidden width"]


class LayerWeights(NamedTuple):
    """One MoE layer: the router, the bias of its selection or None, and the experts."""

    router: Float[Array, "experts hidden"]
    bias: Float[Array, " experts"] | None
    experts: tuple[ExpertWeights, ...]


class Choice(NamedTuple):
    """Each token's K chosen experts in order of selection, and their unnormalised scores."""

    experts: Int[Array, "tokens K"]
    scores: Float[Array, "tokens K"]


@partial(jax.jit, static_argnames=("routing", "top_k"))
def route(
    x: Float[Array, "tokens hidden"],
    router: Float[Array, "experts hidden"],
    bias: Float[Array, " experts"] | None,
    *,
    routing: Routing,
    top_k: int,
) -> Choice:
    """Choose the `top_k` experts of every token, best first; logits and scores are float32 whatever `x` is."""
    logits = jnp.matmul(x.astype(jnp.float32), router.T.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    scores = jax.nn.softmax(logits, axis=-1) if routing.scoring == "softmax" else jax.nn.sigmoid(logits)
    keys = scores if bias is None else scores + bias.astype(jnp.float32)[None, :]
    if routing.num_groups > 1:
        keys = _keep_best_groups(keys, routing)
    _, experts = jax.lax.top_k(keys, top_k)
    return Choice(experts, jnp.take_along_axis(scores, experts, axis=-1))


def _keep_best_groups(keys: Float[Array, "tokens experts"], routing: Routing) -> Float[Array, "tokens experts"]:
    """Put -inf for the experts outside each token's `topk_groups` best groups (DeepSeek-V2, section 2.2.2)."""
    grouped = keys.reshape(keys.shape[0], routing.num_groups, -1)
    judges = 1 if routing.group_score == "max" else 2
    group_scores = jax.lax.top_k(grouped, judges)[0].sum(axis=-1)
    _, best = jax.lax.top_k(group_scores, routing.topk_groups)
    kept = jax.nn.one_hot(best, routing.num_groups, dtype=jnp.bool_).any(axis=1)
    return jnp.where(kept[:, :, None], grouped, -jnp.inf).reshape(keys.shape)


def mixing_weights(
    scores: Float[Array, "tokens K"], k: Int[Array, ""], *, routing: Routing
) -> Float[Array, "tokens K"]:
    """The weights c_k that mix the K expert outputs into the layer's output at `k` <= K; `k` may be traced."""
    kept = jnp.where(jnp.arange(scores.shape[-1])[None, :] < k, scores, 0.0)
    if routing.renormalize:
        kept = kept / (kept.sum(axis=-1, keepdims=True) + 1e-20)  # sigmoid scores may all underflow; DeepSeek's guard
    return kept * jnp.float32(routing.scale)


@partial(jax.jit, static_argnames="routing")
def squared_distances(
    outputs: Float[Array, "tokens K hidden"], scores: Float[Array, "tokens K"], *, routing: Routing
) -> Float[Array, "tokens K"]:
    """||y_k - y_K||^2 of every token for k = 1..K, from its Gram matrix; the last column is zero."""
    top_k = scores.shape[-1]
    gram = jnp.einsum(
        "tih,tjh->tij", outputs, outputs, precision=_precision(outputs), preferred_element_type=jnp.float32
    )
    weights = jax.vmap(lambda k: mixing_weights(scores, k, routing=routing), out_axes=1)(jnp.arange(1, top_k + 1))
    change = weights - weights[:, -1:, :]
    distances = jnp.einsum("tki,tij,tkj->tk", change, gram, change, precision=jax.lax.Precision.HIGHEST)
    # A quadratic form of a Gram matrix, and zero at k = K: only rounding could make it negative, or not quite zero.
    return jnp.maximum(distances, 0.0).at[:, -1].set(0.0)


@partial(jax.jit, static_argnames="routing")
def mix(
    outputs: Float[Array, "tokens K hidden"], scores: Float[Array, "tokens K"], k: Int[Array, ""], *, routing: Routing
) -> Float[Array, "tokens hidden"]:
    """The layer's output at `k`, without shared experts, float32."""
    weights = mixing_weights(scores, k, routing=routing)
    return jnp.einsum("tk,tkh->th", weights, outputs.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def expert_outputs(
    x: Float[Array, "tokens hidden"],
    experts: Int[Array, "tokens K"],
    weights: Sequence[ExpertWeights],
    *,
    activation: str,
) -> Float[Array, "tokens K hidden"]:
    """The output of each token's K chosen experts, in `x`'s element type.

    (token, rank) pairs are sorted by expert, and each expert multiplies its own rows in chunks of `CHUNK_SIZES`, driven
    from Python. A masked dense product, which `jax.lax.ragged_dot` becomes on a GPU, would do num_experts / K times the
    work.
    """
    pairs, loads = _sort_by_expert(experts, num_experts=len(weights))
    result, start = jnp.zeros((experts.size, x.shape[1]), x.dtype), 0
    for expert, load in zip(weights, np.asarray(loads).tolist(), strict=True):
        for size, used in cut_into_chunks(load):
            result = _apply_expert(
                result, x, pairs, np.int32(start), expert, size=size, top_k=experts.shape[1], activation=activation
            )
            start += used
    return result.reshape(*experts.shape, -1)


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

    Behind the pairs stand numbers past the last one, for the largest chunk to run into.
    """
    pairs = jnp.argsort(experts.reshape(-1), stable=True)
    beyond = jnp.arange(pairs.size, pairs.size + CHUNK_SIZES[-1], dtype=pairs.dtype)
    return jnp.concatenate([pairs, beyond]), jnp.bincount(experts.reshape(-1), length=num_experts)


@partial(jax.jit, static_argnames=("size", "top_k", "activation"), donate_argnums=0)
def _apply_expert(
    result: Float[Array, "rows hidden"],
    x: Float[Array, "tokens hidden"],
    pairs: Int[Array, " padded"],
    start: Int[Array, ""],
    weights: ExpertWeights,
    *,
    size: int,
    top_k: int,
    activation: str,
) -> Float[Array, "rows hidden"]:
    """Write one expert's outputs for the `size` pairs from `start` on.

    A padded chunk runs on into the pairs of the next expert. Experts come in ascending order, so what it writes there
    is overwritten by the expert that those pairs belong to; what it would write past the last pair is dropped.
    """
    chosen = jax.lax.dynamic_slice_in_dim(pairs, start, size)
    chunk = x.at[chosen // top_k].get(mode="clip")
    gate, up, down = (matrix.astype(chunk.dtype) for matrix in weights)
    gated = ACTIVATIONS[activation](_multiply(chunk, gate).astype(jnp.float32))
    hidden = gated * _multiply(chunk, up).astype(jnp.float32)
    outputs = _multiply(hidden.astype(chunk.dtype), down)
    return result.at[chosen].set(outputs, mode="drop", unique_indices=True)


def _multiply(x: Float[Array, "rows inner"], weight: Float[Array, "outer inner"]) -> Float[Array, "rows outer"]:
    """x @ weight.T in their own type, accumulated in float32; float32 operands are never rounded to TF32."""
    return jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())), precision=_precision(x))


def _precision(x: Array) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
