"""The certainty of allocations, against loops over resampled tables."""

import numpy as np
import pytest

from lexi_search.solvers.exact import solve
from lexi_search.solvers.problem import Constraints, pose, sum_over_layers
from lexi_search.solvers.uncertainty import judge, resample


def test_shares_and_regret_are_those_of_a_loop():
    draw = np.random.default_rng(0)
    losses = -np.sort(-draw.random((6, 4)), axis=1)
    errors = np.full((6, 4), 0.05)
    problem = pose(losses, np.array([9, 14, 20]))
    top_k = solve(problem).top_k
    sure = judge(problem, errors, top_k, resamples=50, seed=3)
    counts, regrets = np.zeros((3, 6)), np.zeros(3)
    tables = resample(losses, errors, count=50, seed=3)
    for table in tables:
        for row, budget in enumerate((9, 14, 20)):
            best = solve(pose(table, np.array([budget]))).top_k[0]
            counts[row] += best == top_k[row]
            regrets[row] += sum_over_layers(table, top_k[row]) / sum_over_layers(table, best) - 1
    np.testing.assert_array_equal(sure.share, counts / 50)
    np.testing.assert_allclose(sure.regret, regrets / 50)
    assert (sure.share < 1).any() and (sure.regret > 0).all()


def test_resamples_have_the_stated_spread_and_are_losses():
    losses, errors = np.array([[1.0, 0.01, 0.0]]), np.array([[0.1, 0.02, 0.0]])
    tables = resample(losses, errors, count=20000, seed=0)
    assert tables.min() == 0 and (tables[..., 2] == 0).all()
    assert tables[..., 0].mean() == pytest.approx(1, abs=0.005) and tables[..., 0].std() == pytest.approx(0.1, rel=0.05)


LOSSES = -np.sort(-np.random.default_rng(1).random((8, 4)), axis=1)
COSTS = np.sort(np.random.default_rng(2).random((8, 4)), axis=1)
POSED = {
    "sums": (np.arange(8, 33), {}),
    "groups": (np.arange(8, 33), {"constraints": Constraints(groups=((0, 1, 2), (4, 7)))}),
    "allowed values": (np.arange(8, 33), {"constraints": Constraints(allowed_k=(1, 2, 4))}),
    "costs": (np.linspace(COSTS[:, 0].sum() * 1.1, COSTS[:, -1].sum(), 9), {"costs": COSTS}),
}


@pytest.mark.parametrize("case", POSED)
def test_a_profile_without_errors_is_sure(case):
    budgets, more = POSED[case]
    problem = pose(LOSSES, budgets, **more)
    sure = judge(problem, np.zeros((8, 4)), solve(problem).top_k, resamples=3)
    assert (sure.share == 1).all() and (sure.regret == 0).all()


@pytest.mark.parametrize("case", ["groups", "allowed values", "costs"])
def test_constrained_regret_is_that_of_a_loop(case):
    budgets, more = POSED[case]
    problem = pose(LOSSES, budgets, **more)
    top_k = solve(problem).top_k
    sure = judge(problem, LOSSES * 0.1, top_k, resamples=40, seed=5)
    regrets = np.zeros(len(budgets))
    for table in resample(LOSSES, LOSSES * 0.1, count=40, seed=5):
        found, least = sum_over_layers(table, top_k), solve(pose(table, budgets, **more)).loss
        regrets += np.divide(found - least, least, where=least > 0, out=np.zeros_like(least)) / 40
    # Rounded costs may miss the last bit of a budget; whole ones are exact.
    np.testing.assert_allclose(sure.regret, regrets, rtol=1e-9, atol=2e-3 if case == "costs" else 1e-12)
    assert (regrets > 0).any()
