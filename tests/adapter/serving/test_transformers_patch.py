"""`lexi_adapter.apply`, judged by models put together from whole layers of models with one k each."""

import copy
import json
import pickle
from dataclasses import replace

import pytest
import torch
import transformers
from corrections import compensate
from engine import allocate, export
from tiny import FAMILIES, build_reference, find_moe_blocks, make_checkpoint

import lexi_adapter
from lexi_adapter.allocation import read_allocation
from lexi_adapter.errors import AdapterError, AllocationError
from lexi_search.artifacts.serialisation import to_document, write_allocation

TOKENS = torch.arange(3, 40).reshape(1, -1)
# transformers has no classes for these: their language models are those of other families.
INNER = {"deepseek": "deepseek_ocr2", "deepseek_vl2": "deepseek_v2", "minicpm": "mixtral"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: make_checkpoint(family, root / family) for family in FAMILIES}


@pytest.fixture
def olmoe(checkpoints):
    return load(checkpoints["olmoe"]), read_allocation(to_document(allocate(checkpoints["olmoe"])))


def load(folder, **options):
    options = {"dtype": torch.float32, "attn_implementation": "eager"} | options
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def run(model):
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def read_top_k(model):
    return {layer: block.gate.top_k for layer, block in find_moe_blocks(model).items()}


def build_by_hand(family, top_k):
    """Layer l taken from a model whose configuration says k = top_k[l] for all its layers."""
    model = build_reference(family)
    layers = model.get_decoder().layers
    for layer, k in top_k.items():
        layers[layer] = build_reference(family, num_experts_per_tok=k).get_decoder().layers[layer]
    return model


def find_inner(allocation, family):
    """The allocation as it would be had it been made from the family's language model alone."""
    model = replace(allocation.model, model_type=INNER.get(family, allocation.model.model_type))
    return read_allocation(to_document(replace(allocation, model=model)))


@pytest.mark.parametrize("family", FAMILIES)
def test_runs_what_the_allocation_says(checkpoints, family):
    allocation = find_inner(allocate(checkpoints[family], top_k=(1, 3, 2)), family)
    model = build_reference(family)
    base = run(model)
    assert lexi_adapter.apply(model, allocation) is model
    mixed = run(model)
    torch.testing.assert_close(mixed, run(build_by_hand(family, allocation.top_k)), rtol=0, atol=0)
    assert (mixed - base).abs().max() > 0.1
    again = replace(allocation, top_k=dict.fromkeys(allocation.top_k, 4), budget=4 * len(allocation.top_k))
    torch.testing.assert_close(run(lexi_adapter.apply(model, again)), base, rtol=0, atol=0)


def test_layers_that_look_experts_up_by_token_keep_their_top_k(tmp_path):
    folder = make_checkpoint("deepseek_v4", tmp_path / "whole")
    allocation = allocate(folder, top_k=(1, 3))
    assert allocation.top_k == {1: 1, 2: 3}
    model = load(export(allocation, folder, tmp_path / "exported"))
    base = run(model)
    torch.testing.assert_close(base, run(build_reference("deepseek_v4")), rtol=0, atol=1e-6)
    mixed = run(lexi_adapter.apply(model, model.config.lexi_allocation))
    torch.testing.assert_close(mixed, run(build_by_hand("deepseek_v4", allocation.top_k)), rtol=0, atol=1e-6)
    assert (mixed - base).abs().max() > 0.1
    assert model.model.layers[0].mlp.gate.top_k == 4


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(INNER)))
def test_exported_folder_loads_as_ever_and_needs_apply(checkpoints, tmp_path, family):
    """transformers stores `per_layer_config` but builds every layer from the global k."""
    allocation = allocate(checkpoints[family])
    model = load(export(allocation, checkpoints[family], tmp_path / "exported"))
    assert model.config.is_heterogeneous
    torch.testing.assert_close(run(model), run(load(checkpoints[family])), rtol=0, atol=0)
    lexi_adapter.apply(model, model.config.lexi_allocation)
    torch.testing.assert_close(run(model), run(build_by_hand(family, allocation.top_k)), rtol=0, atol=0)


def test_takes_a_path_a_document_or_an_object(checkpoints, tmp_path):
    allocation = allocate(checkpoints["olmoe"])
    write_allocation(tmp_path / "a.json", allocation)
    document = to_document(allocation)
    for source in (tmp_path / "a.json", str(tmp_path / "a.json"), document, read_allocation(document)):
        assert read_top_k(lexi_adapter.apply(load(checkpoints["olmoe"]), source)) == allocation.top_k
    with pytest.raises(AllocationError, match="a path or a JSON object, not 3"):
        lexi_adapter.apply(load(checkpoints["olmoe"]), 3)


def refuse(model, allocation, expected, kind=AllocationError, **options):
    before = read_top_k(model)
    with pytest.raises(AdapterError, match=expected) as caught:
        lexi_adapter.apply(model, allocation, **options)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert read_top_k(model) == before
    assert not any(module._forward_hooks for module in model.modules())


def test_refuses_another_model_before_it_changes_anything(checkpoints, olmoe):
    model, allocation = olmoe
    lexi_adapter.apply(model, replace(allocation, top_k=dict.fromkeys(allocation.top_k, 2), budget=6))
    refuse(model, read_allocation(to_document(allocate(checkpoints["mixtral"]))), "model_type is 'olmoe'")
    for changes, expected in (
        ({"num_hidden_layers": 4}, "num_hidden_layers is 3, the allocation was made for 4"),
        ({"top_k": 8}, "num_experts_per_tok is 4, the allocation was made for 8"),
        ({"num_experts": 8}, "number of rows of model.layers.0.mlp.gate.weight is 16"),
        ({"moe_layers": (0, 2)}, r"layers \[1\] have one"),
        ({"router_sha256": "0" * 64}, "other router weights"),
    ):
        identity = replace(allocation.model, **changes)
        refuse(model, replace(allocation, model=identity, top_k=dict.fromkeys(identity.moe_layers, 1)), expected)


def test_refuses_a_model_whose_layer_has_no_router(checkpoints, olmoe):
    model, allocation = olmoe
    model.model.layers[1].mlp = torch.nn.Identity()
    refuse(model, allocation, r"none for layers \[1\]")


def test_refuses_a_block_that_keeps_its_top_k_elsewhere(olmoe):
    model, allocation = olmoe
    gate = model.model.layers[1].mlp.gate
    gate.chosen, gate.top_k = gate.top_k, "all"
    refuse(model, allocation, "hold no top_k or num_experts_per_tok: unknown family", AdapterError)


def test_sets_the_top_k_of_a_block_around_a_plain_linear_router(checkpoints):
    """As in remote code of the transformers 4 era, where the gate is a linear layer and its block holds the k."""

    class Block(torch.nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.gate = torch.nn.Linear(*weight.shape[::-1], bias=False)
            self.gate.weight = weight
            self.num_experts_per_tok = 4

    model = load(checkpoints["olmoe"])
    for layer in model.model.layers:
        layer.mlp = Block(layer.mlp.gate.weight)
    allocation = allocate(checkpoints["olmoe"])
    lexi_adapter.apply(model, to_document(allocation))
    assert {i: layer.mlp.num_experts_per_tok for i, layer in enumerate(model.model.layers)} == allocation.top_k


def test_weights_of_fewer_bits_are_checked_in_their_folder(checkpoints, tmp_path):
    allocation = to_document(allocate(checkpoints["olmoe"]))
    model = load(checkpoints["olmoe"], dtype=torch.bfloat16)
    assert read_top_k(lexi_adapter.apply(model, allocation)) == {0: 1, 1: 3, 2: 2}
    other = load(make_checkpoint("olmoe", tmp_path / "other", seed=1), dtype=torch.bfloat16)
    refuse(other, allocation, "other router weights")


def test_weights_of_more_bits_are_checked_in_memory(tmp_path):
    folder = tmp_path / "bfloat16"
    build_reference("olmoe").to(torch.bfloat16).save_pretrained(folder)
    model = load(folder)
    assert model.dtype == torch.float32
    model.config._name_or_path = "moved/away"
    assert read_top_k(lexi_adapter.apply(model, to_document(allocate(folder)))) == {0: 1, 1: 3, 2: 2}


def test_changed_weights_need_to_be_meant(olmoe):
    model, allocation = olmoe
    trained = copy.deepcopy(model)
    trained.config._name_or_path = ""
    with torch.no_grad():
        trained.model.layers[0].mlp.gate.weight.mul_(1.01)
    refuse(trained, allocation, "pass check_weights=False if they were meant to change")
    lexi_adapter.apply(trained, allocation, check_weights=False)
    assert read_top_k(trained) == allocation.top_k


@pytest.fixture
def compensated(checkpoints, tmp_path):
    """The path of an allocation of OLMoE with a gate exponent and corrections."""
    allocation = allocate(checkpoints["olmoe"], (1, 3, 4))
    path = tmp_path / "a.json"
    path.write_text(json.dumps(compensate(to_document(allocation), allocation.model, tmp_path, hidden=64)))
    return path


def test_corrections_go_with_the_model_and_are_undone(checkpoints, compensated):
    model, plain = load(checkpoints["olmoe"]), read_allocation(compensated)
    plain = replace(plain, compensation=None)
    base, without = run(model), run(lexi_adapter.apply(model, plain))
    corrected = run(lexi_adapter.apply(model, compensated))
    assert (corrected - without).abs().max() > 0.1
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), lexi_adapter.apply(model, compensated)):
        torch.testing.assert_close(run(other), corrected, rtol=0, atol=0)
    twin = copy.deepcopy(model)
    for _ in range(2):
        torch.testing.assert_close(run(lexi_adapter.apply(model, plain)), without, rtol=0, atol=0)
    torch.testing.assert_close(run(twin), corrected, rtol=0, atol=0)
    full = replace(plain, top_k=dict.fromkeys(plain.top_k, 4), budget=12, gate_exponent=None)
    torch.testing.assert_close(run(lexi_adapter.apply(twin, full)), base, rtol=0, atol=0)
    assert not any(module._forward_hooks for module in twin.modules())
    assert model.state_dict().keys() == load(checkpoints["olmoe"]).state_dict().keys()


def test_corrections_are_added_in_the_type_of_the_model_and_lose_nothing(checkpoints, compensated):
    model = lexi_adapter.apply(load(checkpoints["olmoe"]), compensated)
    block, hidden = model.model.layers[0].mlp, torch.randn(1, 7, 64, generator=torch.Generator().manual_seed(0))
    weights = {name: value.clone() for name, value in block.state_dict().items()}
    with torch.no_grad():
        expected = block(hidden)
        narrow = model.to(torch.bfloat16).model.layers[0].mlp(hidden.bfloat16())
        assert narrow.dtype == torch.bfloat16 and (narrow - expected).abs().max() < 0.05 * expected.abs().max()
        model.float()
        block.load_state_dict(weights)
        torch.testing.assert_close(block(hidden), expected, rtol=0, atol=0)


def test_corrections_are_found_beside_the_allocation_or_the_model(checkpoints, compensated, tmp_path, monkeypatch):
    document = json.loads(compensated.read_text())
    expected = run(lexi_adapter.apply(load(checkpoints["olmoe"]), compensated))
    model = load(checkpoints["olmoe"])
    refuse(model, document, r"corrections.safetensors: cannot be read \(No such file")
    model.config._name_or_path = ""
    refuse(model, document, "not known where that is; give the allocation as a file")
    model.config._name_or_path = "nobody/nothing"  # no such thing in the hub's cache
    refuse(model, document, "not known where that is; give the allocation as a file")
    found = []
    with monkeypatch.context() as patch:
        patch.setattr(
            "transformers.utils.cached_file", lambda *asked, **_: found.append(asked) or str(tmp_path / asked[1])
        )
        torch.testing.assert_close(run(lexi_adapter.apply(model, document)), expected, rtol=0, atol=0)
    assert found == [("nobody/nothing", "corrections.safetensors")]
    model.config._name_or_path = str(tmp_path)
    torch.testing.assert_close(run(lexi_adapter.apply(model, document)), expected, rtol=0, atol=0)


def test_refuses_corrections_before_it_changes_anything(checkpoints, compensated):
    model = load(checkpoints["olmoe"])
    (compensated.parent / "corrections.safetensors").unlink()
    refuse(model, compensated, "corrections.safetensors: cannot be read")
    for layer in model.model.layers:
        layer.mlp.experts = None
    refuse(model, compensated, "no block with experts around model.layers.0.mlp.gate.weight")
