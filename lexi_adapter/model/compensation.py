"""The file of corrections that an allocation names, checked without torch and read into it.

A safetensors file whose metadata name the model. `layers.{layer}.top_k.{k}.A` [rank, 3 * experts] and `.B`
[hidden, rank] are bfloat16, `.c` [hidden] is float32; those of the layers and k that the allocation uses must be there,
and others may be. `serving.kernels.correction` says what they are for.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from lexi_adapter.allocation import Allocation
from lexi_adapter.errors import AdapterError, AllocationError
from lexi_adapter.files import open_regular
from lexi_adapter.model.tensors import Tensor, read_whole_header

if TYPE_CHECKING:
    import torch

FORMAT, VERSION = "lexi-compensation", "1"
EXPORTED = "lexi_compensation.safetensors"  # its name in an exported folder: no shard of the model
MOST_BYTES = 1 << 34
DTYPES = {"A": "BF16", "B": "BF16", "c": "F32"}
REMEDY = "put the file there that was written with the allocation, or search again"


class Correction(NamedTuple):
    """The map of one layer at its k, as stored: see `serving.kernels.correction`."""

    A: "torch.Tensor"
    B: "torch.Tensor"
    c: "torch.Tensor"


def find_file(allocation: Allocation) -> Path:
    """The path of the file that the allocation's compensation names.

    Raises:
        AllocationError: nothing says in which folder the file is.
    """
    file = allocation.compensation.file
    if allocation.folder is None:
        raise AllocationError(
            f"the allocation names {file} beside it, and it is not known where that is; give the allocation as a file"
        )
    return Path(allocation.folder) / file


def locate(allocation: Allocation, folder: str | os.PathLike[str]) -> Allocation:
    """The allocation, whose file lies in an existing `folder` where nothing else says so."""
    if allocation.compensation is None or allocation.folder is not None or not os.path.isdir(folder):
        return allocation
    return replace(allocation, folder=os.path.abspath(folder))


def locate_on_hub(allocation: Allocation, hub_id: str, *, revision: str | None) -> Allocation:
    """The allocation, whose file is fetched beside the config of a hub id; OSError where it is not there."""
    from transformers.utils import cached_file

    file = cached_file(hub_id, allocation.compensation.file, revision=revision)
    return replace(allocation, folder=os.path.dirname(os.path.abspath(file)))


def covers(allocation: Allocation, top_k: Mapping[int, int]) -> bool:
    """Whether the file of a checked allocation's compensation has the maps for other k of the same model, too."""
    names = read_whole_header(find_file(allocation))[0].keys()
    needed = ((layer, k) for layer, k in top_k.items() if k < allocation.model.top_k)
    return all(f"layers.{layer}.top_k.{k}.{part}" in names for layer, k in needed for part in DTYPES)


def check_compensation(allocation: Allocation, *, hidden: int | None = None) -> int:
    """Check the whole file of an allocation's compensation; returns its size in bytes, 0 without one.

    Args:
        allocation: with or without a compensation.
        hidden: the model's hidden size, where it is known; it must be the same in all layers in any case.

    Raises:
        AllocationError: the file is missing, or not the allocation's, or holds numbers that are not finite: one line
            with the file and what to do.
    """
    if allocation.compensation is None:
        return 0
    _read_parts(allocation, hidden)
    return find_file(allocation).stat().st_size


def read_corrections(allocation: Allocation, *, hidden: int | None = None) -> dict[int, Correction]:
    """Decoder-layer index -> correction, for the layers whose k is smaller than the model's own; {} without any.

    Raises:
        AllocationError: as `check_compensation`.
    """
    if allocation.compensation is None:
        return {}
    import torch

    types = {"BF16": torch.bfloat16, "F32": torch.float32}
    return {
        layer: Correction(
            *(torch.frombuffer(data, dtype=types[tensor.dtype]).view(tensor.shape) for tensor, data in parts)
        )
        for layer, parts in _read_parts(allocation, hidden).items()
    }


def _read_parts(allocation: Allocation, hidden: int | None) -> dict[int, list[tuple[Tensor, bytearray]]]:
    """Layer -> A, B and c of the allocation's k there, each with its bytes; all of them checked."""
    path = find_file(allocation)
    _check_bytes(path, allocation.compensation.sha256)
    try:
        tensors, metadata = read_whole_header(path)
    except AdapterError as error:
        _refuse(path, str(error).rpartition("; ")[0])
    _check_metadata(allocation, metadata, path)
    parts = {}
    for layer, found in _find_parts(allocation, tensors, path, hidden).items():
        parts[layer] = [(tensor, _read_finite(tensor, f"{part} of layer {layer}")) for part, tensor in found.items()]
    return parts


def _read_finite(tensor: Tensor, name: str) -> bytearray:
    """The bytes of a tensor whose numbers are all finite: in none are all bits of the exponent set."""
    import numpy as np

    with open_regular(tensor.path) as file:
        file.seek(tensor.offset)
        data = bytearray(file.read(tensor.size))
    kind, exponent = {"BF16": ("<u2", 0x7F80), "F32": ("<u4", 0x7F800000)}[tensor.dtype]
    if np.any(np.frombuffer(data, kind) & exponent == exponent):
        _refuse(tensor.path, f"{name} holds numbers that are not finite")
    return data


def _check_bytes(path: Path, sha256: str) -> None:
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MOST_BYTES:
                _refuse(path, f"larger than {MOST_BYTES >> 30} GiB")
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        _refuse(path, f"cannot be read ({getattr(error, 'strerror', None) or error})")
    if found != sha256:
        _refuse(path, f"not the file that the allocation names: its SHA-256 is {found[:12]}.., not {sha256[:12]}..")


def _check_metadata(allocation: Allocation, metadata: Mapping[str, str], path: Path) -> None:
    model = allocation.model
    expected = {
        "format": FORMAT,
        "version": VERSION,
        "model_type": model.model_type,
        "router_sha256": model.router_sha256,
        "rank": str(allocation.compensation.rank),
    }
    for name, value in expected.items():
        if metadata.get(name) != value:
            _refuse(path, f"its {name} is {str(metadata.get(name))[:80]!r}, the allocation's is {value!r}")


def _find_parts(
    allocation: Allocation, tensors: Mapping[str, Tensor], path: Path, hidden: int | None
) -> dict[int, dict[str, Tensor]]:
    """Layer -> "A", "B" and "c" of the allocation's k there."""
    parts = {}
    for layer, k in _list_used(allocation):
        names = {part: f"layers.{layer}.top_k.{k}.{part}" for part in DTYPES}
        missing = next((name for name in names.values() if name not in tensors), None)
        if missing:
            _refuse(path, f"has no {missing}, which the allocation's top-k of layer {layer} needs")
        found = {part: tensors[name] for part, name in names.items()}
        hidden = next(iter(found["c"].shape), 0) if hidden is None else hidden
        rank = allocation.compensation.rank
        shapes = {"A": (rank, 3 * allocation.model.num_experts), "B": (hidden, rank), "c": (hidden,)}
        for part, tensor in found.items():
            if (tensor.dtype, tensor.shape) != (DTYPES[part], shapes[part]):
                is_there, wanted = (tensor.dtype, list(tensor.shape)), (DTYPES[part], list(shapes[part]))
                _refuse(path, f"{names[part]} is {is_there[0]} {is_there[1]}, {wanted[0]} {wanted[1]} expected")
        parts[layer] = found
    return parts


def _list_used(allocation: Allocation) -> Iterator[tuple[int, int]]:
    return ((layer, k) for layer, k in sorted(allocation.top_k.items()) if k < allocation.model.top_k)


def _refuse(path: Path, reason: str) -> NoReturn:
    raise AllocationError(f"compensation {path}: {reason}; {REMEDY}")
