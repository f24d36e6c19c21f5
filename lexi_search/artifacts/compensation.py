"""Corrections of layers at smaller k, in a safetensors file beside the profile or the allocation that names it.

`layers.{layer}.top_k.{k}.A` [rank, 3 * num_experts] and `.B` [hidden, rank] are bfloat16, `.c` [hidden] is float32.
Metadata say which model they are of. `layers.moe.correct` says what they are for, `lexi_adapter` serves them.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lexi_search.artifacts.codec import require, short
from lexi_search.artifacts.files import check_writable, open_regular, parse_json, read_json_object, write_atomically
from lexi_search.artifacts.identity import ModelIdentity
from lexi_search.errors import InputError

FORMAT, VERSION, SUFFIX = "lexi-compensation", "1", ".safetensors"
EXPORTED = f"lexi_compensation{SUFFIX}"  # its name in an exported folder
SHARED = f"compensation{SUFFIX}"  # for all allocations of a folder
TYPES = {"A": "BF16", "B": "BF16", "c": "F32"}  # of the parts of a correction
SIZES = {"BF16": 2, "F32": 4}  # bytes of an element
MOST_BYTES, MOST_HEADER_BYTES = 1 << 34, 100_000_000
REMEDY = "put the file there that was written with it, or make both again"
_NAME = re.compile(r"layers\.(0|[1-9]\d{0,8})\.top_k\.([1-9]\d{0,8})\.([ABc])")


@dataclass(frozen=True)
class CompensationFile:
    """The file of corrections that a profile or an allocation names: `file` lies in the same folder."""

    file: str
    rank: int
    sha256: str

    def __post_init__(self) -> None:
        require(
            _is_bare(self.file) and self.file.endswith(SUFFIX),
            f"compensation file is {short(self.file)}, expected the bare name of a {SUFFIX} file",
        )
        require(self.rank >= 1, f"compensation rank is {self.rank}, at least 1 expected")
        whole = re.fullmatch("[0-9a-f]{64}", self.sha256)
        require(whole, f"compensation sha256 is {short(self.sha256)}, expected 64 digits of 0-9 and a-f")


def _is_bare(name: str) -> bool:
    """Whether a name is one of a file in the same folder, that any system can hold and show."""
    return name == os.path.basename(name) and "\\" not in name and not name.startswith(".") and name.isprintable()


class Correction(NamedTuple):
    """B A phi + c for one layer and k, as stored: A [rank, features] and B [hidden, rank] bfloat16, c [hidden] float32.

    NumPy arrays. phi is of `layers.moe.find_features`.
    """

    A: Any
    B: Any
    c: Any


Maps = Mapping[tuple[int, int], Correction]  # by decoder layer and k


def name_beside(path: str | os.PathLike[str]) -> Path:
    """Where the corrections of the profile or allocation at `path` lie, unless several share them."""
    path = Path(path)
    return path.with_name(f"{path.stem if path.suffix == '.json' else path.name}{SUFFIX}")


def format_maps(maps: Maps, model: ModelIdentity) -> bytes:
    """The exact bytes of the file."""
    (first, *_) = maps.values()
    header: dict[str, Any] = {
        "__metadata__": {
            "format": FORMAT,
            "model_type": model.model_type,
            "rank": str(len(first.A)),
            "router_sha256": model.router_sha256,
            "version": VERSION,
        }
    }
    parts, end = [], 0
    for (layer, k), correction in sorted(maps.items()):
        for name, array in zip(Correction._fields, correction, strict=True):
            parts.append(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
            start, end = end, end + len(parts[-1])
            entry = {"dtype": TYPES[name], "shape": list(array.shape), "data_offsets": [start, end]}
            header[f"layers.{layer}.top_k.{k}.{name}"] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


class _Entry(NamedTuple):
    """A tensor as the header of a file describes it: its bytes are those from `start` to `end` behind the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def parse_maps(
    data: bytes, model: ModelIdentity, *, needed: Collection[tuple[int, int]] | None = None, rank: int | None = None
) -> Maps:
    """The corrections in the bytes of a file: those that are `needed`, or all; InputError says what is wrong.

    They are of `rank`, or of the one that the file says.
    """
    metadata, entries, body = _read_header(data)
    rank = rank or int(metadata["rank"] if re.fullmatch(r"[1-9]\d{0,8}", metadata.get("rank", "")) else 0)
    known = {"format": FORMAT, "version": VERSION, "model_type": model.model_type}
    known |= {"router_sha256": model.router_sha256, "rank": str(rank)}
    for name, value in known.items():
        require(metadata.get(name) == value, f"its {name} is {short(metadata.get(name))}, expected {short(value)}")
    places = {_find_place(name, model) for name in entries} if needed is None else set(needed)
    require(places or needed is not None, "it holds no corrections")
    maps, hidden = {}, None
    for layer, k in sorted(places):
        names = {part: f"layers.{layer}.top_k.{k}.{part}" for part in Correction._fields}
        missing = [name for name in names.values() if name not in entries]
        require(not missing, f"it lacks {missing[0]}" if missing else "")
        hidden = hidden or next(iter(entries[names["c"]].shape), 0)
        shapes = {"A": (rank, 3 * model.num_experts), "B": (hidden, rank), "c": (hidden,)}
        for part, name in names.items():
            found, wanted = entries[name][:2], (TYPES[part], shapes[part])
            require(found == wanted, f"{name} is {found[0]} {list(found[1])}, expected {wanted[0]} {list(wanted[1])}")
        maps[layer, k] = Correction(*(_read_array(name, entries[name], body) for name in names.values()))
    return maps


def _read_header(data: bytes) -> tuple[dict[str, str], dict[str, _Entry], memoryview]:
    """Metadata, entries by name, and all that follows the header; InputError unless these fill the file."""
    length = int.from_bytes(data[:8], "little")
    require(8 <= len(data) and length <= min(len(data) - 8, MOST_HEADER_BYTES), "not a whole safetensors file")
    try:
        header = parse_json(data[8 : 8 + length])
        metadata = header.pop("__metadata__")
        json.dumps(header, ensure_ascii=False).encode()  # fails for half of a surrogate pair
        entries = {
            name: _Entry(entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
            for name, entry in header.items()
        }
        require(all(isinstance(text, str) for text in metadata.values()), "its __metadata__ holds what is not text")
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"not a whole safetensors file ({str(error)[:80]})") from error
    for name, entry in entries.items():
        numbers = (*entry.shape, entry.start, entry.end)
        whole = all(type(number) is int and number >= 0 for number in numbers)
        known = isinstance(entry.dtype, str) and entry.dtype in SIZES
        require(whole and known, f"tensor {short(name)} is of no correction: {short(entry[:2])}")
        size = math.prod(entry.shape) * SIZES[entry.dtype]
        require(size == entry.end - entry.start, f"tensor {short(name)} does not fill its bytes")
    position, body = 0, memoryview(data)[8 + length :]
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        require(entry.start == position, f"tensor {short(name)} overlaps its neighbour or leaves a hole")
        position = entry.end
    require(position == len(body), f"it has {len(body)} bytes of tensors, its header says {position}")
    return metadata, entries, body


def _find_place(name: str, model: ModelIdentity) -> tuple[int, int]:
    """The layer and k of a tensor's correction."""
    match = _NAME.fullmatch(name)
    require(match, f"it has a tensor {short(name)}, which is of no correction")
    layer, k = int(match[1]), int(match[2])
    require(layer in model.moe_layers and k < model.top_k, f"{name} is of no layer and k that can be corrected")
    return layer, k


def _read_array(name: str, entry: _Entry, body: memoryview) -> Any:
    import ml_dtypes
    import numpy as np

    dtype = np.dtype({"BF16": ml_dtypes.bfloat16, "F32": np.float32}[entry.dtype])
    stored = np.frombuffer(body[entry.start : entry.end], dtype.newbyteorder("<"))
    require(np.isfinite(stored.astype(np.float32)).all(), f"{name} holds numbers that are not finite")
    return stored.astype(dtype, copy=False).reshape(entry.shape)


def read_maps(
    path: str | os.PathLike[str],
    named: CompensationFile | None,
    model: ModelIdentity,
    *,
    needed: Collection[tuple[int, int]] | None = None,
) -> Maps | None:
    """The corrections that the profile or allocation at `path` has `named`, those that are `needed` or all.

    None where it names none.

    Raises:
        InputError: the file is missing, another than the one that was named, damaged, or another model's.
    """
    if named is None:
        return None
    place = Path(path).parent / named.file
    try:
        with open_regular(place) as file:
            require(os.fstat(file.fileno()).st_size <= MOST_BYTES, f"{place}: larger than {MOST_BYTES >> 30} GiB")
            data = file.read()
    except OSError as error:
        raise InputError(f"{place}, which {path} names, cannot be read ({error.strerror}); {REMEDY}") from error
    found = hashlib.sha256(data).hexdigest()
    if found != named.sha256:
        raise InputError(f"{place} is not the file that {path} names (its SHA-256 is {found[:12]}..); {REMEDY}")
    try:
        maps = parse_maps(data, model, needed=needed, rank=named.rank)
    except InputError as error:
        raise InputError(f"{place}: {error}; {REMEDY}") from error
    return maps


def merge_maps(parts: Mapping[str, Maps]) -> Maps:
    """The corrections of all `parts` (name -> maps); InputError where two of them differ in one layer and k."""
    merged: dict[tuple[int, int], Correction] = {}
    owners: dict[tuple[int, int], str] = {}
    for name, maps in parts.items():
        for (layer, k), correction in maps.items():
            first, owner = merged.setdefault((layer, k), correction), owners.setdefault((layer, k), name)
            if any(one.tobytes() != other.tobytes() for one, other in zip(correction, first, strict=True)):
                where = f"the correction of layer {layer} at k = {k} differs from that in {owner}"
                raise InputError(f"{name}: {where}; leave one of them out")
    return merged


def list_maps(path: str | os.PathLike[str]) -> tuple[Mapping[str, str], list[tuple[int, int]]]:
    """What a file of corrections says of itself, and the (layer, k) that it has, by its header alone."""
    header = _peek_header(path)
    require(header is not None, f"{path}: no file of corrections, or not a whole one")
    found = map(_NAME.fullmatch, header)
    return header["__metadata__"], sorted({(int(name[1]), int(name[2])) for name in found if name})


def check_maps_place(
    path: str | os.PathLike[str],
    model: ModelIdentity,
    *,
    owners: Sequence[str | os.PathLike[str]] = (),
    apart_from: Sequence[str | os.PathLike[str] | None] = (),
    force: bool = True,
) -> None:
    """Raise InputError where no corrections can be written to `path`, which the JSON files `owners` are to name.

    Without `force` that is also where something else is there, corrections of another model among it, or those that
    another JSON file in the folder names.
    """
    try:
        CompensationFile(Path(path).name, 1, "0" * 64)
    except InputError as error:
        raise InputError(f"cannot write {path}: {error}; choose another name") from error
    check_writable(path, apart_from=apart_from)
    if force or not os.path.exists(path) or not os.path.getsize(path):
        return
    header = _peek_header(path)
    if header is None or header["__metadata__"].get("router_sha256") != model.router_sha256:
        found = "another file" if header is None else "a file of another model"
        raise InputError(f"cannot write {path}: there is {found}; choose another name, or replace it with --force")
    for other in sorted(set(Path(path).parent.glob("*.json")) - set(map(Path, owners))):
        if _find_named(other) == Path(path).name:
            raise InputError(
                f"cannot write {path}: {other} names it and would lose its corrections; choose another name, or "
                "replace it with --force"
            )


def _peek_header(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The header of a file of corrections; None for any other."""
    try:
        with open_regular(path) as file:
            header = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), 1 << 28)))
            told = header["__metadata__"]
            return header if told["format"] == FORMAT and {"rank", "model_type"} <= told.keys() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _find_named(path: Path) -> str | None:
    """The file of corrections that a JSON file names, if it is one that can be read."""
    try:
        named = read_json_object(path).get("compensation")
    except InputError:
        return None
    return named.get("file") if isinstance(named, dict) else None


def write_maps(
    path: str | os.PathLike[str],
    maps: Maps,
    model: ModelIdentity,
    *,
    owners: Sequence[str | os.PathLike[str]] = (),
    apart_from: Sequence[str | os.PathLike[str] | None] = (),
    force: bool = True,
) -> CompensationFile | None:
    """Write corrections to `path`, whole or not at all, and return what is to name them; None where there are none.

    InputError as from `check_maps_place`.
    """
    if not maps:
        return None
    check_maps_place(path, model, owners=owners, apart_from=apart_from, force=force)
    data = format_maps(maps, model)
    write_atomically(path, data, apart_from=apart_from)
    return name_maps(path, maps, data)


def name_maps(path: str | os.PathLike[str], maps: Maps, data: bytes) -> CompensationFile:
    """What names the file at `path` with these corrections, in the bytes `data`."""
    (first, *_) = maps.values()
    return CompensationFile(Path(path).name, len(first.A), hashlib.sha256(data).hexdigest())
