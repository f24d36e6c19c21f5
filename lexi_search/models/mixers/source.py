"""What a layer, or the model around the layers, is described from: tensors, config and family."""

import math
from typing import Any, NamedTuple

from lexi_search.checkpoint.config import LARGEST_FLOAT, Config
from lexi_search.errors import InputError
from lexi_search.layers.spec import Norm, Streams
from lexi_search.models.families.decoder import Family
from lexi_search.models.finder import Finder

REMEDY = "use lexi-search profile --input paper, which takes the MoE layers alone"


class Source(NamedTuple):
    """The inputs to the description of one layer, or of the model around the layers."""

    finder: Finder
    config: Config
    family: Family
    norm: Norm
    hidden_size: int
    activation: str  # of the model's MLPs
    layer: int = 0
    dense: bool = False  # the layer has no experts
    num_layers: int = 0
    streams: Streams | None = None


def resolve(config: Config, value: Any) -> Any:
    """The value of a `Key` or of a function of the config; InputError where that is no finite number."""
    if not callable(value):
        return config.resolve(value)
    try:
        found = value(config)
        if found is None:
            return None
    except ArithmeticError:
        found = math.inf
    if not abs(found) <= LARGEST_FLOAT:
        name = value.__name__.strip("_").replace("_", " ")
        raise InputError(f"{config.place}: the {name} is not finite; {REMEDY}")
    return found
