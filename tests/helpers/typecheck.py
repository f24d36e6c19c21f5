"""The checker of what the signatures of `lexi_search` declare, which `conftest` puts on every function."""

import random
from abc import ABCMeta
from typing import Annotated

import pytest

# beartype checks one item of a sequence, picked at random: by a seeded generator of its own, because the strategies of
# hypothesis must leave the global one alone.
with pytest.MonkeyPatch.context() as patch:
    patch.setattr(random, "getrandbits", random.Random(0).getrandbits)
    from beartype import BeartypeConf, beartype
    from beartype.vale import IsInstance

CONF = BeartypeConf(is_pep484_tower=True)  # an int will do where a float is declared


def check(function):
    """The function with its arguments and its return value checked; any other object as beartype has it.

    Of a mapping such as `Checkpoint` beartype would look up an item, which reads a tensor: its class is enough.
    """
    for name, hint in getattr(function, "__annotations__", {}).items():
        if isinstance(hint, ABCMeta):
            function.__annotations__[name] = Annotated[object, IsInstance[hint]]
    return beartype(function, conf=CONF)
