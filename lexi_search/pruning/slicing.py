"""Stored tensors with some experts, or some channels of experts, left out: what to write instead of each.

A channel is a row of an expert's gate and up and a column of its down. Quantised tensors are cut as they are stored,
never dequantised: where a block, a group or a word holds several channels, these stay or go together.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from lexi_search.checkpoint.dequantise import Fp4, PackedIntegers, Plain, Scaled, Scheme
from lexi_search.checkpoint.reader import Checkpoint
from lexi_search.checkpoint.tensors import StoredTensor, Tensors
from lexi_search.checkpoint.writer import Output, copy
from lexi_search.errors import InputError
from lexi_search.models.moe_tensors import ExpertTensors


class Kept(NamedTuple):
    """What is left of one layer: experts by their old numbers, and of each the runs of `unit` channels; None: all."""

    experts: tuple[int, ...]
    units: tuple[tuple[int, ...], ...] | None = None


class _Axis(NamedTuple):
    """Where a stored part (of one expert) has the channels: `step` of them to an index, `copies` times over.

    The second copy follows the first one or, if `interleaved`, index by index.
    """

    number: int
    step: int
    copies: int = 1
    interleaved: bool = False


def find_unit(tensors: Tensors, checkpoint: Checkpoint, experts: ExpertTensors, width: int) -> int:
    """How many neighbouring channels stay or go together in one layer; InputError where none can go."""
    steps = {1}
    for name, side in _list_matrices(experts):
        stored = tensors[name]
        for role, part in stored.parts.items():
            axis = _find_axis(stored, role, _shape_of_one(checkpoint, experts, part), side, experts, width)
            steps |= {axis.step} if axis else set()
            if role in ("shape", "group") and experts.fused:
                raise InputError(f"{stored.file}: how to narrow tensor {part} is not known; prune experts, not width")
            if role == "group" and side == "in":
                _require_runs(checkpoint, part, stored)
    return math.lcm(*steps)


def slice_experts(
    tensors: Tensors, checkpoint: Checkpoint, experts: ExpertTensors, stem: str, kept: Kept, width: int, unit: int
) -> dict[str, Output | None]:
    """Stored name -> what is written instead, or None, of the experts' tensors.

    `stem` is what the names of separate ones begin with, such as `model.layers.0.mlp.experts.`. InputError names a
    tensor beside them that is not known, if they are to be narrower.
    """
    cut = _slice_fused if experts.fused else _slice_separate
    return cut(tensors, checkpoint, experts, stem, kept, width, unit)


def slice_rows(checkpoint: Checkpoint, name: str, kept: Sequence[int], num_experts: int) -> Output:
    """A tensor with one entry per expert, along the first axis that can be that of the experts, or as it is."""
    entry = checkpoint.entries[name]
    if num_experts not in entry.shape:
        return copy(checkpoint, name)
    axis = entry.shape.index(num_experts)
    shape = (*entry.shape[:axis], len(kept), *entry.shape[axis + 1 :])
    return Output(name, entry.dtype, shape, partial(_take, name, axis, np.asarray(kept)))


def pad(checkpoint: Checkpoint, name: str, axis: int, extent: int) -> Output:
    """A tensor with zeros behind its last index of `axis`, up to `extent`."""
    entry = checkpoint.entries[name]
    shape = (*entry.shape[:axis], extent, *entry.shape[axis + 1 :])
    return Output(name, entry.dtype, shape, partial(_pad, name, axis, extent))


def _slice_separate(
    tensors: Tensors, checkpoint: Checkpoint, experts: ExpertTensors, stem: str, kept: Kept, width: int, unit: int
) -> dict[str, Output | None]:
    own: dict[str, list[str]] = {}
    for name in checkpoint.entries:
        number, dot, _ = name.removeprefix(stem).partition(".")
        if name.startswith(stem) and dot and number.isdecimal():
            own.setdefault(number, []).append(name)
    planned: dict[str, Output | None] = {name: None for names in own.values() for name in names}
    for place, expert in enumerate(kept.experts):
        old, new = f"{stem}{expert}.", f"{stem}{place}."
        planned |= {name: copy(checkpoint, name, new + name.removeprefix(old)) for name in own[str(expert)]}
        if kept.units is None:
            continue
        known = set()
        for name, side in _list_matrices(experts._replace(separate=(experts.separate[expert],))):
            stored = tensors[name]
            known |= set(stored.parts.values())
            for role, part in stored.parts.items():
                output = _slice_part(checkpoint, experts, stored, role, side, kept.units[place], width, unit)
                planned[part] = output._replace(name=new + part.removeprefix(old))
        for name in own[str(expert)]:
            if name not in known and math.prod(checkpoint.entries[name].shape) != 1:
                raise InputError(f"{checkpoint.entries[name].file}: how to narrow tensor {name} is not known")
    return planned


def _slice_fused(
    tensors: Tensors, checkpoint: Checkpoint, experts: ExpertTensors, stem: str, kept: Kept, width: int, unit: int
) -> dict[str, Output | None]:
    planned: dict[str, Output | None] = {}
    for name, side in _list_matrices(experts):
        stored = tensors[name]
        for role, part in stored.parts.items():
            entry = checkpoint.entries[part]
            shape, axis = entry.shape[1:], None
            cuts: list[np.ndarray | None] = [None] * len(kept.experts)
            if kept.units is not None:
                axis = _find_axis(stored, role, shape, side, experts, width)
            if axis is not None:
                cuts = [_list_indices(axis, units, unit, shape[axis.number]) for units in kept.units]
                shape = (*shape[: axis.number], len(cuts[0]), *shape[axis.number + 1 :])
            number = axis.number if axis else 0
            make = partial(_take_experts, part, kept.experts, number, cuts)
            planned[part] = Output(part, entry.dtype, (len(kept.experts), *shape), make)
    return planned


def _slice_part(
    checkpoint: Checkpoint,
    experts: ExpertTensors,
    stored: StoredTensor,
    role: str,
    side: str,
    units: tuple[int, ...],
    width: int,
    unit: int,
) -> Output:
    """One part of an expert's own matrix, under its old name."""
    part = stored.parts[role]
    entry, left = checkpoint.entries[part], len(units) * unit
    if role == "shape":
        shape = (left, stored.shape[1]) if side == "out" else (stored.shape[0], left)
        return Output(part, entry.dtype, entry.shape, partial(_give, np.asarray(shape, entry.dtype)))
    if role == "group" and side == "in":
        groups = np.arange(left) // stored.scheme.group_size
        return Output(part, entry.dtype, (left,), partial(_give, groups.astype(entry.dtype)))
    axis = _find_axis(stored, role, entry.shape, side, experts, width)
    if axis is None:
        return copy(checkpoint, part)
    indices = _list_indices(axis, units, unit, entry.shape[axis.number])
    shape = (*entry.shape[: axis.number], len(indices), *entry.shape[axis.number + 1 :])
    return Output(part, entry.dtype, shape, partial(_take, part, axis.number, indices))


def _list_matrices(experts: ExpertTensors) -> Iterator[tuple[str, str | None]]:
    """The logical name of every matrix or bias, and the side that has the channels; None: neither has."""
    if experts.fused:
        yield from zip(experts.fused, ("out", "in", "out", None), strict=False)
    for *inputs, down in experts.separate:
        yield from ((name, "out") for name in inputs)
        yield down, "in"


def _shape_of_one(checkpoint: Checkpoint, experts: ExpertTensors, part: str) -> tuple[int, ...]:
    shape = checkpoint.entries[part].shape
    return shape[1:] if experts.fused else shape


def _find_axis(
    stored: StoredTensor, role: str, shape: tuple[int, ...], side: str | None, experts: ExpertTensors, width: int
) -> _Axis | None:
    """Where a part of one expert's matrix [out, in] or bias [out], of shape `shape`, has the channels; None: nowhere.

    Raises:
        InputError: the part's blocks, groups or words do not part the channels.
    """
    if side is None or role in ("global_scale", "shape", "group"):
        return None
    flipped = len(stored.shape) - bool(experts.fused) == 2 and experts.transposed != _is_transposed(stored.scheme)
    number = int((side == "in") != flipped)
    if len(shape) <= number or shape[number] == 1:
        return None  # one number for all channels
    copies = 2 if experts.fused and side == "out" else 1
    extent, rest = divmod(shape[number], copies)
    if extent == 1 and not rest:
        return None  # one number for all channels of gate, and one for those of up
    step = width // extent if extent else 0
    fits = not rest and extent * step == width and step in {1, *_list_steps(stored.scheme)}
    if not fits or (experts.interleaved and copies == 2 and step != 1):
        place = f"{stored.file}: {stored.parts[role]} {list(shape)}"
        raise InputError(f"{place} holds {width} channels in blocks that cannot be cut; prune experts, not width")
    return _Axis(number, step, copies, experts.interleaved)


def _is_transposed(scheme: Scheme) -> bool:
    return getattr(scheme, "transposed", False)


def _list_steps(scheme: Scheme) -> tuple[int, ...]:
    """How many neighbours of a row or a column a scheme may store as one."""
    match scheme:
        case Plain():
            return ()
        case Scaled(block=block):
            return block
        case Fp4(group_size=size):
            return (2, size)
        case PackedIntegers(bits=bits, group_size=size):
            return (32 // bits, size)


def _require_runs(checkpoint: Checkpoint, part: str, stored: StoredTensor) -> None:
    """Groups of inputs in another order than the inputs would each lose some."""
    group = checkpoint[part]
    if not np.array_equal(group, np.arange(group.size) // stored.scheme.group_size):
        raise InputError(f"{stored.file}: {part} orders the channels by activation; prune experts, not width")


def _list_indices(axis: _Axis, units: Sequence[int], unit: int, extent: int) -> np.ndarray:
    run = unit // axis.step
    indices = (np.asarray(units)[:, None] * run + np.arange(run)[None, :]).reshape(-1)
    if axis.copies == 1:
        return indices
    if axis.interleaved:
        return np.stack([2 * indices, 2 * indices + 1], axis=-1).reshape(-1)
    return np.concatenate([indices, indices + extent // 2])


def _take(name: str, axis: int, indices: np.ndarray, checkpoint: Checkpoint) -> Iterator[np.ndarray]:
    yield np.take(checkpoint[name], indices, axis=axis)


def _take_experts(
    name: str, experts: Sequence[int], axis: int, cuts: Sequence[np.ndarray | None], checkpoint: Checkpoint
) -> Iterator[np.ndarray]:
    entry = checkpoint.entries[name]
    buffer = np.empty(entry.size // entry.shape[0], np.uint8)
    for expert, indices in zip(experts, cuts, strict=True):
        one = checkpoint.read(name, buffer, row=expert)
        yield one if indices is None else np.take(one, indices, axis=axis)


def _pad(name: str, axis: int, extent: int, checkpoint: Checkpoint) -> Iterator[np.ndarray]:
    array = checkpoint[name]
    behind = (*array.shape[:axis], extent - array.shape[axis], *array.shape[axis + 1 :])
    yield np.concatenate([array, np.zeros(behind, array.dtype)], axis=axis)


def _give(array: np.ndarray, checkpoint: Checkpoint) -> Iterator[np.ndarray]:
    yield array
