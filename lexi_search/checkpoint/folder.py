"""Model folders: found on this machine or fetched from the hub; new ones, built elsewhere and moved into place."""

import ctypes
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from lexi_search.artifacts.compensation import EXPORTED
from lexi_search.artifacts.files import json_bytes, lock_file, read_json_object
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


RECORD = "lexi-export.json"
# Files without a link in a new folder. vLLM would read params.json, of Mistral's own format, rather than config.json.
UNLINKED = frozenset({"config.json", "params.json", RECORD, EXPORTED})
LARGE = 2**26  # bytes of a file that is not read for the record
LOCK, BUILDING, EARLIER = "lock", "new", "old"  # entries of the folder in which a new one is built


def require_folder(model: str) -> Path:
    """The absolute path of the folder `model`; InputError where there is none on this machine."""
    source = Path(os.path.abspath(model))
    if not source.is_dir():
        raise InputError(f"{model}: no such folder; links need the model on this machine, so download it first")
    return source


def write_record(folder: Path) -> None:
    """Record in an exported folder what it holds, so that `force` knows it again."""
    (folder / RECORD).write_bytes(json_bytes({"format": "lexi-export", "version": 1, "entries": _list_entries(folder)}))


def _list_entries(folder: Path, prefix: str = "") -> dict[str, str]:
    """What each entry of a folder is, but the record: the target of a link, the hash of a file, by its relative path.

    Of a large file, which only an export with copies has, size and time: a hash would read all of the weights.
    """
    entries = {}
    for entry in sorted(folder.iterdir()):
        name = prefix + entry.name
        if entry.is_symlink():
            entries[name] = f"link to {os.readlink(entry)}"
        elif entry.is_dir():
            entries |= {name: "folder", **_list_entries(entry, f"{name}/")}
        elif name != RECORD and entry.is_file() and (status := entry.stat()).st_size < LARGE:
            entries[name] = _hash(entry)
        elif name != RECORD:
            entries[name] = f"{status.st_size} bytes of {status.st_mtime_ns}" if entry.is_file() else "other"
    return entries


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _check_replaceable(target: Path) -> None:
    """Raise InputError unless the folder `target` is an earlier export, with nothing else in it and nothing changed."""
    try:
        recorded = read_json_object(target / RECORD).get("entries") if not (target / RECORD).is_symlink() else None
    except InputError:
        recorded = None
    if not isinstance(recorded, dict):
        raise InputError(f"cannot write {target}: not empty and no earlier export; choose another name or remove it")
    actual = _list_entries(target)
    changed = sorted(name for name in actual | recorded if actual.get(name) != recorded.get(name))
    if changed:
        raise InputError(
            f"cannot write {target}: {changed[0]} there is not as the earlier export left it; choose another name, or "
            "remove the folder"
        )


def _check_target(target: Path, source: Path, force: bool) -> None:
    if target == source or target in source.parents or source in target.parents:
        raise InputError(f"cannot write {target}: it overlaps the model folder {source}; choose another place")
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(f"cannot write {target}: not a folder; choose another name")
    if not any(target.iterdir()):
        return
    _check_replaceable(target)
    if not force:
        raise InputError(f"cannot write {target}: an earlier export is there; --force replaces it")


def _move_into_place(building: Path, target: Path, earlier: Path, force: bool) -> None:
    """Rename `building` to `target`, where nothing or an empty folder is, or with `force` an earlier export.

    That ends at `building` or at `earlier`.
    """
    try:
        building.rename(target)  # an empty folder gives way, and nothing else
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
    if not force or not target.is_dir():
        raise InputError(f"cannot write {target}: it was made while this ran; choose another name or remove it")
    if _exchange(building, target):
        replaced = building
    else:  # a kill between the two leaves `earlier`, which the next run moves back
        target.rename(earlier)
        replaced = earlier
    try:
        _check_replaceable(replaced)  # what came into it while this ran
        if replaced == earlier:
            building.rename(target)
    except BaseException as error:
        if replaced == earlier:
            earlier.rename(target)
        else:
            _exchange(building, target)
        if isinstance(error, InputError):
            raise InputError(str(error).replace(str(replaced), str(target))) from error
        raise


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of Linux
    if rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))


@contextmanager
def _take_place(folder: str, target: Path) -> Iterator[Path]:
    """A folder beside `target` for all that comes before it is there, locked against other runs to `target`.

    What a run that was killed left in it is removed, or moved back where that was an earlier export.
    """
    place = target.parent / f".lexi-{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]}.tmp"
    place.mkdir(exist_ok=True)
    lock = lock_file(place / LOCK)
    if lock is None:
        raise InputError(f"another run is writing {folder}; wait for it to end, or name another folder with -o")
    try:
        if (place / EARLIER).exists() and not os.path.lexists(target):
            (place / EARLIER).rename(target)
        for name in (BUILDING, EARLIER):
            shutil.rmtree(place / name, ignore_errors=True)
        yield place
    finally:
        for name in (BUILDING, EARLIER):
            shutil.rmtree(place / name, ignore_errors=True)
        try:
            (place / LOCK).unlink(missing_ok=True)
            with suppress(OSError):
                place.rmdir()
        finally:
            os.close(lock)


def _copy(entries: Sequence[Path], building: Path) -> None:
    """Copy files and folders, what links lead to included. InputError, before anything, where the disk lacks room."""
    files = [path for entry in entries for path in (entry.rglob("*") if entry.is_dir() else [entry])]
    needed, free = sum(path.stat().st_size for path in files if path.is_file()), shutil.disk_usage(building).free
    if needed > free:
        raise InputError(
            f"copies need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free in {building.parents[1]}; make room, or "
            "export links"
        )
    for entry in entries:
        if entry.is_dir():
            shutil.copytree(entry, building / entry.name)
        else:
            shutil.copy2(entry, building / entry.name)


def _list_linked(source: Path, unlinked: Collection[str]) -> list[Path]:
    """The entries of a model folder that a new folder links to."""
    return [
        entry
        for entry in sorted(source.iterdir())
        if not any(fnmatch(entry.name, pattern) for pattern in (*unlinked, ".*"))
    ]


def _find_origin(source: Path, target: Path) -> Path:
    """The folder `source` as links in the folder `target` name it: relatively where both lie side by side."""
    return Path("..", source.name) if target.parent == Path(os.path.realpath(source.parent)) else source


def is_export(folder: str, model: str, config: Mapping[str, Any], *, files: Mapping[str, bytes]) -> bool:
    """Whether `folder` is the folder `model` with this config.json and these `files`, as `build_folder` makes it."""
    if not os.path.isdir(folder):
        return False
    source = require_folder(model)
    origin = _find_origin(source, Path(os.path.realpath(folder)))
    links = {entry.name: f"link to {origin / entry.name}" for entry in _list_linked(source, UNLINKED)}
    links |= {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    entries = _list_entries(Path(folder))
    for name in files.keys() & entries.keys():  # hashed however large they are
        entries[name] = entries[name] if Path(folder, name).is_symlink() else _hash(Path(folder, name))
    kind = entries.pop("config.json", "link")
    same = entries == links and not kind.startswith("link")
    return same and read_json_object(Path(folder) / "config.json", finite=False) == config


def check_place(folder: str, model: str, *, force: bool = False) -> None:
    """Raise the InputError that `build_folder` would raise now because of what `folder` is or holds."""
    _check_target(Path(os.path.realpath(folder)), Path(os.path.realpath(model)), force)


@contextmanager
def build_folder(
    folder: str, model: str, *, unlinked: Collection[str] = UNLINKED, force: bool = False, copy: bool = False
) -> Iterator[Path]:
    """A temporary folder with links to the entries of `model`, but hidden ones and those matching `unlinked`.

    The links are relative where both folders have one parent, which can then be moved or mounted elsewhere; else
    absolute. With `copy` there are copies in place of links, if the disk has room for them. The temporary folder
    becomes `folder` when the `with` block ends, and is removed if the block raises. `force` replaces an earlier
    export, in one step where the file system can, and only if nothing else is in it and nothing has changed.

    Raises:
        InputError: no folder `model`; `folder` overlaps it, holds other things (also if they came while the block ran),
            or cannot be written; no room for copies; another run is writing it.
    """
    source, target, original = require_folder(model), Path(os.path.realpath(folder)), Path(os.path.realpath(model))
    _check_target(target, original, force)
    try:
        with _take_place(folder, target) as place:
            _check_target(target, original, force)  # again: an earlier export may have been moved back
            building = place / BUILDING
            building.mkdir()
            entries = _list_linked(source, unlinked)
            if copy:
                _copy(entries, building)
            else:
                origin = _find_origin(source, target)
                for entry in entries:
                    (building / entry.name).symlink_to(origin / entry.name)
            yield building
            _move_into_place(building, target, place / EARLIER, force)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error} ({target.parent})") from error
