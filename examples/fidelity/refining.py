"""Is there something better than the exact optimum of a sum over layers? A search that runs whole allocations.

A sum of single-layer losses knows nothing of how layers compound. Here the fitness of an allocation is what the whole
model really loses with it, which is dear, so a table stands in for it: it starts as the sum's own, learns from every
allocation that was run, and proposes the next ones, its own exact optimum and moves of one expert around the best.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from tables import predict, search

RIDGE = 1.0  # how far a table may leave the one it started as, in units of its error


class Refined(NamedTuple):
    """The best allocation found, its fitness, and the best fitness after each round."""

    top_k: tuple[int, ...]
    fitness: float
    history: tuple[float, ...]
    evaluated: int


def refine(
    prior: np.ndarray,
    budget: int,
    evaluate: Callable[[Sequence[tuple[int, ...]]], Sequence[float]],
    *,
    rounds: int = 8,
    width: int = 12,
) -> Refined:
    """Search from the exact optimum of a table [layers, top_k], `width` allocations a round.

    Ends after `rounds`, or when two in a row found nothing better.
    """
    start = search(prior, [budget])[0]
    known = {start: evaluate([start])[0]}
    history = [known[start]]
    for _ in range(rounds):
        best = min(known, key=known.get)
        table = fit(prior, known)
        moves = sorted(make_moves(best, prior.shape[1]), key=lambda top_k: predict(table, top_k))
        proposed = [top_k for top_k in dict.fromkeys([search(table, [budget])[0], *moves]) if top_k not in known]
        if not proposed:
            break
        proposed = proposed[:width]
        known.update(zip(proposed, evaluate(proposed), strict=True))
        history.append(min(known.values()))
        if len(history) > 2 and history[-1] == history[-3]:
            break
    best = min(known, key=known.get)
    return Refined(best, known[best], tuple(history), len(known))


def make_moves(top_k: tuple[int, ...], most: int) -> Iterator[tuple[int, ...]]:
    """All allocations of the same budget that move one expert from one layer to another."""
    for taker, k in enumerate(top_k):
        for giver, other in enumerate(top_k):
            if taker != giver and k < most and other > 1:
                moved = list(top_k)
                moved[taker], moved[giver] = k + 1, other - 1
                yield tuple(moved)


def fit(prior: np.ndarray, known: dict[tuple[int, ...], float]) -> np.ndarray:
    """The table that explains what was found, as near to the prior's shape as it can be; not below zero.

    The prior is scaled to the mean of what was found (losses compound), then corrected by ridge regression.
    """
    chosen, found = np.array(list(known)), np.array(list(known.values()))
    sums = prior[np.arange(len(prior)), chosen - 1].sum(axis=1)
    scaled = prior * (found.sum() / sums.sum() if sums.sum() > 0 else 1.0)
    features = np.zeros((len(chosen), *prior.shape))
    for row, top_k in zip(features, chosen, strict=True):
        row[np.arange(len(prior)), top_k - 1] = 1
    features = features.reshape(len(chosen), -1)
    errors = found - features @ scaled.ravel()
    # Dual form: far fewer allocations than entries.
    weights = np.linalg.solve(features @ features.T + RIDGE * np.eye(len(chosen)), errors)
    return (scaled + (features.T @ weights).reshape(prior.shape)).clip(0)
