"""Layers around a linear recurrence, and short convolutions: from a layer's normalised input to its output.

Whatever the type of the hidden states, convolutions, decays, recurrences and norms are float32.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lexi_search.layers.ffn import ACTIVATIONS
from lexi_search.layers.mixers.attention import apply_affine, map_rows, normalise
from lexi_search.layers.mixers.scans import scan_channels, scan_delta, scan_linear
from lexi_search.layers.spec import GatedDeltaNet, LightningAttention, Mamba, Mamba2, Recurrence
from lexi_search.layers.weights import (
    Affine,
    ChannelDeltaWeights,
    ConvolutionWeights,
    DeltaWeights,
    LightningWeights,
    Mamba2Weights,
    MambaWeights,
    RecurrenceWeights,
)

# Of the values of all heads, float32, of some whole sequences at a time; a layer holds about ten arrays of that size.
MIX_BYTES = 512 << 20
EPS = 1e-6  # of the lengths of queries and keys, as the kernels have it


def recur(
    x: Float[Array, "sequences length hidden"], weights: RecurrenceWeights, *, mixer: Recurrence
) -> Float[Array, "sequences length hidden"]:
    """The layer's output for every position, each seeing itself and those before it, in `x`'s type."""
    size = 4 * x.shape[1] * weights.o.weight.shape[1]
    return map_rows(lambda rows: _mix(rows[0][None], weights, mixer)[0], (x,), at_once=MIX_BYTES // size)


def _mix(
    x: Float[Array, "1 length hidden"], weights: RecurrenceWeights, mixer: Recurrence
) -> Float[Array, "1 length hidden"]:
    match weights:
        case ConvolutionWeights():
            first, last, values = jnp.split(apply_affine(x, weights.input), 3, axis=-1)
            outputs = last.astype(jnp.float32) * convolve(first * values, weights.conv)
        case LightningWeights():
            outputs = _mix_lightning(x, weights, mixer)
        case Mamba2Weights():
            outputs = _mix_mamba2(x, weights, mixer)
        case MambaWeights():
            outputs = _mix_mamba(x, weights, mixer)
        case _:
            outputs = _mix_delta(x, weights, mixer)
    return apply_affine(outputs.astype(x.dtype), weights.o)


def _mix_delta(
    x: Float[Array, "sequences length hidden"], weights: DeltaWeights | ChannelDeltaWeights, mixer: GatedDeltaNet
) -> Float[Array, "sequences length values"]:
    project = _project_delta if isinstance(weights, DeltaWeights) else _project_channel_delta
    queries, keys, values, decays, rates, gates = project(x, weights, mixer)
    inputs = (
        _scale_to_unit(_cut_heads(queries, mixer.num_groups)) * jnp.float32(mixer.key_dim**-0.5),
        _scale_to_unit(_cut_heads(keys, mixer.num_groups)),
        _cut_heads(_cut_heads(values, mixer.num_heads), mixer.num_groups, axis=2),
        _cut_heads(decays, mixer.num_groups, axis=2),
        _cut_heads(jax.nn.sigmoid(rates.astype(jnp.float32)), mixer.num_groups),
    )
    read = normalise(scan_delta(*inputs, dtype=_find_dtype(x)), weights.norm, norm=mixer.norm)
    return read.reshape(*x.shape[:2], -1) * ACTIVATIONS[mixer.gate](gates.astype(jnp.float32))


def _mix_lightning(
    x: Float[Array, "sequences length hidden"], weights: LightningWeights, mixer: LightningAttention
) -> Float[Array, "sequences length values"]:
    joined = ACTIVATIONS[mixer.activation](apply_affine(x, weights.qkv).astype(jnp.float32))
    queries, keys, values = jnp.split(_cut_heads(joined, len(mixer.slopes)), 3, axis=-1)
    decays = jnp.broadcast_to(-jnp.asarray(mixer.slopes, jnp.float32)[None, None, :], queries.shape[:-1])
    read = scan_linear(queries, keys, values[:, :, :, None], decays[..., None, None], dtype=_find_dtype(x))
    read = normalise(read.reshape(*x.shape[:2], -1), weights.norm, norm=mixer.norm)
    return read * jax.nn.sigmoid(apply_affine(x, weights.gate).astype(jnp.float32))


def _mix_mamba(
    x: Float[Array, "sequences length hidden"], weights: MambaWeights, mixer: Mamba
) -> Float[Array, "sequences length channels"]:
    channels, gates = jnp.split(apply_affine(x, weights.input), 2, axis=-1)
    channels = ACTIVATIONS[mixer.activation](convolve(channels, weights.conv))
    rank = weights.steps.weight.shape[1]
    parts = jnp.split(
        apply_affine(channels.astype(x.dtype), weights.selection), (rank, rank + mixer.state_dim), axis=-1
    )
    normed = [normalise(part, norm, norm=mixer.norm) for part, norm in zip(parts, weights.norms, strict=True)]
    steps = apply_affine(normed[0], Affine(weights.steps.weight)).astype(jnp.float32)
    steps = jax.nn.softplus(steps + weights.steps.bias.astype(jnp.float32)[None, None])
    keys, queries = (part.astype(jnp.float32) for part in normed[1:])
    rates = -jnp.exp(weights.decay_rate.astype(jnp.float32))
    read = scan_channels(queries, keys, steps * channels, steps, rates)
    skipped = weights.skip.astype(jnp.float32)[None, None] * channels
    return (read + skipped) * jax.nn.silu(gates.astype(jnp.float32))


def _mix_mamba2(
    x: Float[Array, "sequences length hidden"], weights: Mamba2Weights, mixer: Mamba2
) -> Float[Array, "sequences length values"]:
    width, state = mixer.num_heads * mixer.head_dim, mixer.num_groups * mixer.state_dim
    gates, joined, steps = jnp.split(apply_affine(x, weights.input), (width, 2 * (width + state)), axis=-1)
    joined = ACTIVATIONS[mixer.activation](convolve(joined, weights.conv))
    values, keys, queries = jnp.split(joined, (width, width + state), axis=-1)
    values = _cut_heads(_cut_heads(values, mixer.num_heads), mixer.num_groups, axis=2)
    # No bounds on steps: transformers has some, vLLM none.
    steps = jax.nn.softplus(steps.astype(jnp.float32) + weights.step_bias.astype(jnp.float32)[None, None])
    decays = -jnp.exp(weights.decay_rate.astype(jnp.float32))[None, None] * steps
    steps, decays = (_cut_heads(part[..., None], mixer.num_groups, axis=2) for part in (steps, decays))
    queries, keys = (_cut_heads(part, mixer.num_groups) for part in (queries, keys))
    read = scan_linear(queries, keys, steps * values, decays, dtype=_find_dtype(x))
    skip = weights.skip.astype(jnp.float32).reshape(1, 1, *values.shape[2:4], 1)
    outputs = (read + skip * values).reshape(*x.shape[:2], -1) * jax.nn.silu(gates.astype(jnp.float32))
    normed = normalise(_cut_heads(outputs, mixer.num_groups), None, norm=mixer.norm).reshape(outputs.shape)
    return normed * weights.norm.weight.astype(jnp.float32)[None, None]


def _project_delta(
    x: Float[Array, "sequences length hidden"], weights: DeltaWeights, mixer: GatedDeltaNet
) -> tuple[Float[Array, "sequences length ..."], ...]:
    """Queries, keys, values, decays [.., heads, 1], rates and gates."""
    projected = [apply_affine(x, part) for part in weights.inputs]
    if len(projected) == 2:  # all that belongs to one group is together
        keys, values = mixer.key_dim, mixer.num_heads * mixer.value_dim // mixer.num_groups
        qkvz, rates_decays = (_cut_heads(part, mixer.num_groups) for part in projected)
        parts = jnp.split(qkvz, (keys, 2 * keys, 2 * keys + values), axis=-1)
        parts = [part.reshape(*x.shape[:2], -1) for part in (*parts, *jnp.split(rates_decays, 2, axis=-1))]
        projected = [jnp.concatenate(parts[:3], axis=-1), *parts[3:]]
    joined, gates, rates, steps = projected
    joined = ACTIVATIONS[mixer.activation](convolve(joined, weights.conv))
    keys = mixer.num_groups * mixer.key_dim
    steps = steps.astype(jnp.float32) + weights.decay_bias.astype(jnp.float32)[None, None]
    decays = -jnp.exp(weights.decay_rate.astype(jnp.float32))[None, None] * jax.nn.softplus(steps)
    return *jnp.split(joined, (keys, 2 * keys), axis=-1), decays[..., None], rates, gates


def _project_channel_delta(
    x: Float[Array, "sequences length hidden"], weights: ChannelDeltaWeights, mixer: GatedDeltaNet
) -> tuple[Float[Array, "sequences length ..."], ...]:
    """The same with decays [.., heads, key]."""
    projected = [apply_affine(x, part) for part in weights.inputs]
    convolved = (convolve(part, conv) for part, conv in zip(projected, weights.convs, strict=True))
    steps, gates = (apply_affine(apply_affine(x, first), last) for first, last in (weights.decay, weights.gate))
    steps = steps.astype(jnp.float32) + weights.decay_bias.astype(jnp.float32)[None, None]
    rate = weights.decay_rate.astype(jnp.float32)
    rate = jnp.exp(rate if rate.ndim == 4 else rate.reshape(1, 1, -1, 1))
    if mixer.decay_bound is None:
        decays = -rate * jax.nn.softplus(_cut_heads(steps, mixer.num_heads))
    else:
        decays = jnp.float32(mixer.decay_bound) * jax.nn.sigmoid(rate * _cut_heads(steps, mixer.num_heads))
    return *map(ACTIVATIONS[mixer.activation], convolved), decays, apply_affine(x, weights.rates), gates


def _find_dtype(x: Array) -> DTypeLike:
    """The type of operands of a recurrence's products; states may be beyond float16."""
    return jnp.bfloat16 if x.dtype == jnp.bfloat16 else jnp.float32


def convolve(
    x: Float[Array, "sequences length channels"], weights: Affine, *, dilation: int = 1
) -> Float[Array, "sequences length channels"]:
    """The causal convolution of each channel with its own kernel, of positions `dilation` apart.

    Weights are [channels, 1, width].
    """
    kernel = weights.weight.astype(jnp.float32)[:, 0]
    width, length = kernel.shape[1], x.shape[1]
    padded = jnp.pad(x.astype(jnp.float32), ((0, 0), (dilation * (width - 1), 0), (0, 0)))
    starts = [dilation * i for i in range(width)]
    result = sum(padded[:, starts[i] : starts[i] + length] * kernel[:, i][None, None] for i in range(width))
    return result if weights.bias is None else result + weights.bias.astype(jnp.float32)[None, None]


def _cut_heads(x: Float[Array, "*rows"], count: int, axis: int = -1) -> Float[Array, "*more_rows"]:
    """The axis as `count` heads and what each of them has."""
    axis %= x.ndim
    return x.reshape(*x.shape[:axis], count, -1, *x.shape[axis + 1 :])


def _scale_to_unit(x: Float[Array, "*rows width"]) -> Float[Array, "*rows width"]:
    return x * jax.lax.rsqrt(jnp.square(x).sum(axis=-1, keepdims=True) + EPS)
