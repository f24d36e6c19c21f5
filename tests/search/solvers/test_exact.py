"""The dynamic programme against an enumeration of all allocations."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lexi_search.errors import InputError
from lexi_search.solvers.exact import solve, solve_many
from lexi_search.solvers.problem import Constraints, find_uniform, pose, sum_over_layers

TABLES = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=4).flatmap(
    lambda shape: hnp.arrays(
        np.float64, shape, elements=st.floats(0, 100, allow_subnormal=False) | st.sampled_from([0.0, 1.0, 2.0])
    )
)


def enumerate_feasible(constraints, layers, last_k):
    """Every allocation that the constraints allow, decided layer by layer."""
    low, high = np.broadcast_to(constraints.min_k, layers), np.broadcast_to(constraints.max_k or last_k, layers)
    for top_k in itertools.product(range(1, last_k + 1), repeat=layers):
        in_bounds = all(a <= k <= b for a, k, b in zip(low, top_k, high, strict=True))
        allowed = all(
            constraints.allowed_k is None or k in constraints.allowed_k or a == b
            for a, k, b in zip(low, top_k, high, strict=True)
        )
        together = all(len({top_k[layer] for layer in group}) <= 1 for group in constraints.groups)
        if in_bounds and allowed and together:
            yield top_k


@st.composite
def draw_constraints(draw, layers, last_k):
    bounds = draw(st.lists(st.tuples(*[st.integers(1, last_k)] * 2), min_size=layers, max_size=layers))
    allowed = draw(st.none() | st.sets(st.integers(1, last_k), min_size=1))
    order = draw(st.permutations(range(layers)))
    cut = draw(st.integers(0, layers))
    return Constraints(
        min_k=tuple(map(min, bounds)),
        max_k=tuple(map(max, bounds)),
        allowed_k=None if allowed is None else tuple(sorted(allowed)),
        groups=tuple(filter(None, (tuple(order[:cut]), tuple(order[cut : cut + 2])))),
    )


def test_subnormal_losses_are_none_at_all():
    found = solve(pose(np.array([[0.0, 2e-311], [0.0, 0.0]]), np.array([2, 3, 4])))
    assert found.loss.tolist() == [0, 0, 0] and found.error == 0


@given(table=TABLES, data=st.data())
def test_is_the_best_of_all_allocations(table, data):
    layers, last_k = table.shape
    low = data.draw(st.lists(st.integers(1, last_k), min_size=layers, max_size=layers))
    constraints = Constraints(min_k=tuple(low), max_k=data.draw(st.integers(max(low), last_k)))
    everything = np.array(list(enumerate_feasible(constraints, layers, last_k)))
    problem = pose(table, np.unique(everything.sum(axis=1)), constraints=constraints)
    found = solve(problem)
    assert found.error == 0
    sums = np.array([sum(row[k - 1] for row, k in zip(table, chosen, strict=True)) for chosen in everything])
    allowed = set(map(tuple, everything.tolist()))
    for budget, top_k, loss in zip(problem.budgets, found.top_k, found.loss, strict=True):
        assert top_k.sum() == budget and tuple(top_k.tolist()) in allowed
        assert loss == sum_over_layers(table, top_k) == sums[everything.sum(axis=1) == budget].min()


@given(table=TABLES, data=st.data())
def test_with_real_costs_it_is_the_best_of_all_that_cost_no_more(table, data):
    """Costs of any kind: falling, equal or zero ones, and caps on and between the sums."""
    layers, last_k = table.shape
    costs = data.draw(
        hnp.arrays(
            np.float64, table.shape, elements=st.floats(0, 10, allow_subnormal=False) | st.sampled_from([0.1, 0.2, 0.3])
        )
    )
    constraints = data.draw(draw_constraints(layers, last_k))
    everything = np.array(list(enumerate_feasible(constraints, layers, last_k)))
    if not len(everything):
        with pytest.raises(InputError, match="no k is left for layers"):
            pose(table, [1e9], costs=costs, constraints=constraints)
        return
    sums = sum_over_layers(costs, everything)
    caps = np.concatenate([np.unique(sums), [sums.max() + 1, (sums.min() + sums.max()) / 2]])
    problem = pose(table, caps, costs=costs, constraints=constraints)
    found = solve(problem)
    allowed = set(map(tuple, everything.tolist()))
    losses = sum_over_layers(table, everything)
    assert found.error == 0
    for cap, top_k, loss in zip(problem.budgets, found.top_k, found.loss, strict=True):
        assert tuple(top_k.tolist()) in allowed
        # Sums differ in their last digits, for layers of a group are added first: no worse than the best within the
        # budget, no better than the best within a hair more.
        hair = 2e-11 * (sums.max() + cap)
        assert sum_over_layers(costs, top_k) <= cap + hair
        assert loss <= losses[sums <= cap - hair].min(initial=np.inf) * (1 + 1e-12) + 1e-12
        assert loss >= losses[sums <= cap + hair].min() * (1 - 1e-12) - 1e-12


@given(table=TABLES, data=st.data())
def test_with_groups_and_allowed_values_it_is_the_best_within_the_budget(table, data):
    layers, last_k = table.shape
    constraints = data.draw(draw_constraints(layers, last_k))
    everything = np.array(list(enumerate_feasible(constraints, layers, last_k)))
    if not len(everything):
        return
    sums, losses = everything.sum(axis=1), sum_over_layers(table, everything)
    problem = pose(table, np.arange(sums.min(), sums.max() + 1), constraints=constraints)
    found, uniform = solve(problem), find_uniform(problem)
    for budget, top_k, loss, k in zip(problem.budgets, found.top_k, found.loss, uniform, strict=True):
        fits = sums == budget if problem.sums_to_budget else sums <= budget
        assert tuple(top_k.tolist()) in set(map(tuple, everything[fits].tolist()))
        np.testing.assert_allclose(loss, losses[fits].min(), rtol=1e-12, atol=1e-12)
        same = fits & (everything == everything[:, :1]).all(axis=1)
        assert bool(k) == same.any()
        if k:
            assert sum_over_layers(table, np.full(layers, k)) == losses[same].min()


def test_many_tables_are_solved_as_each_alone():
    tables = np.random.default_rng(0).random((5, 7, 4))
    problem = pose(tables[0], np.arange(7, 29))
    together = solve_many(problem, tables)
    for table, top_k in zip(tables, together, strict=True):
        np.testing.assert_array_equal(top_k, solve(pose(table, np.arange(7, 29))).top_k)


@pytest.mark.parametrize("constraints", [Constraints(), Constraints(allowed_k=(1, 4, 8), groups=((0, 3), (1, 2, 9)))])
def test_many_tables_under_real_costs_stay_within_the_stated_step(constraints):
    """Rounded to steps: never above the budget, and no worse than the optimum of a budget one step a unit smaller."""
    draw = np.random.default_rng(1)
    tables = -np.sort(-draw.random((4, 20, 8)), axis=2)
    costs = np.sort(draw.random((20, 8)), axis=1)
    free = pose(tables[0], None, costs=costs, constraints=constraints)
    least, most = free.unit_costs[:, 0].sum(), free.unit_costs[:, -1].sum()
    caps = np.linspace(least + 0.05 * (most - least), most, 9)
    problem = pose(tables[0], caps, costs=costs, constraints=constraints)
    step = len(free.ks) * (most - least) / 2**14
    for table, top_k in zip(tables, solve_many(problem, tables), strict=True):
        assert (sum_over_layers(costs, top_k) <= problem.budgets).all()
        tighter = solve(pose(table, caps - step, costs=costs, constraints=constraints))
        assert (sum_over_layers(table, top_k) <= tighter.loss * (1 + 1e-12)).all()


@given(table=TABLES)
def test_a_budget_alone_is_solved_as_in_company(table):
    layers, last_k = table.shape
    budgets = np.arange(layers, layers * last_k + 1)
    together = solve(pose(table, budgets))
    for index, budget in enumerate(budgets):
        alone = solve(pose(table, np.array([budget])))
        assert alone.top_k[0].tolist() == together.top_k[index].tolist() and alone.loss[0] == together.loss[index]


def test_falling_losses_give_a_falling_front():
    table = np.sort(np.random.default_rng(0).random((61, 8)), axis=1)[:, ::-1]
    loss = solve(pose(table, np.arange(61, 489))).loss
    assert (np.diff(loss) <= 0).all()


def test_ties_take_the_smaller_k_of_the_later_layer():
    assert solve(pose(np.ones((3, 3)), np.array([5]))).top_k.tolist() == [[3, 1, 1]]


@pytest.mark.parametrize(
    ("table", "budgets", "constraints", "message"),
    [
        (np.ones(3), [3], {}, "the loss of each layer at each k must be a table"),
        (np.ones((0, 3)), [3], {}, "the loss of each layer at each k must be a table"),
        ([[1, np.nan]], [1], {}, "loss of layer 0 at k=2 is nan"),
        ([[1, 0], [np.inf, 0]], [2], {}, "loss of layer 1 at k=1 is inf"),
        ([[1, -0.5]], [1], {}, "loss of layer 0 at k=2 is -0.5"),
        (np.ones((2, 3)), [1], {}, "budget 1 is outside 2..6, what the layers and constraints allow"),
        (np.ones((2, 3)), [2, 7], {}, "budget 7 is outside 2..6"),
        (np.ones((2, 3)), [3], {"min_k": 2}, "budget 3 is outside 4..6"),
        (np.ones((2, 3)), [4], {"min_k": 3, "max_k": 2}, "min_k=3 is above max_k=2 in layer 0"),
        (np.ones((2, 3)), [4], {"min_k": (1, 3), "max_k": (3, 2)}, "min_k=3 is above max_k=2 in layer 1"),
        (np.ones((2, 3)), [4], {"max_k": 4}, r"max_k=4 must be an integer in 1..3"),
        (np.ones((2, 3)), [4], {"min_k": 0}, r"min_k=0 must be an integer in 1..3"),
        (np.ones((2, 3)), [4], {"min_k": (1, 1, 1)}, "an integer or one for each of the 2 layers"),
        (np.ones((2, 3)), [4], {"min_k": 1.5}, "min_k=1.5 must be an integer"),
        (np.ones((2, 3)), [4], {"allowed_k": (1, 4)}, r"allowed_k has 4; the losses cover k in 1..3"),
        (np.ones((2, 3)), [4], {"allowed_k": (1,), "min_k": 2}, r"no k is left for layers \[0\]"),
        (np.ones((2, 3)), [4], {"groups": ((0, 2),)}, r"group \[0, 2\] has layer 2; the table has 2 layers"),
        (np.ones((3, 3)), [4], {"groups": ((0, 1), (1, 2))}, "layer 1 is in two groups"),
        (np.ones((3, 3)), [4], {"groups": ((1, 2), (0, 1))}, "layer 1 is in two groups"),
        (np.ones((3, 3)), [4], {"groups": ((0, 1), (0, 2))}, "layer 0 is in two groups"),
        (np.ones((2, 3)), [], {}, "a non-empty list of integers"),
        (np.ones((2, 3)), [2.5], {}, "a non-empty list of integers"),
    ],
)
def test_refuses(table, budgets, constraints, message):
    with pytest.raises(InputError, match=message):
        pose(np.asarray(table, float), np.asarray(budgets), constraints=Constraints(**constraints))


@pytest.mark.parametrize(
    ("costs", "caps", "message"),
    [
        (np.ones((2, 2)), [5.0], "they must agree"),
        ([[1, 2, 3], [1, np.nan, 3]], [5.0], "cost of layer 1 at k=2 is nan"),
        ([[1, 2, 3], [1, -2, 3]], [5.0], "cost of layer 1 at k=2 is -2"),
        (np.ones((2, 3)), [1.9], "budget 1.9 is below 2, the least that"),
        (np.ones((2, 3)), [np.inf], "finite"),
        (np.ones((2, 3)), [], "a non-empty list of numbers"),
    ],
)
def test_refuses_costs(costs, caps, message):
    with pytest.raises(InputError, match=message):
        pose(np.ones((2, 3)), np.asarray(caps), costs=np.asarray(costs, float))
