"""Measured costs of a mix of steps, against a loop."""

import dataclasses

import numpy as np
import pytest
from synthetic import make_cost_table, make_identity

from lexi_search.allocation.costs import weigh
from lexi_search.artifacts.serialisation import sha256
from lexi_search.errors import InputError


def test_costs_are_weighed_as_a_loop_does():
    table, model = make_cost_table(3, 4), make_identity(3, 4)
    cost = weigh(table, model, mix={16: 10, 4096: 0.5})
    top_k = [1, 4, 2]
    ms = sum(
        count * (table.steps[tokens].other_ms + sum(table.steps[tokens].layers[i][k - 1] for i, k in enumerate(top_k)))
        for tokens, count in ((16, 10), (4096, 0.5))
    )
    assert cost.time(np.array(top_k)) == pytest.approx(ms)
    assert cost.base_ms == cost.time(np.array([4, 4, 4])) and cost.table_sha256 == sha256(table)
    alone = dataclasses.replace(table, steps={16: table.steps[16]})
    assert weigh(alone, model).mix == {16: 1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 9}, "num_experts 8, the profile 9"),
        ({"model_type": "mixtral"}, "model_type 'olmoe', the profile 'mixtral'"),
    ],
)
def test_costs_of_another_model_are_refused(change, message):
    with pytest.raises(InputError, match=f"the cost table has {message}: not the same model"):
        weigh(make_cost_table(), make_identity(**change), mix={16: 1})
