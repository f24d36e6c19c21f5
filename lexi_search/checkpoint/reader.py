"""An open checkpoint: a Hugging Face folder with its config and tensors. The only module that reads weights.

safetensors' own NumPy reader does not support FP8 and allocates a new array per tensor. The format is eight bytes of
header length, a JSON header, then data, so tensors are read by offset, into a buffer that the caller may reuse.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from lexi_search.artifacts.compensation import EXPORTED
from lexi_search.artifacts.files import open_regular, read_json_object
from lexi_search.checkpoint.config import Config, read_text_config
from lexi_search.checkpoint.folder import find_folder
from lexi_search.checkpoint.quantisation_config import SIDE_FILE
from lexi_search.checkpoint.tensors import TensorEntry, Tensors
from lexi_search.errors import InputError

SAMPLES, SAMPLE_BYTES = 1024, 4096  # of `sample_weights`

# safetensors' names for element types. Those of less than a byte lie packed: NumPy has no array of them.
DTYPES = {
    "BOOL": np.dtype(bool),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "C64": np.dtype(np.complex64),
    "F4": np.dtype(ml_dtypes.float4_e2m1fn),
    "F6_E2M3": np.dtype(ml_dtypes.float6_e2m3fn),
    "F6_E3M2": np.dtype(ml_dtypes.float6_e3m2fn),
}
PACKED_BITS = {DTYPES["F4"]: 4, DTYPES["F6_E2M3"]: 6, DTYPES["F6_E3M2"]: 6}
MAX_HEADER_BYTES = 100_000_000  # the limit of safetensors' own reader
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
ADAPTER = "adapter_"  # the beginning of the name of a file of LoRA weights
LFS = b"version "  # the beginning of a file that Git LFS has yet to fetch
NUMBERED = re.compile(r"(.+)-\d+-of-(\d{1,6})\.safetensors")


class Checkpoint(Mapping[str, np.ndarray]):
    """Name of a stored tensor -> array; `config` is the parsed `config.json`, `entries` says where tensors lie.

    Opening reads headers only. A lookup reads the tensor into newly allocated memory; `read` fills the caller's buffer.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], entries: Mapping[str, TensorEntry]):
        self.folder = folder
        self.config = config
        self.entries = entries

    @cached_property
    def tensors(self) -> Tensors:
        """The logical tensors; InputError for a quantisation that is not supported."""
        return Tensors(self.config, self.folder, self.entries)

    @cached_property
    def text_config(self) -> Config:
        """The language model's part of the config."""
        return read_text_config(self.config, self.folder)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.read(name, np.empty(self.entries[name].size, np.uint8))

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def measure(self, name: str, *, row: int | None = None) -> int:
        """Bytes of a tensor, or of one index of its first axis."""
        entry = self.entries[name]
        return entry.size if row is None else entry.size // entry.shape[0]

    def read(self, name: str, buffer: np.ndarray, *, row: int | None = None) -> np.ndarray:
        """Read a tensor into the front of `buffer` (uint8, 1-D, contiguous) and return a view of it as the tensor.

        With `row`, only that index of the tensor's first axis is read and returned. Numbers of less than a byte are
        returned as bytes. Threads may read at the same time.
        """
        entry, size = self.entries[name], self.measure(name, row=row)
        if row is not None:
            entry = entry._replace(shape=entry.shape[1:], start=entry.start + row * size, size=size)
        raw = buffer[: entry.size]
        try:
            with open(entry.file, "rb", buffering=0) as file:
                file.seek(entry.start)
                view, filled = memoryview(raw), 0
                while filled < entry.size:
                    count = file.readinto(view[filled:])
                    if not count:
                        raise InputError(f"{entry.file}: the file ends inside tensor {name}; download it again")
                    filled += count
        except OSError as error:
            raise InputError(f"{entry.file}: cannot be read ({error.strerror})") from error
        return raw if entry.dtype in PACKED_BITS else raw.view(entry.dtype).reshape(entry.shape)


def read_rows(checkpoint: Checkpoint, name: str, rows: Sequence[int]) -> np.ndarray:
    """Those indices of a stored tensor's first axis, which alone are read."""
    entry, size = checkpoint.entries[name], checkpoint.measure(name, row=0)
    raw = np.empty((len(rows), size), np.uint8)
    try:
        with open(entry.file, "rb", buffering=0) as file:
            for own, row in zip(raw, rows, strict=True):
                if os.preadv(file.fileno(), [own], entry.start + row * size) < size:
                    raise InputError(f"{entry.file}: the file ends inside tensor {name}; download it again")
    except OSError as error:
        raise InputError(f"{entry.file}: cannot be read ({error.strerror})") from error
    return raw.view(entry.dtype).reshape(len(rows), *entry.shape[1:])


def open_checkpoint(source: str | os.PathLike[str]) -> Checkpoint:
    """Open a folder with `config.json` and safetensors shards, or the hub id `owner/name` of one.

    Raises:
        InputError: no such folder or id, no or unreadable config, no shards, a damaged or truncated shard.
    """
    folder = find_folder(source, ["config.json", SIDE_FILE, INDEX, "*.safetensors", TOKENIZER, TOKENIZER_CONFIG])
    config = read_json_object(folder / "config.json", finite=False)
    return Checkpoint(folder, config, _read_entries(folder))


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Tensor name -> entry for one safetensors file, checked as strictly as by safetensors' own reader.

    Raises:
        InputError: header length beyond the file, header that is not JSON, unknown element type, offsets that
            overlap, leave holes, disagree with the shape, or end elsewhere than the file does (truncation).
    """
    try:
        with open_regular(file) as stream:
            total = os.fstat(stream.fileno()).st_size
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if start == LFS:
                raise InputError(f"{file}: a pointer of Git LFS, not the file itself; fetch that with git lfs pull")
            if total < 8 or length > min(total - 8, MAX_HEADER_BYTES):
                raise InputError(f"{file}: truncated or not safetensors (header of {length} bytes, file of {total})")
            raw = stream.read(length)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from error
    try:
        header = _parse_header(raw)
        entries = {name: _parse_entry(file, name, item, 8 + length) for name, item in header.items()}
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{file}: not a valid safetensors header ({error})") from error
    position = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].size)):
        if entry.start != position:
            raise InputError(f"{file}: tensor {name} overlaps its neighbour or leaves a hole before it")
        position += entry.size
    if position != total:
        state = "truncated" if position > total else "longer than its header says"
        raise InputError(f"{file}: {state} ({position} bytes expected, {total} found); download it again")
    return entries


def _parse_header(raw: bytes) -> dict[str, Any]:
    """The header without its metadata; ValueError or the like where it is not strict JSON."""
    header = json.loads(raw.decode(), object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant)
    metadata = header.pop("__metadata__", {})
    if not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("__metadata__ holds what is not text")
    if b"\\u" in raw:
        json.dumps([header, metadata], ensure_ascii=False).encode()  # fails for half of a surrogate pair
    return header


def _parse_entry(file: Path, name: str, item: Any, base: int) -> TensorEntry:
    if item["dtype"] not in DTYPES:
        raise InputError(f"{file}: tensor {name} has element type {item['dtype']!r}; known are {', '.join(DTYPES)}")
    dtype, shape, (start, end) = DTYPES[item["dtype"]], tuple(item["shape"]), item["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
        raise InputError(f"{file}: tensor {name} has a shape or offsets that are not whole numbers")
    if 8 * (end - start) != math.prod(shape) * PACKED_BITS.get(dtype, 8 * dtype.itemsize):
        raise InputError(f"{file}: tensor {name} of shape {list(shape)} does not fill its {end - start} bytes")
    return TensorEntry(file, dtype, shape, base + start, end - start)


def _read_entries(folder: Path) -> dict[str, TensorEntry]:
    """All tensors of the shards that the index names; without an index, of `model.safetensors`, or else of all shards.

    Of the index only the names of files count, as for vLLM: a tensor that it leaves out, or gives to another of its
    shards, is there; one that it names in vain is not. A tensor that is in two shards with different values is refused:
    vLLM takes the last of them, others the one that the index names.
    """
    if (folder / INDEX).exists():
        weight_map = read_json_object(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise InputError(f"{folder / INDEX}: no weight_map from tensor names to shard files")
        files = [_find_shard(folder, shard) for shard in sorted(set(weight_map.values()))]
    else:
        files = [folder / SINGLE] if (folder / SINGLE).exists() else _list_shards(folder)
    entries: dict[str, TensorEntry] = {}
    for file in files:
        header = read_header(file)
        for name in sorted(entries.keys() & header.keys()):
            if not _are_same(entries[name], header[name]):
                thing = f"tensor {name} is also in {entries[name].file.name}, with other values"
                raise InputError(f"{file}: {thing}, and engines differ in which they take; keep one of them")
        entries |= header
    return entries


def _are_same(one: TensorEntry, other: TensorEntry) -> bool:
    """Whether two stored tensors are of one type and shape, byte for byte."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    places = [Checkpoint(entry.file.parent, {}, {"": entry}) for entry in (one, other)]
    return places[0][""].tobytes() == places[1][""].tobytes()


def _list_shards(folder: Path) -> list[Path]:
    """The folder's safetensors files that are not an adapter's."""
    shards = [file for file in sorted(folder.glob("*.safetensors")) if _is_shard(file.name)]
    if not shards:
        others = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for file in folder.glob(pattern))
        there = f"the weights are in {others[0]}" if others else "no safetensors shards"
        raise InputError(f"{folder}: {there}; convert the checkpoint to safetensors first")
    return shards


def find_unnamed_shards(folder: Path) -> list[str]:
    """The safetensors files in the folder that its index does not name, and so are not read."""
    if not (folder / INDEX).exists():
        return []
    named = set(read_json_object(folder / INDEX)["weight_map"].values())
    names = (file.name for file in folder.glob("*.safetensors"))
    return sorted(name for name in names if name not in named and _is_shard(name))


def _is_shard(name: str) -> bool:
    """Whether a safetensors file holds weights of the model: not those of an adapter, nor corrections."""
    return not name.startswith(ADAPTER) and name != EXPORTED


def find_missing_shards(folder: Path) -> list[str]:
    """The shards that the folder lacks by the numbers in the others' names, NAME-00001-of-00003.

    They need not exist: some tools number wrongly. Where a tensor is missing, too, they say why.
    """
    names = {file.name for file in folder.glob("*.safetensors")}
    totals = {(match[1], match[2]) for match in map(NUMBERED.fullmatch, names) if match}
    wanted = (
        f"{stem}-{number:0{len(total)}}-of-{total}.safetensors"
        for stem, total in sorted(totals)
        for number in range(1, int(total) + 1)
    )
    return [name for name in wanted if name not in names]


def _find_shard(folder: Path, shard: str) -> Path:
    if Path(shard).name != shard:
        raise InputError(f"{folder / INDEX}: shard {shard!r} is not a plain file name")
    try:
        exists = (folder / shard).is_file()
    except OSError as error:
        raise InputError(f"{folder / INDEX}: shard {shard[:80]!r} cannot be found ({error.strerror})") from error
    if not exists:
        raise InputError(f"{folder / shard}: no such shard; {INDEX} names it, so the download is incomplete")
    return folder / shard


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a name occurs twice")
    return content


def sample_weights(checkpoint: Checkpoint) -> str:
    """Hex SHA-256 over the name, type and shape of every tensor and some bytes from the middle of `SAMPLES` of them.

    It distinguishes checkpoints with the same routers, such as a fine-tuned or a quantised one, in a moment: hashing
    every byte would take as long as profiling.
    """
    digest, names = hashlib.sha256(), sorted(checkpoint.entries)
    for name in names:
        entry = checkpoint.entries[name]
        digest.update(f"{name} {entry.dtype} {list(entry.shape)}\n".encode())
    for name in names[:: -(-len(names) // SAMPLES)]:
        file, _, _, start, size = checkpoint.entries[name]
        try:
            with open(file, "rb", buffering=0) as stored:
                stored.seek(start + max(size - SAMPLE_BYTES, 0) // 2)
                digest.update(stored.read(min(size, SAMPLE_BYTES)))
        except OSError as error:
            raise InputError(f"{file}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()
