"""Causal attention in JAX for whole sequences, from a layer's normalised input to its output for the residual stream.

Norms, rotary embedding, softmax and sums of products are float32 whatever the type of the hidden states.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lexi_search.layers.ffn import find_precision
from lexi_search.layers.spec import Attention, GroupedAttention, LatentAttention, Norm, Rope
from lexi_search.layers.weights import Affine, GroupedWeights, LatentWeights

GATES = {"sigmoid": jax.nn.sigmoid, "softplus": jax.nn.softplus}
SCORE_BYTES = 64 << 20  # of attention scores at a time: some queries of one sequence, or several whole sequences
# Those of several sequences on a CPU, whose caches hold so many. Two sequences at least, where several may be: the
# program for one rounds otherwise.
CACHED_BYTES = 8 << 20


def attend(
    x: Float[Array, "sequences length hidden"], weights: GroupedWeights | LatentWeights, *, attention: Attention
) -> Float[Array, "sequences length hidden"]:
    """The attention layer's output for every position, each seeing itself and those before it, in `x`'s type."""
    project = _project_latent if isinstance(attention, LatentAttention) else _project_grouped
    queries, keys, values, *gates = project(x, weights, attention)
    sinks = None if weights.sinks is None else weights.sinks.reshape(queries.shape[2:4])
    chunk = attention.chunk if isinstance(attention, GroupedAttention) else None
    find_visible = partial(_find_visible, window=attention.window, chunk=chunk)
    mix = partial(attend_sequence, sinks=sinks, scale=attention.scale, find_visible=find_visible)
    sequence_bytes = 4 * attention.num_heads * x.shape[1] ** 2
    at_once = SCORE_BYTES // sequence_bytes
    if jax.default_backend() == "cpu":
        at_once = min(at_once, max(CACHED_BYTES // sequence_bytes, 2))
    outputs = map_rows(lambda sequence: mix(*sequence), (queries, keys, values), at_once=at_once)
    outputs = outputs.reshape(*x.shape[:2], -1)
    for gate in gates:
        outputs = outputs * jax.nn.sigmoid(gate.reshape(outputs.shape))
    if weights.gate is not None:
        gate = GATES[attention.gate](apply_affine(x, weights.gate).astype(jnp.float32)).astype(outputs.dtype)
        outputs = outputs * jnp.repeat(gate, outputs.shape[-1] // gate.shape[-1], axis=-1)
    return apply_affine(outputs, weights.o)


def apply_affine(x: Float[Array, "*rows inner"], weights: Affine) -> Float[Array, "*rows outer"]:
    """x @ weight.T + bias in `x`'s type."""
    matrix = weights.weight.astype(x.dtype)
    product = jnp.einsum("...i,oi->...o", x, matrix, precision=find_precision(x))
    return product if weights.bias is None else product + align(weights.bias.astype(x.dtype), product)


def normalise(x: Float[Array, "*rows width"], weights: Affine | None, *, norm: Norm) -> Float[Array, "*rows width"]:
    """The norm of every row in `x`'s type, computed in float32; without gains where there are no weights."""
    wide = x.astype(jnp.float32)
    if norm.centred:
        wide = wide - wide.mean(axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + norm.eps)
    if weights is None:
        return wide.astype(x.dtype)
    wide = wide * align(weights.weight.astype(jnp.float32) + jnp.float32(norm.offset), x)
    if weights.bias is not None:
        wide = wide + align(weights.bias.astype(jnp.float32), x)
    return wide.astype(x.dtype)


def align(vector: Float[Array, " width"], x: Float[Array, "*rows width"]) -> Float[Array, "*ones width"]:
    """`vector` with leading axes of 1, for broadcasting over the rows of `x`."""
    return vector.reshape((1,) * (x.ndim - 1) + (-1,))


def _project_grouped(
    x: Float[Array, "sequences length hidden"], weights: GroupedWeights, attention: GroupedAttention
) -> tuple[Float[Array, "sequences length kv_heads group head"], ...]:
    """Queries [.., kv_heads, heads / kv_heads, head_dim], keys and values [.., kv_heads, 1, head_dim].

    If attention is gated, also the gates, of the queries' shape.
    """
    kv_heads, group = attention.num_kv_heads, attention.num_heads // attention.num_kv_heads
    queries, keys, values = (
        apply_affine(x, part).reshape(*x.shape[:2], kv_heads, count, -1)
        for part, count in ((weights.q, group), (weights.k, 1), (weights.v, 1))
    )
    queries, *gates = jnp.split(queries, 2, axis=-1) if attention.gated else (queries,)
    gains = weights.q_norm, weights.k_norm
    queries, keys = (_prepare(part, gain, attention) for part, gain in zip((queries, keys), gains, strict=True))
    if attention.growth is not None:
        queries = queries * _grow(x.shape[1], *attention.growth).astype(x.dtype)[None, :, None, None, None]
    if attention.unit_values:
        values = normalise(values, None, norm=attention.norm)
    values = _clip(values, attention.clip) * jnp.asarray(attention.value_scale, x.dtype)
    return queries, keys, values, *gates


def _grow(length: int, share: float, period: float) -> Float[Array, " length"]:
    """The factors of queries by position (arXiv 2501.19399), which keep attention sharp in long sequences."""
    periods = jnp.floor((jnp.arange(length, dtype=jnp.float32) + 1) / period)
    return 1 + share * jnp.log1p(periods)


def _prepare(
    heads: Float[Array, "sequences length kv_heads group head"], gain: Affine | None, attention: GroupedAttention
) -> Float[Array, "sequences length kv_heads group head"]:
    """Queries or keys normalised, clipped and rotated, as attention scores need them."""
    normed = gain is not None or attention.unit
    if normed and not attention.norm_last:
        heads = _normalise_heads(heads, gain, attention.norm)
    heads = _clip(heads, attention.clip)
    if attention.rope is not None:
        heads = _rotate(heads, attention.rope)
    if normed and attention.norm_last:
        heads = _normalise_heads(heads, gain, attention.norm)
    return heads


def _clip(x: Float[Array, "*rows width"], bound: float) -> Float[Array, "*rows width"]:
    return x if bound == math.inf else jnp.clip(x, -bound, bound)


def _normalise_heads(
    heads: Float[Array, "sequences length kv_heads group head"], gain: Affine | None, norm: Norm
) -> Float[Array, "sequences length kv_heads group head"]:
    """The norm of each head, or of all heads together if there are gains for that."""
    together = gain is not None and gain.weight.shape[0] != heads.shape[-1]
    rows = heads.reshape(*heads.shape[:2], -1) if together else heads
    return normalise(rows, gain, norm=norm).reshape(heads.shape)


def _project_latent(
    x: Float[Array, "sequences length hidden"], weights: LatentWeights, attention: LatentAttention
) -> tuple[Float[Array, "sequences length heads 1 head"], ...]:
    """Queries, keys and values [.., heads, 1, .]: each head has its own keys, but for the rotated part.

    If attention is gated, also the gates, of the values' shape.
    """
    heads, nope_dim = (*x.shape[:2], attention.num_heads, 1, -1), attention.nope_dim
    low = x if weights.q_a is None else apply_affine(x, weights.q_a)
    latent = low if weights.q_a is None else normalise(low, weights.q_norm, norm=attention.norm)
    if attention.gated:
        latent = jnp.concatenate([latent, low], axis=-1)
    queries = apply_affine(latent, weights.q).reshape(heads)
    queries, gate = jnp.split(queries, [nope_dim + attention.rope_dim], axis=-1)
    rotate = partial(_rotate, rope=attention.rope) if attention.rope is not None else lambda part: part
    queries = jnp.concatenate([queries[..., :nope_dim], rotate(queries[..., nope_dim:])], axis=-1)
    projected = apply_affine(x, weights.kv_a)
    latent, shared = jnp.split(projected, [projected.shape[-1] - attention.rope_dim], axis=-1)
    keys_values = apply_affine(normalise(latent, weights.kv_norm, norm=attention.norm), weights.kv).reshape(heads)
    shared = rotate(shared[:, :, None, None, :])
    keys = [keys_values[..., :nope_dim], jnp.broadcast_to(shared, (*keys_values.shape[:-1], attention.rope_dim))]
    gates = (gate,) if attention.gated else ()
    return queries, jnp.concatenate(keys, axis=-1), keys_values[..., nope_dim:], *gates


def _rotate(
    x: Float[Array, "sequences length *heads head"], rope: Rope
) -> Float[Array, "sequences length *heads head"]:
    """Rotate the pairs of each head by frequency times position, in float32; the values after them are unchanged.

    Interleaved pairs are returned as halves. Queries and keys have the same order, so their products are the same.
    """
    count = len(rope.frequencies)
    pairs, rest = x[..., : 2 * count].astype(jnp.float32), x[..., 2 * count :]
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * jnp.asarray(rope.frequencies, jnp.float32)[None, :]
    angles = angles.reshape(1, x.shape[1], *[1] * (x.ndim - 3), count)
    cos, sin = jnp.cos(angles) * rope.scale, jnp.sin(angles) * rope.scale
    if rope.interleaved:
        first, second = pairs[..., 0::2], pairs[..., 1::2]
    else:
        first, second = pairs[..., :count], pairs[..., count:]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([rotated.astype(x.dtype), rest], axis=-1)


def _find_visible(
    queries: Int[Array, "queries 1"], keys: Int[Array, "1 keys"], *, window: int | None, chunk: int | None
) -> Bool[Array, "queries keys"]:
    """Which positions a query sees: the last `window`, those of its own `chunk`, or all up to itself."""
    visible = keys <= queries
    if window is not None:
        visible &= queries - keys < window
    if chunk is not None:
        visible &= queries // chunk == keys // chunk
    return visible


def attend_sequence(
    queries: Float[Array, "length kv_heads group head"],
    keys: Float[Array, "keys kv_heads 1 head"],
    values: Float[Array, "keys kv_heads 1 value"],
    *,
    sinks: Float[Array, "kv_heads group"] | None,
    scale: float,
    find_visible: Callable[[Array, Array], Array],
) -> Float[Array, "length kv_heads group value"]:
    """Attention of one sequence, over chunks of queries, so that scores take at most `SCORE_BYTES`.

    `find_visible` says of positions of queries, [queries, 1], and numbers of keys, [1, keys], which see which.
    """
    length, heads = len(queries), queries.shape[1] * queries.shape[2]
    size = min(max(SCORE_BYTES // (4 * heads * len(keys)), 1), length)
    count = -(-length // size)
    padded = jnp.pad(queries, ((0, count * size - length), (0, 0), (0, 0), (0, 0)))
    precision = find_precision(queries)
    positions = jnp.arange(len(keys))

    def attend_chunk(start_and_chunk: tuple[Array, Array]) -> Array:
        start, chunk = start_and_chunk
        # Of the operands in this order einsum makes rows of queries; in the other a CPU would transpose all products.
        products = jnp.einsum(
            "mkd,nkgd->kgnm", keys[:, :, 0], chunk, precision=precision, preferred_element_type=jnp.float32
        )
        visible = find_visible((start + jnp.arange(size))[:, None], positions[None, :])
        scores = jnp.where(visible[None, None], products * scale, jnp.finfo(jnp.float32).min)
        if sinks is not None:
            sink_scores = jnp.broadcast_to(sinks.astype(jnp.float32)[:, :, None, None], (*scores.shape[:3], 1))
            scores = jnp.concatenate([scores, sink_scores], axis=-1)
        shares = jax.nn.softmax(scores, axis=-1)[..., : len(keys)]
        return jnp.einsum("kgnm,mkd->nkgd", shares.astype(values.dtype), values[:, :, 0], precision=precision)

    starts = jnp.arange(count) * size
    outputs = map_rows(attend_chunk, (starts, padded.reshape(count, size, *queries.shape[1:])), at_once=1)
    return outputs.reshape(count * size, *outputs.shape[2:])[:length]


def map_rows(function: Callable, arguments: tuple[Array, ...], *, at_once: int) -> Array:
    """The function mapped over the first axis, `at_once` rows at a time (at least one)."""
    if at_once >= len(arguments[0]) or len(arguments[0]) == 1:
        return jax.vmap(function)(arguments)
    return jax.lax.map(function, arguments, batch_size=max(at_once, 1))
