"""What a run has measured so far, kept beside its output, so that a run cut short goes on from there.

One JSON value a line: first what the run is, then for every finished part its batch, its layer and its numbers. A line
that was cut short, and what follows it, counts as not there.
"""

import fcntl
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, BinaryIO

from lexi_adapter.errors import AllocationError
from lexi_adapter.sensitivity.ablation import Movements

# What of a run a user types, by its place in what the run is.
OPTIONS = {
    "settings.input": "the input",
    "settings.seed": "--seed",
    "settings.length": "--length",
    "settings.dtype": "--dtype",
    "settings.max_samples": "the number of tokens",
    "settings.gate_exponent": "--gate-exponent",
    "made_by.sequences_per_pass": "--batch",
}
WORDS = {"made_by.tokens_sha256": "other tokens", "losses": "with --local, or without it, other than now"}


@dataclass
class Journal:
    """The finished parts of one run by batch and layer, here and in a file."""

    path: Path
    file: BinaryIO
    parts: dict[tuple[int, int], Movements]

    def add(self, batch: int, layer: int, movements: Movements) -> None:
        """Keep one more part; when this returns, it is on disk. AllocationError where that is full."""
        _append(self.file, self.path, [batch, layer, movements])
        self.parts[batch, layer] = movements


def find_place(output: str | os.PathLike[str]) -> Path:
    """Where the journal of the file that is to be written to `output` lies."""
    return Path(f"{os.path.realpath(output)}.partial")


@contextmanager
def keep_journal(output: str | os.PathLike[str], run: Mapping[str, Any], *, restart: bool = False) -> Iterator[Journal]:
    """The journal of the file that is to be written to `output`, locked against other runs, and removed on success.

    So is one in which nothing is finished. A file that is no journal stays as it is, unless `restart` throws it away.

    Raises:
        AllocationError: another run is at work on `output`; there is the journal of a run that was not `run`, or what
            is no journal, unless `restart` throws it away; the file cannot be used.
    """
    path = find_place(output)
    try:
        file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
    except OSError as error:
        raise AllocationError(f"cannot use {path}: {error.strerror}; name another file with -o") from error
    with file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise AllocationError(f"cannot use {path}: not a regular file; name another file with -o")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise AllocationError(f"another run is writing {output}; wait for its end, or use another -o") from error
        data = b"" if restart else file.read()
        parts, end = ({}, 0) if _encode(run).startswith(data) else _read(data, path, json.loads(_encode(run)))
        journal, done = Journal(path, file, parts), False
        try:
            file.truncate(end)
            file.seek(end)
            if not end:
                _append(file, path, run)
            yield journal
            done = True
        finally:
            if done or not journal.parts:
                path.unlink(missing_ok=True)


def _encode(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False).encode() + b"\n"


def _append(file: BinaryIO, path: Path, value: Any) -> None:
    data = _encode(value)
    try:
        while data:  # a disk that is almost full takes a part of it, and says so by the number alone
            data = data[file.write(data) :]
        os.fsync(file.fileno())
    except OSError as error:
        raise AllocationError(
            f"cannot write {path}: {error.strerror}; what is finished is kept: make room, and give the command again"
        ) from error


def _read(data: bytes, path: Path, run: Mapping[str, Any]) -> tuple[dict[tuple[int, int], Movements], int]:
    """The parts of the run's journal up to the first line that is not one, and where they end."""
    first, *lines = data.splitlines(keepends=True)
    found = _parse(first)
    if not isinstance(found, dict):
        raise AllocationError(f"{path} is no journal of such a run; move it away, or throw it away with --restart")
    if difference := _find_difference(found, run):
        raise AllocationError(
            f"{path} is of another run ({difference}); repeat that to finish it, or throw it away with --restart"
        )
    parts, end = {}, len(first)
    for line in lines:
        match _parse(line):
            case [int(batch), int(layer), [_, _, _, _] as tables] if all(map(_is_table, tables)):
                parts[batch, layer] = Movements(*tables)
                end += len(line)
            case _:
                break
    return parts, end


def _parse(line: bytes) -> Any:
    """What a whole line holds; None of one that was cut short."""
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None


def _is_table(value: Any) -> bool:
    rows = isinstance(value, list) and all(isinstance(row, list) for row in value)
    return rows and all(type(number) is float and isfinite(number) for row in value for number in row)


def _find_difference(found: Mapping[str, Any], run: Mapping[str, Any]) -> str | None:
    """What tells the run of a journal from this one, in the user's words; None if nothing does."""
    theirs, ours = _flatten(found), _flatten(run)
    name = next((name for name in ours | theirs if ours.get(name) != theirs.get(name)), None)
    if name is None or name in WORDS:
        return WORDS.get(name)
    if name.partition(".")[0] == "model":
        return "another model"
    return f"{OPTIONS.get(name, name)} was {_say(theirs.get(name))}, is {_say(ours.get(name))} now"


def _flatten(run: Mapping[str, Any]) -> dict[str, Any]:
    """Values two levels down by the dotted path of their keys."""
    flat = {}
    for key, value in run.items():
        flat |= {f"{key}.{inner}": item for inner, item in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _say(value: Any) -> str:
    return "not given" if value is None else str(value)[:60]
