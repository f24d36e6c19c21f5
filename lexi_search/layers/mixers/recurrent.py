"""Layers around a linear recurrence, and short convolutions: from a layer's normalised input to its output.

Whatever the type of the hidden states, convolutions, decays, recurrences and norms are float32.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lexi_search.layers.ffn import ACTIVATIONS, find_precision
from lexi_search.layers.mixers.attention import apply_affine, map_rows, normalise
from lexi_search.layers.mixers.scans import scan_delta
from lexi_search.layers.spec import GatedDeltaNet
from lexi_search.layers.weights import Affine, DeltaWeights

SCAN_BYTES = 512 << 20  # of the values of all heads, float32, at a time; a scan holds about ten arrays of that size
EPS = 1e-6  # of the lengths of queries and keys, as the kernels have it


def mix_delta(
    x: Float[Array, "sequences length hidden"], weights: DeltaWeights, *, mixer: GatedDeltaNet
) -> Float[Array, "sequences length hidden"]:
    """A gated delta net's output for every position, in `x`'s type."""
    sizes = mixer.num_groups * mixer.key_dim, mixer.num_heads * mixer.value_dim
    joined, z, rates, decays = _project_delta(x, weights, mixer)
    joined = ACTIVATIONS[mixer.activation](convolve(joined, weights.conv))
    queries, keys, values = jnp.split(joined, (sizes[0], 2 * sizes[0]), axis=-1)
    queries, keys = (_cut_heads(part, mixer.num_groups) for part in (queries, keys))
    decays = _find_decays(decays, weights.decay_rate, weights.decay_bias)
    inputs = (
        _scale_to_unit(queries) * jnp.float32(mixer.key_dim**-0.5),
        _scale_to_unit(keys),
        _cut_heads(_cut_heads(values, mixer.num_heads), mixer.num_groups, axis=2),
        _cut_heads(decays[..., None], mixer.num_groups, axis=2),
        _cut_heads(jax.nn.sigmoid(rates.astype(jnp.float32)), mixer.num_groups),
    )
    read = _scan(scan_delta, inputs, x)
    read = normalise(read, weights.norm, norm=mixer.norm).reshape(*x.shape[:2], -1)
    return apply_affine((read * ACTIVATIONS[mixer.gate](z.astype(jnp.float32))).astype(x.dtype), weights.o)


def _project_delta(
    x: Float[Array, "sequences length hidden"], weights: DeltaWeights, mixer: GatedDeltaNet
) -> tuple[Float[Array, "sequences length _"], ...]:
    """Queries, keys and values together; the output gate; rates and decays of each head, before their functions."""
    projected = [apply_affine(x, part) for part in weights.inputs]
    if len(projected) == 4:
        return tuple(projected)
    # All that belongs to one group is together.
    width = mixer.num_heads * mixer.value_dim // mixer.num_groups
    qkvz, rates_decays = (_cut_heads(part, mixer.num_groups) for part in projected)
    bounds = mixer.key_dim, 2 * mixer.key_dim, 2 * mixer.key_dim + width
    parts = [*jnp.split(qkvz, bounds, axis=-1), *jnp.split(rates_decays, 2, axis=-1)]
    queries, keys, values, z, rates, decays = (part.reshape(*x.shape[:2], -1) for part in parts)
    return jnp.concatenate([queries, keys, values], axis=-1), z, rates, decays


def _scan(
    function: Callable, inputs: tuple[Array, ...], x: Array
) -> Float[Array, "sequences length groups heads value"]:
    """A scan of the `inputs` made from `x`, of as many sequences at a time as `SCAN_BYTES` allow."""
    queries, _, values, *_ = inputs
    size = 4 * values.shape[1] * values.shape[2] * values.shape[3] * max(queries.shape[-1], values.shape[-1])

    def scan(sequence: tuple[Array, ...]) -> Array:
        return function(*(part[None] for part in sequence), precision=find_precision(x))[0]

    return map_rows(scan, inputs, at_once=SCAN_BYTES // size)


def convolve(
    x: Float[Array, "sequences length channels"], weights: Affine
) -> Float[Array, "sequences length channels"]:
    """The causal convolution of each channel with its own kernel; weights are [channels, 1, width]."""
    kernel = weights.weight.astype(jnp.float32)[:, 0]
    width, length = kernel.shape[1], x.shape[1]
    padded = jnp.pad(x.astype(jnp.float32), ((0, 0), (width - 1, 0), (0, 0)))
    result = sum(padded[:, i : i + length] * kernel[:, i][None, None] for i in range(width))
    return result if weights.bias is None else result + weights.bias.astype(jnp.float32)[None, None]


def _find_decays(
    steps: Float[Array, "sequences length heads"], rate: Float[Array, " heads"], bias: Float[Array, " heads"]
) -> Float[Array, "sequences length heads"]:
    """-exp(rate) softplus(step + bias), the logarithm of what a head's state keeps."""
    rate, bias = (part.astype(jnp.float32)[None, None] for part in (rate, bias))
    return -jnp.exp(rate) * jax.nn.softplus(steps.astype(jnp.float32) + bias)


def _cut_heads(x: Float[Array, "*rows"], count: int, axis: int = -1) -> Float[Array, "*more_rows"]:
    """The axis as `count` heads and what each of them has."""
    axis %= x.ndim
    return x.reshape(*x.shape[:axis], count, -1, *x.shape[axis + 1 :])


def _scale_to_unit(x: Float[Array, "*rows width"]) -> Float[Array, "*rows width"]:
    return x * jax.lax.rsqrt(jnp.square(x).sum(axis=-1, keepdims=True) + EPS)
