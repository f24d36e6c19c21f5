"""Corrections fitted from sums against ridge regression on all tokens at once in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
import reference

from lexi_search.layers.moe import compute_outputs
from lexi_search.layers.routing import route
from lexi_search.layers.spec import Activation, Routing
from lexi_search.layers.weights import ExpertWeights
from lexi_search.profiling import compensation
from lexi_search.profiling.compensation import RIDGES, find_rank, solve

EXPERTS, HIDDEN, WIDTH, TOP_K, TOKENS = 6, 16, 8, 3, 400
ROUTINGS = (
    Routing(exponent=0.5),
    Routing(scoring="sigmoid", renormalize=True, scale=2.5, bias="selection", exponent=0.3),
    Routing(renormalize=True, bias="logits", exponent=0.0),
)


def make_layer(routing, seed=0):
    """Inputs, with a mean of their own, and a layer: what its k experts are short of is far from unpredictable."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(TOKENS, HIDDEN)) + draw.normal(size=HIDDEN)
    router, bias = draw.normal(size=(EXPERTS, HIDDEN)) / 4, draw.normal(size=EXPERTS) / 4
    shapes = (WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)
    experts = [tuple(draw.normal(size=shape) / 3 for shape in shapes) for _ in range(EXPERTS)]
    return x, router, bias if routing.bias else None, experts


def sum_all(layer, routing, folds, *, parts=3):
    """The sums over all tokens, some at a time."""
    x, router, bias, experts = layer
    weights = tuple(ExpertWeights(*(jnp.asarray(part, jnp.float32) for part in expert)) for expert in experts)
    plain, total = routing._replace(exponent=None), None
    for some in np.array_split(np.arange(TOKENS), parts):
        inputs = jnp.asarray(x[some], jnp.float32)
        stored = None if bias is None else jnp.asarray(bias, jnp.float32)
        choice = route(inputs, jnp.asarray(router, jnp.float32), stored, routing=plain, top_k=TOP_K)
        outputs = compute_outputs(inputs, choice, weights, routing=plain, activation=Activation())
        found = compensation._sum(
            outputs,
            choice,
            folds[some].astype(np.int32),
            np.float32(routing.exponent),
            np.arange(1, TOP_K, dtype=np.int32),
            routing=plain,
        )
        total = found if total is None else type(found)(*map(jnp.add, total, found))
    return type(total)(*map(np.asarray, total))


def find_rest(layer, routing, k):
    """Y_K - Y_k under the gate exponent, by loops."""
    x, router, bias, experts = layer
    rest = np.zeros(x.shape)
    for t, token in enumerate(x):
        chosen, weights = reference.weigh(token, router, bias, routing, TOP_K)
        _, scores = reference.choose(token, router, bias, routing, TOP_K)
        handed = (scores[chosen].sum() / scores[chosen[:k]].sum()) ** routing.exponent
        for rank, e in enumerate(chosen):
            share = weights[e] * (1 - handed if rank < k else 1)
            rest[t] += share * reference.run_expert(token, experts[e], Activation())
    return rest


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("rank", (2, 12))
def test_maps_are_those_of_ridge_regression(routing, rank):
    layer, folds = make_layer(routing), (np.arange(TOKENS) // 40 % 2).astype(np.int32)
    sums = sum_all(layer, routing, folds)
    for k in range(1, TOP_K):
        A, B, c = (np.asarray(array, np.float64) for array in solve([sums], k - 1, rank=rank)[0])
        assert A.shape == (rank, 3 * EXPERTS) and B.shape == (HIDDEN, rank)
        features, rest = reference.find_features(*layer[:3], routing, TOP_K, k), find_rest(layer, routing, k)
        expected = reference.cut_rank(features, reference.fit_ridge(features, rest, folds, RIDGES), rank)
        fitted = features @ expected[:-1] + expected[-1]
        found = features @ A.T @ B.T + c
        # bfloat16 has 8 bits; the mean is right in spite of it.
        assert np.linalg.norm(found - fitted) < 0.01 * np.linalg.norm(fitted - fitted.mean(0))
        np.testing.assert_allclose((rest - found).mean(0), 0, atol=2e-5 * np.abs(rest).max())
        assert ((rest - found) ** 2).sum() < ((rest - rest.mean(0)) ** 2).sum() < (rest**2).sum()


def test_several_gate_exponents_get_what_each_gets_alone():
    routings = [Routing(exponent=exponent) for exponent in (0.0, 0.5, 1.0)]
    layer, folds = make_layer(routings[0]), (np.arange(TOKENS) // 40 % 2).astype(np.int32)
    sums = [sum_all(layer, routing, folds) for routing in routings]
    together, alone = solve(sums, 0, rank=4), [solve([one], 0, rank=4)[0] for one in sums]
    assert (together[0].c != together[1].c).any()
    for found, expected in zip(together, alone, strict=True):
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)


def test_an_expert_that_is_never_chosen_gets_no_weight():
    routing = ROUTINGS[0]
    x, router, _, experts = make_layer(routing)
    router = np.vstack([router, -20 * x.mean(0)])
    layer = x, router, None, [*experts, experts[0]]
    sums, unused = sum_all(layer, routing, np.arange(TOKENS) % 2), [EXPERTS * 2 + 1, EXPERTS * 3 + 2]
    for k in range(1, TOP_K):
        A, B, c = (np.asarray(array, np.float32) for array in solve([sums], k - 1, rank=4)[0])
        assert all(np.isfinite(array).all() for array in (A, B, c))
        assert not A[:, unused].any()  # its kept and its dropped weight


def test_tokens_of_which_the_router_sees_nothing_have_no_part_in_the_fit():
    (x, *others), folds = make_layer(ROUTINGS[0]), np.arange(TOKENS) % 2
    blank = np.arange(TOKENS) % 8 == 0
    sums = sum_all((np.where(blank[:, None], 0.0, x), *others), ROUTINGS[0], folds)
    assert sums.count.tolist() == [(~blank & (folds == fold)).sum() for fold in (0, 1)]
    elsewhere = sum_all((np.where(blank[:, None], 0.0, x), *others), ROUTINGS[0], np.where(blank, 2, folds))
    for found, expected in zip(sums, elsewhere, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-5)


def test_the_rank_is_at_most_what_the_layer_has():
    assert find_rank(4096, 64, None) == 32
    assert find_rank(4096, 8, 100) == 24
    assert find_rank(16, 64, 20) == 16
