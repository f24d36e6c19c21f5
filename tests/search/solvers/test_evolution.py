"""The evolutionary search: feasible, never worse than uniform, independent of other budgets, at the optimum."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lexi_search.errors import InputError
from lexi_search.solvers import evolution
from lexi_search.solvers.evolution import make_tasks, search
from lexi_search.solvers.exact import solve
from lexi_search.solvers.operators import Settings, read_top_k, repair, start, step
from lexi_search.solvers.problem import Constraints, find_uniform, pose, sum_over_layers

SMALL = {"population": 32, "generations": 20}


def make_convex(layers, top_k, seed=0):
    """Mean squares as in real profiles: falling ever more slowly."""
    draw = np.random.default_rng(seed)
    tail = np.arange(top_k - 1, -1, -1) / top_k
    return draw.uniform(0.2, 1, (layers, 1)) * tail ** draw.uniform(1.5, 3, (layers, 1))


def make_norms(layers, top_k, seed=0):
    """Norms: their last step is the largest, so that the optimum gives a few layers everything."""
    return np.sqrt(make_convex(layers, top_k, seed)) * 100


def make_random(layers, top_k, seed=0):
    return np.sort(np.random.default_rng(seed).random((layers, top_k)), axis=1)[:, ::-1]


@pytest.mark.parametrize("make", [make_convex, make_norms, make_random])
@pytest.mark.parametrize(("layers", "top_k"), [(12, 8), (24, 4), (32, 2), (26, 6)])
def test_defaults_reach_the_optimum(make, layers, top_k):
    table = make(layers, top_k)
    budgets = np.arange(layers, layers * top_k + 1, 7)
    problem = pose(table, budgets)
    np.testing.assert_allclose(search(problem).loss, solve(problem).loss, rtol=1e-12)


def make_costs(layers, top_k, seed=0):
    """Milliseconds that rise ever more slowly with k, and differ between layers by a little."""
    draw = np.random.default_rng(seed)
    return np.sort(np.arange(1, top_k + 1) ** 0.7 * draw.normal(1, 0.02, (layers, top_k)), axis=1)


POSED = {
    "bounds": lambda: pose(make_random(6, 4), np.arange(12, 19), constraints=Constraints(min_k=2, max_k=3)),
    "one budget left": lambda: pose(make_random(6, 4), [12], constraints=Constraints(min_k=2, max_k=2)),
    "bounds of each layer": lambda: pose(
        make_random(5, 4), np.arange(9, 16), constraints=Constraints(min_k=(1, 2, 1, 4, 1), max_k=(4, 2, 3, 4, 2))
    ),
    "allowed values": lambda: pose(
        make_random(6, 8), np.arange(6, 49), constraints=Constraints(allowed_k=(1, 2, 4, 8))
    ),
    "groups": lambda: pose(make_random(7, 4), np.arange(7, 29), constraints=Constraints(groups=((0, 1, 5), (2, 3)))),
    "costs": lambda: pose(make_random(6, 4), np.linspace(6.5, 15, 9), costs=make_costs(6, 4)),
    "costs that fall": lambda: pose(make_random(6, 4), np.linspace(6.5, 15, 9), costs=make_costs(6, 4)[:, ::-1]),
    "costs and everything": lambda: pose(
        make_random(6, 8),
        np.linspace(11, 23, 7),
        costs=make_costs(6, 8),
        constraints=Constraints(min_k=(1, 1, 8, 1, 1, 1), allowed_k=(1, 2, 4), groups=((0, 1), (3, 5))),
    ),
}


@pytest.mark.parametrize("case", POSED)
def test_every_individual_of_every_generation_is_feasible(case):
    problem = POSED[case]()
    settings = Settings(64, 1, 0.5, 2, problem.sums_to_budget, None)
    tasks = make_tasks(problem, find_uniform(problem))
    begin, advance = jax.jit(start, static_argnums=2), jax.jit(step, static_argnums=3)
    allowed = [set(ks[:count]) for ks, count in zip(problem.ks.tolist(), problem.num_levels, strict=True)]
    for row, budget in list(enumerate(problem.budgets))[:: len(problem.budgets) // 7 + 1]:
        own = {name: getattr(tasks, name)[row] for name in ("budget", "uniform", "target")}
        task = jax.tree.map(jnp.asarray, tasks._replace(**own))
        state = begin(jax.random.key(row), task, settings)
        for generation in range(8):
            top_k = np.asarray(read_top_k(state.levels, task))
            costs = sum_over_layers(problem.costs, top_k)
            assert (costs == budget).all() if problem.sums_to_budget else (costs <= budget).all()
            assert all(k in allowed[problem.unit_of[layer]] for layer in range(top_k.shape[1]) for k in top_k[:, layer])
            for unit in range(len(allowed)):
                members = top_k[:, problem.unit_of == unit]
                assert (members == members[:, :1]).all()
            np.testing.assert_allclose(state.fitness, sum_over_layers(problem.losses, top_k), rtol=1e-5)
            state = advance(jax.random.key(generation), state, task, settings)


@pytest.mark.parametrize("case", POSED)
def test_constrained_searches_come_close_to_the_optimum_and_never_above_uniform(case):
    problem = POSED[case]()
    found, best, uniform = search(problem, population=128, generations=60), solve(problem), find_uniform(problem)
    assert (found.loss <= best.loss * 1.001).all() and (found.loss >= best.loss * (1 - 1e-12)).all()
    costs = sum_over_layers(problem.costs, found.top_k)
    assert (costs == problem.budgets).all() if problem.sums_to_budget else (costs <= problem.budgets).all()
    for loss, k in zip(found.loss, uniform, strict=True):
        assert not k or loss <= sum_over_layers(problem.losses, np.full(len(problem.losses), k))


def test_never_worse_than_uniform_however_little_it_searches():
    """Where all layers are alike and losses convex, uniform is the optimum and next to nothing else comes near it."""
    table = np.tile((8 - np.arange(1.0, 9)) ** 2, (40, 1))
    costs = make_costs(40, 8)
    budgets = np.arange(40, 321, 40)
    for problem in (pose(table, budgets), pose(table, np.cumsum(costs.sum(axis=0)[:1]) * 3, costs=costs)):
        found = search(problem, population=2, generations=1)
        for loss, k in zip(found.loss, find_uniform(problem), strict=True):
            assert k and loss <= sum_over_layers(table, np.full(40, k))


def test_never_worse_than_a_uniform_k_that_some_layer_has_a_better_level_for():
    """Layer 0 loses less with fewer, so that its uniform level is dominated: the uniform k still takes part."""
    table, costs = np.tile((8 - np.arange(1.0, 9)) ** 2, (30, 1)), make_costs(30, 8)
    table[0, 1] = 0.5
    budget = costs[:, 4].sum()
    problem = pose(table, [budget], costs=costs)
    assert find_uniform(problem).tolist() == [5]
    found = search(problem, population=2, generations=1)
    assert found.loss[0] <= sum_over_layers(table, np.full(30, 5))


@given(
    levels=st.lists(st.integers(0, 4), min_size=1, max_size=8),
    first=st.integers(0, 7),
    spare=st.floats(0, 1),
)
def test_repair_meets_any_budget_in_the_least_steps(levels, first, spare):
    units = len(levels)
    problem = pose(np.zeros((units, 5)), [round(units + spare * units * 4)])
    task = jax.tree.map(jnp.asarray, make_tasks(problem, find_uniform(problem)))
    task = task._replace(budget=task.budget[0], uniform=task.uniform[0])
    before = np.array([levels])
    at = jnp.asarray([first % units], jnp.int32)
    after = np.asarray(repair(jnp.asarray(before, jnp.int32), at, task, unit_steps=True))
    assert after.sum() + units == problem.budgets[0] and after.min() >= 0 and after.max() <= 4
    assert np.abs(after - before).sum() == abs(problem.budgets[0] - units - before.sum())


def test_history_never_rises():
    found = search(pose(make_norms(16, 8), np.array([40, 64, 90])), generations=50)
    assert found.best_history.shape == (3, 50)
    assert (np.diff(found.best_history, axis=1) <= 0).all()
    assert (found.mean_history >= found.best_history).all()
    np.testing.assert_allclose(found.best_history[:, -1], found.loss, rtol=1e-5)


def test_a_budget_does_not_depend_on_its_company():
    table = make_random(12, 6)
    together = search(pose(table, np.array([20, 33, 50])), **SMALL)
    for index, budget in enumerate((20, 33, 50)):
        alone = search(pose(table, np.array([budget])), **SMALL)
        np.testing.assert_array_equal(alone.top_k[0], together.top_k[index])
        np.testing.assert_array_equal(alone.best_history[0], together.best_history[index])


@pytest.mark.parametrize("case", ["bounds", "groups", "costs"])
def test_a_known_optimum_ends_the_search_where_it_is_reached(case):
    problem = POSED[case]()
    best = solve(problem)
    whole, short = search(problem, **SMALL), search(problem, **SMALL, optimum=best)
    assert (whole.generations == SMALL["generations"]).all()
    assert (short.loss <= whole.loss * (1 + 1e-6)).all()
    reached = short.loss <= best.loss * (1 + 1e-6)
    assert reached.any() and (short.generations[~reached] == SMALL["generations"]).all()
    for row, count in enumerate(short.generations):
        np.testing.assert_array_equal(short.best_history[row, :count], whole.best_history[row, :count])
        assert (short.best_history[row, count:] == short.best_history[row, -1]).all()
        assert count == 0 or short.best_history[row, -1] == short.best_history[row, count - 1]
    assert np.isfinite(short.best_history).all() and np.isfinite(short.mean_history).all()


def test_more_budgets_than_a_block_are_searched_as_each_alone(monkeypatch):
    table = make_random(5, 4)
    together = search(pose(table, np.arange(5, 21)), **SMALL)
    monkeypatch.setattr(evolution, "BLOCK", 3)
    apart = search(pose(table, np.arange(5, 21)), **SMALL)
    np.testing.assert_array_equal(together.top_k, apart.top_k)
    np.testing.assert_array_equal(together.mean_history, apart.mean_history)


def test_seed_decides():
    table = make_random(24, 8)
    first, again, other = (search(pose(table, np.array([90])), **SMALL, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.best_history, again.best_history)
    assert (first.best_history != other.best_history).any()


def test_restarts_are_never_worse():
    table = make_norms(24, 8)
    budgets = np.array([60, 100, 150])
    once, thrice = (search(pose(table, budgets), **SMALL, restarts=restarts).loss for restarts in (1, 3))
    assert (thrice <= once).all() and (thrice < once).any()


@pytest.mark.parametrize("layers", [1, 5])
def test_least_and_largest_budgets(layers):
    table = make_random(layers, 4)
    found = search(pose(table, np.array([layers, 4 * layers])), **SMALL)
    assert found.top_k.tolist() == [[1] * layers, [4] * layers]


def test_losses_that_rise_with_k_are_searched_too():
    table = make_random(8, 4)[:, ::-1]
    budgets = np.array([12, 20, 28])
    problem = pose(table, budgets)
    np.testing.assert_allclose(search(problem).loss, solve(problem).loss)


def test_a_fitness_may_bar_allocations_under_constraints():
    """Neighbours may differ by one at most: a constraint across layers, in groups and allowed values."""
    table = make_norms(8, 4)

    def smooth(losses, top_k):
        steps = jnp.abs(top_k[:, 1:] - top_k[:, :-1]).max(axis=1)
        loss = jax.vmap(lambda row, k: row[k - 1], (0, 1), 1)(losses, top_k).sum(axis=1)
        return jnp.where(steps > 1, jnp.inf, loss)

    problem = pose(table, np.array([20]), constraints=Constraints(groups=((0, 1),)))
    found = search(problem, fitness=smooth)
    assert np.abs(np.diff(found.top_k[0])).max() <= 1 and found.top_k[0, 0] == found.top_k[0, 1]
    everything = (k for k in itertools.product(range(1, 5), repeat=8) if sum(k) <= 20 and k[0] == k[1])
    smooth_ones = np.array([k for k in everything if np.abs(np.diff(k)).max() <= 1])
    np.testing.assert_allclose(found.loss[0], sum_over_layers(table, smooth_ones).min())


def test_another_fitness():
    """The largest loss of a layer instead of the sum: nothing that a sum over layers can say."""
    table = make_random(6, 3)

    def worst_layer(losses, population):
        return jnp.take_along_axis(losses.T, population - 1, axis=0).max(axis=1)

    found = search(pose(table, np.array([12])), fitness=worst_layer, generations=100)
    allocations = (np.array(chosen) for chosen in itertools.product((1, 2, 3), repeat=6) if sum(chosen) == 12)
    best = min(table[range(6), top_k - 1].max() for top_k in allocations)
    np.testing.assert_allclose(table[range(6), found.top_k[0] - 1].max(), best)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"population": 0}, "population=0 must be at least 1"),
        ({"generations": 0}, "generations=0 must be at least 1"),
        ({"tournament": 0}, "tournament=0 must be at least 1"),
        ({"restarts": 0}, "restarts=0 must be at least 1"),
        ({"mutation_rate": 1.5}, "mutation_rate=1.5 must be within 0..1"),
        ({"seed": -1}, "seed=-1 must be within"),
        ({"fitness": lambda losses, population: jnp.full(len(population), jnp.nan)}, "the fitness is NaN"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(InputError, match=message):
        search(pose(make_random(4, 4), np.array([8])), **(SMALL | settings))
