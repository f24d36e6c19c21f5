"""Comparison of profiles: the allocations from one, judged by the losses of another, such as one of a user's text."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from lexi_search.artifacts.profile import Profile
from lexi_search.errors import InputError
from lexi_search.solvers.exact import solve
from lexi_search.solvers.problem import pose, sum_over_layers

SHARES = (0.25, 0.375, 0.5, 0.625, 0.75)  # of the budget at full k


class Comparison(NamedTuple):
    """The quality of a loss table, judged by the losses of a reference.

    `correlation` is Spearman's, over all layers and all k below the largest. The others are losses by the reference, at
    each of `budgets`: `found` of the allocation that is best by the compared table, `optimum` of its own best one, and
    `uniform` of a uniform k, interpolated between two k.
    """

    correlation: float
    budgets: Int64[np.ndarray, " budgets"]
    uniform: Float64[np.ndarray, " budgets"]
    found: Float64[np.ndarray, " budgets"]
    optimum: Float64[np.ndarray, " budgets"]

    @property
    def closed(self) -> Float64[np.ndarray, " budgets"]:
        """The share of the gap between uniform and optimum that is closed; negative if worse, NaN without a gap."""
        gap = self.uniform - self.optimum
        return np.divide(self.uniform - self.found, gap, where=gap > 0, out=np.full_like(gap, np.nan))


def compare(
    reference: Profile, other: Profile, *, reference_loss: str | None = None, loss: str | None = None
) -> Comparison:
    """`loss` of the other profile, judged by `reference_loss`; where None, each one's `default_loss`.

    Budgets are `SHARES` of that at full k, without those that leave no choice (one expert in every layer).

    Raises InputError for profiles of different models, layers or k.
    """
    for name in ("model", "max_k"):
        if getattr(reference, name) != getattr(other, name):
            raise InputError(f"the profiles have a different {name}; only those of one model can be compared")
    if set(reference.layers) != set(other.layers):
        raise InputError("the profiles have different layers; profile both without --layers")
    truth, table = (
        np.asarray(profile.losses(kind or profile.default_loss))
        for profile, kind in ((reference, reference_loss), (other, loss))
    )
    layers, last_k = truth.shape
    budgets = np.unique([round(share * layers * last_k) for share in SHARES])
    budgets = budgets[(budgets > layers) & (budgets < layers * last_k)]
    uniform = np.interp(budgets / layers, np.arange(1, last_k + 1), truth.sum(axis=0))
    optimum, found = (
        sum_over_layers(truth, solve(pose(losses, budgets)).top_k) if len(budgets) else np.empty(0)
        for losses in (truth, table)
    )
    return Comparison(
        correlation=correlate(truth[:, :-1], table[:, :-1]),
        budgets=budgets,
        uniform=uniform,
        found=found,
        optimum=optimum,
    )


def correlate(one: Float64[np.ndarray, "*shape"], other: Float64[np.ndarray, "*shape"]) -> float:
    """Spearman's rank correlation; ties share their mean rank; NaN where all values of one argument are equal."""
    ranks = [_rank(np.ravel(values)) for values in (one, other)]
    spread = [rank - rank.mean() for rank in ranks]
    size = np.sqrt(np.prod([(rank * rank).sum() for rank in spread]))
    return float((spread[0] * spread[1]).sum() / size) if size else float("nan")


def _rank(values: Float64[np.ndarray, " values"]) -> Float64[np.ndarray, " values"]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
