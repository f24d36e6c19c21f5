"""The checker of what the signatures of `lexi_search` declare, which `conftest` puts on every function."""

import random

import pytest

# beartype checks one item of a sequence, picked at random: by a seeded generator of its own, because the strategies of
# hypothesis must leave the global one alone.
with pytest.MonkeyPatch.context() as patch:
    patch.setattr(random, "getrandbits", random.Random(0).getrandbits)
    from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int will do where a float is declared
