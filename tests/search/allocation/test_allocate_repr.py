"""What a Python prompt shows of results is a line, not their tables."""

import numpy as np
import pytest
from synthetic import add_model_losses, make_allocation, make_cost_table, make_profile

import lexi_search
from lexi_search.allocation.costs import weigh
from lexi_search.allocation.tradeoff import find_front

PROFILE = add_model_losses(make_profile(61, 8))
MADE = {
    "profile": lambda: PROFILE,
    "layer": lambda: PROFILE.layers[0],
    "allocation": lambda: make_allocation(61, 8),
    "cost table": lambda: make_cost_table(61, 8),
    "cost": lambda: weigh(make_cost_table(61, 8), PROFILE.model, mix={16: 1.0}),
    "results": lambda: lexi_search.allocate(PROFILE, [200], resamples=4, generations=8),
    "front": lambda: find_front(PROFILE),
    "problem": lambda: lexi_search.pose(np.array(PROFILE.losses("rms")), [200]),
    "optimum": lambda: lexi_search.solve(lexi_search.pose(np.array(PROFILE.losses("rms")), [200])),
}


@pytest.mark.parametrize("name", MADE)
def test_a_repr_is_a_line(name):
    shown = repr(MADE[name]())
    assert "\n" not in shown and len(shown) < 420, shown
    assert shown.count(".") < 12
