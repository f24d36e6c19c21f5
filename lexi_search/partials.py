"""The finished layers of a profile that is not whole yet, kept beside it so that a run cut short goes on from there.

`profile.json.partial/` holds one file per finished layer, a canonical profile of that layer alone with the start of its
bytes' SHA-256 in its name, and a lock that the run holds while it lives.
"""

import fcntl
import hashlib
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lexi_search.artifacts import LayerLoss, Profile, read_profile, to_bytes
from lexi_search.errors import InputError
from lexi_search.files import write_atomically
from lexi_search.merging import Header, find_difference, read_header

LOCK = "lock"


@dataclass
class Partials:
    """The finished layers of one run, in `folder` and here. `damaged` counts files that are not what was written."""

    header: Header
    folder: Path
    layers: dict[int, LayerLoss] = field(default_factory=dict)
    damaged: int = 0

    def load(self, header: Header, *, but_exponent: bool = False) -> None:
        """Take up the layers that are there, of the run that `header` describes, perhaps but for its gate exponent.

        Raises InputError where they are another run's.
        """
        self.header, self.layers, self.damaged = header, {}, 0
        for path in sorted(self.folder.glob("*.json")):
            found = _read(path)
            if found is None:
                self.damaged += 1
                continue
            theirs, ours = read_header(found).to_document(), header.to_document()
            if but_exponent:
                theirs["settings"]["gate_exponent"] = ours["settings"]["gate_exponent"]
            if difference := find_difference(theirs, ours):
                raise InputError(
                    f"{self.folder} has finished layers of another run, whose {difference} now; repeat that run to "
                    "finish it, or throw them away with --restart"
                )
            self.layers |= found.layers

    def add(self, layer: int, loss: LayerLoss) -> None:
        """Keep one more layer; when this returns, it is on disk."""
        data = to_bytes(Profile(self.header.model, self.header.settings, {layer: loss}, self.header.made_by))
        write_atomically(self.folder / _name(layer, data), data)
        self.layers[layer] = loss

    def clear(self) -> None:
        """Remove every layer, and what writes cut short left."""
        for path in self.folder.iterdir():
            if path.suffix in (".json", ".tmp"):
                path.unlink()
        self.layers, self.damaged = {}, 0

    def drop(self, layers: Collection[int]) -> None:
        """Remove these layers, which are in the output now; others, that it was not to have, stay."""
        for layer in set(layers) & set(self.layers):
            for path in self.folder.glob(f"{layer}-*.json"):
                path.unlink()
            del self.layers[layer]


@contextmanager
def keep_partials(
    output: str | os.PathLike[str], header: Header, *, restart: bool = False, but_exponent: bool = False
) -> Iterator[Partials]:
    """The finished layers of the profile that is to be written to `output`, locked against other runs meanwhile.

    A file whose bytes are not those that were written counts as not there: its layer is to be measured again. The
    folder goes when no layer is left in it. With `but_exponent` the header's gate exponent is not known yet: `load` is
    to be called again when it is.

    Raises:
        InputError: another run is at work on `output`; the folder holds layers of another model, other settings or
            another version, unless `restart` throws them away; the folder cannot be used.
    """
    partials = Partials(header, Path(f"{os.path.realpath(output)}.partial"))
    try:
        partials.folder.mkdir(exist_ok=True)
        lock = _lock(partials.folder / LOCK, output)
    except OSError as error:
        raise InputError(f"cannot use {partials.folder}: {error.strerror}") from error
    try:
        if restart:
            partials.clear()
        else:
            partials.load(header, but_exponent=but_exponent)
        yield partials
    finally:
        if not any(partials.folder.glob("*.json")):
            _remove(partials)
        os.close(lock)


def _lock(path: Path, output: str | os.PathLike[str]) -> int:
    """A file descriptor that holds the lock; the kernel lets go of it however the process ends."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), os.stat(path)):  # else its last holder has removed it in between
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        os.close(lock)
        raise
    os.close(lock)
    raise InputError(f"another run is writing {output}; wait for it to end, or name another file with -o")


def _read(path: Path) -> Profile | None:
    """The profile of one layer in `path`; None where the bytes are not those that the name was made for."""
    try:
        found = read_profile(path)
        (layer,) = found.layers
        return found if path.name == _name(layer, path.read_bytes()) else None
    except (InputError, OSError, ValueError):
        return None


def _name(layer: int, data: bytes) -> str:
    return f"{layer}-{hashlib.sha256(data).hexdigest()[:16]}.json"


def _remove(partials: Partials) -> None:
    """Whatever else somebody put into the folder stays, and with it the folder."""
    try:
        partials.clear()
        (partials.folder / LOCK).unlink()
        partials.folder.rmdir()
    except OSError:
        return
