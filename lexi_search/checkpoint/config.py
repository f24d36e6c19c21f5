"""Checked access to a checkpoint's config.json: counts, numbers and nested sections, refused by name and place."""

from collections.abc import Mapping
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, NamedTuple

from lexi_search.artifacts.codec import short
from lexi_search.errors import InputError

# The largest whole number and the largest float that JAX computes with.
LARGEST_COUNT, LARGEST_FLOAT = 2**31 - 1, (2 - 2**-23) * 2.0**127
# Keys under which multimodal configs keep the language model's config, perhaps one inside another.
TEXT_KEYS = ("text_config", "language_config", "llm_config", "thinker_config")
# Keys under which configs have the number of experts.
COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class Key(NamedTuple):
    """The config's value under `name`; `default` where the key is absent or null."""

    name: str
    default: Any


class Config(NamedTuple):
    """The language model's part of `config.json`, its dotted path there, and its place for messages."""

    values: Mapping[str, Any]
    path: str  # empty where it is the whole
    place: str  # file and, where nested, the path

    def find_key(self, aliases: tuple[str, ...]) -> str:
        """The first of `aliases` that has a value; InputError where none has."""
        key = next((key for key in aliases if self.values.get(key) is not None), None)
        if key is None:
            raise InputError(f"{self.place}: {' or '.join(aliases)} is missing; is this a mixture-of-experts model?")
        return key

    def read_count(self, *aliases: str) -> int:
        """The whole number of at least 1 under the first alias, or in a list of equal ones, one for every layer."""
        key = self.find_key(aliases)
        value = self.values[key]
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if type(value) is list:
            raise InputError(f"{self.place}: {key} differs between layers; known is one value for all of them")
        if type(value) is not int or value < 1:
            raise InputError(f"{self.place}: {key} is {short(value)}, expected a whole number of at least 1")
        if value > LARGEST_COUNT:
            raise InputError(f"{self.place}: {key} is {short(value)}, expected at most {LARGEST_COUNT}")
        return value

    def count_layers(self) -> int:
        """The number of decoder layers."""
        key = self.find_key(("num_hidden_layers", "layers_block_type"))  # the second has an entry for every layer
        if key == "layers_block_type" and isinstance(self.values[key], list):
            return len(self.values[key])
        return self.read_count(key)

    def resolve(self, value: Any) -> Any:
        """The value of a `Key` in this config, of its default's type; any other `value` is returned as it is."""
        if not isinstance(value, Key):
            return value
        found = self.values.get(value.name)
        if found is None:
            return value.default
        if isinstance(value.default, float) and type(found) is int and abs(found) < 2**53:
            found = float(found)
        same = type(found) is type(value.default)
        largest = {int: LARGEST_COUNT, float: LARGEST_FLOAT}.get(type(found))
        if not same or (largest is not None and not abs(found) <= largest):  # NaN is not
            raise InputError(f"{self.place}: {value.name} is {short(found)}, expected a value like {value.default!r}")
        return found

    def read_choice(self, key: str, known: Mapping[Any, Any]) -> Any:
        """The value under `key`, one of `known`; the first of these where it is absent or null."""
        value = self.values.get(key)
        if value is None:
            return next(iter(known))
        if not any(isinstance(value, bool) == isinstance(choice, bool) and value == choice for choice in known):
            raise InputError(f"{self.place}: {key} {short(value)} is not known; known are {', '.join(map(str, known))}")
        return value


def find_text_config(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys that lead to the language model's part of a multimodal config; none where there is no such part."""
    path: tuple[str, ...] = ()
    while key := next((key for key in TEXT_KEYS if isinstance(config.get(key), dict)), None):
        config, path = config[key], (*path, key)
    return path


def read_text_config(config: Mapping[str, Any], folder: Path) -> Config:
    """The language model's part of the `config` in `folder`: a section of a multimodal config, else the whole."""
    keys = find_text_config(config)
    path = ".".join(keys)
    place = folder / "config.json"
    return Config(reduce(getitem, keys, config), path, f"{place}, {path}" if path else str(place))
