"""The gate exponent's arithmetic, judged by one token at a time in float64, and a whole layer by a loop over tokens."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engine import allocate
from hypothesis import given
from hypothesis import strategies as st
from tiny import build_reference, make_checkpoint

import lexi_adapter
from lexi_adapter.errors import AllocationError
from lexi_adapter.serving.kernels.gates import compensate, pick, rescale
from lexi_adapter.serving.vllm_gates import compensate_layer
from lexi_search.artifacts.serialisation import to_document


def weigh(scores, selection, top_k, own, exponent, *, renormalize, scale):
    """Expert -> weight of one token, by the definition: scores and selection scores are [experts], float64."""
    order = np.argsort(-selection, kind="stable")
    mass = scores[order[:own]].sum() / scores[order[:top_k]].sum()
    base = scores * scale / (scores[order[:own]].sum() if renormalize else 1.0)
    return {int(expert): base[expert] * mass**exponent for expert in order[:top_k]}


def route(scores, selection, top_k, *, renormalize, scale, order):
    """The weights and ids [tokens, top_k] of an engine's router at top_k, in a given order."""
    ids = np.argsort(-selection, axis=-1, kind="stable")[:, :top_k][:, order]
    weights = np.take_along_axis(scores, ids, -1)
    weights = scale * (weights / weights.sum(-1, keepdims=True) if renormalize else weights)
    return torch.tensor(weights, dtype=torch.float32), torch.tensor(ids)


def read_weights(weights, ids):
    pairs = zip(weights.double().tolist(), ids.tolist(), strict=True)
    return [dict(zip(expert, weight, strict=True)) for weight, expert in pairs]


@st.composite
def layers(draw):
    own = draw(st.integers(1, 8))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = rng.normal(0, draw(st.sampled_from([0.1, 1.0, 4.0])), (5, own + draw(st.integers(0, 8))))
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    softmax = draw(st.booleans())
    scores = exponentials / exponentials.sum(-1, keepdims=True) if softmax else 1 / (1 + np.exp(-logits))
    bias = rng.normal(0, 0.3, logits.shape[-1]) if draw(st.booleans()) else 0.0
    rule = {"renormalize": draw(st.booleans()), "scale": draw(st.sampled_from([1.0, 2.5]))}
    exponent = draw(st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.5]))
    return rng, scores, scores + bias, draw(st.integers(1, own)), own, exponent, rule


@given(layers())
def test_the_weights_are_those_of_the_definition(layer):
    rng, scores, selection, top_k, own, exponent, rule = layer
    expected = [weigh(*token, top_k, own, exponent, **rule) for token in zip(scores, selection, strict=True)]
    shuffled = route(scores, selection, own, **rule, order=rng.permutation(own))
    _, kept = route(scores, selection, top_k, **rule, order=rng.permutation(top_k))
    for token, reference in zip(read_weights(pick(*shuffled, kept, exponent), kept), expected, strict=True):
        assert token == pytest.approx(reference, rel=1e-5)


@given(layers())
def test_the_kernel_gives_the_weights_of_the_definition(narrow, layer):
    rng, scores, selection, top_k, own, exponent, rule = layer
    expected = [weigh(*token, top_k, own, exponent, **rule) for token in zip(scores, selection, strict=True)]
    first = narrow(*route(scores, selection, own, **rule, order=np.arange(own)), top_k, exponent, ranked=False)
    by_score = [weigh(token, token, top_k, own, exponent, **rule) for token in scores]
    shuffled = route(scores, scores, own, **rule, order=rng.permutation(own))
    largest = narrow(*shuffled, top_k, exponent, ranked=True)
    for found, reference in ((first, expected), (largest, by_score)):
        for token, weights in zip(read_weights(*found), reference, strict=True):
            assert token == pytest.approx(weights, rel=1e-5)


@pytest.mark.parametrize("tokens", [0, 1, 16, 17, 40])
def test_the_kernel_takes_any_number_of_tokens_and_breaks_ties_by_place(narrow, tokens):
    weights = torch.tensor([0.1, 0.3, 0.3, 0.3, 0.1]).repeat(tokens, 1)
    ids = torch.arange(5, dtype=torch.int32).repeat(tokens, 1)
    for ranked, expected in ((True, [1, 2]), (False, [0, 1])):
        found, kept = narrow(weights, ids, 2, 1.0, ranked=ranked)
        assert found.shape == kept.shape == (tokens, 2) and kept.dtype == ids.dtype
        assert (kept == torch.tensor(expected)).all()
        torch.testing.assert_close(found.sum(-1), torch.full((tokens,), 1.1))


@given(layers())
def test_the_ends_are_what_engines_do(layer):
    rng, scores, selection, top_k, own, _, rule = layer
    weights, ids = route(scores, selection, own, **rule, order=rng.permutation(own))
    engine, kept = route(scores, selection, top_k, **rule, order=rng.permutation(top_k))
    end = 1.0 if rule["renormalize"] else 0.0
    torch.testing.assert_close(pick(weights, ids, kept, end), engine, rtol=1e-5, atol=0)


@given(layers())
def test_a_renormalised_softmax_can_be_rescaled_instead(layer):
    _, scores, _, top_k, own, exponent, _ = layer
    rule = {"renormalize": True, "scale": 1.0}
    scores = scores / scores.sum(-1, keepdims=True)
    engine, ids = route(scores, scores, top_k, **rule, order=np.arange(top_k))
    found = engine * rescale(torch.tensor(np.log(scores)), top_k, own, exponent)
    expected = [weigh(token, token, top_k, own, exponent, **rule) for token in scores]
    for token, reference in zip(read_weights(found, ids), expected, strict=True):
        assert token == pytest.approx(reference, rel=1e-5)


def test_rows_without_weights_stay_without(narrow):
    """Padding rows, whose ids and weights vLLM blanks."""
    weights, ids = torch.zeros(2, 4), torch.full((2, 4), -1)
    for ranked in (True, False):
        assert (narrow(weights, ids, 2, 0.5, ranked=ranked)[0] == 0).all()
    assert (pick(weights, ids, ids[:, :2], 0.5) == 0).all()
    assert (compensate(weights, weights[:, :2], 0.5) == 0).all()


def run_layer(block, hidden, top_k, exponent, *, renormalize):
    """A block of OLMoE or Qwen3-MoE, token by token and expert by expert, in NumPy float64."""
    router, gate_up, down = (
        weight.detach().double().numpy()
        for weight in (block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj)
    )
    out = np.zeros(hidden.shape)
    for place, token in enumerate(hidden):
        scores = np.exp(router @ token)
        scores /= scores.sum()
        weights = weigh(scores, scores, top_k, 4, exponent, renormalize=renormalize, scale=1.0)
        for expert, weight in weights.items():
            gate, up = np.split(gate_up[expert] @ token, 2)
            out[place] += weight * (down[expert] @ (gate / (1 + np.exp(-gate)) * up))
    return out


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe"])
def test_a_whole_layer_is_that_of_the_definition(tmp_path, family):
    allocation = to_document(allocate(make_checkpoint(family, tmp_path / family), (1, 3, 4)))
    model = lexi_adapter.apply(build_reference(family), allocation | {"gate_exponent": 0.5})
    hidden = np.random.default_rng(0).normal(size=(7, 64))
    for layer, top_k in enumerate((1, 3, 4)):
        block = model.model.layers[layer].mlp
        with torch.no_grad():
            found = block(torch.tensor(hidden[None], dtype=torch.float32))[0]
        expected = run_layer(block, hidden, top_k, 0.5, renormalize=family == "qwen3_moe")
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-5)


def test_a_layer_whose_experts_have_factors_of_their_own_takes_no_exponent():
    class Gemma4Router:
        def routing_function(self): ...

    Gemma4Router.routing_function.__qualname__ = "Gemma4Router.routing_function"
    router = type("CustomRoutingRouter", (), {"custom_routing_function": Gemma4Router().routing_function})()
    layer = SimpleNamespace(router=router, routed_experts=None)
    with pytest.raises(AllocationError, match="layer 3: no gate exponent can be applied in Gemma4Router.routing_func"):
        compensate_layer(layer, "layer 3", 2, 4, 0.5)
