"""Hyper-connections (arXiv 2409.19606) in JAX: what a part of a layer reads of several residual streams, and writes.

The weights of both come from the streams of the token. They, norms and sums are float32 whatever the type of the
streams.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lexi_search.layers.mixers.attention import align, apply_affine, normalise
from lexi_search.layers.spec import Norm, Streams
from lexi_search.layers.weights import Affine, Connection, GatedConnection


class Shares(NamedTuple):
    """How much of a part's output each stream gets, and how much each other keeps of a stream, [from, to].

    `kept` is None where each stream keeps all of itself, and nothing of others. `written` is empty at the model's end.
    """

    written: Float[Array, "*tokens streams"]
    kept: Float[Array, "*tokens streams streams"] | None


def read(
    hidden: Float[Array, "*tokens streams hidden"], weights: Connection | GatedConnection, *, streams: Streams
) -> tuple[Float[Array, "*tokens hidden"], Shares]:
    """What a part of a layer, or the model's end, reads, in the streams' type, and the shares of what it writes."""
    if isinstance(weights, GatedConnection):
        return _read_gated(hidden, weights, streams)
    count = streams.count
    flat = normalise(hidden.reshape(*hidden.shape[:-2], -1).astype(jnp.float32), None, norm=streams.norm)
    logits = apply_affine(flat, Affine(weights.weight.astype(jnp.float32)))
    scale, base = (part.astype(jnp.float32) for part in (weights.scale, weights.base))
    sizes = (count, count, count * count)[: len(scale)]
    scale = jnp.concatenate([jnp.broadcast_to(scale[i : i + 1], (size,)) for i, size in enumerate(sizes)])
    logits = logits * align(scale, logits) + align(base, logits)
    shares = jax.nn.sigmoid(logits[..., :count]) + jnp.float32(streams.eps)
    x = (hidden.astype(jnp.float32) * shares[..., None]).sum(axis=-2).astype(hidden.dtype)
    written = jnp.float32(streams.gain) * jax.nn.sigmoid(logits[..., count : 2 * count])
    if len(sizes) < 3:
        return x, Shares(written + jnp.float32(streams.eps), None)
    kept = jax.nn.softmax(logits[..., 2 * count :].reshape(*logits.shape[:-1], count, count), axis=-1)
    return x, Shares(written, _balance(kept + jnp.float32(streams.eps), streams))


def _read_gated(
    hidden: Float[Array, "*tokens streams hidden"], weights: GatedConnection, streams: Streams
) -> tuple[Float[Array, "*tokens hidden"], Shares]:
    normed = normalise_each(hidden, weights.norm, norm=streams.norm)
    flat, count = normed.reshape(*hidden.shape[:-2], -1), jnp.asarray(streams.count, hidden.dtype)
    gates = apply_affine(jax.nn.silu(apply_affine(flat, weights.down) / count), weights.up).reshape(hidden.shape)
    x = (normed.astype(jnp.float32) * jax.nn.sigmoid(gates.astype(jnp.float32))).mean(axis=-2).astype(hidden.dtype)
    if weights.written is None:
        return x, Shares(jnp.zeros((*hidden.shape[:-2], 0), jnp.float32), None)
    logits = (apply_affine(flat, weights.written) / count).astype(jnp.float32)
    return x, Shares(jnp.float32(streams.gain) * jax.nn.sigmoid(logits), None)


def normalise_each(
    hidden: Float[Array, "*tokens streams hidden"], weights: Affine, *, norm: Norm
) -> Float[Array, "*tokens streams hidden"]:
    """The norm of each stream, with gains of its own, in the streams' type."""
    wide = normalise(hidden.astype(jnp.float32), None, norm=norm)
    gains = weights.weight.astype(jnp.float32) + jnp.float32(norm.offset)
    return (wide * gains.reshape((1,) * (hidden.ndim - 2) + hidden.shape[-2:])).astype(hidden.dtype)


def _balance(
    shares: Float[Array, "*tokens streams streams"], streams: Streams
) -> Float[Array, "*tokens streams streams"]:
    """Shares whose rows and columns add up to 1, nearly: by the iterations of Sinkhorn and Knopp."""

    def scale(values: Array, axis: int) -> Array:
        return values / (values.sum(axis=axis, keepdims=True) + jnp.float32(streams.eps))

    return jax.lax.fori_loop(1, streams.iterations, lambda _, values: scale(scale(values, -1), -2), scale(shares, -2))


def write(
    hidden: Float[Array, "*tokens streams hidden"], output: Float[Array, "*tokens hidden"], shares: Shares
) -> Float[Array, "*tokens streams hidden"]:
    """The streams after a part of a layer, of its output."""
    kept = hidden.astype(jnp.float32)
    if shares.kept is not None:
        kept = jnp.einsum("...ij,...ih->...jh", shares.kept, kept, precision=jax.lax.Precision.HIGHEST)
    return (kept + shares.written[..., None] * output.astype(jnp.float32)[..., None, :]).astype(hidden.dtype)
