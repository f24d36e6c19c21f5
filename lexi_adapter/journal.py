"""What a run has measured so far, kept beside its output, so that a run cut short goes on from there.

One JSON value a line: first what the run is, then for every finished part its batch, its layer and its numbers. A line
that was cut short, and what follows it, counts as not there.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lexi_adapter.allocation import AllocationError
from lexi_adapter.movements import Movements


@dataclass
class Journal:
    """The finished parts of one run by batch and layer, here and in a file."""

    path: Path
    file: BinaryIO
    parts: dict[tuple[int, int], Movements]

    def add(self, batch: int, layer: int, movements: Movements) -> None:
        """Keep one more part; when this returns, it is on disk."""
        _append(self.file, [batch, layer, movements])
        self.parts[batch, layer] = movements


@contextmanager
def keep_journal(output: str | os.PathLike[str], run: Mapping[str, Any], *, restart: bool = False) -> Iterator[Journal]:
    """The journal of the file that is to be written to `output`, locked against other runs, and removed on success.

    Raises:
        AllocationError: another run is at work on `output`; there is the journal of a run that was not `run`, unless
            `restart` throws it away; the file cannot be used.
    """
    path = Path(f"{os.path.realpath(output)}.partial")
    try:
        file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
    except OSError as error:
        raise AllocationError(f"cannot use {path}: {error.strerror}; name another file with -o") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise AllocationError(f"another run is writing {output}; wait for its end, or use another -o") from error
        run = json.loads(json.dumps(run))
        found, end = ([], 0) if restart else _read(file)
        if found and found[0] != run:
            raise AllocationError(
                f"{path} is of another run ({_find_difference(found[0], run)}); repeat that to finish it, or throw it "
                "away with --restart"
            )
        file.truncate(end)
        file.seek(end)
        if not found:
            _append(file, run)
        yield Journal(path, file, {(batch, layer): Movements(*values) for batch, layer, values in found[1:]})
        path.unlink(missing_ok=True)


def _append(file: BinaryIO, value: Any) -> None:
    file.write(json.dumps(value).encode() + b"\n")
    os.fsync(file.fileno())


def _read(file: BinaryIO) -> tuple[list[Any], int]:
    """The values of the whole lines, up to the first that is not one, and where they end."""
    found, end = [], 0
    for line in file.read().splitlines(keepends=True):
        try:
            found.append(json.loads(line))
        except ValueError:
            break
        if not line.endswith(b"\n"):
            del found[-1]
            break
        end += len(line)
    return found, end


def _find_difference(found: Any, run: Mapping[str, Any]) -> str:
    if not isinstance(found, dict):
        return "or no journal at all"
    key = next((key for key in run if found.get(key) != run[key]), "more is said there")
    return f"another {key}"
