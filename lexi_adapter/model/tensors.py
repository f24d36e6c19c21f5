"""The headers of safetensors files, read without safetensors, and the stored bytes of their tensors hashed."""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from lexi_adapter.errors import AdapterError
from lexi_adapter.files import open_regular, parse_json, refuse_repeats

LFS = b"version "  # the beginning of a file that Git LFS has yet to fetch
MOST_HEADER_BYTES = 100_000_000  # the limit of safetensors' own reader
# safetensors' name of an element type -> its bits; lexi_search knows the same ones.
BITS = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


@dataclass(frozen=True)
class Tensor:
    """One tensor in a safetensors file: `size` bytes from `offset` of `path`."""

    path: Path
    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    offset: int
    size: int


def read_header(path: Path) -> dict[str, Tensor]:
    """Name -> tensor of one safetensors file. AdapterError as from `read_whole_header`."""
    return read_whole_header(path)[0]


def read_whole_header(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Name -> tensor of one safetensors file: eight bytes of header length (little endian), JSON, data; its metadata.

    Raises:
        AdapterError: no such file, or one that safetensors' own reader would refuse.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if start == LFS:
                raise AdapterError(f"{path}: a pointer of Git LFS, not the file itself; fetch that with git lfs pull")
            if size < 8 or length > min(size - 8, MOST_HEADER_BYTES):
                raise AdapterError(f"{path} is not a whole safetensors file; fetch it again")
            raw = file.read(length)
        header = parse_json(raw.decode(), object_pairs_hook=refuse_repeats, parse_constant=_refuse_constant)
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("__metadata__ holds what is not text")
        if b"\\u" in raw:
            json.dumps([header, metadata], ensure_ascii=False).encode()  # fails for half of a surrogate pair
        tensors = {name: _read_entry(path, 8 + length, name, entry) for name, entry in header.items()}
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise AdapterError(f"cannot read {path}: {reason}; fetch the checkpoint again") from error
    except (TypeError, KeyError, AttributeError) as error:
        raise AdapterError(f"{path} has no safetensors header ({error}); fetch it again") from error
    position = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].size)):
        if tensor.offset != position:
            raise AdapterError(f"{path}: tensor {name} overlaps its neighbour or leaves a hole; fetch it again")
        position += tensor.size
    if position != size:
        raise AdapterError(f"{path} has {size} bytes, its header says {position}; fetch it again")
    return tensors, metadata


def _read_entry(path: Path, base: int, name: str, entry: Mapping[str, Any]) -> Tensor:
    shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"tensor {name} has a shape or offsets that are not whole numbers")
    if entry["dtype"] not in BITS:
        raise ValueError(f"tensor {name} has element type {entry['dtype']!r}, which is not known")
    if 8 * (end - begin) != math.prod(shape) * BITS[entry["dtype"]]:
        raise ValueError(f"tensor {name} of shape {list(shape)} does not fill its {end - begin} bytes")
    return Tensor(path, entry["dtype"], shape, base + begin, end - begin)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def hash_tensors(tensors: Iterable[Tensor]) -> str:
    """Hex SHA-256 over the stored bytes of one tensor after the other."""
    digest = hashlib.sha256()
    for tensor in tensors:
        try:
            with open_regular(tensor.path) as file:
                file.seek(tensor.offset)
                digest.update(file.read(tensor.size))
        except OSError as error:
            raise AdapterError(f"cannot read {tensor.path}: {error.strerror}; fetch the checkpoint again") from error
    return digest.hexdigest()
