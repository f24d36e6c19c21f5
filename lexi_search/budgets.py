"""The allocation problem that both searches solve, checked once.

Choose one top-k per layer so that the k sum to a budget and the summed loss is smallest (LExI, arXiv 2509.02753,
stage 2). Everything here is host-side numpy; nothing knows a model.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int, Int64, Real

from lexi_search.errors import InputError


class Problem(NamedTuple):
    """A checked problem: `losses[l, k - 1]` is what layer l loses with k experts, in any unit that adds over layers."""

    losses: Float64[np.ndarray, "layers ks"]
    budgets: Int64[np.ndarray, " budgets"]
    min_k: int
    max_k: int


def pose(
    losses: Real[np.ndarray, "layers ks"],
    budgets: Int[np.ndarray, " budgets"],
    *,
    min_k: int = 1,
    max_k: int | None = None,
) -> Problem:
    """Check a loss table and its budgets and return them as a `Problem`.

    `max_k` defaults to the table's last k. A table need not fall as k grows, nor be convex. InputError names the layer
    and k of a loss that is NaN, infinite or negative, bounds outside the table, and a budget that no allocation meets.
    """
    losses = np.array(losses, np.float64)
    if losses.ndim != 2 or 0 in losses.shape:
        raise InputError(f"losses must be a table of layers x k with at least one of each, not of shape {losses.shape}")
    wrong = np.argwhere(~np.isfinite(losses) | (losses < 0))
    if len(wrong):
        layer, column = wrong[0]
        raise InputError(
            f"loss of layer {layer} at k={column + 1} is {losses[layer, column]}; losses must be finite and at least 0"
        )

    layers, last_k = losses.shape
    max_k = last_k if max_k is None else max_k
    for name, bound in (("min_k", min_k), ("max_k", max_k)):
        if not isinstance(bound, int | np.integer) or not 1 <= bound <= last_k:
            raise InputError(f"{name}={bound} must be an integer in 1..{last_k}, the k that the losses cover")
    if min_k > max_k:
        raise InputError(f"min_k={min_k} is above max_k={max_k}")

    budgets = np.asarray(budgets)
    if budgets.ndim != 1 or not len(budgets) or not np.issubdtype(budgets.dtype, np.integer):
        raise InputError("budgets must be a non-empty list of integers")
    low, high = layers * int(min_k), layers * int(max_k)
    for budget in budgets[(budgets < low) | (budgets > high)]:
        raise InputError(f"budget {budget} is outside {low}..{high} ({layers} layers with k in {min_k}..{max_k})")
    return Problem(losses, budgets.astype(np.int64), int(min_k), int(max_k))


def allocation_loss(
    losses: Float64[np.ndarray, "layers ks"], top_k: Int[np.ndarray, "*batch layers"]
) -> Float64[np.ndarray, "*batch"]:
    """Loss of allocations: the sum over layers, added in float64 from the first layer to the last.

    The order is part of the result: the dynamic programme adds in the same one, so that equal allocations have equal
    losses to the last bit and a gap is never negative.
    """
    chosen = losses[np.arange(losses.shape[0]), np.asarray(top_k) - 1]
    return np.cumsum(chosen, axis=-1)[..., -1]
