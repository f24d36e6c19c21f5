"""Embeddings of n-grams (Qwen4-Exp): where a table has them, and what a layer adds of them to its residual streams."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int64

from lexi_search.layers.mixers.attention import apply_affine
from lexi_search.layers.mixers.recurrent import convolve
from lexi_search.layers.mixers.streams import normalise_each
from lexi_search.layers.spec import NGrams, Norm
from lexi_search.layers.weights import NGramWeights

LEAST = 1e-6  # of a gate's size, whose root is taken


def find_rows(
    tokens: Int[np.ndarray, "sequences length"], ngrams: NGrams
) -> Int64[np.ndarray, "sequences length heads"]:
    """The rows of the table for the n-grams that end at each position, n = 2 and up, by several hashes each.

    Tokens of another text are `end`: those up to the last one before a position, and before the beginning.
    """
    size, end = len(ngrams.multipliers), ngrams.end
    history = np.pad(tokens.astype(np.int64), ((0, 0), (size - 1, 0)), constant_values=end)
    positions = np.arange(history.shape[1])
    ends = np.maximum.accumulate(np.where(history == end, positions, -1), axis=1)
    start = np.pad(ends[:, :-1], ((0, 0), (1, 0)), constant_values=-1) + 1  # of the text that a position is in
    rows, mixed = [], history * ngrams.multipliers[0]
    per_size = len(ngrams.sizes) // (size - 1)
    for shift in range(1, size):
        shifted = np.pad(history, ((0, 0), (shift, 0)), constant_values=end)[:, : history.shape[1]]
        mixed = mixed ^ (np.where(positions - start >= shift, shifted, end) * ngrams.multipliers[shift])
        own = slice((shift - 1) * per_size, shift * per_size)
        rows.append(np.remainder(mixed[..., None], np.asarray(ngrams.sizes[own])) + np.asarray(ngrams.offsets[own]))
    return np.concatenate(rows, axis=-1)[:, size - 1 :]


def add_ngrams(
    hidden: Float[Array, "sequences length streams hidden"],
    embeddings: Float[Array, "sequences length width"],
    weights: NGramWeights,
    *,
    norm: Norm,
    ngrams: NGrams,
) -> Float[Array, "sequences length streams hidden"]:
    """The residual streams with the values of n-grams, each stream with a gate of its own, and their convolution."""
    keys = apply_affine(embeddings.astype(hidden.dtype), weights.key).reshape(hidden.shape)
    keys, queries = (
        normalise_each(part, gains, norm=norm).astype(jnp.float32)
        for part, gains in ((keys, weights.key_norm), (hidden, weights.query_norm))
    )
    gates = (keys * queries).sum(axis=-1, keepdims=True) / math.sqrt(hidden.shape[-1])
    gates = jax.nn.sigmoid(jnp.sqrt(jnp.maximum(jnp.abs(gates), LEAST)) * jnp.sign(gates))
    values = apply_affine(embeddings.astype(hidden.dtype), weights.value).astype(jnp.float32)
    gated = gates * values[:, :, None]
    normed = normalise_each(gated, weights.conv_norm, norm=norm).reshape(*hidden.shape[:2], -1)
    convolved = convolve(normed, weights.conv, dilation=len(ngrams.multipliers)).reshape(hidden.shape)
    return (hidden.astype(jnp.float32) + gated + jax.nn.silu(convolved)).astype(hidden.dtype)
