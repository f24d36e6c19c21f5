"""The mathematics of one MoE layer against loops in float64, over every routing rule that a family may declare."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from lexi_search.layers.experts import CHUNK_SIZES, MAX_PADDING, _argsort, cut_into_chunks, expert_outputs
from lexi_search.layers.ffn import ACTIVATIONS
from lexi_search.layers.moe import (
    Correction,
    compute_outputs,
    correct,
    corrected_distances,
    find_features,
    mix,
    squared_distances,
)
from lexi_search.layers.routing import _find_largest, mixing_weights, route
from lexi_search.layers.spec import Activation, Routing
from lexi_search.layers.weights import ExpertWeights

EXPERTS, HIDDEN, WIDTH, TOP_K, TOKENS = 8, 24, 12, 4, 40

ROUTINGS = [
    Routing(
        scoring=scoring,
        renormalize=renormalize,
        scale=scale,
        num_groups=groups,
        topk_groups=kept,
        group_score=score,
        bias=bias,
    )
    for scoring in ("softmax", "sigmoid")
    for renormalize, scale in ((False, 1.0), (True, 2.5))
    for groups, kept, score in ((1, 1, "max"), (4, 2, "max"), (4, 2, "top2"))
    for bias in (None, "selection")
] + [
    Routing(renormalize=True, bias="logits"),
    Routing(renormalize=True, epsilon=0.0, norm_min=0.3, bias="selection"),
    Routing(scoring="sigmoid", renormalize=True, epsilon=0.1),
    Routing(scoring="sigmoid", scales_input=True),
    Routing(scoring="sqrtsoftplus", renormalize=True, scale=1.5, bias="selection"),
    Routing(scoring="sparsemixer", jitter=0.01),
    Routing(scoring="sparsemixer", jitter=0.2),
]
EXPERTS_OF = {
    "gated": (Activation(), "gate up down"),
    "gelu": (Activation("gelu"), "gate up down"),
    "relu": (Activation("relu"), "gate up down"),
    "clamped": (Activation(limit=0.5), "gate up down"),
    "clamped, shifted, biased": (
        Activation(alpha=1.702, limit=0.7, up_offset=1.0),
        "gate up down gate_bias up_bias down_bias",
    ),
    "ungated": (Activation("relu2"), "up down"),
}
SHAPES = {
    "gate": (WIDTH, HIDDEN),
    "up": (WIDTH, HIDDEN),
    "down": (HIDDEN, WIDTH),
    "gate_bias": (WIDTH,),
    "up_bias": (WIDTH,),
    "down_bias": (HIDDEN,),
}


def make_layer(seed=0, parts="gate up down"):
    draw = np.random.default_rng(seed)
    router = draw.normal(size=(EXPERTS, HIDDEN)) / 2
    bias = draw.normal(size=EXPERTS) / 4
    experts = [
        tuple(draw.normal(size=shape) / 3 if part in parts.split() else None for part, shape in SHAPES.items())
        for _ in range(EXPERTS)
    ]
    return (
        router,
        bias,
        [tuple(expert[: 6 if "_bias" in parts else 3]) for expert in experts],
        draw.normal(size=(TOKENS, HIDDEN)),
    )


def choose(inputs, router, bias, routing):
    stored = jnp.asarray(bias, jnp.float32) if routing.bias else None
    return route(inputs, jnp.asarray(router, jnp.float32), stored, routing=routing, top_k=TOP_K)


def as_weights(experts, dtype=jnp.float32):
    return tuple(
        ExpertWeights(*(None if part is None else jnp.asarray(part, dtype) for part in expert)) for expert in experts
    )


@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_k_from_one_pass_equals_the_loop(routing):
    router, bias, experts, x = make_layer()
    inputs, activation = jnp.asarray(x, jnp.float32), Activation()
    choice = choose(inputs, router, bias, routing)
    outputs = compute_outputs(inputs, choice, as_weights(experts), routing=routing, activation=activation)
    distances = squared_distances(outputs, choice.scores, routing=routing)
    expected = [reference.moe_output(x, router, bias, experts, routing, activation, k) for k in range(1, TOP_K + 1)]
    for k in range(1, TOP_K + 1):
        mixed = mix(outputs, choice.scores, jnp.int32(k), routing=routing)
        assert relative_error(mixed, expected[k - 1]) < 4e-7
        far = ((expected[k - 1] - expected[-1]) ** 2).sum(axis=1)
        np.testing.assert_allclose(
            distances[:, k - 1], far, rtol=1e-5, atol=1e-6 * (expected[-1] ** 2).sum(axis=1).max()
        )
        np.testing.assert_allclose(np.asarray(distances, np.float64).sum(axis=0)[k - 1], far.sum(), rtol=1e-6)
    assert not distances[:, -1].any()


@pytest.mark.parametrize("routing", ROUTINGS)
def test_corrections_equal_the_loop(routing):
    router, bias, experts, x = make_layer()
    inputs, draw = jnp.asarray(x, jnp.float32), np.random.default_rng(1)
    choice = choose(inputs, router, bias, routing)
    shapes = (TOP_K - 1, 2, 3 * EXPERTS), (TOP_K - 1, HIDDEN, 2), (TOP_K - 1, HIDDEN)
    correction = Correction(*(jnp.asarray(draw.normal(size=shape), jnp.float32) for shape in shapes))
    outputs = compute_outputs(inputs, choice, as_weights(experts), routing=routing, activation=Activation())
    distances = corrected_distances(outputs, choice, correction, routing=routing)
    whole = reference.moe_output(x, router, bias, experts, routing, Activation(), TOP_K)
    for k in range(1, TOP_K):
        features = reference.find_features(x, router, bias, routing, TOP_K, k)
        assert relative_error(find_features(choice, jnp.int32(k), routing=routing), features) < 4e-6
        A, B, c = (np.asarray(array[k - 1], np.float64) for array in correction)
        expected = features @ A.T @ B.T + c
        own = jax.tree.map(lambda array, k=k: array[k - 1 : k], correction)
        assert relative_error(correct(choice, jnp.int32(k), own, routing=routing), expected) < 4e-6
        moved = reference.moe_output(x, router, bias, experts, routing, Activation(), k) + expected - whole
        np.testing.assert_allclose(distances[:, k - 1], (moved**2).sum(axis=1), rtol=1e-5)
    assert not distances[:, -1].any()
    ks = np.repeat(np.arange(1, TOP_K, dtype=np.int32), TOKENS)[:, None]
    several = type(choice)(*(jnp.tile(array, (TOP_K - 1, 1)) for array in choice))
    each = [
        correct(choice, jnp.int32(k), jax.tree.map(lambda array, k=k: array[k - 1 : k], correction), routing=routing)
        for k in range(1, TOP_K)
    ]
    np.testing.assert_allclose(
        correct(several, jnp.asarray(ks), correction, routing=routing), np.concatenate(each), atol=2e-5
    )


def test_a_token_of_which_the_router_sees_nothing_gets_no_correction():
    router, _, experts, x = make_layer()
    x[1] = 0.0
    routing = Routing()
    choice = choose(jnp.asarray(x, jnp.float32), router, None, routing)
    shapes = (TOP_K - 1, 2, 3 * EXPERTS), (TOP_K - 1, HIDDEN, 2), (TOP_K - 1, HIDDEN)
    correction = Correction(*(jnp.ones(shape, jnp.float32) for shape in shapes))
    own = jax.tree.map(lambda array: array[:1], correction)
    added = correct(choice, jnp.int32(1), own, routing=routing)
    assert not added[1].any() and (added[jnp.arange(TOKENS) != 1] != 0).any(axis=1).all()
    outputs = compute_outputs(
        jnp.asarray(x, jnp.float32), choice, as_weights(experts), routing=routing, activation=Activation()
    )
    assert not corrected_distances(outputs, choice, correction, routing=routing)[1].any()


def test_shapes_and_types_that_do_not_fit_are_refused():
    """By the checker that `conftest` puts on every function; JAX itself would broadcast such a bias and such a k."""
    router, _, experts, x = make_layer()
    inputs, router, routing = jnp.asarray(x, jnp.float32), jnp.asarray(router, jnp.float32), Routing(bias="selection")
    with pytest.raises(TypeCheckError, match="parameter 'router'"):
        route(inputs, router.T, None, routing=Routing(), top_k=TOP_K)
    with pytest.raises(TypeCheckError, match="parameter 'bias'"):
        route(inputs, router, jnp.zeros(1), routing=routing, top_k=TOP_K)
    choice = route(inputs, router, jnp.zeros(EXPERTS), routing=routing, top_k=TOP_K)
    outputs = compute_outputs(inputs, choice, as_weights(experts), routing=routing, activation=Activation())
    with pytest.raises(TypeCheckError, match="parameter 'k'"):
        mix(outputs, choice.scores, jnp.float32(2.5), routing=routing)


@pytest.mark.parametrize("kind", EXPERTS_OF)
def test_experts(kind):
    activation, parts = EXPERTS_OF[kind]
    router, _, experts, x = make_layer(1, parts)
    inputs, routing = jnp.asarray(x, jnp.float32), Routing()
    choice = route(inputs, jnp.asarray(router, jnp.float32), None, routing=routing, top_k=TOP_K)
    outputs = compute_outputs(inputs, choice, as_weights(experts), routing=routing, activation=activation)
    expected = reference.moe_output(x, router, None, experts, routing, activation, TOP_K)
    assert relative_error(mix(outputs, choice.scores, jnp.int32(TOP_K), routing=routing), expected) < 4e-7


def test_activation_names_are_those_of_transformers():
    activations = pytest.importorskip("transformers.activations")
    import torch

    x = np.linspace(-4, 4, 101, dtype=np.float32)
    for name, function in ACTIVATIONS.items():
        np.testing.assert_allclose(function(jnp.asarray(x)), activations.ACT2FN[name](torch.tensor(x)), atol=2e-6)


def test_bfloat16_stays_near_float32():
    """The Gram matrix keeps bf16 rounding out of the distances: compared on the same rounded weights and inputs."""
    router, _, experts, x = make_layer(2)
    distances = []
    for dtype in (jnp.float32, jnp.bfloat16):
        rounded = jnp.asarray(x, jnp.bfloat16).astype(dtype)
        weights = jax.tree.map(lambda matrix, dtype=dtype: matrix.astype(dtype), as_weights(experts, jnp.bfloat16))
        choice = route(rounded, jnp.asarray(router, jnp.float32), None, routing=Routing(), top_k=TOP_K)
        outputs = expert_outputs(rounded, choice.experts, weights, activation=Activation())
        assert outputs.dtype == dtype
        distances.append(np.sqrt(np.asarray(squared_distances(outputs, choice.scores, routing=Routing())).mean(axis=0)))
    np.testing.assert_allclose(distances[1][:-1], distances[0][:-1], rtol=3e-3)


def test_unequal_loads():
    """Every token to the same experts, so that some chunks are full, one is padded, and most experts have no rows."""
    _, _, experts, _ = make_layer()
    x = np.random.default_rng(3).normal(size=(700, HIDDEN)).astype(np.float32)
    chosen = np.tile([[6, 2]], (700, 1))
    chosen[0] = [7, 0]
    outputs = expert_outputs(jnp.asarray(x), jnp.asarray(chosen), as_weights(experts), activation=Activation("relu"))
    for t in (0, 1, 350, 699):
        for rank, e in enumerate(chosen[t]):
            gate, up, down = experts[e]
            expected = down @ (np.maximum(gate @ x[t], 0) * (up @ x[t]))
            np.testing.assert_allclose(outputs[t, rank], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bound", (5, 2**32 // 300, 2**32 // 300 + 1, 2**31 - 1))
def test_experts_are_sorted_stably_whether_or_not_they_fit_into_one_number_with_their_place(bound):
    values = np.random.default_rng(0).choice([0, 1, bound // 2, bound - 1], size=300).astype(np.int32)
    found = jax.jit(_argsort, static_argnames="bound")(values, bound=bound)
    np.testing.assert_array_equal(found, np.argsort(values, kind="stable"))


@given(load=st.integers(0, 50_000))
def test_chunks_cover_the_load(load):
    chunks = cut_into_chunks(load)
    assert sum(used for _, used in chunks) == load
    assert all(size in CHUNK_SIZES and 0 < used <= size for size, used in chunks)
    assert all(size == used for size, used in chunks[:-1])
    assert sum(size for size, _ in chunks) - load <= max(MAX_PADDING * load, CHUNK_SIZES[0])


@given(
    scores=st.lists(st.floats(2**-8, 1, width=32), min_size=1, max_size=6),
    k=st.integers(1, 6),
    renormalize=st.booleans(),
    exponent=st.none() | st.sampled_from([0.0, 0.5, 1.0, 2.0]),
)
def test_mixing_weights(scores, k, renormalize, exponent):
    ordered = np.sort(np.asarray([scores], np.float32))[:, ::-1]
    routing = Routing(renormalize=renormalize, scale=2.0, exponent=exponent)
    weights = mixing_weights(jnp.asarray(ordered), jnp.int32(k), routing=routing)
    scores = ordered[0].astype(np.float64)
    kept = np.where(np.arange(len(scores)) < k, scores, 0)
    expected = kept / (kept.sum() if renormalize else 1)
    if exponent is not None:  # from what they weigh with all of them
        expected = kept / (scores.sum() if renormalize else 1) * (scores.sum() / kept.sum()) ** exponent
    np.testing.assert_allclose(weights[0], 2 * expected, rtol=2e-6)


def relative_error(ours, expected):
    return np.linalg.norm(np.asarray(ours, np.float64) - expected) / np.linalg.norm(expected)


@given(st.lists(st.lists(st.sampled_from([-1.5, 0.0, 0.25, 3.0, np.inf, np.nan]), min_size=6, max_size=6), min_size=1))
def test_maxima_one_by_one_are_those_of_a_sort(keys):
    """With equal ones in the same order, as what a GPU chooses is to be what a CPU does."""
    keys = jnp.asarray(keys, jnp.float32)
    for count in (1, 4, 6):
        np.testing.assert_array_equal(_find_largest(keys, count=count), jax.lax.top_k(keys, count)[1])
