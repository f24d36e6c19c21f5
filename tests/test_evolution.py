"""The evolutionary search: always feasible, never worse, independent of company, and at the proven optimum."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lexi_search.errors import InputError
from lexi_search.evolution import Settings, Task, additive_loss, project, search, start, step
from lexi_search.exact import solve

SMALL = {"population": 32, "generations": 20}


def make_convex(layers, top_k, seed=0):
    """Mean squares as real profiles have them: falling ever more slowly."""
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
    np.testing.assert_allclose(search(table, budgets).loss, solve(table, budgets).loss, rtol=1e-12)


@pytest.mark.parametrize(("min_k", "max_k"), [(1, 3), (2, 4), (2, 2)])
def test_every_individual_of_every_generation_is_feasible(min_k, max_k):
    table = jnp.asarray(make_random(6, 4), jnp.float32)
    settings = Settings(population=64, generations=1, mutation_rate=0.5, tournament=2, fitness=additive_loss)
    for budget in range(6 * min_k, 6 * max_k + 1):
        task = Task(table, jnp.int32(budget), jnp.int32(min_k), jnp.int32(max_k))
        state = start(jax.random.key(budget), task, settings)
        for generation in range(10):
            assert (state.top_k.sum(axis=1) == budget).all()
            assert state.top_k.min() >= min_k and state.top_k.max() <= max_k
            np.testing.assert_array_equal(state.fitness, additive_loss(table, state.top_k))
            state = step(jax.random.key(generation), state, task, settings)


@given(
    top_k=st.lists(st.integers(1, 5), min_size=1, max_size=8),
    first=st.integers(0, 7),
    spare=st.floats(0, 1),
)
def test_projection_meets_any_budget_in_the_least_steps(top_k, first, spare):
    layers = len(top_k)
    budget = round(layers + spare * layers * 4)
    before = np.array([top_k])
    after = np.asarray(
        project(
            jnp.asarray(before, jnp.int32),
            jnp.asarray([first % layers], jnp.int32),
            jnp.int32(budget),
            jnp.int32(1),
            jnp.int32(5),
        )
    )
    assert after.sum() == budget and after.min() >= 1 and after.max() <= 5
    assert np.abs(after - before).sum() == abs(budget - before.sum())


def test_history_never_rises():
    found = search(make_norms(16, 8), np.array([40, 64, 90]), generations=50)
    assert found.best_history.shape == (3, 50)
    assert (np.diff(found.best_history, axis=1) <= 0).all()
    assert (found.mean_history >= found.best_history).all()
    np.testing.assert_allclose(found.best_history[:, -1], found.loss, rtol=1e-5)


def test_a_budget_does_not_depend_on_its_company():
    table = make_random(12, 6)
    together = search(table, np.array([20, 33, 50]), **SMALL)
    for index, budget in enumerate((20, 33, 50)):
        alone = search(table, np.array([budget]), **SMALL)
        np.testing.assert_array_equal(alone.top_k[0], together.top_k[index])
        np.testing.assert_array_equal(alone.best_history[0], together.best_history[index])


def test_seed_decides():
    table = make_random(24, 8)
    first, again, other = (search(table, np.array([90]), **SMALL, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.best_history, again.best_history)
    assert (first.best_history != other.best_history).any()


def test_restarts_are_never_worse():
    table = make_norms(24, 8)
    budgets = np.array([60, 100, 150])
    once, thrice = (search(table, budgets, **SMALL, restarts=restarts).loss for restarts in (1, 3))
    assert (thrice <= once).all() and (thrice < once).any()


@pytest.mark.parametrize("layers", [1, 5])
def test_least_and_largest_budgets(layers):
    table = make_random(layers, 4)
    found = search(table, np.array([layers, 4 * layers]), **SMALL)
    assert found.top_k.tolist() == [[1] * layers, [4] * layers]


def test_losses_that_rise_with_k_are_searched_too():
    table = make_random(8, 4)[:, ::-1]
    budgets = np.array([12, 20, 28])
    np.testing.assert_allclose(search(table, budgets).loss, solve(table, budgets).loss)


def test_another_fitness():
    """The largest loss of a layer instead of the sum: nothing that a sum over layers can say."""
    table = make_random(6, 3)

    def worst_layer(losses, population):
        return jnp.take_along_axis(losses.T, population - 1, axis=0).max(axis=1)

    found = search(table, np.array([12]), fitness=worst_layer, generations=100)
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
        ({"min_k": 3}, "budget 8 is outside 12..16"),
        ({"fitness": lambda losses, population: jnp.full(len(population), jnp.nan)}, "the fitness is NaN"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(InputError, match=message):
        search(make_random(4, 4), np.array([8]), **(SMALL | settings))
