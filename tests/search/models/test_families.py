"""One common test over every registered family: tiny checkpoints made by transformers, its own blocks as the judge."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny
import torch
from blocks import compute_reference
from moe_families import find_families
from safetensors.torch import load_file, save_file

from lexi_search.checkpoint.reader import open_checkpoint
from lexi_search.errors import InputError
from lexi_search.layers.moe import compute_outputs as compute_outputs_of_experts
from lexi_search.layers.moe import mix
from lexi_search.layers.routing import route
from lexi_search.layers.spec import Routing
from lexi_search.models.families.refused import REFUSED
from lexi_search.models.loading.streaming import stream_layers
from lexi_search.models.model import describe, find_dtype
from lexi_search.models.moe_families import ARCHITECTURES

MAX_K = {"llama4": 4, "llama4_text": 4}  # where the model's own k is 1


def test_every_family_of_transformers_is_known_or_refused_with_its_reason():
    assert set(find_families()) <= set(ARCHITECTURES) | set(REFUSED)
    assert not set(ARCHITECTURES) & set(REFUSED)


def test_every_registered_family_is_tested():
    assert {tiny.MODEL_TYPES.get(family, family) for family in tiny.ALL_FAMILIES} == set(ARCHITECTURES)


@pytest.fixture(scope="module", params=tiny.ALL_FAMILIES)
def family(request, tmp_path_factory):
    folder = tiny.make_checkpoint(request.param, tmp_path_factory.mktemp(request.param))
    return request.param, folder, tiny.build_reference(request.param)


def compute_outputs(folder, layer, x, max_k=None):
    """Our output of one layer at every k, [k][tokens, hidden]."""
    checkpoint = open_checkpoint(folder)
    model = describe(checkpoint, max_k=max_k)
    [(_, weights)] = stream_layers(checkpoint, model, [layer])
    tokens, routing = jnp.asarray(x.numpy()), model.routing
    choice = route(tokens, weights.router, weights.bias, routing=routing, top_k=model.top_k)
    outputs = compute_outputs_of_experts(tokens, choice, weights.experts, routing=routing, activation=model.activation)
    return [mix(outputs, choice.scores, jnp.int32(k), routing=routing) for k in range(1, model.top_k + 1)]


def compute_phimoe(block, x, k):
    """transformers' router knows k = 2 only; at k = 1 it would stop after its first choice."""
    with torch.no_grad():
        _, weights, chosen = block.router(x)
        return block.experts(x, chosen[:, :k], weights[:, :k]).numpy()


def test_description(family):
    name, folder, model = family
    described = describe(open_checkpoint(folder), max_k=MAX_K.get(name))
    identity, config = described.identity, model.config.get_text_config()
    assert identity.model_type == tiny.MODEL_TYPES.get(name, name)
    assert identity.num_experts == (8 if name in ("mixtral", "minicpm") else 12 if name == "qwen2_moe" else 16)
    assert identity.top_k == {"phimoe": 2, "llama4": 1, "llama4_text": 1}.get(name, 4)
    assert identity.num_hidden_layers == config.num_hidden_layers
    assert described.layers == tuple(tiny.find_moe_blocks(model))
    stored = json.loads((folder / "config.json").read_text())
    for key in identity.top_k_key.split("."):
        stored = stored[key]
    assert stored in (identity.top_k, [identity.top_k] * config.num_hidden_layers)


def test_every_layer_at_every_k_equals_transformers(family):
    name, folder, model = family
    x = torch.randn(50, model.config.get_text_config().hidden_size, generator=torch.Generator().manual_seed(1))
    x = x / x.square().mean(dim=-1, keepdim=True).sqrt()  # as a layer's input is where experts have scales
    blocks = tiny.find_moe_blocks(model)
    assert blocks
    for layer, block in blocks.items():
        for k, ours in enumerate(compute_outputs(folder, layer, x, MAX_K.get(name)), 1):
            theirs = (compute_phimoe if name == "phimoe" else compute_reference)(block, x, k)
            assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs), (name, layer, k)


def test_every_k_equals_the_loop_in_float64(family):
    name, folder, _ = family
    checkpoint = open_checkpoint(folder)
    described = describe(checkpoint, max_k=MAX_K.get(name))
    layer = described.layers[-1]
    [(_, weights)] = stream_layers(checkpoint, described, [layer])
    x = torch.randn(50, described.hidden_size, generator=torch.Generator().manual_seed(4))
    router, bias, experts = jax.tree.map(
        lambda part: np.asarray(part, np.float64), (weights.router, weights.bias, tuple(weights.experts))
    )
    for k, ours in enumerate(compute_outputs(folder, layer, x, MAX_K.get(name)), 1):
        loop = reference.moe_output(
            x.double().numpy(),
            router,
            None if bias is None else bias.reshape(-1),
            [tuple(0 if i > 2 and part is None else part for i, part in enumerate(expert)) for expert in experts],
            described.routing,
            described.activation,
            k,
        )
        assert np.linalg.norm(ours - loop) < 4e-7 * np.linalg.norm(loop), (name, k)


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
@pytest.mark.parametrize("name", ["mixtral", "qwen3_next", "deepseek_v3"])
def test_fused_layouts_are_the_same_model(name, transposed, tmp_path):
    folder = tiny.make_checkpoint(name, tmp_path / "separate")
    tensors = load_file(folder / "model.safetensors")
    (tmp_path / "fused").mkdir()
    save_file(fuse(tensors, transposed=transposed), tmp_path / "fused/model.safetensors")
    (tmp_path / "fused/config.json").write_bytes((folder / "config.json").read_bytes())
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(3))
    for separate, together in zip(
        compute_outputs(folder, 1, x), compute_outputs(tmp_path / "fused", 1, x), strict=True
    ):
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
    assert model.routing == Routing("sigmoid", num_groups=4, topk_groups=2, group_score="top2", bias="selection")


def test_prediction_layers_past_the_last_are_left_out(tmp_path):
    tiny.make_checkpoint("olmoe", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    assert describe(open_checkpoint(tmp_path)).layers == (0, 1)


@pytest.mark.parametrize("prefix", ["mtp.", "model.mtp.", "talker.model."])
def test_parts_with_layers_of_their_own_are_left_out(prefix, tmp_path):
    tiny.make_checkpoint("qwen3_next", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    more = {f"{prefix}layers.0.mlp.gate.weight": torch.zeros(16, 64)}
    save_file(tensors | more, tmp_path / "model.safetensors")
    assert describe(open_checkpoint(tmp_path)).identity.router == "model.layers.{}.mlp.gate.weight"


def rewrite_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def test_a_single_expert_is_refused_unless_more_are_asked_for(tmp_path):
    tiny.make_checkpoint("llama4_text", tmp_path)
    with pytest.raises(InputError, match="num_experts_per_tok is 1.*; --input paper --max-k 2 profiles"):
        describe(open_checkpoint(tmp_path))
    for wrong in (1, 17):
        with pytest.raises(InputError, match=f"max_k {wrong} is not between 2 and 16"):
            describe(open_checkpoint(tmp_path), max_k=wrong)
    model = describe(open_checkpoint(tmp_path), max_k=3)
    assert (model.identity.top_k, model.top_k) == (1, 3)


def test_max_k_is_not_below_the_models_own(tmp_path):
    tiny.make_checkpoint("deepseek_v3", tmp_path)
    with pytest.raises(InputError, match="max_k 3 is not between 4 and 16"):
        describe(open_checkpoint(tmp_path), max_k=3)
    with pytest.raises(InputError, match="topk_group 2 leaves fewer than 9"):
        describe(open_checkpoint(tmp_path), max_k=9)


def test_a_config_may_hold_infinity(tmp_path):
    """As those of Nemotron-H on the hub do, although it is no JSON; values that are used must still be finite."""
    tiny.make_checkpoint("nemotron_h", tmp_path)
    rewrite_config(tmp_path, time_step_limit=[0.0, float("inf")])
    assert "Infinity]" in (tmp_path / "config.json").read_text().replace("\n", "").replace(" ", "")
    assert describe(open_checkpoint(tmp_path)).routing.scale == 1.5
    for wrong in (float("inf"), 10**400, "1.5", True):
        rewrite_config(tmp_path, routed_scaling_factor=wrong)
        with pytest.raises(InputError, match="routed_scaling_factor is .*, expected a value like 1.0"):
            describe(open_checkpoint(tmp_path))


def test_a_multimodal_config_needs_the_language_models_part(tmp_path):
    tiny.make_checkpoint("qwen3_omni_moe", tmp_path)
    assert describe(open_checkpoint(tmp_path)).identity.top_k_key == "thinker_config.text_config.num_experts_per_tok"
    for wrong in (None, 3, {}):
        rewrite_config(tmp_path, thinker_config=wrong)
        with pytest.raises(InputError, match="num_experts or num_local_experts is missing"):
            describe(open_checkpoint(tmp_path))


def test_one_number_for_every_layer_may_be_a_list(tmp_path):
    """As moe_topk in Hunyuan-A13B; numbers that differ are refused (below), since a model has one k of its own."""
    tiny.make_checkpoint("hunyuan_v1_moe", tmp_path)
    before = describe(open_checkpoint(tmp_path))
    rewrite_config(tmp_path, moe_topk=[4, 4], num_experts=[16, 16])
    assert describe(open_checkpoint(tmp_path)) == before


def test_experts_in_a_latent_space_equal_transformers(tmp_path):
    """As those of Nemotron-3 Super."""
    tiny.make_checkpoint("nemotron_h", tmp_path, moe_latent_size=24)
    blocks = tiny.find_moe_blocks(tiny.build_reference("nemotron_h", moe_latent_size=24))
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    for layer, block in blocks.items():
        for k, ours in enumerate(compute_outputs(tmp_path, layer, x), 1):
            theirs = compute_reference(block, x, k)
            assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs), (layer, k)


def test_a_latent_space_needs_the_maps_to_it(tmp_path):
    tiny.make_checkpoint("nemotron_h", tmp_path)
    rewrite_config(tmp_path, moe_latent_size=32)
    with pytest.raises(InputError, match="fc1_latent_proj.weight is missing"):
        describe(open_checkpoint(tmp_path))


def drop(suffix):
    return lambda tensors: {key: value for key, value in tensors.items() if not key.endswith(suffix)}


def replace(suffix, change):
    return lambda tensors: {key: change(value) if key.endswith(suffix) else value for key, value in tensors.items()}


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"model_type": "gpt9"}, None, "model_type 'gpt9' is not known; known are afmoe, .*qwen3_moe"),
        ({"model_type": "longcat_flash"}, None, "longcat_flash are refused: some of its experts do nothing"),
        ({"norm_topk_prob": "yes"}, None, "norm_topk_prob is 'yes', expected a value like False"),
        ({"num_experts_per_tok": [4, 2, 4]}, None, "num_experts_per_tok differs between layers"),
        ({"num_experts_per_tok": [4.0, 4]}, None, r"num_experts_per_tok is 4.0, expected a whole number"),
        ({"num_experts": None}, None, "num_experts or num_local_experts is missing"),
        ({"num_experts": 8}, None, r"has shape \[16, 64\], expected \[8, 64\]"),
        ({"num_experts_per_tok": 1}, None, "num_experts_per_tok is 1: each token runs one expert"),
        ({"num_experts_per_tok": 17}, None, "only 16 experts"),
        ({"num_hidden_layers": "3"}, None, "num_hidden_layers is '3'"),
        ({"hidden_size": 32}, None, r"expected \[16, 32\]"),
        (
            {"quantization_config": {"quant_method": "hqq"}},
            None,
            "quant_method 'hqq' is not supported; supported are auto-round, awq, ",
        ),
        ({"topk_method": "magic"}, None, "topk_method 'magic' is not known"),
        ({"scoring_func": "cosine"}, None, "scoring_func 'cosine' is not known"),
        ({}, drop("gate.weight"), "no router tensor"),
        ({}, drop("layers.1.mlp.experts.3.up_proj.weight"), "layers.1.mlp.experts.3.up_proj.weight is missing"),
        ({}, replace("experts.3.up_proj.weight", lambda t: t[:5]), r"has shape \[5, 64\], expected \[32, 64\]"),
        ({}, replace("experts.3.up_proj.weight", lambda t: t.to(torch.int8)), "is int8; known are"),
        ({}, lambda t: t | {"model.layers.0.mlp.experts.0.up_proj.bias": torch.zeros(32)}, "up_proj has a bias"),
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
        ({"n_group": 3}, "n_group 3, topk_group 2 do not fit 16"),
        ({"n_group": 8, "topk_group": 1}, "topk_group 1 leaves fewer than 4"),
        ({"n_group": 16, "topk_group": 8}, "n_group 16, topk_group 8 do not fit 16"),  # judged by its best two
        ({"n_group": 0}, "n_group 0, topk_group 2 do not fit 16"),
    ],
)
def test_refuses_groups_that_do_not_fit(config, message, tmp_path):
    tiny.make_checkpoint("deepseek_v3", tmp_path)
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
