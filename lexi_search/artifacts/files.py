"""Reading and writing of files: written whole or not at all, and JSON in one canonical form."""

import fcntl
import hashlib
import json
import math
import os
import secrets
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from lexi_search.errors import InputError

# The largest index of a checkpoint on the hub has 20 MB. Parsed, JSON takes at most some thirty times its size.
MOST_BYTES = 2**25
MOST_LEVELS = 100  # of nested JSON: far below what Python's recursion allows
# Formats of records that belong to the folder in which they lie.
RECORDS = ("lexi-pruning", "lexi-export")
FIGURES = (b"\x89PNG", b"<?xml", b"%PDF")  # how files of figures begin


class Nature(NamedTuple):
    """What a result is: its kind, and the model that it is of as a JSON object; None where it does not say."""

    kind: str
    model: Any = None


def json_bytes(document: Any) -> bytes:
    """JSON in this project's canonical form: keys sorted, indent 1, ASCII, one trailing newline."""
    return (json.dumps(document, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def read_json_object(path: str | os.PathLike[str], *, finite: bool = True) -> dict[str, Any]:
    """Read a JSON object; unlike Python's parser, refuse repeated keys and, if `finite`, NaN and infinities.

    A model's config.json is read with `finite` off: Nemotron-H's has an Infinity, in a value that is not used here.
    """
    try:
        document = parse_json(read_bytes(path), finite=finite)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    if not isinstance(document, dict):
        raise InputError(f"{path}: not a JSON object")
    return document


def parse_json(data: bytes, *, finite: bool = True) -> Any:
    """JSON in UTF-8; unlike Python's parser, refuse repeated keys, deep nesting and, if `finite`, NaN and infinities.

    InputError, ValueError or RecursionError say what is wrong.
    """
    checks = {"parse_constant": _refuse_non_finite, "parse_float": _parse_finite} if finite else {}
    document = json.loads(data.decode(), object_pairs_hook=_require_unique, **checks)
    _check_levels(document)
    return document


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """A regular file, open for reading. OSError for any other: a pipe would wait, and a device may never end."""
    # Without O_NONBLOCK, opening a pipe waits for somebody to write.
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(0, "not a regular file")
    return file


def read_bytes(path: str | os.PathLike[str], most: int = MOST_BYTES) -> bytes:
    """The bytes of a regular file of at most `most`. OSError for any other; its `strerror` is the reason."""
    with open_regular(path) as file:
        data = file.read(most + 1) if os.fstat(file.fileno()).st_size <= most else None
    if data is None or len(data) > most:
        raise OSError(0, f"larger than {most >> 20} MiB")
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


def write_atomically(
    path: str | os.PathLike[str],
    data: bytes,
    *,
    apart_from: Sequence[str | os.PathLike[str] | None] = (),
    force: bool = True,
) -> None:
    """Write `data` to a temporary file beside `path`, then rename it: no reader ever sees half of it.

    A link is followed; a path that is no regular file (a folder, a device), or that `refuse_inputs` refuses at the time
    of the rename, stays as it is. So does, without `force`, a file that `require_replaceable` refuses.
    """
    target, temporary, file = _open_temporary(path)
    try:
        with file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            refuse_inputs(path, apart_from)
            if not force:
                require_replaceable(path, find_nature(data))
            os.replace(temporary, target)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(
    path: str | os.PathLike[str],
    *,
    apart_from: Sequence[str | os.PathLike[str] | None] = (),
    nature: Nature | None = None,
) -> None:
    """Raise the InputError that `write_atomically` would raise now for a result of this nature; leave nothing behind.

    Without a nature any file may be replaced.
    """
    refuse_inputs(path, apart_from)
    if nature is not None:
        require_replaceable(path, nature)
    _, temporary, file = _open_temporary(path)
    temporary.unlink()
    file.close()


def refuse_inputs(path: str | os.PathLike[str], others: Sequence[str | os.PathLike[str] | None]) -> None:
    """Raise InputError where writing to `path` changes one of `others`, which the same command reads or writes.

    That is where `path` is one of them, or a link to it, symbolic or hard. A folder, such as a model's, stands for all
    files in it and for those that its links lead to, but not for results (`is_result`), which no command reads from a
    model's folder. None is ignored.
    """
    target, state = os.path.realpath(path), _find_state(path)
    for other in filter(None, others):
        if target == os.path.realpath(other) or _is_same(state, other):
            raise InputError(
                f"cannot write {path}: the same command reads or writes it as another file; choose another name"
            )
        same = (Path(os.path.realpath(file)) for file in _list_files(other) if _is_same(state, file)) if state else ()
        if not all(map(is_result, same)):
            raise InputError(f"cannot write {path}: it is a file of {other}, which the same command reads")


def find_nature(data: bytes) -> Nature:
    """What the bytes of a file are. The kind is the "format" of JSON, or its keys; of CSV its first column."""
    if data.startswith(FIGURES):
        return Nature("figure")
    try:
        document = json.loads(data) if data.lstrip().startswith(b"{") else None
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        first, comma, _ = data.partition(b"\n")[0].partition(b",")
        return Nature(
            f"table by {first.decode(errors='replace')}" if comma and len(first) < 20 else "file of no known kind"
        )
    kind = document.get("format")
    model = document.get("model")
    if not isinstance(kind, str):
        return Nature(f"JSON object with the keys {', '.join(sorted(document))}")
    return Nature(kind, model if isinstance(model, dict) else None)


def require_replaceable(path: str | os.PathLike[str], new: Nature) -> None:
    """Raise InputError where `path` is a file of another kind, or of another model, than a result of the nature `new`.

    An empty file may be replaced, and what is no regular file is not looked at.
    """
    try:
        old = find_nature(read_bytes(path)) if os.path.isfile(path) and os.path.getsize(path) else new
    except OSError:
        old = Nature("file that cannot be read")
    if old.kind != new.kind:
        found = old.kind[:80]
    elif None not in (old.model, new.model) and old.model != new.model:
        found = f"{old.kind} of another model"
    else:
        return
    raise InputError(f"cannot write {path}: there is a {found}; choose another name, or replace it with --force")


def is_result(path: Path) -> bool:
    """Whether a file is one that this project writes: a figure, or JSON that says so."""
    if path.suffix != ".json":
        return path.suffix in (".png", ".svg", ".pdf")
    try:
        document = json.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return False
    form = str(document.get("format")) if isinstance(document, dict) else ""
    return form.startswith("lexi-") and form not in RECORDS


def check_writable_folder(path: str | os.PathLike[str]) -> None:
    """Raise InputError unless files can be written into `path`, a folder that exists or can be created."""
    if os.path.lexists(path) and not os.path.isdir(path):
        raise InputError(f"cannot write {path}: not a folder; choose another name")
    check_writable(os.path.join(path, "file") if os.path.isdir(path) else path)


def lock_file(path: str | os.PathLike[str]) -> int | None:
    """A descriptor that locks the file `path`, created if missing; None where another process locks it.

    The kernel releases the lock however the process ends. OSError where the file cannot be opened or locked.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):  # else its last holder has removed it in between
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _find_state(path: str | os.PathLike[str]) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (OSError, ValueError):
        return None


def _is_same(state: os.stat_result | None, path: str | os.PathLike[str]) -> bool:
    other = _find_state(path)
    return state is not None and other is not None and os.path.samestat(state, other)


def _list_files(folder: str | os.PathLike[str]) -> Iterator[str]:
    """The files in a folder and, through links to folders, beyond it; nothing where `folder` is none."""
    seen: list[os.stat_result] = []
    for place, folders, names in os.walk(folder, followlinks=True):
        if any(_is_same(state, place) for state in seen):  # a link that leads back
            folders.clear()
            continue
        seen.append(os.stat(place))
        yield from (os.path.join(place, name) for name in names)


def _open_temporary(path: str | os.PathLike[str]) -> tuple[Path, Path, BinaryIO]:
    """The file to write in the end, and a new file beside it, open and locked while its maker lives.

    Those that dead makers of the same file have left are removed.
    """
    target = Path(os.path.realpath(path))
    stem = f".lexi-{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]}-"
    try:
        if os.path.lexists(target) and not stat.S_ISREG(target.stat().st_mode):
            raise InputError(f"cannot write {path}: not a regular file; name a file to write")
        file = None
        while file is None:
            temporary = target.parent / f"{stem}{secrets.token_hex(8)}.tmp"
            file = _lock(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), temporary)
    except OSError as error:
        remedy = "make that folder first" if isinstance(error, FileNotFoundError) else "name another file"
        raise InputError(f"cannot write {path}: {error.strerror} ({target.parent}); {remedy}") from error
    for other in target.parent.glob(f"{stem}*.tmp"):
        if other != temporary:
            _remove_abandoned(other)
    return target, temporary, file


def _lock(descriptor: int, path: Path) -> BinaryIO | None:
    """The open file, locked where the file system can; None where another process locks it or has removed it."""
    file = open(descriptor, "wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:  # without locks, nobody can take it for abandoned
        return file
    if _is_same(os.fstat(file.fileno()), path):
        return file
    file.close()
    return None


def _remove_abandoned(path: Path) -> None:
    """Remove a temporary file, unless its maker still holds its lock."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    except OSError:
        pass
    finally:
        os.close(descriptor)
