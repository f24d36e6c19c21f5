"""The certainty of an allocation, given the standard errors of its profile: the optimum under resampled losses.

Every loss is resampled independently from a normal distribution around its mean. The losses of one layer at different k
are measured on the same tokens, so their errors are correlated, and this overstates the effect: the cautious side.
Measured costs are resampled as well where their errors are known: one error for all layers at a k.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int

from lexi_search.errors import InputError, check_memory
from lexi_search.solvers.exact import solve_each, solve_many
from lexi_search.solvers.problem import Problem, sum_over_layers

LEAST_SHARE = 0.01  # of a measured cost that a resampled one keeps: time is never negative
# The expected regret, relative to the optimum, above which a profile is too noisy for a budget.
NOISY = 0.01


class Certainty(NamedTuple):
    """For each budget, `share`: the share of resampled profiles in which each layer's optimal k is the chosen one; and
    `regret`: the mean excess of the allocation's loss over the optimum of each, relative to that."""

    share: Float64[np.ndarray, "budgets layers"]
    regret: Float64[np.ndarray, " budgets"]


def resample(
    losses: Float64[np.ndarray, "layers ks"], errors: Float64[np.ndarray, "layers ks"], *, count: int, seed: int
) -> Float64[np.ndarray, "count layers ks"]:
    """`count` tables that other samples of the same size might have given; never below 0."""
    noise = np.random.default_rng(seed).standard_normal((count, *losses.shape))
    return np.maximum(losses + noise * errors, 0.0)


def find_saving(regret: float) -> float:
    """What another sample would have saved, as a share of the loss: a regret is a share of the least loss instead."""
    return regret / (1 + regret)


def judge(
    problem: Problem,
    errors: Float64[np.ndarray, "layers ks"],
    top_k: Int[np.ndarray, "budgets layers"],
    *,
    resamples: int = 200,
    seed: int = 0,
    cost_errors: Float64[np.ndarray, "layers ks"] | None = None,
    repose: Callable[[np.ndarray], Problem] | None = None,
) -> Certainty:
    """The certainty of the allocations `top_k`, one for each of `problem`'s budgets, from `resamples` tables.

    With `cost_errors`, each table has costs of its own, with which `repose` makes its problem. An allocation that then
    exceeds its budget is not counted as the best.
    """
    # Noise, the tables, and the best allocation of each table.
    size = 8.0 * resamples * (2 * problem.losses.size + top_k.size / 2)
    check_memory(f"{resamples} resampled profiles", size, "lower --resamples")
    tables = resample(problem.losses, np.asarray(errors), count=resamples, seed=seed)
    shares, regrets = np.zeros(top_k.shape), np.zeros(len(top_k))
    problems = [problem] * resamples
    if cost_errors is None or repose is None:
        solved = solve_many(problem, tables)
    else:
        problems = _resample_costs(problem, cost_errors, repose, count=resamples, seed=seed)
        solved = solve_each(problems, tables)
    for own, table, best in zip(problems, tables, solved, strict=True):
        loss, least = sum_over_layers(table, top_k), sum_over_layers(table, best)
        # Where costs were rounded, the allocation may be better than this optimum.
        fits = own is problem or sum_over_layers(own.costs, top_k) <= own.budgets
        stays = (loss <= least) & fits
        shares += stays[:, None] | (best == top_k)
        excess = np.maximum(loss - least, 0.0)
        regrets += np.where(stays, 0.0, np.divide(excess, least, where=least > 0, out=np.zeros_like(least)))
    return Certainty(shares / resamples, regrets / resamples)


def _resample_costs(
    problem: Problem,
    errors: Float64[np.ndarray, "layers ks"],
    repose: Callable[[np.ndarray], Problem],
    *,
    count: int,
    seed: int,
) -> list[Problem]:
    """The problem under `count` tables of costs; as it is where no allocation would meet a budget any more."""
    noise = np.random.default_rng([seed, 1]).standard_normal((count, errors.shape[1]))
    problems = []
    for row in noise:
        try:
            problems.append(repose(np.maximum(problem.costs + row * errors, LEAST_SHARE * problem.costs)))
        except InputError:
            problems.append(problem)
    return problems
