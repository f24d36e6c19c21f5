"""One common test over every registered family: tiny checkpoints made by transformers, its own blocks as the judge."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from lexi_search.architectures import ARCHITECTURES
from lexi_search.checkpoint import open_checkpoint
from lexi_search.errors import InputError
from lexi_search.experts import expert_outputs
from lexi_search.models import describe, find_dtype
from lexi_search.moe import mix
from lexi_search.routing import route
from lexi_search.weights import stream_layers

MODEL_TYPES = {"deepseek_vl2": "deepseek_vl_v2"}  # where tiny.FAMILIES' name is not the config's


def test_every_registered_family_is_tested():
    assert {MODEL_TYPES.get(family, family) for family in tiny.FAMILIES} == set(ARCHITECTURES)


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def family(request, tmp_path_factory):
    folder = tiny.make_checkpoint(request.param, tmp_path_factory.mktemp(request.param))
    return request.param, folder, tiny.build_reference(request.param)


def compute_outputs(folder, layer, x):
    """Our output of one layer at every k, [k][tokens, hidden]."""
    checkpoint = open_checkpoint(folder)
    model = describe(checkpoint)
    [(_, weights)] = stream_layers(checkpoint, model, [layer])
    tokens, top_k = jnp.asarray(x.numpy()), model.identity.top_k
    choice = route(tokens, weights.router, weights.bias, routing=model.routing, top_k=top_k)
    outputs = expert_outputs(tokens, choice.experts, weights.experts, activation=model.activation)
    return [mix(outputs, choice.scores, jnp.int32(k), routing=model.routing) for k in range(1, top_k + 1)]


def compute_reference(block, x, k):
    """The routed part of transformers' block at this k: what its shared expert adds does not depend on k."""
    for module in block.modules():
        if hasattr(module, "top_k"):
            module.top_k = k
    with torch.no_grad():
        output = block(x[None])[0]
        if hasattr(block, "shared_expert"):
            output -= torch.sigmoid(block.shared_expert_gate(x)) * block.shared_expert(x)
        if hasattr(block, "shared_experts"):
            output -= block.shared_experts(x)
    return output.numpy()


def test_description(family):
    name, folder, model = family
    described = describe(open_checkpoint(folder))
    config = model.config
    num_experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    identity = described.identity
    assert identity.model_type == MODEL_TYPES.get(name, name)
    assert identity.num_experts == (num_experts or config.n_routed_experts)
    assert (identity.top_k, identity.num_hidden_layers) == (config.num_experts_per_tok, config.num_hidden_layers)
    assert described.layers == tuple(tiny.find_moe_blocks(model))
    assert identity.top_k_key == ("language_config." if name == "deepseek_vl2" else "") + "num_experts_per_tok"


def test_every_layer_at_every_k_equals_transformers(family):
    name, folder, model = family
    x = torch.randn(50, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    for layer, block in tiny.find_moe_blocks(model).items():
        for k, ours in enumerate(compute_outputs(folder, layer, x), 1):
            theirs = compute_reference(block, x, k)
            assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs), (name, layer, k)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("name", ["olmoe", "qwen2_moe", "qwen3_moe"])
def test_renormalisation_follows_the_config(name, renormalize, tmp_path):
    tiny.make_checkpoint(name, tmp_path, norm_topk_prob=renormalize)
    model = tiny.build_reference(name, norm_topk_prob=renormalize)
    x = torch.randn(20, model.config.hidden_size, generator=torch.Generator().manual_seed(2))
    theirs = compute_reference(tiny.find_moe_blocks(model)[2], x, 2)
    assert np.linalg.norm(compute_outputs(tmp_path, 2, x)[1] - theirs) < 1e-5 * np.linalg.norm(theirs)


def fuse(tensors, *, transposed):
    """Put each layer's per-expert matrices into `experts.gate_up_proj` and `experts.down_proj`."""
    names = {"gate": ("gate_proj", "w1"), "up": ("up_proj", "w3"), "down": ("down_proj", "w2")}
    stems = sorted(
        {key.split(".experts.")[0] for key in tensors if ".mlp.experts." in key or ".block_sparse_moe.experts." in key}
    )
    fused = {key: value for key, value in tensors.items() if ".experts." not in key}
    for stem in stems:
        matrices = {
            role: torch.stack([tensors[key] for key in sorted_keys(tensors, stem, options)])
            for role, options in names.items()
        }
        gate_up, down = torch.cat([matrices["gate"], matrices["up"]], dim=1), matrices["down"]
        fused[f"{stem}.experts.gate_up_proj"] = (gate_up.mT if transposed else gate_up).contiguous()
        fused[f"{stem}.experts.down_proj"] = (down.mT if transposed else down).contiguous()
    return fused


def sorted_keys(tensors, stem, options):
    keys = [key for key in tensors if key.startswith(f"{stem}.experts.") and key.split(".")[-2] in options]
    return sorted(keys, key=lambda key: int(key.removeprefix(f"{stem}.experts.").split(".")[0]))


@pytest.mark.parametrize("transposed", [False, True])
def test_fused_layouts_are_the_same_model(family, transposed, tmp_path):
    _, folder, model = family
    tensors = load_file(folder / "model.safetensors")
    save_file(fuse(tensors, transposed=transposed), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    x = torch.randn(20, model.config.hidden_size, generator=torch.Generator().manual_seed(3))
    layer = describe(open_checkpoint(tmp_path)).layers[-1]
    for separate, together in zip(compute_outputs(folder, layer, x), compute_outputs(tmp_path, layer, x), strict=True):
        np.testing.assert_array_equal(separate, together)


def test_new_mixtral_names(tmp_path):
    """transformers 5 calls the block `mlp`; the hub's files call it `block_sparse_moe`."""
    tiny.make_checkpoint("mixtral", tmp_path)
    before = describe(open_checkpoint(tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({key.replace("block_sparse_moe", "mlp"): t for key, t in tensors.items()}, tmp_path / "model.safetensors")
    after = describe(open_checkpoint(tmp_path))
    assert after.identity.router == "model.layers.{}.mlp.gate.weight" != before.identity.router
    assert after.identity.router_sha256 == before.identity.router_sha256


def test_selection_bias_is_read(tmp_path):
    """DeepSeek-VL2's largest model selects with a bias on sigmoid scores, as DeepSeek-V3 does."""
    tiny.make_checkpoint("deepseek_vl2", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["language_config"] |= dict(topk_method="noaux_tc", scoring_func="sigmoid", n_group=4, topk_group=2)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="e_score_correction_bias is missing"):
        describe(open_checkpoint(tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    routers = [key for key in tensors if key.endswith("mlp.gate.weight")]
    bias = {key.replace("weight", "e_score_correction_bias"): torch.rand(16) for key in routers}
    save_file(tensors | bias, tmp_path / "model.safetensors")
    model = describe(open_checkpoint(tmp_path))
    assert model.tensors[1].bias == "language.model.layers.1.mlp.gate.e_score_correction_bias"
    assert model.routing == (("sigmoid", False, 1.0, 4, 2, "top2"))


def test_prediction_layers_past_the_last_are_left_out(tmp_path):
    tiny.make_checkpoint("olmoe", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    assert describe(open_checkpoint(tmp_path)).layers == (0, 1)


def drop(suffix):
    return lambda tensors: {key: value for key, value in tensors.items() if not key.endswith(suffix)}


def replace(suffix, change):
    return lambda tensors: {key: change(value) if key.endswith(suffix) else value for key, value in tensors.items()}


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"model_type": "gpt9"}, None, "model_type 'gpt9' is not known; known are deepseek_v2, .*qwen3_moe"),
        ({"num_experts": None}, None, "num_experts or num_local_experts is missing"),
        ({"num_experts": 8}, None, r"has shape \[16, 64\], expected \[8, 64\]"),
        ({"num_experts_per_tok": 1}, None, "num_experts_per_tok is 1: each token runs one expert"),
        ({"num_experts_per_tok": 17}, None, "only 16 experts"),
        ({"num_hidden_layers": "3"}, None, "num_hidden_layers is '3'"),
        ({"hidden_size": 32}, None, r"expected \[16, 32\]"),
        ({"quantization_config": {"quant_method": "fp8"}}, None, "quantised"),
        ({"topk_method": "magic"}, None, "topk_method 'magic' is not known"),
        ({"scoring_func": "cosine"}, None, "scoring_func 'cosine' is not known"),
        ({}, drop("gate.weight"), "no router tensor"),
        ({}, drop("layers.1.mlp.experts.3.up_proj.weight"), "layers.1.mlp.experts.3.up_proj.weight is missing"),
        ({}, replace("experts.3.up_proj.weight", lambda t: t[:5]), r"has shape \[5, 64\], expected \[32, 64\]"),
        ({}, replace("experts.3.up_proj.weight", lambda t: t.to(torch.int8)), "is int8; known are"),
        ({}, lambda t: t | {"teacher.layers.0.mlp.gate.weight": torch.zeros(16, 64)}, "routers under several names"),
    ],
)
def test_refuses(config, tensors, message, tmp_path):
    tiny.make_checkpoint("olmoe", tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text()) | config
    (tmp_path / "config.json").write_text(json.dumps(settings))
    if tensors:
        changed = tensors(load_file(tmp_path / "model.safetensors"))
        save_file({key: value.contiguous() for key, value in changed.items()}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=message) as caught:
        describe(open_checkpoint(tmp_path))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"n_group": 3}, "n_group 3, topk_group 2 do not part 16"),
        ({"n_group": 8, "topk_group": 1}, "topk_group 1 leaves fewer than 4"),
    ],
)
def test_refuses_groups_that_do_not_fit(config, message, tmp_path):
    tiny.make_checkpoint("deepseek_v2", tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text()) | config
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=message):
        describe(open_checkpoint(tmp_path))


@pytest.mark.parametrize(
    ("stored", "found"),
    [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16"), ("float64", "float32")],
)
def test_dtype_is_the_experts_own(stored, found, tmp_path):
    tiny.make_checkpoint("olmoe", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change = {key: t.to(getattr(torch, stored)) for key, t in tensors.items() if ".experts." in key}
    save_file(tensors | change, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert find_dtype(checkpoint, describe(checkpoint)) == found
