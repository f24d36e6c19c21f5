"""Measured costs of a mix of steps, against a loop."""

import dataclasses

import numpy as np
import pytest
from command_line import run, write
from synthetic import make_cost_table, make_identity, make_profile

from lexi_search.allocation.allocate import allocate
from lexi_search.allocation.costs import weigh
from lexi_search.artifacts.serialisation import read_cost_table, sha256, to_bytes
from lexi_search.errors import InputError
from lexi_search.solvers.exact import solve, solve_each
from lexi_search.solvers.problem import pose, sum_over_layers


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


def add_errors(table, share):
    """The table with standard errors that are a share of each time."""
    steps = {
        tokens: dataclasses.replace(
            step, layers_stderr={layer: tuple(share * time for time in row) for layer, row in step.layers.items()}
        )
        for tokens, step in table.steps.items()
    }
    return dataclasses.replace(table, steps=steps)


def test_errors_of_costs_are_written_read_and_weighed(folder):
    table, model = make_cost_table(3, 4), make_identity(3, 4)
    noisy = add_errors(table, 0.1)
    assert b"stderr" not in to_bytes(table)
    assert read_cost_table(write(folder / "cost", noisy)) == noisy
    assert weigh(table, model, mix={16: 1}).errors is None
    cost = weigh(noisy, model, mix={16: 10, 4096: 0.5})
    for layer in range(3):
        for k in range(4):
            parts = [count * 0.1 * noisy.steps[tokens].layers[layer][k] for tokens, count in ((16, 10), (4096, 0.5))]
            assert cost.errors[layer, k] == pytest.approx(np.hypot(*parts))
    step = noisy.steps[16]
    for wrong in ({0: (0.1,)}, {**step.layers_stderr, 0: (-0.1, 0.1, 0.1, 0.1)}):
        with pytest.raises(InputError, match="layers_stderr has other|error of layer 0 at k = 1 is -0.1"):
            dataclasses.replace(step, layers_stderr=wrong)


def test_the_noise_of_costs_makes_an_allocation_less_sure():
    profile = make_profile(8, 4)
    sure = []
    for share in (0.0, 0.02, 0.2):
        cost = weigh(add_errors(make_cost_table(8, 4), share), profile.model, mix={16: 1})
        [found] = allocate(profile, [cost.base_ms / 1.2], cost=cost, method="exact", resamples=60)
        sure.append(sum(found.share) / 8)
    plain = weigh(make_cost_table(8, 4), profile.model, mix={16: 1})
    [without] = allocate(profile, [plain.base_ms / 1.2], cost=plain, method="exact", resamples=60)
    assert sure[0] == pytest.approx(sum(without.share) / 8)
    assert sure[0] > sure[1] > sure[2]


def test_each_table_is_solved_under_its_own_costs():
    draw = np.random.default_rng(0)
    tables, costs = draw.uniform(0, 1, (5, 4, 3)), np.sort(draw.uniform(1, 9, (5, 4, 3)), axis=2)
    problems = [pose(table, np.array([22.0, 28.0]), costs=own) for table, own in zip(tables, costs, strict=True)]
    for problem, table, found in zip(problems, tables, solve_each(problems, tables), strict=True):
        assert (sum_over_layers(problem.costs, found) <= problem.budgets).all()
        assert sum_over_layers(table, found) == pytest.approx(solve(problem).loss, rel=1e-2)


def test_costs_that_fall_as_k_grows_lead_to_a_warning(folder):
    table = make_cost_table()
    step = table.steps[16]
    fallen = {layer: (row[0], row[1], 0.9 * row[1], row[3]) for layer, row in step.layers.items()}
    write(folder / "cost", dataclasses.replace(table, steps={16: dataclasses.replace(step, layers=fallen)}))
    write(folder / "p", make_profile())
    for command in (("search", "p", "--cost", "cost", "--target-speedup", "1.1"), ("front", "p", "--cost", "cost")):
        said = run(*command).stderr.splitlines()[0]
        assert said.startswith("cost: a layer takes less time at k = 3 than with one expert fewer; if that is noise")
