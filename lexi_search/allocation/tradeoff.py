"""The Pareto front of cost and loss that a profile offers, and ways to choose one of its points."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int

from lexi_search.allocation.allocate import choose_carefully, needs_caution, pose_profile
from lexi_search.allocation.costs import Cost
from lexi_search.artifacts.profile import Profile
from lexi_search.errors import InputError
from lexi_search.solvers.pareto import read_top_k, trace
from lexi_search.solvers.problem import CAP_TOLERANCE, Constraints, replace_losses, sum_over_layers
from lexi_search.solvers.robust import CAUTION, Caution, shrink

# The most points of a front that are each compared with even k, which takes milliseconds.
MOST_COMPARED = 2048


class Point(NamedTuple):
    """One allocation with its cost and loss. `ms` and `speedup` are None without a measured cost.

    `limit` is the budget that it was chosen for, of which it may leave a rest; None for a uniform k.
    """

    budget: int
    loss: float
    ms: float | None
    speedup: float | None
    top_k: tuple[int, ...]
    limit: float | None = None

    def __repr__(self) -> str:
        time = "" if self.ms is None else f", {self.ms:.4g} ms"
        return f"<Point: budget {self.budget}, loss {self.loss:.4g}{time}, k = {' '.join(map(str, self.top_k))}>"


class Front(NamedTuple):
    """The Pareto points, by rising cost and falling loss, which may be off by the relative `error` (see `trace`).

    `uniform` are the allocations with a uniform k = 1, 2, ..., regardless of the constraints.
    """

    points: tuple[Point, ...]
    uniform: tuple[Point, ...]
    error: float

    def __repr__(self) -> str:
        return f"<Front of {len(self.points)} points: from {self.points[0]} to {self.points[-1]}>"


def find_front(
    profile: Profile,
    *,
    cost: Cost | None = None,
    constraints: Constraints | None = None,
    loss: str | None = None,
    caution: Caution | None = CAUTION,
    seed: int = 0,
) -> Front:
    """All Pareto points of cost and loss: cost is milliseconds or, without `cost`, the sum of k.

    Each is what `allocate` makes of its `limit` by the exact method, with the same `caution` and `seed`. With caution
    there are `MOST_COMPARED` of them at most, evenly spaced.
    """
    loss = loss or profile.default_loss
    problem = pose_profile(profile, None, cost=cost, constraints=constraints, loss=loss)
    cautious = caution is not None and needs_caution(profile, loss)
    if cautious:
        shrunk = shrink(problem.losses, np.asarray(profile.errors(loss)), floor=caution.floor)
        problem = replace_losses(problem, shrunk)
    frontier = trace(problem)
    places = range(len(frontier.cost))
    top_k = read_top_k(frontier, problem, np.array(thin(places, MOST_COMPARED) if cautious else places))
    limits = (top_k.sum(axis=1) if cost is None else cost.time(top_k)).tolist()
    if cautious:
        problem = pose_profile(profile, limits, cost=cost, constraints=constraints, loss=loss)
        top_k = choose_carefully(profile, problem, caution, loss=loss, seed=seed).top_k
    layers, last_k = problem.losses.shape
    uniform = np.tile(np.arange(1, last_k + 1)[:, None], layers)
    points = [
        point._replace(limit=limit)
        for point, limit in zip(_make_points(top_k, problem.losses, cost), limits, strict=True)
    ]
    return Front(_drop_dominated(points), _make_points(uniform, problem.losses, cost), frontier.error)


def _make_points(
    top_k: Int[np.ndarray, "points layers"], losses: Float64[np.ndarray, "layers ks"], cost: Cost | None
) -> tuple[Point, ...]:
    sums = sum_over_layers(losses, top_k).tolist()
    times = speedups = [None] * len(top_k)
    if cost is not None:
        ms = cost.time(top_k)
        times, speedups = ms.tolist(), (cost.base_ms / ms).tolist()
    return tuple(
        Point(budget=sum(row), loss=sums[i], ms=times[i], speedup=speedups[i], top_k=tuple(row))
        for i, row in enumerate(top_k.tolist())
    )


def _drop_dominated(points: Sequence[Point]) -> tuple[Point, ...]:
    """The points that no other one dominates by the cost and loss that they state, sums taken layer by layer."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda point: (point.budget if point.ms is None else point.ms, point.loss)):
        if not kept or point.loss < kept[-1].loss:
            kept.append(point)
    return tuple(kept)


def find_fastest_within(front: Front, max_loss: float) -> Point:
    """The cheapest point with a loss of at most `max_loss`; InputError where every point loses more."""
    for point in front.points:
        if point.loss <= max_loss:
            return point
    raise InputError(f"every allocation loses more than {max_loss:g}; the least is {front.points[-1].loss:g}")


def find_best_within(front: Front, *, ms: float | None = None, speedup: float | None = None) -> Point:
    """The point of least loss that takes at most `ms`, or is at least `speedup` times as fast as the model's own k.

    Raises InputError without a measured cost, or where no point is that fast.
    """
    if front.points[0].ms is None:
        raise InputError("a time or a speed-up needs measured costs; give --cost, which lexi-adapter latency writes")
    if not 0 < (ms if speedup is None else speedup) < np.inf:
        raise InputError("a time or a speed-up must be above 0")
    limit = front.points[0].ms * front.points[0].speedup / speedup if ms is None else ms
    fast = [point for point in front.points if point.ms <= limit * (1 + CAP_TOLERANCE)]
    if not fast:
        quickest = front.points[0]
        raise InputError(
            f"no allocation is that fast; the fastest takes {quickest.ms:g} ms, a speed-up of {quickest.speedup:.3f}"
        )
    return fast[-1]


def find_knee(front: Front) -> Point:
    """The knee: the point furthest below the straight line between the front's ends, cost and loss scaled to 0..1.

    Below it a little cost saves much loss, above it much cost saves little. The cheapest point where the front has no
    such bend.
    """
    cost = np.array([point.budget if point.ms is None else point.ms for point in front.points], np.float64)
    loss = np.array([point.loss for point in front.points])
    if len(cost) < 3:
        return front.points[0]
    below = (cost[-1] - cost) / (cost[-1] - cost[0]) - (loss - loss[-1]) / (loss[0] - loss[-1])
    return front.points[int(below.argmax())]


def thin(points: Sequence[Any], count: int) -> tuple[Any, ...]:
    """At most `count` of the points, evenly spaced in their order, with both ends."""
    if len(points) <= count:
        return tuple(points)
    return tuple(points[i] for i in np.unique(np.linspace(0, len(points) - 1, count).round().astype(int)))
