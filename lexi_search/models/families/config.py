"""The language model's part of a config, with its class' default for every key that is not there."""

from collections import ChainMap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lexi_search.checkpoint.config import Config
from lexi_search.checkpoint.reader import Checkpoint
from lexi_search.errors import InputError
from lexi_search.models.families.defaults import DEFAULTS, ROPES, SIZES, TOP_K


def read_config(checkpoint: Checkpoint) -> Config:
    """The language model's part of the config, with its class' default for every key that is not there.

    A key that is there and null is no default, except of the rotary parameters. A default under one of several names
    does not count where the config has another of them.
    """
    config = checkpoint.text_config
    model_type = checkpoint.config.get("model_type")
    defaults = DEFAULTS.get(model_type, {}) if isinstance(model_type, str) else {}
    missing = {key: value for key, value in defaults.items() if not _is_given(config.values, key)}
    return config._replace(values=ChainMap(config.values, missing))


@contextmanager
def name_sizes_left_out(checkpoint: Checkpoint) -> Iterator[None]:
    """Add to a refusal which of the sizes that the tensors must fit are the defaults of the class, not the config's."""
    try:
        yield
    except InputError as error:
        given, values = checkpoint.text_config.values, read_config(checkpoint).values
        taken = [f"{key} of {values[key]}" for key in SIZES if key in values and key not in given]
        if not taken:
            raise
        raise InputError(f"{error}; the config leaves out and its class takes {', '.join(taken)}") from error


def _is_given(values: Mapping[str, Any], key: str) -> bool:
    if key in ROPES:
        return any(values.get(name) for name in ROPES)
    return any(name in values for name in (TOP_K if key in TOP_K else (key,)))
