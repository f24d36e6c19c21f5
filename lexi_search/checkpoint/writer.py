"""Writing of safetensors shards and their index, with at most one tensor in memory."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lexi_search.artifacts.files import json_bytes
from lexi_search.checkpoint.reader import DTYPES, INDEX, PACKED_BITS, SINGLE, Checkpoint

NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Output(NamedTuple):
    """A tensor to write. `make` reads and slices it; it yields arrays whose bytes are written one after the other."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[Checkpoint], Iterator[np.ndarray]]


def copy(checkpoint: Checkpoint, name: str, new: str | None = None) -> Output:
    """A tensor to write unchanged, under the name `new` if there is one."""
    entry = checkpoint.entries[name]
    return Output(new or name, entry.dtype, entry.shape, partial(_copy, name))


def _copy(name: str, checkpoint: Checkpoint) -> Iterator[np.ndarray]:
    yield checkpoint[name]


def write_shards(
    folder: Path,
    checkpoint: Checkpoint,
    changes: Mapping[str, Output | None],
    *,
    report: Callable[[float], None] = lambda share: None,
) -> tuple[int, int]:
    """Write the checkpoint's tensors into `folder`; `changes`: stored name -> what to write instead, or None.

    Shards keep their names and their tensors. `report` gets the share of all bytes that is done. Returns the bytes of
    all tensors, before and after; OSError where they cannot be written.
    """
    shards: dict[str, list[str]] = {}
    for name, entry in checkpoint.entries.items():
        shards.setdefault(entry.file.name, []).append(name)
    before = sum(entry.size for entry in checkpoint.entries.values())
    weight_map, total, done = {}, 0, 0
    for shard, names in sorted(shards.items()):
        outputs = {name: changes[name] if name in changes else copy(checkpoint, name) for name in names}
        written = {name: output for name, output in outputs.items() if output is not None}
        # By falling element size, as in safetensors' own writer: readers need every tensor aligned.
        order = sorted(written, key=lambda name: (-written[name].dtype.itemsize, checkpoint.entries[name].start))
        total += _write_shard(folder / shard, checkpoint, [written[name] for name in order])
        weight_map |= {written[name].name: shard for name in order}
        done += sum(checkpoint.entries[name].size for name in names)
        report(done / before)
    if (checkpoint.folder / INDEX).exists() or set(shards) != {SINGLE}:
        (folder / INDEX).write_bytes(json_bytes({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return before, total


def _write_shard(path: Path, checkpoint: Checkpoint, outputs: Sequence[Output]) -> int:
    header, position = {"__metadata__": {"format": "pt"}}, 0
    for output in outputs:
        bits = PACKED_BITS.get(output.dtype, 8 * output.dtype.itemsize)
        end = position + math.prod(output.shape) * bits // 8
        entry = {"dtype": NAMES[output.dtype], "shape": list(output.shape), "data_offsets": [position, end]}
        header[output.name], position = entry, end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for output in outputs:
            for array in output.make(checkpoint):
                file.write(array.tobytes())
    return position
