"""The true optimum of stage 2 for every budget at once: a dynamic programme over layers."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int, Int32, Real

from lexi_search.budgets import allocation_loss, pose


class Optimum(NamedTuple):
    """Row i belongs to `budgets[i]`; losses are in the unit of the table."""

    top_k: Int32[np.ndarray, "budgets layers"]
    loss: Float64[np.ndarray, " budgets"]


def solve(
    losses: Real[np.ndarray, "layers ks"],
    budgets: Int[np.ndarray, " budgets"],
    *,
    min_k: int = 1,
    max_k: int | None = None,
) -> Optimum:
    """Allocations of least summed loss, one per budget, with sum == budget and min_k <= k <= max_k.

    Exact in float64, not merely close: rounded addition keeps order, so the programme's minimum is the minimum over
    all allocations of the sum taken from the first layer to the last (`budgets.allocation_loss`). Where several k of a
    layer tie, the smallest is taken, decided from the last layer back to the first. Time and memory grow with
    layers^2 x (max_k - min_k)^2 and layers^2 x (max_k - min_k), whatever the budgets. Raises InputError as
    `budgets.pose`.
    """
    problem = pose(losses, budgets, min_k=min_k, max_k=max_k)
    table = problem.losses[:, problem.min_k - 1 : problem.max_k]
    layers, choices = table.shape
    extras = layers * (choices - 1) + 1  # experts above min_k, summed over layers: 0 .. extras - 1

    best = np.full(extras, np.inf)  # best[e]: least loss of the layers so far with e extra experts in sum
    best[0] = 0.0
    choice = np.empty((layers, extras), np.int64)
    for layer in range(layers):
        padded = np.concatenate([np.full(choices - 1, np.inf), best])
        # Row c is `best` moved up by c: the layers before had c experts fewer.
        before = np.lib.stride_tricks.sliding_window_view(padded, extras)[::-1]
        total = before + table[layer][:, None]
        choice[layer] = total.argmin(axis=0)
        best = total.min(axis=0)

    left = problem.budgets - layers * problem.min_k
    top_k = np.empty((len(left), layers), np.int32)
    for layer in reversed(range(layers)):
        extra = choice[layer, left]
        top_k[:, layer] = problem.min_k + extra
        left = left - extra
    return Optimum(top_k, allocation_loss(problem.losses, top_k))
