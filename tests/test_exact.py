"""The dynamic programme against every allocation there is."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lexi_search.budgets import allocation_loss
from lexi_search.errors import InputError
from lexi_search.exact import solve

TABLES = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=4).flatmap(
    lambda shape: hnp.arrays(np.float64, shape, elements=st.floats(0, 100) | st.sampled_from([0.0, 1.0, 2.0]))
)


def enumerate_allocations(layers, min_k, max_k):
    return np.array(list(itertools.product(range(min_k, max_k + 1), repeat=layers)))


@given(table=TABLES, data=st.data())
def test_is_the_best_of_all_allocations(table, data):
    layers, last_k = table.shape
    min_k = data.draw(st.integers(1, last_k))
    max_k = data.draw(st.integers(min_k, last_k))
    budgets = np.arange(layers * min_k, layers * max_k + 1)
    found = solve(table, budgets, min_k=min_k, max_k=max_k)
    everything = enumerate_allocations(layers, min_k, max_k)
    sums = np.array([sum(row[k - 1] for row, k in zip(table, chosen, strict=True)) for chosen in everything])
    for budget, top_k, loss in zip(budgets, found.top_k, found.loss, strict=True):
        assert top_k.sum() == budget and top_k.min() >= min_k and top_k.max() <= max_k
        assert loss == allocation_loss(table, top_k) == sums[everything.sum(axis=1) == budget].min()


@given(table=TABLES)
def test_a_budget_alone_is_solved_as_in_company(table):
    layers, last_k = table.shape
    budgets = np.arange(layers, layers * last_k + 1)
    together = solve(table, budgets)
    for index, budget in enumerate(budgets):
        alone = solve(table, np.array([budget]))
        assert alone.top_k[0].tolist() == together.top_k[index].tolist() and alone.loss[0] == together.loss[index]


def test_falling_losses_give_a_falling_front():
    table = np.sort(np.random.default_rng(0).random((61, 8)), axis=1)[:, ::-1]
    loss = solve(table, np.arange(61, 489)).loss
    assert (np.diff(loss) <= 0).all()


def test_ties_take_the_smaller_k_of_the_later_layer():
    assert solve(np.ones((3, 3)), np.array([5])).top_k.tolist() == [[3, 1, 1]]


@pytest.mark.parametrize(
    ("table", "budgets", "bounds", "message"),
    [
        (np.ones(3), [3], {}, "a table of layers x k"),
        (np.ones((0, 3)), [3], {}, "a table of layers x k"),
        ([[1, np.nan]], [1], {}, "loss of layer 0 at k=2 is nan"),
        ([[1, 0], [np.inf, 0]], [2], {}, "loss of layer 1 at k=1 is inf"),
        ([[1, -0.5]], [1], {}, "loss of layer 0 at k=2 is -0.5"),
        (np.ones((2, 3)), [1], {}, r"budget 1 is outside 2..6 \(2 layers with k in 1..3\)"),
        (np.ones((2, 3)), [2, 7], {}, "budget 7 is outside 2..6"),
        (np.ones((2, 3)), [3], {"min_k": 2}, "budget 3 is outside 4..6"),
        (np.ones((2, 3)), [4], {"min_k": 3, "max_k": 2}, "min_k=3 is above max_k=2"),
        (np.ones((2, 3)), [4], {"max_k": 4}, r"max_k=4 must be an integer in 1..3"),
        (np.ones((2, 3)), [4], {"min_k": 0}, r"min_k=0 must be an integer in 1..3"),
        (np.ones((2, 3)), [], {}, "a non-empty list of integers"),
        (np.ones((2, 3)), [2.5], {}, "a non-empty list of integers"),
    ],
)
def test_refuses(table, budgets, bounds, message):
    with pytest.raises(InputError, match=message):
        solve(np.asarray(table, float), np.asarray(budgets), **bounds)
