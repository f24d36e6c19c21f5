"""The formats of quantised weights, as data: the names of the parts of each, and the shapes that they must have.

A matrix is [out, in]: `out` outputs, each a row of `in` inputs.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from lexi_search.checkpoint.dequantise import AWQ_ORDER, Fp4, PackedIntegers, Scaled, Scheme
from lexi_search.checkpoint.quantisation_methods import Storage

FLOATS = ("float32", "float16", "bfloat16")
FP8 = ("float8_e4m3fn", "float8_e5m2")
BYTES = ("uint8", "float8_e8m0fnu")  # E8M0 powers of two, under either name
WORDS = ("int32",)


class Part(NamedTuple):
    """One role in a format: the possible endings of the stored tensor's name, and its possible element types."""

    endings: tuple[str, ...]
    dtypes: tuple[str, ...]
    required: bool = True


Shapes = Mapping[str, tuple[int, ...]]  # role -> shape


class ShapeMismatch(Exception):
    """Parts whose shapes do not fit together."""


class Format(NamedTuple):
    """One format of a weight. A part is named by the logical name without its ending `base`, plus one of the endings.

    `describe` returns the scheme and the logical shape for the parts' shapes, all without an axis of experts, or raises
    ShapeMismatch. Without that axis the part `weight` has `rank` dimensions.
    """

    parts: Mapping[str, Part]
    describe: Callable[[Storage, Shapes], tuple[Scheme, tuple[int, int]]]
    base: str = ""
    rank: int = 2


def _describe_scaled(storage: Storage, shapes: Shapes) -> tuple[Scheme, tuple[int, int]]:
    """One scale for each block or group of a row if the config has their size; else per matrix, row or column."""
    rows, columns = _require_rank(shapes["weight"], 2)
    options = [(rows, columns), (1, columns), (rows, 1)]
    if storage.block:
        options = [storage.block]
    elif storage.group_size > 0 and columns % storage.group_size == 0:
        options = [(1, storage.group_size)]
    for block in options:
        if shapes["scale"] in _list_grids((rows, columns), block):
            _require(shapes, "zero", shapes["scale"])
            return Scaled(block), (rows, columns)
    raise ShapeMismatch


def _list_grids(shape: tuple[int, int], block: tuple[int, int]) -> list[tuple[int, ...]]:
    """The shapes in which one number per block may be stored: [down, across], or fewer axes where an extent is 1.

    ModelOpt writes [down, 1, across, 1].
    """
    down, across = (math.ceil(extent / size) for extent, size in zip(shape, block, strict=True))
    return [(down, across), (down, 1, across, 1)] + [(down,)] * (across == 1) + [()] * (down == across == 1)


def _describe_packed(storage: Storage, shapes: Shapes) -> tuple[Scheme, tuple[int, int]]:
    """compressed-tensors: words along the inputs, [out, in / 8]; zeros along the outputs, [out / 8, groups]."""
    per_word = 32 // storage.bits
    rows, words = _require_rank(shapes["weight"], 2)
    groups = _require_rank(shapes["scale"], 2)[1]
    # The last word may be padded; where there are groups, their number tells how many columns are real.
    columns = words * per_word if storage.group_size == -1 else groups * storage.group_size
    group_size = columns // groups
    _require(shapes, "scale", (rows, columns // group_size))
    _require(shapes, "weight", (rows, math.ceil(columns / per_word)))
    _require(shapes, "zero", (math.ceil(rows / per_word), groups))
    _require(shapes, "group", (columns,))
    _require(shapes, "shape", (2,))
    return PackedIntegers(storage.bits, group_size, weight_axis=1, zero_axis=0), (rows, columns)


def _describe_gptq(storage: Storage, shapes: Shapes, zero_offset: int) -> tuple[Scheme, tuple[int, int]]:
    """GPTQ: words along the inputs, [in / 8, out]; zeros along the outputs, [groups, out / 8]."""
    per_word = 32 // storage.bits
    words, rows = _require_rank(shapes["weight"], 2)
    columns = words * per_word
    group_size = _check_groups(storage, shapes, rows, columns)
    _require(shapes, "group", (columns,))
    scheme = PackedIntegers(
        storage.bits, group_size, weight_axis=0, zero_axis=1, transposed=True, zero_offset=zero_offset
    )
    return scheme, (rows, columns)


def _describe_awq(storage: Storage, shapes: Shapes) -> tuple[Scheme, tuple[int, int]]:
    """AWQ: words along the outputs, [in, out / 8] and [groups, out / 8], with AWQ's order of fields."""
    columns, words = _require_rank(shapes["weight"], 2)
    rows = words * (32 // storage.bits)
    group_size = _check_groups(storage, shapes, rows, columns)
    scheme = PackedIntegers(storage.bits, group_size, weight_axis=1, zero_axis=1, order=AWQ_ORDER, transposed=True)
    return scheme, (rows, columns)


def _check_groups(storage: Storage, shapes: Shapes, rows: int, columns: int) -> int:
    group_size = columns if storage.group_size == -1 else storage.group_size
    if columns % group_size:
        raise ShapeMismatch
    _require(shapes, "scale", (columns // group_size, rows))
    _require(shapes, "zero", (columns // group_size, math.ceil(rows * storage.bits / 32)))
    return group_size


def _describe_mxfp4(storage: Storage, shapes: Shapes) -> tuple[Scheme, tuple[int, int]]:
    """gpt-oss: [out, groups, 16] bytes; the tensor in transformers is the transpose, [in, out]."""
    rows, groups, half = _require_rank(shapes["weight"], 3)
    _require(shapes, "weight", (rows, groups, storage.group_size // 2))
    _require(shapes, "scale", (rows, groups))
    return Fp4(storage.group_size, transposed=True), (groups * storage.group_size, rows)


def _describe_fp4(storage: Storage, shapes: Shapes, divide: bool = False) -> tuple[Scheme, tuple[int, int]]:
    """Two numbers to a byte along the inputs, [out, in / 2], and the scales of groups, [out, in / group_size]."""
    rows, half = _require_rank(shapes["weight"], 2)
    groups = 2 * half // storage.group_size
    if groups * storage.group_size != 2 * half or math.prod(shapes.get("global_scale", ())) != 1:
        raise ShapeMismatch
    _require(shapes, "scale", (rows, groups))
    return Fp4(storage.group_size, divide=divide), (rows, 2 * half)


def _require_rank(shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    if len(shape) != rank or 0 in shape:
        raise ShapeMismatch
    return shape


def _require(shapes: Shapes, role: str, shape: tuple[int, ...]) -> None:
    if role in shapes and shapes[role] != shape:
        raise ShapeMismatch


BESIDE = ("scale", "weight_scale_inv", "weight_scale")  # of scales beside `weight`
_FP8_OR_INT8 = (*FP8, "int8")
_ZERO = Part(("_zero_point",), ("int8",), required=False)
_GPTQ = Format(
    base="weight",
    parts={
        "weight": Part(("qweight",), WORDS),
        "scale": Part(("scales",), FLOATS),
        "zero": Part(("qzeros",), WORDS),
        "group": Part(("g_idx",), WORDS, required=False),
    },
    describe=lambda storage, shapes: _describe_gptq(storage, shapes, zero_offset=1),
)
FORMATS: Mapping[str, Format] = {
    "scaled": Format(
        parts={
            "weight": Part(("",), _FP8_OR_INT8),
            "scale": Part(("_scale_inv", "_scale", "_weight_scale"), (*FLOATS, *BYTES)),
            "zero": _ZERO,
        },
        describe=_describe_scaled,
    ),
    "scaled-beside": Format(
        base="weight",
        parts={"weight": Part(("weight",), FP8), "scale": Part(BESIDE, (*FLOATS, *BYTES))},
        describe=_describe_scaled,
    ),
    "mxfp4-beside": Format(
        base="weight",
        parts={"weight": Part(("weight",), ("int8", "uint8")), "scale": Part(BESIDE, BYTES)},
        describe=_describe_fp4,
    ),
    "packed": Format(
        parts={
            "weight": Part(("_packed",), WORDS),
            "scale": Part(("_scale",), FLOATS),
            "zero": Part(("_zero_point",), WORDS, required=False),
            "group": Part(("_g_idx",), WORDS, required=False),
            "shape": Part(("_shape",), ("int64", "int32")),
        },
        describe=_describe_packed,
    ),
    "gptq": _GPTQ,
    "gptq_v2": _GPTQ._replace(describe=lambda storage, shapes: _describe_gptq(storage, shapes, zero_offset=0)),
    "awq": Format(
        base="weight",
        parts={role: part for role, part in _GPTQ.parts.items() if role != "group"},
        describe=_describe_awq,
    ),
    "mxfp4": Format(
        parts={"weight": Part(("_blocks",), ("uint8",)), "scale": Part(("_scales",), BYTES)},
        describe=_describe_mxfp4,
        rank=3,
    ),
    "mxfp4-packed": Format(
        parts={"weight": Part(("_packed",), ("uint8",)), "scale": Part(("_scale",), BYTES)},
        describe=_describe_fp4,
    ),
    "nvfp4-packed": Format(
        parts={
            "weight": Part(("_packed",), ("uint8",)),
            "scale": Part(("_scale",), FP8),
            "global_scale": Part(("_global_scale",), ("float32",)),
        },
        describe=lambda storage, shapes: _describe_fp4(storage, shapes, divide=True),
    ),
    "nvfp4": Format(
        parts={
            "weight": Part(("",), ("uint8",)),
            "scale": Part(("_scale",), FP8),
            "global_scale": Part(("_scale_2",), ("float32",)),
        },
        describe=_describe_fp4,
    ),
}
