"""Model folders: found on this machine or fetched from the hub; new ones, built elsewhere and moved into place."""

import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from lexi_search.artifacts.files import read_json_object
from lexi_search.errors import InputError


def find_folder(source: str | os.PathLike[str], patterns: Sequence[str]) -> Path:
    """The folder `source`; where there is none and `source` is a hub id (`owner/name`), the hub's copy in the cache.

    From the hub only files matching `patterns` are fetched, by `huggingface_hub`. InputError where there is neither.
    """
    folder = Path(source)
    if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        return _fetch(str(source), patterns)
    if not folder.is_dir():
        reason = "is a file, not a folder" if folder.exists() else "no such folder"
        raise InputError(f"{source}: {reason}; name a folder with config.json and safetensors shards, or a hub id")
    return folder


def _fetch(hub_id: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(patterns)))
    except Exception as error:  # the hub client raises its own, its HTTP library's and the system's errors
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise InputError(f"{hub_id}: no such folder here, and not to be had from the hub ({reason})") from error


# Files without a link in a new folder. vLLM would read params.json, of Mistral's own format, rather than config.json.
UNLINKED = frozenset({"config.json", "params.json"})


def require_folder(model: str) -> Path:
    """The absolute path of the folder `model`; InputError where there is none on this machine."""
    source = Path(os.path.abspath(model))
    if not source.is_dir():
        raise InputError(f"{model}: no such folder; links need the model on this machine, so download it first")
    return source


def _is_export(folder: Path) -> bool:
    try:
        return "lexi_allocation" in read_json_object(folder / "config.json", finite=False)
    except InputError:
        return False


def _check_target(target: Path, source: Path, force: bool) -> None:
    if target == source or target in source.parents or source in target.parents:
        raise InputError(f"cannot write {target}: it overlaps the model folder {source}; choose another place")
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(f"cannot write {target}: not a folder; choose another name")
    if not any(target.iterdir()):
        return
    if not _is_export(target):
        raise InputError(f"cannot write {target}: not empty and no earlier export; choose another name or remove it")
    if not force:
        raise InputError(f"cannot write {target}: an earlier export is there; --force replaces it")


def _move_into_place(building: Path, target: Path) -> None:
    earlier = building.with_suffix(".old")
    if target.exists():
        target.rename(earlier)
    try:
        building.rename(target)
    except BaseException:
        if earlier.exists():
            earlier.rename(target)
        raise
    shutil.rmtree(earlier, ignore_errors=True)


@contextmanager
def build_folder(
    folder: str, model: str, *, unlinked: Collection[str] = UNLINKED, force: bool = False
) -> Iterator[Path]:
    """A temporary folder with links to the entries of `model`, but hidden ones and those matching `unlinked`.

    It becomes `folder` when the `with` block ends, and is removed if the block raises. `force` replaces an earlier
    export.

    Raises:
        InputError: no folder `model`; `folder` overlaps it, holds other things, or cannot be written.
    """
    source, target = require_folder(model), Path(os.path.realpath(folder))
    _check_target(target, Path(os.path.realpath(model)), force)
    building = target.parent / f".lexi-{secrets.token_hex(8)}.tmp"
    try:
        building.mkdir()
        for entry in sorted(source.iterdir()):
            if not any(fnmatch(entry.name, pattern) for pattern in (*unlinked, ".*")):
                (building / entry.name).symlink_to(entry)
        yield building
        _move_into_place(building, target)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror} ({target.parent})") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
