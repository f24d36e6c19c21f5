"""The certainty of an allocation, given the standard errors of its profile: the optimum under resampled losses.

Every loss is resampled independently from a normal distribution around its mean. The losses of one layer at different k
are measured on the same tokens, so their errors are correlated, and this overstates the effect: the cautious side.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int

from lexi_search.errors import check_memory
from lexi_search.solvers.exact import solve_many
from lexi_search.solvers.problem import Problem, sum_over_layers

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


def judge(
    problem: Problem,
    errors: Float64[np.ndarray, "layers ks"],
    top_k: Int[np.ndarray, "budgets layers"],
    *,
    resamples: int = 200,
    seed: int = 0,
) -> Certainty:
    """The certainty of the allocations `top_k`, one for each of `problem`'s budgets, from `resamples` tables."""
    # Noise, the tables, and the best allocation of each table.
    size = 8.0 * resamples * (2 * problem.losses.size + top_k.size / 2)
    check_memory(f"{resamples} resampled profiles", size, "lower --resamples")
    tables = resample(problem.losses, np.asarray(errors), count=resamples, seed=seed)
    shares, regrets = np.zeros(top_k.shape), np.zeros(len(top_k))
    for table, best in zip(tables, solve_many(problem, tables), strict=True):
        loss, least = sum_over_layers(table, top_k), sum_over_layers(table, best)
        # Where costs were rounded, the allocation may be better than this optimum.
        stays = loss <= least
        shares += stays[:, None] | (best == top_k)
        regrets += np.where(stays, 0.0, np.divide(loss - least, least, where=least > 0, out=np.zeros_like(least)))
    return Certainty(shares / resamples, regrets / resamples)
