"""Allocations that are as even as can be unless a loss table, known with errors, can tell a better one.

The exact optimum of a noisy table is the winner of many comparisons, and looks better than it is: near the model's own
k, where losses are small, it is often worse than a uniform k. Two things hold it back. Losses are shrunk towards their
mean over layers, as far as their standard errors, or a floor for what errors do not cover, justify (empirical Bayes);
of layers that are equal, even k are then the optimum.
And an allocation has to be better than the even one of its budget by an expected gain, from a parametric bootstrap.
"""

from collections.abc import Callable
from itertools import combinations
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int, Int32, Int64

from lexi_search.errors import check_memory
from lexi_search.solvers.evolution import Evolved
from lexi_search.solvers.exact import Optimum, solve, solve_many
from lexi_search.solvers.problem import Problem, read_levels, replace_losses, sum_over_layers
from lexi_search.solvers.uncertainty import resample

# The most numbers in the allocations of the resampled tables that are solved at once.
BLOCK = 2**25
ROUNDING = 1e-12  # losses that differ by less than this share are equal


class Caution(NamedTuple):
    """How sure an allocation has to be.

    `threshold` is the least expected gain over even k, relative to the loss of those. `floor` is the least share by
    which losses are shrunk towards the mean over layers, for what a profile cannot know: a user's text is not the
    model's own. `resamples` is the number of tables of the bootstrap.
    """

    threshold: float = 0.03
    floor: float = 0.5
    resamples: int = 200


CAUTION = Caution()


class Choice(NamedTuple):
    """Row i belongs to `budgets[i]`: `found`, or the most even allocation where `fallback`.

    `gain` is that of `found` over the even one by the shrunk table, relative to the loss of the even one; and
    `expected_gain` the same, corrected for the winner's curse: never more.
    """

    top_k: Int32[np.ndarray, "budgets layers"]
    gain: Float64[np.ndarray, " budgets"]
    expected_gain: Float64[np.ndarray, " budgets"]
    fallback: Bool[np.ndarray, " budgets"]
    found: Optimum | Evolved


def shrink(
    losses: Float64[np.ndarray, "*tables layers ks"], errors: Float64[np.ndarray, "layers ks"], *, floor: float = 0.0
) -> Float64[np.ndarray, "*tables layers ks"]:
    """The losses, moved towards their mean over layers at the same k, which is made convex in k.

    By the share of their variance over layers that is measurement error, at least by `floor`, at most all the way. A
    mean that noise has bent would have layers that are equal take different k.
    """
    mean = losses.mean(axis=-2, keepdims=True)
    spread = ((losses - mean) ** 2).sum(axis=-2) / max(losses.shape[-2] - 1, 1)
    noise = np.broadcast_to((errors**2).mean(axis=0), spread.shape)
    differ = spread > (ROUNDING * mean[..., 0, :]) ** 2
    share = np.clip(np.divide(noise, spread, where=differ, out=np.ones_like(spread)), floor, 1.0)
    return losses + share[..., None, :] * (_make_convex(mean) - losses)


def _make_convex(curves: Float64[np.ndarray, "*curves ks"]) -> Float64[np.ndarray, "*curves ks"]:
    """The largest convex curve that is nowhere above each."""
    convex = curves.copy()
    for first, last in combinations(range(curves.shape[-1]), 2):
        ends, inner = curves[..., [first, last]], slice(first + 1, last)
        weight = np.arange(1, last - first) / (last - first)
        line = (1 - weight) * ends[..., :1] + weight * ends[..., 1:]
        convex[..., inner] = np.minimum(convex[..., inner], line)
    return convex


def find_even(problem: Problem) -> Int32[np.ndarray, "budgets layers"]:
    """For each budget the allocation whose k are most alike: the best uniform k of that budget where there is one.

    All units have the largest k that all of them can have within the budget, or what their constraints leave that is
    nearest from below; then as many as the budget allows have one step more, spread evenly over the layers.
    """
    units = np.arange(len(problem.ks))
    last_k = problem.losses.shape[1]
    levels = np.stack([_find_levels(problem, k) for k in range(1, last_k + 1)])
    costs = problem.unit_costs[units, levels].sum(axis=1)
    fits = costs <= problem.budgets[:, None]
    base = np.where(fits.any(axis=1), last_k - fits[:, ::-1].argmax(axis=1), 0)  # 0: even k = 1 is too much
    chosen = np.zeros((len(problem.budgets), len(units)), np.int64)
    for k in np.unique(base[base > 0]):
        rows = np.flatnonzero(base == k)
        chosen[rows] = levels[k - 1]
        if k < last_k:
            raised = _raise_evenly(problem, levels[k - 1], levels[k], problem.budgets[rows] - costs[k - 1])
            chosen[rows] = np.where(raised, levels[k], levels[k - 1])
    return read_levels(problem, chosen)


def _find_levels(problem: Problem, k: int) -> Int64[np.ndarray, " units"]:
    """The level of each unit with the largest k up to `k`, or its least k where it has none."""
    exists = np.arange(problem.ks.shape[1]) < problem.num_levels[:, None]
    below = np.where(exists & (problem.ks <= k), problem.ks, 0)
    least = np.where(exists, problem.ks, problem.losses.shape[1] + 1).argmin(axis=1)
    return np.where(below.any(axis=1), below.argmax(axis=1), least)


def _raise_evenly(
    problem: Problem,
    low: Int64[np.ndarray, " units"],
    high: Int64[np.ndarray, " units"],
    left: Float64[np.ndarray, " budgets"],
) -> Bool[np.ndarray, "budgets units"]:
    """Whether each unit goes from level `low` to `high`, with what is `left` of each budget."""
    units = np.arange(len(low))
    steps = problem.unit_costs[units, high] - problem.unit_costs[units, low]
    moved = np.flatnonzero(low != high)
    count, place = np.arange(len(moved) + 1)[:, None], np.arange(len(moved))
    spread = (place + 1) * count // len(moved) > place * count // len(moved)  # row n: n of them, evenly
    fits = spread @ steps[moved] <= left[:, None]
    raised = np.zeros((len(left), len(low)), bool)
    raised[:, moved] = spread[len(moved) - fits[:, ::-1].argmax(axis=1)]
    left = left - raised @ steps
    for unit in moved:  # where steps differ in cost, a smaller one may still fit
        more = ~raised[:, unit] & (steps[unit] <= left)
        raised[more, unit] = True
        left = left - more * steps[unit]
    return raised


def choose(
    problem: Problem,
    errors: Float64[np.ndarray, "layers ks"],
    *,
    threshold: float = CAUTION.threshold,
    floor: float = CAUTION.floor,
    resamples: int = CAUTION.resamples,
    seed: int = 0,
    find: Callable[[Problem], Optimum | Evolved] = solve,
) -> Choice:
    """The allocation that `find` finds by the shrunk losses, or the even one where it is not expected to be better.

    The settings are those of `Caution`; `errors` are the standard errors of the problem's losses.
    """
    errors = np.asarray(errors, np.float64)
    posed = replace_losses(problem, shrink(problem.losses, errors, floor=floor))
    found, even = find(posed), find_even(problem)
    loss, even_loss = (sum_over_layers(posed.losses, top_k) for top_k in (found.top_k, even))
    expected_loss = _expect(posed, errors, floor=floor, resamples=resamples, seed=seed)
    gain, expected_gain = (
        np.divide(even_loss - each, even_loss, where=even_loss > 0, out=np.zeros_like(even_loss))
        for each in (loss, np.maximum(loss, expected_loss))
    )
    fallback = (expected_gain < threshold) & (found.top_k != even).any(axis=1)
    top_k = np.where(fallback[:, None], even, found.top_k).astype(np.int32)
    return Choice(top_k, gain, expected_gain, fallback, found)


def _expect(
    problem: Problem, errors: Float64[np.ndarray, "layers ks"], *, floor: float, resamples: int, seed: int
) -> Float64[np.ndarray, " budgets"]:
    """The mean loss by `problem`'s table of the allocations that are best by resampled ones, shrunk alike."""
    size = 8.0 * resamples * 2 * problem.losses.size
    check_memory(f"{resamples} resampled profiles", size, "lower the number of resamples")
    tables = shrink(resample(problem.losses, errors, count=resamples, seed=seed), errors, floor=floor)
    block = max(1, BLOCK // (len(problem.budgets) * len(problem.losses)))
    total = np.zeros(len(problem.budgets))
    for first in range(0, resamples, block):
        best: Int[np.ndarray, "tables budgets layers"] = solve_many(problem, tables[first : first + block])
        total += sum_over_layers(problem.losses, best).sum(axis=0)
    return total / resamples
