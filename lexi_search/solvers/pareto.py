"""The Pareto front of cost and loss under real costs, exact, built unit by unit.

A dominated allocation of the first u units cannot be part of an optimal one, so only the front is kept after each unit.
It stays small: some ten thousand points for 61 layers with 8 levels. Where it would not, points are merged, and the
error is bounded and returned.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int, Int64

from lexi_search.solvers.problem import Problem, read_levels

MAX_POINTS = 2**18
GRAIN = 1e-14  # of the largest cost: costs closer than this are equal


class Frontier(NamedTuple):
    """Points in order of cost, each loss below the one before; with the parent and level of each, unit by unit.

    `error` bounds the excess of a loss over the least loss at its cost, relative to that; 0 where nothing was merged.
    """

    cost: Float64[np.ndarray, " points"]
    loss: Float64[np.ndarray, " points"]
    parents: tuple[Int64[np.ndarray, " points"], ...]
    levels: tuple[Int64[np.ndarray, " points"], ...]
    error: float


def trace(problem: Problem, *, max_points: int = MAX_POINTS) -> Frontier:
    """The Pareto front of a problem whatever its budgets, keeping at most `max_points` points after each unit."""
    cost, loss, growth = np.zeros(1), np.zeros(1), 1.0
    grain = max(GRAIN * problem.unit_costs.max(axis=1).sum(), np.finfo(np.float64).tiny)
    parents, levels = [], []
    for unit_losses, unit_costs, count in zip(problem.unit_losses, problem.unit_costs, problem.num_levels, strict=True):
        all_costs = (cost[:, None] + unit_costs[:count]).ravel()
        all_losses = (loss[:, None] + unit_losses[:count]).ravel()
        # Sums of the same costs in another order differ in their last digits: such points have equal cost.
        order = np.lexsort((all_losses, np.round(all_costs / grain)))
        least_before = np.minimum.accumulate(np.concatenate([[np.inf], all_losses[order][:-1]]))
        kept = order[all_losses[order] < least_before]
        kept, factor = _merge(kept, all_losses[kept], max_points)
        growth *= factor
        cost, loss = all_costs[kept], all_losses[kept]
        parent, level = np.divmod(kept, count)
        parents.append(parent)
        levels.append(level)
    return Frontier(cost, loss, tuple(parents), tuple(levels), growth - 1)


def read_top_k(
    frontier: Frontier, problem: Problem, points: Int[np.ndarray, " chosen"]
) -> Int[np.ndarray, "chosen layers"]:
    """The allocations of some of the front's points."""
    points, columns = np.asarray(points), []
    for parent, level in zip(reversed(frontier.parents), reversed(frontier.levels), strict=True):
        columns.append(level[points])
        points = parent[points]
    return read_levels(problem, np.stack(columns[::-1], axis=1))


def _merge(kept: np.ndarray, losses: np.ndarray, max_points: int) -> tuple[np.ndarray, float]:
    """Keep the cheapest of points whose losses lie within a factor of each other; return them and that factor.

    The factor is the smallest that leaves at most `max_points`. An allocation built on a dropped point can be built on
    the kept one, at no more cost and at most `factor` times the loss.
    """
    factor = 1.0
    step = 1e-9
    while len(kept) > max_points:
        factor = 1 + step
        bucket = np.full(len(losses), -np.inf)  # a loss of 0 is merged with no other
        np.log(losses, where=losses > 0, out=bucket)
        bucket = np.floor(bucket / np.log1p(step))
        first = np.concatenate([[True], bucket[1:] != bucket[:-1]])
        if first.sum() <= max_points:
            return kept[first], factor
        step *= 2
    return kept, factor
