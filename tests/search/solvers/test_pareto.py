"""The Pareto front against all allocations, and the error of merging points."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lexi_search.solvers.pareto import read_top_k, trace
from lexi_search.solvers.problem import pose, sum_over_layers

VALUES = st.floats(0, 100, allow_subnormal=False) | st.sampled_from([0.0, 1.0, 2.0])
TABLES = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=4).flatmap(
    lambda shape: st.tuples(*[hnp.arrays(np.float64, shape, elements=VALUES)] * 2)
)


@given(tables=TABLES)
def test_no_point_is_dominated_and_none_is_missing(tables):
    losses, costs = tables
    problem = pose(losses, None, costs=costs)
    front = trace(problem)
    top_k = read_top_k(front, problem, np.arange(len(front.cost)))
    np.testing.assert_array_equal(front.cost, sum_over_layers(costs, top_k))
    np.testing.assert_array_equal(front.loss, sum_over_layers(losses, top_k))
    assert (np.diff(front.cost) > 0).all() and (np.diff(front.loss) < 0).all() and front.error == 0
    hair = max(1e-12 * costs.max(axis=1).sum(), 1e-300)  # less apart is equal
    everything = np.array(list(itertools.product(range(1, losses.shape[1] + 1), repeat=losses.shape[0])))
    for cost, loss in zip(sum_over_layers(costs, everything), sum_over_layers(losses, everything), strict=True):
        assert ((front.cost <= cost + hair) & (front.loss <= loss)).any()


@pytest.mark.parametrize("max_points", [20, 100, 400])
def test_merged_points_lose_no_more_than_stated(max_points):
    draw = np.random.default_rng(0)
    losses, costs = -np.sort(-draw.random((16, 8)), axis=1), np.sort(draw.random((16, 8)), axis=1)
    losses[:, -1] = 0
    problem = pose(losses, None, costs=costs)
    whole, merged = trace(problem), trace(problem, max_points=max_points)
    assert len(merged.cost) <= max_points < len(whole.cost) and whole.error == 0 < merged.error
    for cost, loss in zip(whole.cost, whole.loss, strict=True):
        assert merged.loss[merged.cost <= cost].min() <= loss * (1 + merged.error)
    top_k = read_top_k(merged, problem, np.arange(len(merged.cost)))
    np.testing.assert_allclose(sum_over_layers(losses, top_k), merged.loss, atol=1e-15)
    np.testing.assert_allclose(sum_over_layers(costs, top_k), merged.cost)
