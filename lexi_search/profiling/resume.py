"""Finished layers of a profile, kept beside its file, so that a run that was cut short goes on from there.

`profile.json.partial/` holds one file per finished layer, a canonical profile of that layer alone with the start of its
bytes' SHA-256 in its name; the same for findings that all layers need and that took long, such as the sampled text; and
a lock that the run holds while it lives.
"""

import base64
import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lexi_search.artifacts.compensation import Maps, check_maps_place, format_maps, name_beside, parse_maps, read_maps
from lexi_search.artifacts.files import (
    check_writable,
    json_bytes,
    lock_file,
    read_bytes,
    refuse_inputs,
    write_atomically,
)
from lexi_search.artifacts.profile import Header, LayerLoss, Profile, find_difference, find_missing, read_header
from lexi_search.artifacts.serialisation import describe_nature, read_profile, to_bytes
from lexi_search.errors import InputError

LOCK = "lock"
LAYERS, FINDINGS = "*.json", "*.found"  # files
COMPENSATION = "compensation"  # the name of a finding: what `divergence.choose_compensation` chose
FOUND = ("gate_exponent", "compensation_rank")  # settings that it decides
MAPS = "maps"  # the name of a finding, before a layer's index
# Names of the files of this module, and of what a write that was cut short leaves.
OURS = re.compile(r"\w+-[0-9a-f]{16}\.(json|found)|\.lexi-.*\.tmp")


@dataclass
class Partials:
    """The finished layers of one run, in memory and in `folder`, findings that all layers need, by name, and `maps`,
    the corrections of layers that are fitted.

    `damaged` counts files whose bytes are not those that were written.
    """

    header: Header
    folder: Path
    layers: dict[int, LayerLoss] = field(default_factory=dict)
    findings: dict[str, Any] = field(default_factory=dict)
    maps: dict[int, Maps] = field(default_factory=dict)
    damaged: int = 0

    def load(self, header: Header, *, but_exponent: bool = False) -> None:
        """Load the layers and findings in the folder, all of the run that `header` describes.

        With `but_exponent` the gate exponents may differ. InputError where they are another run's.
        """
        self.header, self.damaged = header, 0
        self.layers, self.findings, self.maps = {}, {}, {}
        for path in sorted((*self.folder.glob(LAYERS), *self.folder.glob(FINDINGS))):
            found = _read(path)
            if found is None:
                self.damaged += 1
            elif isinstance(found, Profile):
                self._check(read_header(found).to_document(), but_exponent)
                self.layers |= found.layers
            else:
                name = path.name.partition("-")[0]
                # Of what is found, corrections alone depend on the exponent.
                self._check(found["run"], but_exponent=but_exponent or not name.startswith(MAPS))
                self._keep(name, found["value"])

    def _check(self, theirs: dict[str, Any], but_exponent: bool) -> None:
        ours = self.header.to_document()
        if but_exponent:
            theirs["settings"] |= {name: ours["settings"][name] for name in FOUND}
        if difference := find_difference(theirs, ours):
            raise InputError(
                f"{self.folder} has finished layers of another run, whose {difference} now; repeat that run to "
                "finish it, or throw them away with --restart"
            )

    def _keep(self, name: str, value: Any) -> None:
        if name.startswith(MAPS):
            self.maps[int(name.removeprefix(MAPS))] = parse_maps(base64.b64decode(value), self.header.model)
        else:
            self.findings[name] = value

    def find(self, name: str, make: Callable[[], Any]) -> Any:
        """The finding of this name, plain JSON: from an earlier run, or made now and kept."""
        if name not in self.findings:
            self._keep(name, self._write(name, make()))
        return self.findings[name]

    def add_maps(self, layer: int, maps: Maps) -> Maps:
        """Add the corrections of a layer, and return them; when this returns, they are on disk."""
        data = format_maps(maps, self.header.model)
        self._keep(f"{MAPS}{layer}", self._write(f"{MAPS}{layer}", base64.b64encode(data).decode()))
        return self.maps[layer]

    def _write(self, name: str, value: Any) -> Any:
        """Write a finding to disk, and return it as it will be read."""
        data = json_bytes({"run": self.header.to_document(), "value": value})
        write_atomically(self.folder / _name(name, data, FINDINGS), data)
        return json.loads(data)["value"]

    def add(self, layer: int, loss: LayerLoss) -> None:
        """Add a finished layer; when this returns, it is on disk."""
        data = to_bytes(Profile(self.header.model, self.header.settings, {layer: loss}, self.header.made_by))
        write_atomically(self.folder / _name(layer, data, LAYERS), data)
        self.layers[layer] = loss

    def clear(self) -> None:
        """Remove everything, and temporary files of writes that were cut short."""
        for path in self.folder.iterdir():
            if OURS.fullmatch(path.name):
                path.unlink()
        self.layers, self.findings, self.maps, self.damaged = {}, {}, {}, 0

    def drop(self, layers: Collection[int]) -> None:
        """Remove these layers, which are in the output now. Any others stay, and with them the findings."""
        for layer in set(layers) & set(self.layers):
            for path in (*self.folder.glob(f"{layer}-*.json"), *self.folder.glob(f"{MAPS}{layer}-*.found")):
                path.unlink()
            del self.layers[layer]
            self.maps.pop(layer, None)
        if not self.layers:
            self.clear()


def find_partials(output: str | os.PathLike[str]) -> Path:
    """The folder for the finished layers of the profile that is to be written to `output`."""
    return Path(f"{os.path.realpath(output)}.partial")


def find_finished(output: str | os.PathLike[str], header: Header, *, but_exponent: bool) -> Profile | None:
    """The profile in `output`, all of whose layers the run of `header` has measured; None where nothing is there.

    With `but_exponent` the header's gate exponent is not known yet. InputError for a profile of another run, or one
    whose corrections are not whole.
    """
    if not os.path.lexists(output):
        return None
    profile = read_profile(output)
    theirs, ours = read_header(profile).to_document(), header.to_document()
    if but_exponent:
        ours["settings"] |= {name: theirs["settings"][name] for name in FOUND}
    if difference := find_difference(theirs, ours):
        raise InputError(f"{output} is the profile of another run, whose {difference} now; choose another place")
    if missing := find_missing(profile):
        raise InputError(f"{output} lacks layers, the first is {missing[0]}; choose another place")
    read_maps(output, profile.compensation, profile.model)
    return profile


def check_place(
    output: str | os.PathLike[str], inputs: Sequence[str | os.PathLike[str] | None], *, force: bool
) -> None:
    """Raise InputError where nothing can be written, whatever it will be."""
    check_writable(output, apart_from=inputs, nature=None if force else describe_nature(Profile))
    refuse_inputs(find_partials(output), inputs)


def check_output(output: str | os.PathLike[str], header: Header, folder: Path, *, force: bool) -> None:
    """Raise InputError where the files of a run on the checkpoint in `folder` may not replace what is there."""
    check_writable(output, nature=None if force else describe_nature(Profile, header.model))
    if header.settings.compensation_rank is not None:
        check_maps_place(name_beside(output), header.model, owners=[output], apart_from=[folder], force=force)


@contextmanager
def keep_partials(
    output: str | os.PathLike[str], header: Header, *, restart: bool = False, but_exponent: bool = False
) -> Iterator[Partials]:
    """The finished layers of the profile that is to be written to `output`, locked against other runs.

    A file whose bytes are not those that were written counts as not there: its layer is to be measured again. The
    folder goes when nothing is left in it. With `but_exponent` the header's gate exponent is not known yet: `load` is
    to be called again when it is.

    Raises:
        InputError: another run is at work on `output`; the folder holds layers of another model, other settings or
            another version, unless `restart` throws them away; the folder cannot be used.
    """
    partials = Partials(header, find_partials(output))
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
        if not any((*partials.folder.glob(LAYERS), *partials.folder.glob(FINDINGS))):
            _remove(partials)
        os.close(lock)


def _lock(path: Path, output: str | os.PathLike[str]) -> int:
    lock = lock_file(path)
    if lock is None:
        raise InputError(f"another run is writing {output}; wait for it to end, or name another file with -o")
    return lock


def _read(path: Path) -> Profile | Mapping[str, Any] | None:
    """The layer or finding in `path`; None where the bytes do not match the hash in its name."""
    try:
        data = read_bytes(path)
        if path.name != _name(path.name.partition("-")[0], data, f"*{path.suffix}"):
            return None
        return read_profile(path) if path.match(LAYERS) else json.loads(data)
    except (InputError, OSError, ValueError):
        return None


def _name(what: int | str, data: bytes, pattern: str) -> str:
    return f"{what}-{hashlib.sha256(data).hexdigest()[:16]}{pattern[1:]}"


def _remove(partials: Partials) -> None:
    """Remove the folder and the files of this module in it; the folder stays if it holds others."""
    try:
        partials.clear()
        (partials.folder / LOCK).unlink()
        partials.folder.rmdir()
    except OSError:
        return
