"""DeepSeek-V4's attention in JAX: to the last positions, and to entries that each sum up a window of all positions.

Norms, rotary embedding, softmax and sums of products are float32 whatever the type of the hidden states.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lexi_search.layers.ffn import find_precision
from lexi_search.layers.mixers.attention import SCORE_BYTES, apply_affine, attend_sequence, map_rows, normalise
from lexi_search.layers.spec import CompressedAttention, Rope
from lexi_search.layers.weights import CompressedWeights, CompressorWeights


def attend_compressed(
    x: Float[Array, "sequences length hidden"], weights: CompressedWeights, *, attention: CompressedAttention
) -> Float[Array, "sequences length hidden"]:
    """The attention layer's output for every position, each seeing itself and those before it, in `x`'s type."""
    length, rope, norm = x.shape[1], attention.rope, attention.norm
    positions = jnp.arange(length)
    latent = normalise(apply_affine(x, weights.q_a), weights.q_norm, norm=norm)
    queries = apply_affine(latent, weights.q).reshape(*x.shape[:2], 1, attention.num_heads, -1)
    queries = _rotate(normalise(queries, None, norm=norm), rope, positions)
    keys = normalise(apply_affine(x, weights.kv), weights.kv_norm, norm=norm)
    keys = _rotate(keys[:, :, None, None], rope, positions)
    if weights.compressor is not None and length >= attention.rate:
        keys = jnp.concatenate([keys, _compress(x, weights.compressor, attention)], axis=1)
    find_visible = partial(_find_visible, length=length, attention=attention)
    sinks = weights.sinks.reshape(1, -1)
    mix = partial(attend_sequence, sinks=sinks, scale=attention.scale, find_visible=find_visible)
    at_once = SCORE_BYTES // (4 * attention.num_heads * length * keys.shape[1])
    outputs = map_rows(lambda sequence: mix(*sequence), (queries, keys, keys), at_once=at_once)
    outputs = _rotate(outputs, rope, -positions)  # values are rotated as keys are: to its distance, as seen from here
    outputs = outputs.reshape(*x.shape[:2], attention.num_groups, -1)
    projections = weights.o_a.weight.astype(x.dtype).reshape(attention.num_groups, -1, outputs.shape[-1])
    outputs = jnp.einsum("slgi,goi->slgo", outputs, projections, precision=find_precision(x))
    return apply_affine(outputs.reshape(*x.shape[:2], -1), weights.o)


def _compress(
    x: Float[Array, "sequences length hidden"], weights: CompressorWeights, attention: CompressedAttention
) -> Float[Array, "sequences windows 1 1 head"]:
    """The entries of all whole windows: means of their positions' values, each channel by a softmax of its own.

    Where there are twice as many channels, the first half of them is for the entry of the next window.
    """
    rate, count, dim = attention.rate, x.shape[1] // attention.rate, weights.norm.weight.shape[0]
    values, gates = (
        apply_affine(x[:, : count * rate], part).astype(jnp.float32).reshape(len(x), count, rate, -1)
        for part in (weights.values, weights.gates)
    )
    gates = gates + weights.bias.astype(jnp.float32)[None, None]
    if values.shape[-1] > dim:
        values, gates = (
            jnp.concatenate([_delay(part[..., :dim], first), part[..., dim:]], axis=2)
            for part, first in ((values, 0.0), (gates, -jnp.inf))
        )
    entries = (values * jax.nn.softmax(gates, axis=2)).sum(axis=2)
    entries = normalise(entries, weights.norm, norm=attention.norm).astype(x.dtype)
    return _rotate(entries[:, :, None, None], attention.rope, jnp.arange(count) * rate)


def _delay(
    parts: Float[Array, "sequences windows rate head"], first: float
) -> Float[Array, "sequences windows rate head"]:
    """Those of the window before; all `first` for the first one."""
    return jnp.pad(parts, ((0, 0), (1, 0), (0, 0), (0, 0)), constant_values=first)[:, :-1]


def _find_visible(
    queries: Int[Array, "queries 1"], keys: Int[Array, "1 keys"], *, length: int, attention: CompressedAttention
) -> Bool[Array, "queries keys"]:
    """Of `length` positions the last ones; of the entries after them those of windows that are complete."""
    near = (keys <= queries) & (queries - keys < attention.window)
    if attention.rate is None:
        return near
    return jnp.where(keys < length, near, keys - length < (queries + 1) // attention.rate)


def _rotate(
    x: Float[Array, "sequences length *heads head"], rope: Rope, positions: Int[Array, " length"]
) -> Float[Array, "sequences length *heads head"]:
    """Rotate the last values of each head, pairs of neighbours, by frequency times position, in float32."""
    count = len(rope.frequencies)
    rest, pairs = x[..., : -2 * count], x[..., -2 * count :].astype(jnp.float32)
    angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(rope.frequencies, jnp.float32)[None, :]
    angles = angles.reshape(1, len(positions), *[1] * (x.ndim - 3), count)
    cos, sin = jnp.cos(angles) * rope.scale, jnp.sin(angles) * rope.scale
    first, second = pairs[..., 0::2], pairs[..., 1::2]
    rotated = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1).reshape(pairs.shape)
    return jnp.concatenate([rest, rotated.astype(x.dtype)], axis=-1)
