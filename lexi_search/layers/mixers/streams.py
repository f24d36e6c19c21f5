"""Hyper-connections (arXiv 2409.19606) in JAX: what a part of a layer reads of several residual streams, and writes.

The weights of both come from the streams of the token. They, norms and sums are float32 whatever the type of the
streams.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lexi_search.layers.mixers.attention import align, apply_affine, normalise
from lexi_search.layers.spec import Streams
from lexi_search.layers.weights import Affine, Connection


class Shares(NamedTuple):
    """How much of each stream a part reads; how much of its output each gets; how much each other keeps of a stream.

    `kept` is [from, to]; None where each stream keeps all of itself, and nothing of others. `written` is empty at the
    end of the model.
    """

    read: Float[Array, "*tokens streams"]
    written: Float[Array, "*tokens streams"]
    kept: Float[Array, "*tokens streams streams"] | None


def find_shares(hidden: Float[Array, "*tokens streams hidden"], weights: Connection, *, streams: Streams) -> Shares:
    """The shares of a part of a layer, or at the end of the model."""
    count = streams.count
    flat = normalise(hidden.reshape(*hidden.shape[:-2], -1).astype(jnp.float32), None, norm=streams.norm)
    logits = apply_affine(flat, Affine(weights.weight.astype(jnp.float32)))
    scale, base = (part.astype(jnp.float32) for part in (weights.scale, weights.base))
    sizes = (count, count, count * count)[: len(scale)]
    scale = jnp.concatenate([jnp.broadcast_to(scale[i : i + 1], (size,)) for i, size in enumerate(sizes)])
    logits = logits * align(scale, logits) + align(base, logits)
    read = jax.nn.sigmoid(logits[..., :count]) + jnp.float32(streams.eps)
    written = jnp.float32(streams.gain) * jax.nn.sigmoid(logits[..., count : 2 * count])
    if len(sizes) < 3:
        return Shares(read, written + jnp.float32(streams.eps), None)
    kept = jax.nn.softmax(logits[..., 2 * count :].reshape(*logits.shape[:-1], count, count), axis=-1)
    return Shares(read, written, _balance(kept + jnp.float32(streams.eps), streams))


def _balance(
    shares: Float[Array, "*tokens streams streams"], streams: Streams
) -> Float[Array, "*tokens streams streams"]:
    """Shares whose rows and columns add up to 1, nearly: by the iterations of Sinkhorn and Knopp."""

    def scale(values: Array, axis: int) -> Array:
        return values / (values.sum(axis=axis, keepdims=True) + jnp.float32(streams.eps))

    return jax.lax.fori_loop(1, streams.iterations, lambda _, values: scale(scale(values, -1), -2), scale(shares, -2))


def read(hidden: Float[Array, "*tokens streams hidden"], shares: Shares) -> Float[Array, "*tokens hidden"]:
    """What a part of a layer reads, in the streams' type."""
    return (hidden.astype(jnp.float32) * shares.read[..., None]).sum(axis=-2).astype(hidden.dtype)


def write(
    hidden: Float[Array, "*tokens streams hidden"], output: Float[Array, "*tokens hidden"], shares: Shares
) -> Float[Array, "*tokens streams hidden"]:
    """The streams after a part of a layer, of its output."""
    kept = hidden.astype(jnp.float32)
    if shares.kept is not None:
        kept = jnp.einsum("...ij,...ih->...jh", shares.kept, kept, precision=jax.lax.Precision.HIGHEST)
    return (kept + shares.written[..., None] * output.astype(jnp.float32)[..., None, :]).astype(hidden.dtype)
