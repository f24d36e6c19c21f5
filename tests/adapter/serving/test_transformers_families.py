"""`lexi_adapter.apply` on every mixture-of-experts family that transformers has, judged by what its config can say.

A model whose config says k for all layers must be what `apply` makes of one that says more. Blocks with a correction
are judged by the formula in float64, from what reaches the experts of the unreduced model.
"""

import warnings
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from corrections import describe, draw_tensors, write_corrections
from moe_families import EXPERTS, SETTINGS, TOP_K, build, find_families, find_text_class, find_top_k_key

import lexi_adapter
from lexi_adapter.allocation import Allocation, CompensationFile, ModelIdentity
from lexi_adapter.errors import AdapterError, AllocationError
from lexi_adapter.model.identity import ROUTER_WEIGHTS

# Families whose classes for text alone are tested instead, or whose tiny model transformers itself does not build.
UNBUILT = {
    "gemma4": "see gemma4_text",
    "llama4": "see llama4_text",
    "qwen3_5_moe": "see qwen3_5_moe_text",
    "qwen4_exp": "see qwen4_exp_text",
    "zaya": "knows top-k 1 only",
}
REFUSED = {
    "doge": (AllocationError, "none for layers"),
    # The shared expert is among the rows.
    "inkling_text": (AllocationError, "number of rows of .* is 9, the allocation was made for 8"),
    "jetmoe": (AdapterError, "layer 0 has two routers"),
}
NO_EXPONENT = {
    "gemma4_text": "no gate exponent can be applied in gemma4_text",
    "llama4_text": "Llama4Router does not return the ids and weights of its experts",
    "phimoe": "no gate exponent can be applied in phimoe",
}
FIXED = ("phimoe",)  # routes to two experts whatever the config says
NO_CORRECTION = {"axk1": "no correction can be applied in axk1"}
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
    buffers = dict(model.named_buffers())
    routers = [
        name.split(".")
        for name, _ in model.named_parameters()
        if f".{name}".endswith(ROUTER_WEIGHTS) and name.replace("weight", "tid2eid") not in buffers
    ]
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


def name_corrections(allocation, folder, *, hidden=32, rank=4):
    """The allocation with a file of random corrections in `folder`."""
    tensors = draw_tensors(allocation.model, allocation.top_k.items(), hidden=hidden, rank=rank)
    named = write_corrections(folder / "a.safetensors", tensors, describe(allocation.model, rank))
    return replace(allocation, compensation=CompensationFile(**named), folder=str(folder)), tensors


def find_block(model, layer):
    """The block of a layer, and the weight and the bias of its router."""
    name, weight = next(
        (name, weight)
        for name, weight in model.named_parameters()
        if f".{name}".endswith(ROUTER_WEIGHTS) and f"layers.{layer}." in name
    )
    parts = name.split(".")
    around = [model.get_submodule(".".join(parts[:end])) for end in range(-1, -len(parts), -1)]
    block = next(module for module in around if hasattr(module, "experts"))
    bias = getattr(around[0], "bias", None)
    return block, *(None if part is None else part.detach().double().numpy() for part in (weight, bias))


@contextmanager
def replacing(experts, function):
    """`experts` with function(hidden, ids, weights, run) as what they return."""
    run = experts.forward

    def forward(hidden, *choice):
        weights, ids = sorted(choice, key=lambda part: not part.is_floating_point())
        order = [0, 1] if choice[0] is weights else [1, 0]
        return function(hidden, ids, weights, lambda w, i: run(hidden, *([w, i][place] for place in order)))

    experts.forward = forward
    yield
    del experts.forward


def run_block(block, hidden, function=None):
    """The hidden states that a block returns [tokens, hidden], float64."""
    with torch.no_grad():
        if function is None:
            output = block(hidden)
        else:
            with replacing(block.experts, function):
                output = block(hidden)
    output = output[0] if isinstance(output, tuple) else output
    return output.reshape(-1, hidden.shape[-1]).double().numpy()


def read_choice(block, hidden):
    """The ids [tokens, k] and the weights that reach the experts, which may be called in parts."""
    calls = []
    run_block(block, hidden, lambda x, ids, weights, run: calls.append((ids, weights)) or run(weights, ids))
    ids, weights = (torch.cat(parts) for parts in zip(*calls, strict=True))
    return ids.numpy(), weights.double().numpy()


def measure_scale(block, hidden):
    """The factor by which a block multiplies the weighted sum of its experts."""
    once, twice = (
        run_block(block, hidden, lambda x, ids, weights, run, times=times: run(times * weights, ids))
        for times in (1.0, 2.0)
    )
    none = run_block(block, hidden, lambda x, ids, weights, run: torch.zeros_like(run(weights, ids)))
    assert np.abs(twice - once - (once - none)).max() < 1e-4  # linear in the weights
    routed = run_block(block, hidden, lambda x, ids, weights, run: run(weights, ids)) - none
    plain = sum_experts(block, hidden)
    return float((routed * plain).sum() / (plain * plain).sum())


def sum_experts(block, hidden):
    """The weighted sum of a block's experts as they return it, or as a projection does that follows."""
    sums = []
    run_block(block, hidden, lambda x, ids, weights, run: sums.append(run(weights, ids)) or sums[-1])
    projection = getattr(block, "fc2_latent_proj", None)
    with torch.no_grad():
        return torch.cat([s if projection is None else projection(s) for s in sums]).double().numpy()


def correct_by_hand(whole, fewer, layer, hidden, tensors, top_k, exponent):
    """The output of a block at top_k with its correction: the formula, one token at a time."""
    block, weight, bias = find_block(whole, layer)
    (ids, weights), (kept, _) = read_choice(block, hidden), read_choice(find_block(fewer, layer)[0], hidden)
    scale, features, shifted = measure_scale(block, hidden), [], np.zeros(kept.shape)
    for token, x in enumerate(hidden.reshape(-1, hidden.shape[-1]).double().numpy()):
        logits = weight @ x + (0.0 if bias is None else bias)
        by_expert = dict(zip(ids[token].tolist(), weights[token].tolist(), strict=True))
        mass = (sum(by_expert.values()) / sum(by_expert[expert] for expert in kept[token].tolist())) ** exponent
        shifted[token] = [by_expert[expert] * mass for expert in kept[token].tolist()]
        own, dropped = np.zeros(EXPERTS), np.zeros(EXPERTS)
        for expert, value in by_expert.items():
            (own if expert in kept[token] else dropped)[expert] = value * scale
        features.append(np.concatenate([logits, own, dropped]))
    first = run_block(
        block, hidden, lambda x, i, w, run: run(torch.tensor(shifted, dtype=w.dtype), torch.tensor(kept, dtype=i.dtype))
    )
    A, B, c = (tensors[f"layers.{layer}.top_k.{top_k}.{part}"].astype(np.float64) for part in "ABc")
    return first + np.array(features) @ A.T @ B.T + c


@pytest.mark.parametrize("family", sorted(set(find_families()) - set(UNBUILT) - set(REFUSED) - set(NO_EXPONENT)))
def test_a_block_with_a_correction_is_that_of_the_formula(family, tmp_path):
    whole, fewer, model = build(family), build(family, 2), build(family)
    for module in (module for each in (whole, fewer, model) for module in each.modules()):
        if hasattr(module, "routed_scaling_factor"):
            module.routed_scaling_factor = 1.5
    allocation, tensors = name_corrections(allocate(model, family, 2, 0.5), tmp_path)
    if family in NO_CORRECTION:
        with pytest.raises(AllocationError, match=NO_CORRECTION[family]):
            lexi_adapter.apply(model, allocation, check_weights=False)
        return
    layer, hidden = allocation.model.moe_layers[-1], torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    block = find_block(model, layer)[0]
    base = run_block(block, hidden)
    lexi_adapter.apply(model, allocation, check_weights=False)
    found = run_block(block, hidden)
    expected = correct_by_hand(whole, fewer, layer, hidden, tensors, 2, 0.5)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert np.abs(found - base).max() > 1e-3
    full = replace(allocation, top_k=dict.fromkeys(allocation.top_k, TOP_K), budget=TOP_K * len(allocation.top_k))
    lexi_adapter.apply(model, full, check_weights=False)
    np.testing.assert_array_equal(run_block(block, hidden), base)
