"""Parts of a profile, measured separately, merged into one: the same bytes as if one run had measured it all."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lexi_search.artifacts.files import json_bytes
from lexi_search.artifacts.identity import ModelIdentity
from lexi_search.artifacts.profile import Profile, ProfileSettings
from lexi_search.errors import InputError


class Header(NamedTuple):
    """Everything in a profile but its layers; equal in all parts of one profile."""

    model: ModelIdentity
    settings: ProfileSettings
    made_by: Mapping[str, Any]

    def to_document(self) -> dict[str, dict[str, Any]]:
        """The header as a JSON object, as another process would read it."""
        parts = dataclasses.asdict(self.model), dataclasses.asdict(self.settings), dict(self.made_by)
        return json.loads(json_bytes(dict(zip(self._fields, parts, strict=True))))


def read_header(profile: Profile) -> Header:
    return Header(profile.model, profile.settings, profile.made_by)


def merge(parts: Mapping[str, Profile]) -> Profile:
    """One profile with the layers of all `parts` (name, such as that of a file -> profile).

    Raises:
        InputError: parts of different models, settings or makers; a layer that two parts have with different losses.
    """
    (first, whole), *others = parts.items()
    owners = dict.fromkeys(whole.layers, first)
    layers = dict(whole.layers)
    for name, part in others:
        if difference := find_difference(read_header(part).to_document(), read_header(whole).to_document()):
            raise InputError(f"{name}: {difference} in {first}; only parts of one profile can be merged")
        for layer, loss in part.layers.items():
            if layers.setdefault(layer, loss) != loss:
                raise InputError(f"{name}: layer {layer} differs from that in {owners[layer]}; leave one of them out")
            owners.setdefault(layer, name)
    return dataclasses.replace(whole, layers=dict(sorted(layers.items())))


def find_difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """The first difference between two headers, such as "settings.seed is 1, not 0 as"; None where they are equal."""
    left, right = _flatten(ours), _flatten(theirs)
    for name in left | right:
        if left.get(name) != right.get(name):
            return f"{name} is {_short(left.get(name))}, not {_short(right.get(name))} as"
    return None


def find_missing(profile: Profile) -> tuple[int, ...]:
    """The model's MoE layers that the profile lacks, ascending."""
    return tuple(layer for layer in profile.model.moe_layers if layer not in profile.layers)


def format_layers(layers: Sequence[int]) -> str:
    """Ascending layer indices in the form of `--layers`: (0, 1, 2, 5) is "0:2,5"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1][1:] = [layer]
        else:
            runs.append([layer])
    return ",".join(":".join(map(str, run)) for run in runs)


def _flatten(header: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{part}.{key}": value for part in Header._fields for key, value in sorted(header[part].items())}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
