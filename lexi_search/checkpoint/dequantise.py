"""Dequantisation in JAX: the values of one matrix from its stored parts, with one class per scheme.

A scheme is hashable, static under `jit`; `quantisation_formats` chooses the scheme of a stored tensor. All arithmetic
is float32, which holds a product of a low-bit number and a bf16 or fp16 scale exactly; the final type then rounds once.
Values that the parts do not define, such as those of a group that does not exist, become NaN. Values below the smallest
normal number may be flushed to zero by the device.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)  # by E2M1 code
SEQUENTIAL = (0, 1, 2, 3, 4, 5, 6, 7)
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)

Parts = Mapping[str, Array]  # role -> stored array


@dataclass(frozen=True)
class Plain:
    """Values that are not quantised, of any rank; the only part is `weight`."""

    def decode(self, parts: Parts, shape: tuple[int, ...]) -> Array:
        return parts["weight"]


@dataclass(frozen=True)
class Scaled:
    """weight * scale, or (weight - zero) * scale: FP8 or int8 numbers, one scale for each block.

    Blocks of `block` = (rows, columns) cover the matrix [out, in] from its first corner; the last may pass its edges.
    """

    block: tuple[int, int]

    def decode(self, parts: Parts, shape: tuple[int, ...]) -> Float[Array, "out in"]:
        values = parts["weight"].astype(jnp.float32)
        if "zero" in parts:
            values -= _expand(parts["zero"].astype(jnp.float32), self.block, shape)
        return values * _expand(_read_scale(parts["scale"]), self.block, shape)


@dataclass(frozen=True)
class Fp4:
    """E2M1 numbers, two to a byte, low half first, with a scale for each `group_size` of a row.

    Scales are floats, or bytes that stand for powers of two (E8M0). Where there is also a scale of the whole tensor,
    the groups' scales are multiplied or, if `divide`, divided by it. If `transposed`, the logical matrix is [in, out].
    """

    group_size: int
    divide: bool = False
    transposed: bool = False

    def decode(self, parts: Parts, shape: tuple[int, ...]) -> Float[Array, "rows columns"]:
        rows, columns = shape[::-1] if self.transposed else shape
        codes = jax.lax.bitcast_convert_type(parts["weight"], jnp.uint8).reshape(rows, columns // 2)
        nibbles = jnp.stack([codes & 15, codes >> 4], axis=-1).reshape(rows, columns)
        scale = _read_scale(parts["scale"])
        if "global_scale" in parts:
            whole = parts["global_scale"].astype(jnp.float32).reshape(1, 1)
            if self.divide:  # number by number: for one divisor XLA would multiply by its reciprocal, rounding twice
                whole = jax.lax.optimization_barrier(jnp.broadcast_to(whole, scale.shape))
            scale = scale / whole if self.divide else scale * whole
        values = jnp.asarray(FP4_VALUES, jnp.float32)[nibbles.astype(jnp.int32)]
        values *= _expand(scale, (1, self.group_size), (rows, columns))
        return values.T if self.transposed else values


@dataclass(frozen=True)
class PackedIntegers:
    """(weight - zero) * scale of `bits`-bit numbers in words of 32 bits, by groups of `group_size` inputs.

    The matrix is stored [out, in] or, if `transposed`, [in, out], and so are its scales and zeros. A word holds
    neighbours along `weight_axis` or `zero_axis` of the stored array, the i-th of them in field `order[i]`. Zero points
    are the stored ones plus `zero_offset`; where none are stored, the middle of the range. The part `group` gives the
    group of every input where groups are not runs of inputs; the part `shape`, if there, must be the matrix's shape.
    """

    bits: int
    group_size: int
    weight_axis: int
    zero_axis: int
    order: tuple[int, ...] = SEQUENTIAL
    transposed: bool = False
    zero_offset: int = 0

    def decode(self, parts: Parts, shape: tuple[int, ...]) -> Float[Array, "out in"]:
        weight, scale = self._unpack(parts["weight"], self.weight_axis), parts["scale"].astype(jnp.float32)
        if "zero" in parts:
            zero = self._unpack(parts["zero"], self.zero_axis) + self.zero_offset
        else:
            zero = jnp.full(scale.shape, 2 ** (self.bits - 1))
        if self.transposed:
            weight, scale, zero = weight.T, scale.T, zero.T
        zero = zero[: scale.shape[0], : scale.shape[1]].astype(jnp.float32)  # the last word may be padded
        if "group" in parts:
            scale, zero = (_take_groups(values, parts["group"]) for values in (scale, zero))
        else:
            scale, zero = (_expand(values, (1, self.group_size), shape) for values in (scale, zero))
        values = (weight.astype(jnp.float32) - zero) * scale
        if "shape" in parts:
            agrees = parts["shape"].astype(jnp.int32) == jnp.asarray(shape, jnp.int32)
            values = jnp.where(agrees.all(), values, jnp.nan)
        return values

    def _unpack(self, words: Int[Array, "a b"], axis: int) -> Int[Array, "c d"]:
        fields = jnp.asarray(self.order[: 32 // self.bits], jnp.int32) * self.bits
        words = jnp.moveaxis(words.astype(jnp.int32), axis, -1)
        numbers = (words[..., None] >> fields[None, None, :]) & (2**self.bits - 1)
        return jnp.moveaxis(numbers.reshape(words.shape[0], -1), -1, axis)


Scheme = Plain | Scaled | Fp4 | PackedIntegers


def dequantise(parts: Parts, scheme: Scheme, shape: tuple[int, ...], dtype: str) -> Array:
    """The values of one tensor of shape `shape` from its parts; not finite where the parts are damaged.

    Their type is `dtype`; plain values keep the type that they are stored in.
    """
    values = scheme.decode(parts, shape)
    return values if scheme == Plain() else values.astype(dtype)


def _expand(grid: Num[Array, "..."], block: tuple[int, int], shape: tuple[int, ...]) -> Num[Array, "rows columns"]:
    """A matrix of shape `shape` from one number per block, each repeated over its block."""
    grid = grid.reshape([math.ceil(extent / size) for extent, size in zip(shape, block, strict=True)])
    for axis, (extent, size) in enumerate(zip(shape, block, strict=True)):
        grid = jax.lax.slice_in_dim(jnp.repeat(grid, min(size, extent), axis=axis), 0, extent, axis=axis)
    return grid


def _take_groups(values: Float[Array, "out groups"], group: Int[Array, " in"]) -> Float[Array, "out in"]:
    group = jnp.where(group < 0, values.shape[1], group)  # a negative index would count from the end
    return jnp.take(values, group, axis=1, mode="fill", fill_value=jnp.nan)


def _read_scale(scale: Num[Array, "..."]) -> Float[Array, "..."]:
    """Scales as float32. A byte e is 2 ** (e - 127), E8M0, where 255 stands for NaN."""
    if scale.dtype != jnp.uint8:
        return scale.astype(jnp.float32)
    bits = jnp.where(scale == 0, 1 << 22, scale.astype(jnp.int32) << 23)
    return jnp.where(scale == 255, jnp.nan, jax.lax.bitcast_convert_type(bits, jnp.float32))
