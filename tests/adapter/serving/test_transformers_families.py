"""`lexi_adapter.apply` on every mixture-of-experts family that transformers has, judged by what its config can say.

A model whose config says k for all layers must be what `apply` makes of one that says more.
"""

import warnings

import pytest
import torch
from moe_families import EXPERTS, SETTINGS, TOP_K, build, find_families, find_text_class, find_top_k_key

import lexi_adapter
from lexi_adapter.allocation import Allocation, ModelIdentity
from lexi_adapter.errors import AdapterError, AllocationError
from lexi_adapter.model.identity import ROUTER_WEIGHTS

# Families whose classes for text alone are tested instead, or whose tiny model transformers itself does not build.
UNBUILT = {
    "gemma4": "layers differ in attention, not only in experts",
    "gemma4_text": "as gemma4",
    "llama4": "see llama4_text",
    "qwen3_5_moe": "see qwen3_5_moe_text",
    "qwen4_exp": "see qwen4_exp_text",
    "zaya": "knows top-k 1 only",
}
REFUSED = {
    "deepseek_v4": (AdapterError, "looks its experts up for every token: no other top-k can be applied"),
    "doge": (AllocationError, "none for layers"),
    # The shared expert is among the rows.
    "inkling_text": (AllocationError, "number of rows of .* is 9, the allocation was made for 8"),
    "jetmoe": (AdapterError, "layer 0 has two routers"),
}
NO_EXPONENT = {
    "llama4_text": "Llama4Router does not return the ids and weights of its experts",
    "phimoe": "no gate exponent can be applied in phimoe",
}
FIXED = ("phimoe",)  # routes to two experts whatever the config says
TOKENS = torch.arange(2, 18).reshape(2, -1)


@pytest.fixture(autouse=True)
def families_may_warn():
    """Warnings of transformers about tiny configurations and its own code are no failures here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def run(model):
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def allocate(model, model_type, top_k, gate_exponent=None):
    """An allocation of `top_k` for every layer that has a router, or for all if none is found."""
    text = model.config.get_text_config()
    routers = [name.split(".") for name, _ in model.named_parameters() if f".{name}".endswith(ROUTER_WEIGHTS)]
    layers = sorted({int(part) for name in routers for part in name if part.isdecimal()}) or [0]
    key = find_top_k_key(find_text_class(model_type))
    key = getattr(text, "attribute_map", {}).get(key, key)
    identity = ModelIdentity(
        model_type=model.config.model_type,
        num_hidden_layers=text.num_hidden_layers,
        num_experts=EXPERTS,
        top_k=TOP_K,
        moe_layers=tuple(layers),
        router="model.layers.{}.router.weight",
        top_k_key=key if text is model.config else f"text_config.{key}",
        router_sha256="0" * 64,
    )
    chosen = dict.fromkeys(layers, top_k)
    return Allocation(identity, chosen, sum(chosen.values()), 0.0, 0.0, {}, gate_exponent)


def apply(model, *args):
    return lexi_adapter.apply(model, allocate(model, *args), check_weights=False)


def test_the_families_left_out_are_there():
    found = find_families()
    assert set(UNBUILT) | set(REFUSED) | set(NO_EXPONENT) | set(SETTINGS) <= set(found) and len(found) > 40


@pytest.mark.parametrize("family", sorted(set(find_families()) - set(UNBUILT) - set(REFUSED)))
def test_apply_is_what_the_config_would_have_said(family):
    model, fewer = build(family), run(build(family, 2))
    base = run(model)
    torch.testing.assert_close(run(apply(model, family, 2)), fewer, rtol=0, atol=0)
    if family not in FIXED:
        assert (fewer - base).abs().max() > 1e-3
    if family in NO_EXPONENT:
        with pytest.raises(AllocationError, match=NO_EXPONENT[family]):
            run(apply(model, family, 2, 0.5))
        return
    # Renormalising families do b = 1 by themselves, the others b = 0; in between lies something else.
    ends = [(run(apply(model, family, 2, exponent)) - fewer).abs().max() for exponent in (0.0, 1.0)]
    assert min(ends) < 1e-5 < max(ends)
    between = run(apply(model, family, 2, 0.5))
    assert (between - fewer).abs().max() > 1e-5
    torch.testing.assert_close(run(apply(model, family, TOP_K, 0.5)), base, rtol=0, atol=0)
    torch.testing.assert_close(run(apply(model, family, 2)), fewer, rtol=0, atol=0)


@pytest.mark.parametrize("family", REFUSED)
def test_apply_refuses_what_it_cannot_do(family):
    model = build(family)
    kind, message = REFUSED[family]
    with pytest.raises(AdapterError, match=message) as caught:
        apply(model, family, 2)
    assert type(caught.value) is kind
