"""The ways to choose an allocation from the Pareto front."""

import pytest

from lexi_search.allocation.tradeoff import Front, Point, find_best_within, find_fastest_within, find_knee, thin
from lexi_search.errors import InputError


def make_front(costs, losses, *, timed=True):
    points = [
        Point(i, loss, cost if timed else None, costs[-1] / cost if timed else None, (i,))
        for i, (cost, loss) in enumerate(zip(costs, losses, strict=True), 1)
    ]
    return Front(tuple(points), (), 0.0)


def test_choices():
    front = make_front([1.0, 2.0, 4.0, 8.0], [10.0, 3.0, 2.0, 0.0])
    assert find_fastest_within(front, 3.0).ms == 2 and find_fastest_within(front, 2.9).ms == 4
    assert find_best_within(front, ms=4.0).ms == 4 and find_best_within(front, ms=3.9).ms == 2
    assert find_best_within(front, speedup=2.0).ms == 4 and find_best_within(front, speedup=2.1).ms == 2
    assert find_knee(front).ms == 2
    assert find_knee(make_front([1.0, 8.0], [10.0, 0.0])).ms == 1
    assert find_knee(make_front([1.0, 2.0, 3.0], [5.0, 4.9, 0.0])).ms == 1  # no bend towards the origin
    assert [point.ms for point in thin(front.points, 2)] == [1, 8] and thin(front.points, 9) == front.points
    with pytest.raises(InputError, match="no allocation is that fast; the fastest takes 1 ms, a speed-up of 8.000"):
        find_best_within(front, ms=0.5)
    with pytest.raises(InputError, match="needs measured costs"):
        find_best_within(make_front([1, 2], [1, 0], timed=False), speedup=1.5)
