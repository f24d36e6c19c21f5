"""Files read within bounds, and results written: atomically, JSON in one canonical form, over nothing that is read."""

import json
import math
import os
import secrets
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from lexi_adapter.errors import AdapterError

# The largest index of a checkpoint on the hub has 20 MB. Parsed, JSON takes at most some thirty times its size.
MOST_JSON_BYTES = 2**25
MOST_DATA_BYTES = 2**30  # of texts and token ids
MOST_LEVELS = 100  # of nested JSON: far below what Python's recursion allows


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """A regular file, open for reading. OSError for any other: a pipe would wait, and a device may never end."""
    # Without O_NONBLOCK, opening a pipe waits for somebody to write.
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(0, "not a regular file")
    return file


def read_bytes(path: str | os.PathLike[str], most: int) -> bytes:
    """The bytes of a regular file of at most `most`. OSError for any other; its `strerror` is the reason."""
    with open_regular(path) as file:
        data = file.read(most + 1) if os.fstat(file.fileno()).st_size <= most else None
    if data is None or len(data) > most:
        raise OSError(0, f"larger than {most >> 20} MiB")
    return data


def read_json(path: str | os.PathLike[str], *, finite: bool = True, most: int = MOST_JSON_BYTES) -> Any:
    """The value in a JSON file, read as `lexi_search` reads one: UTF-8 without a mark, no key twice in one object.

    With `finite`, NaN and numbers that overflow are refused too.

    Raises:
        OSError: no such file, no regular one, or a larger one; its `strerror` is the reason.
        ValueError: not such JSON, or nested too deep.
    """
    checks = {"parse_constant": _refuse_constant, "parse_float": _parse_finite} if finite else {}
    return parse_json(read_bytes(path, most).decode(), object_pairs_hook=refuse_repeats, **checks)


def parse_json(text: str | bytes, **hooks: Any) -> Any:
    """`json.loads`, but ValueError for values nested too deep, of which other functions would overflow the stack."""
    try:
        value = json.loads(text, **hooks)
    except RecursionError as error:
        raise ValueError(f"nested more than {MOST_LEVELS} levels deep") from error
    check_levels(value)
    return value


def check_levels(value: Any) -> None:
    """Raise ValueError for a value of JSON that is nested more than `MOST_LEVELS` deep."""
    level = [value]
    for _ in range(MOST_LEVELS):
        containers = [item for item in level if isinstance(item, dict | list | tuple)]
        if not containers:
            return
        level = [item for inner in containers for item in (inner.values() if isinstance(inner, dict) else inner)]
    raise ValueError(f"nested more than {MOST_LEVELS} levels deep")


def refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs as an object; ValueError for a key that appears twice."""
    content = dict(pairs)
    if len(content) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {key[:40]!r} appears twice in one object")
    return content


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a finite number")


def _parse_finite(literal: str) -> float:
    value = float(literal)
    return value if math.isfinite(value) else _refuse_constant(literal[:40])


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
        document = read_json(path, finite=False)
    except (OSError, ValueError):
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
