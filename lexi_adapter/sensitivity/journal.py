"""The journal of a run: its finished parts, kept in a file beside its output, so that an interrupted run resumes.

One JSON value a line: first the description of the run, then for every finished part its batch, layer and losses, after
the start of their SHA-256. A line that is incomplete or damaged is ignored, with all that follow.
"""

import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, BinaryIO

from lexi_adapter.errors import AdapterError
from lexi_adapter.files import parse_json
from lexi_adapter.sensitivity.ablation import LayerLosses

# Dotted path in the description of a run -> the option that sets it, for messages.
OPTIONS = {
    "settings.input": "the input",
    "settings.seed": "--seed",
    "settings.length": "--length",
    "settings.dtype": "--dtype",
    "settings.max_samples": "the number of tokens",
    "settings.gate_exponent": "--gate-exponent",
    "made_by.sequences_per_pass": "--batch",
}
WORDS = {"made_by.tokens_sha256": "other tokens", "losses": "--local differs"}


@dataclass
class Journal:
    """The finished parts of one run by batch and layer, in memory and in a file."""

    path: Path
    file: BinaryIO
    parts: dict[tuple[int, int], LayerLosses]

    def add(self, batch: int, layer: int, losses: LayerLosses) -> None:
        """Add a finished part, and return once it is on disk. AdapterError where that is full."""
        data = _encode([batch, layer, losses])
        _append(self.file, self.path, _hash(data) + b" " + data)
        self.parts[batch, layer] = losses


def find_path(output: str | os.PathLike[str]) -> Path:
    """The path of the journal of a run that writes `output`."""
    return Path(f"{os.path.realpath(output)}.partial")


@contextmanager
def keep_journal(output: str | os.PathLike[str], run: Mapping[str, Any], *, restart: bool = False) -> Iterator[Journal]:
    """The journal of the run that writes `output`, locked against other runs.

    It is removed on success, and when nothing is finished. A file that is no journal stays as it is, unless `restart`
    discards it.

    Args:
        output: the file that the run writes.
        run: the description of the run, JSON.
        restart: discard the file of an earlier run.

    Raises:
        AdapterError: another run is writing `output`; without `restart`, the file is the journal of another run or no
            journal; the file cannot be used.
    """
    path = find_path(output)
    try:
        file = open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666), "r+b", buffering=0)
    except OSError as error:
        raise AdapterError(f"cannot use {path}: {error.strerror}; name another file with -o") from error
    with file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise AdapterError(f"cannot use {path}: not a regular file; name another file with -o")
        _lock(file, path, output)
        data = b"" if restart else file.read()
        line = _encode(run)
        parts, end = ({}, 0) if line.startswith(data) else _read(data, path, json.loads(line))
        journal, succeeded = Journal(path, file, parts), False
        try:
            file.truncate(end)
            file.seek(end)
            if not end:
                _append(file, path, line)
            yield journal
            succeeded = True
        finally:
            if succeeded or not journal.parts:
                path.unlink(missing_ok=True)


def _lock(file: BinaryIO, path: Path, output: str | os.PathLike[str]) -> None:
    """Lock the journal; the kernel releases it however the process ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):  # else its last holder has removed it in between
            return
    except OSError:
        pass
    raise AdapterError(f"another run is writing {output}; wait for its end, or use another -o")


def _encode(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False).encode() + b"\n"


def _hash(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest()[:16].encode()


def _append(file: BinaryIO, path: Path, data: bytes) -> None:
    try:
        while data:  # on an almost full disk, write takes a part and returns its size
            data = data[file.write(data) :]
        os.fsync(file.fileno())
    except OSError as error:
        raise AdapterError(
            f"cannot write {path}: {error.strerror}; finished parts are kept: make room, and give the command again"
        ) from error


def _read(data: bytes, path: Path, run: Mapping[str, Any]) -> tuple[dict[tuple[int, int], LayerLosses], int]:
    """The parts in a journal of `run`, up to the first line that is no part, and the position where they end."""
    first, *lines = data.splitlines(keepends=True)
    earlier = _parse(first)
    if not isinstance(earlier, dict):
        raise AdapterError(f"{path} is no journal of such a run; move it away, or throw it away with --restart")
    if difference := _find_difference(earlier, run):
        raise AdapterError(
            f"{path} is of another run ({difference}); repeat that to finish it, or throw it away with --restart"
        )
    parts, end = {}, len(first)
    for line in lines:
        digest, _, data = line.partition(b" ")
        match _parse(data) if digest == _hash(data) else None:
            case [int(batch), int(layer), [_, _, _, _] as tables] if all(map(_is_table, tables)):
                parts[batch, layer] = LayerLosses(*tables)
                end += len(line)
            case _:
                break
    return parts, end


def _parse(line: bytes) -> Any:
    """The JSON value of a line; None for a line that is incomplete."""
    try:
        return parse_json(line) if line.endswith(b"\n") else None
    except ValueError:
        return None


def _is_table(value: Any) -> bool:
    rows = isinstance(value, list) and all(isinstance(row, list) for row in value)
    return rows and all(type(number) is float and isfinite(number) for row in value for number in row)


def _find_difference(earlier: Mapping[str, Any], run: Mapping[str, Any]) -> str | None:
    """The first difference between the run of a journal and this one, for a message; None if there is none."""
    before, now = _flatten(earlier), _flatten(run)
    name = next((name for name in now | before if now.get(name) != before.get(name)), None)
    if name is None or name in WORDS:
        return WORDS.get(name)
    if name.partition(".")[0] == "model":
        return "another model"
    return f"{OPTIONS.get(name, name)} was {_show(before.get(name))}, is {_show(now.get(name))} now"


def _flatten(run: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a run's description, at most two levels deep, by the dotted path of their keys."""
    flat = {}
    for key, value in run.items():
        flat |= {f"{key}.{inner}": item for inner, item in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _show(value: Any) -> str:
    return "not given" if value is None else str(value)[:60]
