"""Comparison of profiles: the allocations from one, judged by the losses of another, such as one of a user's text."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int, Int64

from lexi_search.artifacts.profile import Profile
from lexi_search.errors import InputError
from lexi_search.solvers.exact import solve, solve_many
from lexi_search.solvers.problem import pose, sum_over_layers
from lexi_search.solvers.uncertainty import resample

SHARES = (0.25, 0.375, 0.5, 0.625, 0.75)  # of the budget at full k


class Comparison(NamedTuple):
    """The quality of a loss table, judged by the losses of a reference.

    `correlation` is Spearman's, over all layers and all k below the largest. The others are losses by the reference, at
    each of `budgets`: `found` of the allocation that is best by the compared table, `optimum` of its own best one, and
    `uniform` of a uniform k, interpolated between two k.

    From profiles resampled within their standard errors: `lead_error` is the standard error of `uniform` - `found`, and
    `closed_error` that of `closed`, as half the width of the central 68 % of it; zeros without resampling.
    """

    correlation: float
    budgets: Int64[np.ndarray, " budgets"]
    uniform: Float64[np.ndarray, " budgets"]
    found: Float64[np.ndarray, " budgets"]
    optimum: Float64[np.ndarray, " budgets"]
    lead_error: Float64[np.ndarray, " budgets"]
    closed_error: Float64[np.ndarray, " budgets"]

    @property
    def distinguishable(self) -> Bool[np.ndarray, " budgets"]:
        """Whether the found allocation differs from the uniform k by more than two standard errors."""
        return np.abs(self.uniform - self.found) > 2 * self.lead_error

    @property
    def closed(self) -> Float64[np.ndarray, " budgets"]:
        """The share of the gap between uniform and optimum that is closed; negative if worse, NaN without a gap."""
        return _close(self.uniform, self.found, self.optimum)


def compare(
    reference: Profile,
    other: Profile,
    *,
    reference_loss: str | None = None,
    loss: str | None = None,
    resamples: int = 0,
    seed: int = 0,
) -> Comparison:
    """`loss` of the other profile, judged by `reference_loss`; where None, each one's `default_loss`.

    `resamples` of both profiles give the standard errors.

    Budgets are `SHARES` of that at full k, without those that leave no choice (one expert in every layer).

    Raises InputError for profiles of different models, layers or k.
    """
    for name in ("model", "max_k"):
        if getattr(reference, name) != getattr(other, name):
            raise InputError(f"the profiles have a different {name}; only those of one model can be compared")
    if set(reference.layers) != set(other.layers):
        raise InputError("the profiles have different layers; profile both without --layers")
    kinds = reference_loss or reference.default_loss, loss or other.default_loss
    truth, table = (np.asarray(each.losses(kind)) for each, kind in zip((reference, other), kinds, strict=True))
    layers, last_k = truth.shape
    budgets = np.unique([round(share * layers * last_k) for share in SHARES])
    budgets = budgets[(budgets > layers) & (budgets < layers * last_k)]
    if not len(budgets):
        return Comparison(correlate(truth[:, :-1], table[:, :-1]), budgets, *[np.empty(0)] * 5)
    optimum, found = (solve(pose(losses, budgets)).top_k for losses in (truth, table))
    uniform, *losses = _judge(truth, budgets, found, optimum)
    lead_error, closed_error = np.zeros((2, len(budgets)))
    if resamples:
        errors = (np.asarray(each.errors(kind)) for each, kind in zip((reference, other), kinds, strict=True))
        one = reference is other and kinds[0] == kinds[1]
        lead_error, closed_error = _find_errors(truth, table, *errors, budgets, resamples, seed, one=one)
    correlation = correlate(truth[:, :-1], table[:, :-1])
    return Comparison(correlation, budgets, uniform, *losses, lead_error, closed_error)


def _judge(
    truth: Float64[np.ndarray, "layers ks"],
    budgets: Int64[np.ndarray, " budgets"],
    *allocations: Int[np.ndarray, "budgets layers"],
) -> tuple[Float64[np.ndarray, " budgets"], ...]:
    """The losses by `truth` of uniform k, and of each of the allocations."""
    layers, last_k = truth.shape
    uniform = np.interp(budgets / layers, np.arange(1, last_k + 1), truth.sum(axis=0))
    return uniform, *(sum_over_layers(truth, top_k) for top_k in allocations)


def _find_errors(
    truth: Float64[np.ndarray, "layers ks"],
    table: Float64[np.ndarray, "layers ks"],
    truth_errors: Float64[np.ndarray, "layers ks"],
    table_errors: Float64[np.ndarray, "layers ks"],
    budgets: Int64[np.ndarray, " budgets"],
    count: int,
    seed: int,
    *,
    one: bool,
) -> Float64[np.ndarray, "2 budgets"]:
    """The errors of a comparison, from resampled tables; `one`: both tables are the same, and so is their noise."""
    truths = resample(truth, truth_errors, count=count, seed=seed)
    tables = truths if one else resample(table, table_errors, count=count, seed=seed + 1)
    chosen, best = (solve_many(pose(own, budgets), many) for own, many in ((table, tables), (truth, truths)))
    judged = np.array([_judge(*row) for row in zip(truths, [budgets] * count, chosen, best, strict=True)])
    uniform, found, optimum = np.moveaxis(judged, 1, 0)
    low, high = np.percentile(np.nan_to_num(_close(uniform, found, optimum)), (16, 84), axis=0)
    return np.stack([(uniform - found).std(axis=0, ddof=1), (high - low) / 2])


def _close(
    uniform: Float64[np.ndarray, "*shape"], found: Float64[np.ndarray, "*shape"], optimum: Float64[np.ndarray, "*shape"]
) -> Float64[np.ndarray, "*shape"]:
    gap = uniform - optimum
    return np.divide(uniform - found, gap, where=gap > 0, out=np.full_like(gap, np.nan))


def correlate(one: Float64[np.ndarray, "*shape"], other: Float64[np.ndarray, "*shape"]) -> float:
    """Spearman's rank correlation; ties share their mean rank; NaN where all values of one argument are equal."""
    ranks = [_rank(np.ravel(values)) for values in (one, other)]
    spread = [rank - rank.mean() for rank in ranks]
    size = np.sqrt(np.prod([(rank * rank).sum() for rank in spread]))
    return float((spread[0] * spread[1]).sum() / size) if size else float("nan")


def _rank(values: Float64[np.ndarray, " values"]) -> Float64[np.ndarray, " values"]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
