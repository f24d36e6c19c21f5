"""Result files: written atomically, JSON in one canonical form, and never over a file that a command reads."""

import json
import os
import secrets
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lexi_adapter.errors import AdapterError


def write_json(path: str | os.PathLike[str], document: Any) -> None:
    """Write JSON with sorted keys, indent 1 and one trailing newline. AdapterError where nothing can be written."""
    write_atomically(path, (json.dumps(document, sort_keys=True, indent=1, allow_nan=False) + "\n").encode())


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to a temporary file beside `path`, then rename: nobody ever sees half of it.

    A link is followed, and a path that is no regular file (a folder, a device) is refused.
    """
    target, temporary = _open_temporary(path)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise AdapterError(f"cannot write {path}: {error.strerror} ({target.parent}); name another file") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str], *, apart_from: Sequence[str | os.PathLike[str] | None] = ()) -> None:
    """Raise the AdapterError that `write_atomically` would raise now, leaving nothing behind.

    `apart_from` are files and folders that the same command reads, or writes as well; None stands for no file. A `path`
    that is one of these files is refused too, and one that exists in one of these folders, such as a model's, unless
    it is a result itself.
    """
    # A link that lies in a folder belongs to it wherever it leads, as all files of a model in the hub's cache do.
    folder, name = os.path.split(os.path.abspath(path))
    places = (Path(os.path.realpath(path)), Path(os.path.realpath(folder), name))
    for other in filter(None, apart_from):
        taken = Path(os.path.realpath(other))
        if taken == places[0]:
            raise AdapterError(
                f"cannot write {path}: the same command reads or writes it as another file; choose another name"
            )
        within = taken.is_dir() and any(place.is_relative_to(taken) for place in places)
        if within and places[0].exists() and not is_result(places[0]):
            raise AdapterError(f"cannot write {path}: it is a file of {other}, which the same command reads")
    _, temporary = _open_temporary(path)
    temporary.unlink()


def is_result(path: Path) -> bool:
    """Whether a file is one that this project writes: a figure, or JSON that says so."""
    if path.suffix != ".json":
        return path.suffix in (".png", ".svg", ".pdf")
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(document, dict) and str(document.get("format")).startswith("lexi-")


def _open_temporary(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    target = Path(os.path.realpath(path))
    temporary = target.parent / f".lexi-{secrets.token_hex(8)}.tmp"
    try:
        if os.path.lexists(target) and not stat.S_ISREG(target.stat().st_mode):
            raise AdapterError(f"cannot write {path}: not a regular file; name a file to write")
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    except OSError as error:
        raise AdapterError(f"cannot write {path}: {error.strerror} ({target.parent}); name another file") from error
    return target, temporary
