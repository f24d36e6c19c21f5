"""Reading and writing of files: written whole or not at all, and JSON in one canonical form."""

import json
import math
import os
import secrets
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from lexi_search.errors import InputError

# The largest index of a checkpoint on the hub has 20 MB. Parsed, JSON takes at most some thirty times its size.
MOST_BYTES = 2**25
MOST_LEVELS = 100  # of nested JSON: far below what Python's recursion allows


def json_bytes(document: Any) -> bytes:
    """JSON in this project's canonical form: keys sorted, indent 1, ASCII, one trailing newline."""
    return (json.dumps(document, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def read_json_object(path: str | os.PathLike[str], *, finite: bool = True) -> dict[str, Any]:
    """Read a JSON object; unlike Python's parser, refuse repeated keys and, if `finite`, NaN and infinities.

    A model's config.json is read with `finite` off: Nemotron-H's has an Infinity, in a value that is not used here.
    """
    checks = {"parse_constant": _refuse_non_finite, "parse_float": _parse_finite} if finite else {}
    try:
        document = json.loads(read_bytes(path).decode(), object_pairs_hook=_require_unique, **checks)
        _check_levels(document)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    if not isinstance(document, dict):
        raise InputError(f"{path}: not a JSON object")
    return document


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """A regular file, open for reading. OSError for any other: a pipe would wait, and a device may never end."""
    # Without O_NONBLOCK, opening a pipe waits for somebody to write.
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(0, "not a regular file")
    return file


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a regular file of at most `MOST_BYTES`. OSError for any other; its `strerror` is the reason."""
    with open_regular(path) as file:
        data = file.read(MOST_BYTES + 1) if os.fstat(file.fileno()).st_size <= MOST_BYTES else None
    if data is None or len(data) > MOST_BYTES:
        raise OSError(0, f"larger than {MOST_BYTES >> 20} MiB")
    return data


def _check_levels(document: Any) -> None:
    """Raise ValueError for values nested so deep that other functions would overflow the stack."""
    level = [document]
    for _ in range(MOST_LEVELS):
        containers = [item for item in level if isinstance(item, dict | list)]
        if not containers:
            return
        level = [item for inner in containers for item in (inner.values() if isinstance(inner, dict) else inner)]
    raise ValueError(f"nested more than {MOST_LEVELS} levels deep")


def _require_unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise InputError(f"key {key[:40]!r} appears twice in one object")
    return result


def _refuse_non_finite(literal: str) -> NoReturn:
    raise InputError(f"{literal} is not a finite number")


def _parse_finite(literal: str) -> float:
    value = float(literal)
    return value if math.isfinite(value) else _refuse_non_finite(literal)


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to a temporary file beside `path`, then rename it: no reader ever sees half of it.

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
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str], *, apart_from: Sequence[str | os.PathLike[str] | None] = ()) -> None:
    """Raise the InputError that `write_atomically` would raise now; leave nothing behind.

    Raise one also where `path` is a file of `apart_from`, which the same command reads or writes; None is ignored.
    """
    if os.path.realpath(path) in map(os.path.realpath, filter(None, apart_from)):
        raise InputError(
            f"cannot write {path}: the same command reads or writes it as another file; choose another name"
        )
    _, temporary = _open_temporary(path)
    temporary.unlink()


def check_writable_folder(path: str | os.PathLike[str]) -> None:
    """Raise InputError unless files can be written into `path`, a folder that exists or can be created."""
    if os.path.lexists(path) and not os.path.isdir(path):
        raise InputError(f"cannot write {path}: not a folder; choose another name")
    check_writable(os.path.join(path, "file") if os.path.isdir(path) else path)


def _open_temporary(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    target = Path(os.path.realpath(path))
    temporary = target.parent / f".lexi-{secrets.token_hex(8)}.tmp"
    try:
        if os.path.lexists(target) and not stat.S_ISREG(target.stat().st_mode):
            raise InputError(f"cannot write {path}: not a regular file; name a file to write")
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror} ({target.parent})") from error
    return target, temporary
