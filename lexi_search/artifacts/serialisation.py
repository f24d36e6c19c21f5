"""Reading, writing and hashing of the three kinds of file: profiles, allocations and cost tables.

All are JSON objects with the fields of their dataclass, plus "format" and "version". The bytes are canonical (keys
sorted as strings, indent 1, one trailing newline), so equal content gives an equal file and an equal hash. An object
that exists is valid: its constructor has checked the values, and reading also checks types and keys.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lexi_search import __version__
from lexi_search.artifacts.allocation import Allocation
from lexi_search.artifacts.codec import decode, encode, require, short
from lexi_search.artifacts.compensation import Maps, name_beside, read_maps, write_maps
from lexi_search.artifacts.cost_table import CostTable
from lexi_search.artifacts.files import Nature, json_bytes, read_json_object, write_atomically
from lexi_search.artifacts.identity import ModelIdentity
from lexi_search.artifacts.profile import Profile
from lexi_search.errors import InputError

VERSION = 1

Artifact = Profile | Allocation | CostTable

_FORMATS = {"lexi-profile": Profile, "lexi-allocation": Allocation, "lexi-cost": CostTable}
_FORMAT_OF = {cls: name for name, cls in _FORMATS.items()}


def to_document(artifact: Artifact) -> dict[str, Any]:
    """The JSON object in the artifact's file."""
    return {"format": _FORMAT_OF[type(artifact)], "version": VERSION, **encode(artifact)}


def to_bytes(artifact: Artifact) -> bytes:
    """The exact bytes of the artifact's file."""
    return json_bytes(to_document(artifact))


def describe_nature(cls: type, model: ModelIdentity | None = None) -> Nature:
    """The nature of the files of a class of artifacts, of `model` where it is known."""
    return Nature(_FORMAT_OF[cls], None if model is None else encode(model))


def sha256(artifact: Artifact) -> str:
    """Hex SHA-256 of the artifact's file."""
    return hashlib.sha256(to_bytes(artifact)).hexdigest()


def read_profile(path: str | os.PathLike[str]) -> Profile:
    """Read and check a profile file; InputError names the file and what is wrong with it."""
    return _read(path, "lexi-profile")


def read_allocation(path: str | os.PathLike[str]) -> Allocation:
    """Read and check an allocation file; InputError names the file and what is wrong with it."""
    return _read(path, "lexi-allocation")


def read_cost_table(path: str | os.PathLike[str]) -> CostTable:
    """Read and check a cost table file; InputError names the file and what is wrong with it."""
    return _read(path, "lexi-cost")


def read_artifact(path: str | os.PathLike[str]) -> Profile | Allocation:
    """Read and check a profile or an allocation, whichever its "format" says."""
    return _read(path, "lexi-profile", "lexi-allocation")


def write_profile(
    path: str | os.PathLike[str],
    profile: Profile,
    *,
    apart_from: Sequence[str | os.PathLike[str] | None] = (),
    force: bool = True,
) -> None:
    """Write a profile file, whole or not at all; InputError as from `write_atomically`."""
    write_atomically(path, to_bytes(profile), apart_from=apart_from, force=force)


def write_allocation(
    path: str | os.PathLike[str],
    allocation: Allocation,
    *,
    apart_from: Sequence[str | os.PathLike[str] | None] = (),
    force: bool = True,
) -> None:
    """Write an allocation file, whole or not at all.

    InputError as from `write_atomically`, and for an allocation that lacks the corrections that its losses are with:
    `write_allocations` writes them, too.
    """
    rank = allocation.made_by.get("compensation_rank")
    if rank is not None and allocation.compensation is None and allocation.corrected:
        raise InputError(
            f"cannot write {path}: the allocation's losses are with corrections, which it does not name; write it by "
            "write_allocations, with what read_profile_maps returns"
        )
    write_atomically(path, to_bytes(allocation), apart_from=apart_from, force=force)


def write_allocations(
    files: Sequence[str | os.PathLike[str]],
    allocations: Sequence[Allocation],
    maps: Maps | None,
    *,
    shared: str | os.PathLike[str] | None = None,
    apart_from: Sequence[str | os.PathLike[str] | None] = (),
    force: bool = True,
) -> list[Allocation]:
    """Write allocations, one to a file, and return them as they were written: each names its corrections.

    Those of `maps` that they use come first, into one file: `shared`, or one beside the only allocation. `maps` are
    None for allocations without any. InputError as from `write_atomically` and `write_maps`.
    """
    used = sorted({place for allocation in allocations for place in allocation.corrected})
    named = None
    if maps is not None and used:
        place = shared or name_beside(files[0])
        chosen = {key: maps[key] for key in used}
        named = write_maps(place, chosen, allocations[0].model, owners=files, apart_from=apart_from, force=force)
    written = [replace(one, compensation=named if one.corrected else None) for one in allocations]
    for file, allocation in zip(files, written, strict=True):
        write_allocation(file, allocation, apart_from=apart_from, force=force)
    return written


def read_profile_maps(path: str | os.PathLike[str], profile: Profile) -> Maps | None:
    """The corrections that the losses of the profile at `path` are with; None where it is without any.

    InputError where it does not name them, and as from `read_maps`.
    """
    if profile.settings.compensation_rank is not None and profile.compensation is None:
        raise InputError(f"{path}: its losses are with corrections, and it names no file of them; profile again")
    needed = [(layer, k) for layer in profile.layers for k in range(1, profile.model.top_k)]
    return read_maps(path, profile.compensation, profile.model, needed=needed)


def read_allocation_maps(path: str | os.PathLike[str], allocation: Allocation) -> Maps | None:
    """The corrections that the allocation at `path` uses; None without any. InputError as from `read_maps`."""
    return read_maps(path, allocation.compensation, allocation.model, needed=allocation.corrected)


def _read(path: str | os.PathLike[str], *formats: str) -> Any:
    document = read_json_object(path)
    try:
        name = document.pop("format", None)
        require(name in formats, f"its format is {short(name)}, expected {' or '.join(map(repr, formats))}")
        version = document.pop("version", None)
        require(
            type(version) is int and version == VERSION,
            f"its format version is {short(version)}, lexi-search {__version__} reads {VERSION}; make the file again",
        )
        return decode(_FORMATS[name], document, "")
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
