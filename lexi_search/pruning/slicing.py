"""Stored tensors without some experts or some of their channels: for each tensor, the output to write instead.

A channel is a row of an expert's gate and up and a column of its down. Quantised tensors are cut as they are stored,
never dequantised: channels that share a block, a group or a word are kept or dropped together.
"""

import math
from collections.abc import Collection, Iterator, Sequence
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
    """What is left of one block: experts by their old numbers, and runs of `unit` channels of each (None: all)."""

    experts: tuple[int, ...]
    units: tuple[tuple[int, ...], ...] | None = None


class ExpertBlock(NamedTuple):
    """The experts of one MoE layer in a checkpoint, before they are cut.

    `stem` is what the names of separate experts begin with, such as `model.layers.0.mlp.experts.`. Channels are kept
    or dropped in runs of `unit`.
    """

    checkpoint: Checkpoint
    tensors: Tensors
    experts: ExpertTensors
    stem: str
    width: int
    unit: int = 1


class _Part(NamedTuple):
    """One stored part of a matrix or bias, and the side of the matrix that has the channels (None: neither)."""

    tensor: StoredTensor
    role: str
    side: str | None

    @property
    def name(self) -> str:
        return self.tensor.parts[self.role]


class _Axis(NamedTuple):
    """The axis of a stored part (of one expert) that has the channels: `step` of them to an index, `copies` times over.

    The second copy follows the first one or, if `interleaved`, index by index.
    """

    number: int
    step: int
    copies: int = 1
    interleaved: bool = False


def find_unit(block: ExpertBlock) -> int:
    """The number of neighbouring channels that are kept or dropped together; InputError where none can be dropped."""
    steps = {1}
    for part in _list_parts(block.tensors, block.experts):
        shape = block.checkpoint.entries[part.name].shape
        axis = _find_axis(block, part, shape[1:] if block.experts.fused else shape)
        steps |= {axis.step} if axis else set()
        if part.role in ("shape", "group") and block.experts.fused:
            file = part.tensor.file
            raise InputError(f"{file}: how to narrow tensor {part.name} is not known; prune experts, not width")
        if part.role == "group" and part.side == "in":
            _require_runs(block.checkpoint, part)
    return math.lcm(*steps)


def slice_experts(block: ExpertBlock, kept: Kept) -> dict[str, Output | None]:
    """Stored name -> what is written instead, or None, for the tensors of the experts.

    Raises:
        InputError: experts are to be narrower, and an unknown tensor stands beside theirs.
    """
    return (_slice_fused if block.experts.fused else _slice_separate)(block, kept)


def slice_rows(checkpoint: Checkpoint, name: str, kept: Sequence[int], num_experts: int) -> Output:
    """A tensor with one entry per expert, cut along the first axis of that extent; without one, the tensor as it is."""
    entry = checkpoint.entries[name]
    if num_experts not in entry.shape:
        return copy(checkpoint, name)
    axis = entry.shape.index(num_experts)
    shape = _resize(entry.shape, axis, len(kept))
    return Output(name=name, dtype=entry.dtype, shape=shape, make=partial(_take, name, axis, np.asarray(kept)))


def pad(checkpoint: Checkpoint, name: str, axis: int, extent: int) -> Output:
    """A tensor with zeros behind its last index of `axis`, up to `extent`."""
    entry = checkpoint.entries[name]
    shape = _resize(entry.shape, axis, extent)
    return Output(name=name, dtype=entry.dtype, shape=shape, make=partial(_pad, name, axis, extent))


def _slice_separate(block: ExpertBlock, kept: Kept) -> dict[str, Output | None]:
    checkpoint, experts = block.checkpoint, block.experts
    stored = _group_by_expert(block)
    planned: dict[str, Output | None] = {name: None for names in stored.values() for name in names}
    for new_number, expert in enumerate(kept.experts):
        old, new = f"{block.stem}{expert}.", f"{block.stem}{new_number}."
        names = stored[str(expert)]
        planned |= {name: copy(checkpoint, name, new + name.removeprefix(old)) for name in names}
        if kept.units is None:
            continue
        known = set()
        for part in _list_parts(block.tensors, experts._replace(separate=(experts.separate[expert],))):
            known.add(part.name)
            output = _slice_part(block, part, kept.units[new_number])
            planned[part.name] = output._replace(name=new + part.name.removeprefix(old))
        for name in names:
            if name not in known and math.prod(checkpoint.entries[name].shape) != 1:
                raise InputError(f"{checkpoint.entries[name].file}: how to narrow tensor {name} is not known")
    return planned


def _group_by_expert(block: ExpertBlock) -> dict[str, list[str]]:
    """Number of a separate expert -> names of its stored tensors."""
    names: dict[str, list[str]] = {}
    for name in block.checkpoint.entries:
        number, dot, _ = name.removeprefix(block.stem).partition(".")
        if name.startswith(block.stem) and dot and number.isdecimal():
            names.setdefault(number, []).append(name)
    return names


def _slice_fused(block: ExpertBlock, kept: Kept) -> dict[str, Output | None]:
    planned: dict[str, Output | None] = {}
    for part in _list_parts(block.tensors, block.experts):
        entry = block.checkpoint.entries[part.name]
        shape, axis = entry.shape[1:], None
        cuts: list[np.ndarray | None] = [None] * len(kept.experts)
        if kept.units is not None:
            axis = _find_axis(block, part, shape)
        if axis is not None:
            cuts = [_list_indices(axis, units, block.unit, shape[axis.number]) for units in kept.units]
            shape = _resize(shape, axis.number, len(cuts[0]))
        make = partial(_take_experts, part.name, kept.experts, axis.number if axis else 0, cuts)
        planned[part.name] = Output(name=part.name, dtype=entry.dtype, shape=(len(kept.experts), *shape), make=make)
    return planned | _slice_scales(block, kept, planned.keys())


def _slice_scales(block: ExpertBlock, kept: Kept, planned: Collection[str]) -> dict[str, Output | None]:
    """Scales beside fused experts, of weights or inputs: one number for each expert, or one for all."""
    sizes = {1, num_experts := block.tensors[block.experts.fused[0]].shape[0]}
    entries = block.checkpoint.entries
    scales = [name for name in entries if name.startswith(block.experts.fused) and name.endswith("_scale")]
    return {
        name: slice_rows(block.checkpoint, name, kept.experts, num_experts)
        for name in scales
        if name not in planned and math.prod(entries[name].shape) in sizes
    }


def _slice_part(block: ExpertBlock, part: _Part, units: tuple[int, ...]) -> Output:
    """One part of a separate expert's matrix with the channels of `units` only, under its old name."""
    entry, width = block.checkpoint.entries[part.name], len(units) * block.unit
    output = partial(Output, name=part.name, dtype=entry.dtype)
    if part.role == "shape":
        rows, columns = part.tensor.shape
        pair = (width, columns) if part.side == "out" else (rows, width)
        return output(shape=entry.shape, make=partial(_give, np.asarray(pair, entry.dtype)))
    if part.role == "group" and part.side == "in":
        groups = np.arange(width) // part.tensor.scheme.group_size
        return output(shape=(width,), make=partial(_give, groups.astype(entry.dtype)))
    axis = _find_axis(block, part, entry.shape)
    if axis is None:
        return copy(block.checkpoint, part.name)
    indices = _list_indices(axis, units, block.unit, entry.shape[axis.number])
    shape = _resize(entry.shape, axis.number, len(indices))
    return output(shape=shape, make=partial(_take, part.name, axis.number, indices))


def _list_parts(tensors: Tensors, experts: ExpertTensors) -> Iterator[_Part]:
    """The stored parts of every matrix and bias of the experts."""
    for name, side in _list_matrices(experts):
        tensor = tensors[name]
        yield from (_Part(tensor, role, side) for role in tensor.parts if role not in tensor.shared)


def _list_matrices(experts: ExpertTensors) -> Iterator[tuple[str, str | None]]:
    """The logical name of every matrix or bias, and the side that has the channels (None: neither)."""
    if experts.fused:
        sides = ("out", "out", "in") if experts.apart else ("out", "in", "out", None)
        yield from zip(experts.fused, sides, strict=False)
    for *inputs, down in experts.separate:
        yield from ((name, "out") for name in inputs)
        yield down, "in"


def _find_axis(block: ExpertBlock, part: _Part, shape: tuple[int, ...]) -> _Axis | None:
    """The axis that has the channels in a part, for one expert of shape `shape`, of a matrix [out, in] or bias [out].

    None where no axis has them.

    Raises:
        InputError: channels cannot be cut without cutting the part's blocks, groups or words.
    """
    stored, experts, width = part.tensor, block.experts, block.width
    if part.side is None or part.role in ("global_scale", "shape", "group"):
        return None
    flipped = len(stored.shape) - bool(experts.fused) == 2 and experts.transposed != _is_transposed(stored.scheme)
    number = int((part.side == "in") != flipped)
    if len(shape) <= number or shape[number] == 1:
        return None  # one number for all channels
    copies = 2 if experts.fused and not experts.apart and part.side == "out" else 1
    extent, rest = divmod(shape[number], copies)
    if extent == 1 and not rest:
        return None  # one number for all channels of gate, and one for those of up
    step = width // extent if extent else 0
    fits = not rest and extent * step == width and step in {1, *_list_steps(stored.scheme)}
    if not fits or (experts.interleaved and copies == 2 and step != 1):
        thing = f"{stored.file}: {part.name} {list(shape)}"
        raise InputError(f"{thing} holds {width} channels in blocks that cannot be cut; prune experts, not width")
    return _Axis(number=number, step=step, copies=copies, interleaved=experts.interleaved)


def _resize(shape: tuple[int, ...], axis: int, extent: int) -> tuple[int, ...]:
    return (*shape[:axis], extent, *shape[axis + 1 :])


def _is_transposed(scheme: Scheme) -> bool:
    return getattr(scheme, "transposed", False)


def _list_steps(scheme: Scheme) -> tuple[int, ...]:
    """The numbers of neighbours in a row or column that a scheme may store as one value."""
    match scheme:
        case Plain():
            return ()
        case Scaled(block=block):
            return block
        case Fp4(group_size=size):
            return (2, size)
        case PackedIntegers(bits=bits, group_size=size):
            return (32 // bits, size)


def _require_runs(checkpoint: Checkpoint, part: _Part) -> None:
    """Raise InputError unless groups are runs of inputs: else every group would lose some of its inputs."""
    group = checkpoint[part.name]
    if not np.array_equal(group, np.arange(group.size) // part.tensor.scheme.group_size):
        raise InputError(f"{part.tensor.file}: {part.name} orders the channels by activation; prune experts, not width")


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
    zeros = np.zeros(_resize(array.shape, axis, extent - array.shape[axis]), array.dtype)
    yield np.concatenate([array, zeros], axis=axis)


def _give(array: np.ndarray, checkpoint: Checkpoint) -> Iterator[np.ndarray]:
    yield array
