"""Allocations that stay even unless a noisy table can tell a better one, against brute force and loops."""

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lexi_search.allocation.baselines import spread_evenly
from lexi_search.solvers.exact import solve
from lexi_search.solvers.problem import Constraints, pose, sum_over_layers
from lexi_search.solvers.robust import Caution, choose, find_even, shrink
from lexi_search.solvers.uncertainty import resample


def draw_losses(layers=5, last_k=4, *, seed=0, spread=1.0):
    """A table of losses that are convex in k, at another scale in each layer."""
    scale = np.exp(spread * np.random.default_rng(seed).standard_normal((layers, 1)))
    return scale * (1 - np.arange(1, last_k + 1) / last_k) ** 2


COSTS = np.sort(np.random.default_rng(2).random((5, 4)), axis=1) + 0.1 * np.arange(4)
FALLING = COSTS[:, [0, 2, 1, 3]]  # k = 3 is cheaper than k = 2
POSED = {
    "sums": (np.arange(5, 21), {}),
    "bounds": (np.arange(8, 18), {"constraints": Constraints(min_k=(1, 3, 1, 1, 2), max_k=(4, 4, 2, 4, 4))}),
    "groups": (np.arange(5, 21), {"constraints": Constraints(groups=((0, 3, 4),))}),
    "allowed values": (np.arange(5, 21), {"constraints": Constraints(allowed_k=(1, 2, 4))}),
    "costs": (np.linspace(COSTS[:, 0].sum(), COSTS[:, -1].sum(), 12), {"costs": COSTS}),
    "falling costs": (np.linspace(FALLING.min(axis=1).sum(), FALLING.max(axis=1).sum(), 12), {"costs": FALLING}),
}


def list_feasible(problem, budget):
    """Every allocation within the constraints that meets the budget, whatever it loses."""
    units = [problem.ks[unit, :count].tolist() for unit, count in enumerate(problem.num_levels)]
    every = np.array(list(itertools.product(*units)))[:, problem.unit_of]
    cost = sum_over_layers(problem.costs, every)
    return every[cost == budget if problem.sums_to_budget else cost <= budget]


@pytest.mark.parametrize("layers", [1, 4, 7])
def test_even_k_are_spread_as_those_that_an_allocation_is_compared_with(layers):
    budgets = np.arange(layers, 4 * layers + 1)
    even = find_even(pose(draw_losses(layers), budgets))
    assert list(map(tuple, even.tolist())) == [spread_evenly(budget, layers) for budget in budgets.tolist()]


@pytest.mark.parametrize("case", POSED)
def test_even_k_are_the_most_alike_that_a_budget_allows(case):
    budgets, more = POSED[case]
    problem = pose(draw_losses(), budgets, **more)
    for even, budget in zip(find_even(problem), problem.budgets, strict=True):
        feasible = list_feasible(problem, budget)
        assert (feasible == even).all(axis=1).any()
        if problem.sums_to_budget:
            assert (even**2).sum() == (feasible**2).sum(axis=1).min()
            continue
        if case == "falling costs":  # even k need not rise with the budget there
            continue
        assert even.min() == feasible.min(axis=1).max()
        # Nothing is left that would raise one of the smallest k alone.
        more_k = feasible[(feasible >= even).all(axis=1) & (feasible != even).any(axis=1)]
        assert not ((more_k.min(axis=1) > even.min()) | (more_k.max(axis=1) <= even.max())).any()


def test_a_uniform_k_is_even_where_costs_allow_it():
    budgets = COSTS.sum(axis=0)
    assert find_even(pose(draw_losses(), budgets, costs=COSTS)).tolist() == [[k] * 5 for k in (1, 2, 3, 4)]


def test_losses_are_shrunk_by_the_share_of_their_spread_that_is_error():
    losses, errors = draw_losses(), 0.1 * draw_losses(seed=1)
    errors[:, 2] = 10.0
    shrunk = shrink(losses, errors, floor=0.05)
    for column in range(4):
        row, mean = losses[:, column], losses[:, column].mean()
        spread, noise = row.var(ddof=1), (errors[:, column] ** 2).mean()
        share = min(max(noise / spread, 0.05), 1.0) if spread else 1.0
        np.testing.assert_allclose(shrunk[:, column], (1 - share) * row + share * mean, rtol=1e-12)
    assert np.ptp(shrunk[:, 2]) < 1e-12 < np.ptp(shrunk[:, 0])
    np.testing.assert_array_equal(shrink(np.stack([losses, shrunk]), errors)[0], shrink(losses, errors))
    np.testing.assert_array_equal(shrink(losses, np.zeros_like(errors)), losses)


def test_the_mean_is_made_convex():
    losses, errors = np.random.default_rng(0).random((6, 5)), np.full((6, 5), 10.0)  # all is noise
    mean, hull = losses.mean(axis=0), []
    for k in range(5):
        ends = [(i, j) for i in range(k + 1) for j in range(k, 5)]
        hull.append(min(np.interp(k, (i, j), mean[[i, j]]) for i, j in ends))
    assert (mean > np.array(hull) + 1e-3).any() and (np.diff(hull, n=2) > -1e-12).all()
    np.testing.assert_allclose(shrink(losses, errors), np.tile(hull, (6, 1)), rtol=1e-12)


@pytest.mark.parametrize("case", POSED)
def test_the_expected_gain_is_that_of_a_loop(case):
    budgets, more = POSED[case]
    losses = draw_losses(spread=0.4)
    errors = 0.03 * losses  # small enough that no column is shrunk to its mean, which would leave ties
    posed = pose(losses, budgets, **more)
    sure = choose(posed, errors, resamples=30, floor=0.1, threshold=-np.inf, seed=3)
    threshold = np.median(sure.expected_gain[(sure.top_k != find_even(posed)).any(axis=1)])
    choice = choose(posed, errors, resamples=30, floor=0.1, threshold=float(threshold), seed=3)
    shrunk = shrink(losses, errors, floor=0.1)
    problem, lost = pose(shrunk, budgets, **more), np.zeros(len(budgets))
    for table in shrink(resample(shrunk, errors, count=30, seed=3), errors, floor=0.1):
        lost += sum_over_layers(shrunk, solve(pose(table, budgets, **more)).top_k) / 30
    even = find_even(problem)
    least, even_loss = solve(problem).loss, sum_over_layers(shrunk, even)
    expected = 1 - np.divide(lost, even_loss, where=even_loss > 0, out=np.ones_like(lost))
    # Rounded costs may miss the last bit of a budget; whole ones are exact.
    np.testing.assert_allclose(choice.expected_gain, expected, atol=1e-2 if "costs" in case else 1e-12)
    gain = 1 - np.divide(least, even_loss, where=even_loss > 0, out=np.ones_like(lost))
    np.testing.assert_allclose(choice.gain, gain, atol=1e-12)
    assert (expected < gain - 1e-5).any()
    differs = (choice.found.top_k != even).any(axis=1)
    np.testing.assert_array_equal(choice.fallback, differs & (choice.expected_gain < threshold))
    np.testing.assert_array_equal(choice.top_k, np.where(choice.fallback[:, None], even, choice.found.top_k))
    assert choice.fallback.any() and (differs & ~choice.fallback).any()


@st.composite
def draw_case(draw):
    losses = draw(hnp.arrays(np.float64, (4, 3), elements=st.floats(0, 10, allow_subnormal=False)))
    errors = losses * draw(hnp.arrays(np.float64, (4, 3), elements=st.floats(0, 0.5, allow_subnormal=False)))
    groups = draw(st.sampled_from([(), ((0, 2),)]))
    allowed = draw(st.sampled_from([None, (1, 3), (1, 2, 3)]))
    constraints = Constraints(
        min_k=draw(st.sampled_from([1, (1, 1, 1, 2)])) if allowed is None else 1, allowed_k=allowed, groups=groups
    )
    if draw(st.booleans()):
        costs = draw(st.sampled_from([COSTS, FALLING]))[:4, :3]
        return losses, errors, np.linspace(costs.max(axis=1).sum() - 0.3, costs.sum(), 3), constraints, costs
    return losses, errors, np.arange(5, 13), constraints, None


@settings(max_examples=40)
@given(case=draw_case(), seed=st.integers(0, 3), threshold=st.floats(0, 0.3), floor=st.floats(0, 1))
def test_what_is_returned_is_expected_to_be_better_or_even(case, seed, threshold, floor):
    losses, errors, budgets, constraints, costs = case
    problem = pose(losses, budgets, constraints=constraints, costs=costs)
    choice = choose(problem, errors, threshold=threshold, floor=floor, resamples=4, seed=seed)
    even = find_even(problem)
    for row, budget in enumerate(problem.budgets):
        assert (list_feasible(problem, budget) == choice.top_k[row]).all(axis=1).any()
        assert choice.expected_gain[row] >= threshold or (choice.top_k[row] == even[row]).all()
    assert (choice.expected_gain <= choice.gain).all()
    again = choose(problem, errors, threshold=threshold, floor=floor, resamples=4, seed=seed)
    np.testing.assert_array_equal(choice.top_k, again.top_k)
    np.testing.assert_array_equal(choice.expected_gain, again.expected_gain)
    last = pose(losses, budgets[-1:], constraints=constraints, costs=costs)  # whatever else is in the call
    alone = choose(last, errors, threshold=threshold, floor=floor, resamples=4, seed=seed)
    np.testing.assert_array_equal(alone.top_k, choice.top_k[-1:])


@given(
    steps=hnp.arrays(np.float64, 3, elements=st.floats(0.01, 10)),
    noise=st.floats(0, 0.3),
    seed=st.integers(0, 5),
)
def test_layers_that_are_alike_stay_even(steps, noise, seed):
    row = np.concatenate([np.cumsum(steps)[::-1], [0.0]])  # convex in k or not
    losses, budgets = np.tile(row, (6, 1)), np.arange(6, 25)
    problem = pose(losses, budgets)
    choice = choose(problem, noise * losses, resamples=8, seed=seed)
    np.testing.assert_array_equal(choice.top_k, find_even(problem))
    assert (choice.expected_gain < 1e-9).all()


@given(table=hnp.arrays(np.float64, (5, 4), elements=st.floats(0.1, 10)))
def test_a_table_without_errors_and_prior_gives_its_optimum(table):
    assume(np.ptp(table, axis=0).min() > 1e-3)
    problem = pose(table, np.arange(5, 21))
    choice = choose(problem, np.zeros((5, 4)), threshold=0.0, floor=0.0, resamples=2)
    np.testing.assert_allclose(sum_over_layers(table, choice.top_k), solve(problem).loss, rtol=1e-12)
    np.testing.assert_allclose(choice.expected_gain, choice.gain, atol=1e-12)


def test_layers_that_differ_much_get_their_optimum_despite_noise():
    losses = draw_losses(12, 8, spread=1.0, seed=4)
    problem = pose(losses, np.array([24, 48, 72]))
    choice = choose(problem, 0.05 * losses, floor=0.25)
    even = sum_over_layers(losses, find_even(problem))
    assert not choice.fallback.any() and (choice.expected_gain > 0.1).all()
    assert (sum_over_layers(losses, choice.top_k) < even - 0.8 * (even - solve(problem).loss)).all()


def test_noise_alone_leads_nowhere_where_the_optimum_would_be_worse():
    row = (1 - np.arange(1, 9) / 8) ** 2
    truth, budgets = np.tile(row, (12, 1)), np.array([24, 48, 72, 80])
    draw, optimum_lost, lost = np.random.default_rng(0), 0.0, 0.0
    even = sum_over_layers(truth, find_even(pose(truth, budgets)))
    for seed in range(10):
        table = truth * (1 + 0.15 * draw.standard_normal(truth.shape))
        problem = pose(table, budgets)
        optimum_lost += (sum_over_layers(truth, solve(problem).top_k) / even - 1).mean() / 10
        lost += (sum_over_layers(truth, choose(problem, 0.15 * table, seed=seed).top_k) / even - 1).mean() / 10
    assert optimum_lost > 0.03 and lost < 0.005


def test_a_single_layer_and_losses_of_zero_are_no_trouble():
    assert choose(pose(np.array([[1.0, 0.5, 0.0]]), [2]), np.full((1, 3), 0.1), resamples=3).top_k.tolist() == [[2]]
    choice = choose(pose(np.zeros((4, 3)), np.arange(4, 13)), np.zeros((4, 3)), resamples=3)
    assert (choice.expected_gain == 0).all() and (choice.top_k == find_even(pose(np.zeros((4, 3)), range(4, 13)))).all()


def test_defaults_are_those_of_caution():
    problem, errors = pose(draw_losses(), np.arange(5, 21)), 0.2 * draw_losses()
    by_name = choose(problem, errors, **Caution()._asdict())
    np.testing.assert_array_equal(choose(problem, errors).expected_gain, by_name.expected_gain)
