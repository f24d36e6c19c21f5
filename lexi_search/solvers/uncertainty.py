"""How sure an allocation is, given the standard errors of its profile: the optimum under resampled losses.

Every loss is drawn anew from a normal distribution around its mean, on its own. The losses of one layer at different k
are measured on the same tokens and err together, so this overstates what the errors do; it is the careful side.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int

from lexi_search.solvers.exact import solve_many
from lexi_search.solvers.problem import Problem, sum_over_layers

# Above this expected regret, relative to the optimum, a profile is called too noisy for a budget.
NOISY = 0.01


class Certainty(NamedTuple):
    """For each budget: in what share of the resampled profiles each layer's optimal k is the one that was chosen, and
    how much more the allocation loses than the optimum of each, on average, relative to it."""

    share: Float64[np.ndarray, "budgets layers"]
    regret: Float64[np.ndarray, " budgets"]


def resample(
    losses: Float64[np.ndarray, "layers ks"], errors: Float64[np.ndarray, "layers ks"], *, count: int, seed: int
) -> Float64[np.ndarray, "count layers ks"]:
    """`count` tables as other samples of the same size might have given; never below 0."""
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
    """How sure the allocations `top_k` of `problem`'s budgets are, from `resamples` tables."""
    tables = resample(problem.losses, np.asarray(errors), count=resamples, seed=seed)
    shares, regrets = np.zeros(top_k.shape), np.zeros(len(top_k))
    for table, best in zip(tables, solve_many(problem, tables), strict=True):
        found, least = sum_over_layers(table, top_k), sum_over_layers(table, best)
        # Where costs were rounded, the allocation itself may be the better one.
        stays = found <= least
        shares += stays[:, None] | (best == top_k)
        regrets += np.where(stays, 0.0, np.divide(found - least, least, where=least > 0, out=np.zeros_like(least)))
    return Certainty(shares / resamples, regrets / resamples)
