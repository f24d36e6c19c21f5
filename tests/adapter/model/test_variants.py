"""The variants that `lexi-adapter bench` and `eval` compare, from config.json alone."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from corrections import compensate, describe, draw_tensors, write_corrections
from engine import allocate as allocate_from_weights
from hypothesis import given
from hypothesis import strategies as st
from tiny import FAMILIES, make_checkpoint
from transformers import CONFIG_MAPPING

import lexi_adapter
from lexi_adapter.allocation import ModelIdentity, read_allocation, to_document
from lexi_adapter.engines.workload import Workload, draw_prompts, parse_workload
from lexi_adapter.errors import AdapterError, AllocationError
from lexi_adapter.model import shapes, variants
from lexi_search.artifacts.serialisation import to_document as to_search_document

SHAPES = Path(lexi_adapter.__file__).parent.parent / "examples" / "benchmarks" / "configs"
# Experts, k and MoE layers as the model cards have them; what remains of experts, width and shared experts at one half.
PUBLIC = {
    "olmoe-1b-7b": (64, 8, 16, {"num_experts": 32}, {"intermediate_size": 512}),
    "qwen1.5-moe-a2.7b": (60, 4, 24, {"num_experts": 30}, {"moe_intermediate_size": 704}),
    "deepseek-v2-lite": (
        64,
        6,
        26,
        {"n_routed_experts": 32},
        {"moe_intermediate_size": 704, "n_shared_experts": 4},
    ),
    "deepseek-vl2-tiny": (
        64,
        6,
        11,
        {"n_routed_experts": 32},
        {"moe_intermediate_size": 448, "n_shared_experts": 4},
    ),
    "minicpm-moe-8x2b": (8, 2, 40, {"num_experts": 4}, {"intermediate_size": 2880}),
    "qwen3-30b-a3b": (128, 8, 48, {"num_experts": 64}, {"moe_intermediate_size": 384}),
    "mixtral-8x7b": (8, 2, 32, {"num_local_experts": 4}, {"intermediate_size": 7168}),
}


def read_shape(name):
    return json.loads((SHAPES / name / "config.json").read_text())


def make_model(layers, top_k):
    return ModelIdentity("olmoe", layers, 64, top_k, tuple(range(layers)), "layers.{}.gate", "k", "0" * 64)


def test_every_shape_is_known():
    assert {path.parent.name for path in SHAPES.glob("*/config.json")} == set(PUBLIC)


@pytest.mark.parametrize("name", sorted(shapes.FAMILIES.keys() & CONFIG_MAPPING.keys()))
def test_a_key_left_out_means_the_default_of_the_familys_class(name):
    """Or is named in the refusal: what `describe` reads of a config of one key less is what the class fills in."""
    config = CONFIG_MAPPING[name](num_experts_per_tok=2).to_dict()
    for key in config.keys() - {"model_type"}:
        left = {k: v for k, v in config.items() if k != key}
        try:
            found = shapes.describe(left)
        except AdapterError as error:
            assert key in str(error) or (key == shapes.RENAMED and "no num_experts" in str(error))
        else:
            assert found == shapes.describe(CONFIG_MAPPING[name].from_dict(left).to_dict()), key


@pytest.mark.parametrize("name", PUBLIC)
def test_shapes_and_what_pruning_leaves_of_them(name):
    config = read_shape(name)
    experts, top_k, layers, dropped, narrowed = PUBLIC[name]
    model = shapes.describe(config)
    assert (model.num_experts, model.top_k, len(model.moe_layers)) == (experts, top_k, layers)
    assert variants.drop_experts("a", "b", config, 0.5).overrides == dropped
    assert variants.narrow_experts("a", "b", config, 0.5).overrides == narrowed


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_describes_what_the_weights_do(family, tmp_path):
    folder = make_checkpoint(family, tmp_path / family)
    expected = asdict(allocate_from_weights(folder).model)
    assert asdict(shapes.describe_folder(str(folder), "auto")) == expected
    assert asdict(shapes.describe_folder(str(folder), "dummy")) == expected | {"router_sha256": "0" * 64}


@given(st.integers(1, 20), st.integers(1, 8), st.floats(0, 1), st.integers(0, 99))
def test_a_mixed_k_keeps_the_budget(layers, top_k, share, seed):
    model = make_model(layers, top_k)
    budget = layers + round(share * layers * (top_k - 1))
    drawn = variants.draw_top_k(model, budget, seed=seed)
    assert sum(drawn.values()) == budget and set(drawn.values()) <= set(range(1, top_k + 1))
    assert drawn == variants.draw_top_k(model, budget, seed=seed)
    assert read_allocation(to_document(variants.allocate(model, drawn))).top_k == drawn


def test_a_mixed_k_is_mixed():
    drawn = [variants.draw_top_k(make_model(16, 8), 64, seed=seed) for seed in range(20)]
    assert all(len(set(top_k.values())) >= 4 for top_k in drawn)
    assert len({tuple(top_k.values()) for top_k in drawn}) == 20


def test_a_budget_out_of_reach_is_refused():
    with pytest.raises(AdapterError, match="sums to 129"):
        variants.draw_top_k(make_model(16, 8), 129, seed=0)


def test_variants_have_one_name_each_and_the_base_comes_first():
    made = variants.make_variants(
        (folder := str(SHAPES / "qwen1.5-moe-a2.7b")),
        load_format="dummy",
        allocations={},
        shares=(0.75, 0.5, 0.25),
        dropped=(0.125, 0.25),
        narrowed=(0.5,),
        folders=("there",),
    )
    names = [variant.name for variant in made]
    assert names == [
        "base",
        *("mixed k, 75 %", "uniform k = 3, 75 %"),
        *("mixed k, 50 %", "uniform k = 2, 50 %"),
        "uniform k = 1, 25 %",
        *("inter-pruned 12.5 %", "inter-pruned 25 %", "intra-pruned 50 %"),
        "there",
    ]
    assert made[0] == variants.Variant("base", folder) and made[-1] == variants.Variant("there", "there")
    assert [variant.allocation.budget for variant in made[1:6]] == [72, 72, 48, 48, 24]


def test_a_uniform_k_stands_before_shares_and_is_one_that_the_model_has():
    folder = str(SHAPES / "mixtral-8x7b")
    made = variants.make_variants(folder, load_format="dummy", allocations={}, uniform=(2, 1), shares=(0.5,))
    assert [variant.name for variant in made] == ["base", "uniform k = 2", "uniform k = 1", "uniform k = 1, 50 %"]
    with pytest.raises(AdapterError, match="uniform k = 3 is not one of 1 to 2, the k of "):
        variants.make_variants(folder, load_format="dummy", allocations={}, uniform=(3,))


def test_a_uniform_k_that_no_layer_can_have_is_left_out():
    made = variants.make_variants(str(SHAPES / "mixtral-8x7b"), load_format="dummy", allocations={}, shares=(0.75, 0.5))
    assert [variant.name for variant in made] == ["base", "mixed k, 75 %", "uniform k = 1, 50 %"]


@given(st.floats(0, 0.85), st.sampled_from(sorted(PUBLIC)))
def test_narrowing_never_narrows_what_is_shared(share, name):
    config = read_shape(name)
    width = config.get("moe_intermediate_size", config["intermediate_size"])
    changed = config | variants.narrow_experts("a", "b", config, share).overrides
    found = changed.get("moe_intermediate_size", changed["intermediate_size"])
    assert found == round(width * (1 - share))
    if "n_shared_experts" in config:
        shared = config["n_shared_experts"] * width
        assert shared <= changed["n_shared_experts"] * found < shared + found


def test_too_few_experts_and_unknown_families_are_refused():
    with pytest.raises(AdapterError, match=r"leaves 6, fewer than k = 8"):
        variants.drop_experts("a", "b", read_shape("olmoe-1b-7b"), 0.9)
    with pytest.raises(AdapterError, match="'nonsense' is not one of olmoe"):
        shapes.describe({"model_type": "nonsense"})
    with pytest.raises(AdapterError, match="has no intermediate_size"):
        shapes.describe({"model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 1})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_hidden_layers": "8"}, "num_hidden_layers is '8', an integer of at least 1 expected"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None, an integer of at least 1 expected"),
        ({"num_experts": "32"}, "num_experts is '32', an integer of at least 1 expected"),
        ({"num_experts_per_tok": True}, "num_experts_per_tok is True, an integer of at least 1 expected"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size is 0, an integer of at least 1 expected"),
        ({"num_experts_per_tok": 61}, "num_experts_per_tok is 61, more than the 60 experts"),
        ({"mlp_only_layers": 3}, "mlp_only_layers is 3, a list of layers expected"),
        ({"mlp_only_layers": ["3"]}, r"mlp_only_layers is \['3'\], a list of layers expected"),
        ({"mlp_only_layers": list(range(24))}, "leaves no MoE layer"),
        ({"decoder_sparse_step": "1"}, "decoder_sparse_step is '1', an integer of at least 1 expected"),
        ({"first_k_dense_replace": [1]}, r"first_k_dense_replace is \[1\], an integer of at least 0 expected"),
        ({"moe_layer_freq": [0, 1]}, r"moe_layer_freq is \[0, 1\], an integer of at least 1 expected"),
        ({"model_type": ["qwen2_moe"]}, r"model_type \['qwen2_moe'\] is not one of"),
        ({"model_type": "deepseek_vl_v2", "language_config": 3}, "has no object language_config"),
    ],
)
def test_a_config_of_other_types_is_refused_in_one_line(change, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(read_shape("qwen1.5-moe-a2.7b") | change))
    which_layers = {"mlp_only_layers", "decoder_sparse_step", "first_k_dense_replace", "moe_layer_freq"} & change.keys()
    for what in ("shares",) if which_layers else ("shares", "dropped", "narrowed"):
        with pytest.raises(AdapterError, match=message):
            variants.make_variants(str(tmp_path), load_format="dummy", allocations={}, **{what: [0.5]})


def test_shared_experts_that_are_not_there_are_not_widened():
    config = read_shape("deepseek-v2-lite") | {"n_shared_experts": None}
    assert variants.narrow_experts("a", "b", config, 0.5).overrides == {"moe_intermediate_size": 704}
    with pytest.raises(AdapterError, match="n_shared_experts is '2', an integer of at least 0 expected"):
        variants.narrow_experts("a", "b", config | {"n_shared_experts": "2"}, 0.5)


def test_experts_are_not_narrowed_to_nothing():
    with pytest.raises(AdapterError, match="narrowing experts of width 1408 by 1 leaves nothing of them"):
        variants.narrow_experts("a", "b", read_shape("deepseek-v2-lite"), 0.9999)


def test_weights_tell_of_families_that_a_config_alone_does_not(tmp_path):
    folder = make_checkpoint("glm4_moe", tmp_path / "glm4_moe")
    expected = asdict(allocate_from_weights(folder).model)
    assert asdict(shapes.describe_folder(str(folder), "auto")) == expected
    assert asdict(shapes.describe_folder(str(folder), "dummy")) == expected | {"router_sha256": "0" * 64}
    made = variants.make_variants(str(folder), load_format="auto", allocations={}, shares=(0.5,))
    assert [variant.name for variant in made] == ["base", "mixed k, 50 %", "uniform k = 2, 50 %"]
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        AdapterError, match="name a folder with its weights, or, where there are such options, an --allocation"
    ):
        shapes.describe_folder(str(folder), "dummy")


def test_an_allocation_is_checked_against_the_weights_that_are_read(tmp_path):
    folder, other = (make_checkpoint("olmoe", tmp_path / str(seed), seed=seed) for seed in (0, 1))
    allocation = read_allocation(to_document(allocate_from_weights(other)))
    shapes.check_allocation(allocation, str(other), "auto")
    shapes.check_allocation(allocation, str(folder), "dummy")
    glm4 = make_checkpoint("glm4_moe", tmp_path / "glm4_moe")
    of_glm4 = read_allocation(to_document(allocate_from_weights(glm4)))
    shapes.check_allocation(of_glm4, str(glm4), "dummy")
    wide = replace(of_glm4, model=replace(of_glm4.model, num_experts=99))
    with pytest.raises(AllocationError, match="the number of experts is 16, the allocation was made for 99"):
        shapes.check_allocation(wide, str(glm4), "dummy")
    with pytest.raises(AllocationError, match="holds other router weights than the allocation was made for"):
        variants.make_variants(str(folder), load_format="auto", allocations={"a": allocation})


def test_pruning_reaches_a_language_model_inside_another():
    config = {"model_type": "deepseek_vl_v2", "language_config": read_shape("deepseek-vl2-tiny")}
    pruned = variants.drop_experts("a", "b", config, 0.25)
    assert pruned.overrides == {"language_config": {"n_routed_experts": 48}} and pruned.kept == {"experts": (48, 64)}
    assert shapes.describe(config).top_k_key == "language_config.num_experts_per_tok"


@given(st.integers(1, 300), st.integers(1, 99999), st.integers(1, 99999))
def test_workloads_read_what_they_print(batch, length, answer):
    workload = Workload(batch, length, answer)
    assert parse_workload(str(workload)) == workload
    assert workload.tokens == batch * length + batch * answer


@pytest.mark.parametrize("text", ["16x512", "0x1x1", "16x512x-1", "a", "16 x 512 x 1"])
def test_other_texts_are_no_workload(text):
    with pytest.raises(AdapterError, match="is not BATCHxINPUTxOUTPUT"):
        parse_workload(text)


def test_prompts_are_random_tokens_of_the_vocabulary():
    prompts = draw_prompts(Workload(3, 50, 1), vocab_size=7, seed=1)
    assert [len(prompt) for prompt in prompts] == [50] * 3
    assert {token for prompt in prompts for token in prompt} == set(range(7))
    assert prompts != draw_prompts(Workload(3, 50, 1), vocab_size=7, seed=2)


def test_real_weights_are_not_pruned_by_a_config():
    with pytest.raises(AdapterError, match="add --load-format dummy"):
        variants.make_variants(str(SHAPES / "mixtral-8x7b"), load_format="auto", allocations={}, dropped=(0.5,))


def test_pruned_models_at_each_k_are_the_pruned_ones_with_a_k_of_their_own():
    folder = str(SHAPES / "olmoe-1b-7b")
    common = {"load_format": "dummy", "allocations": {}, "uniform": [2, 4, 8], "dropped": [0.25], "narrowed": [0.5]}
    plain = variants.make_variants(folder, **common)
    crossed = variants.make_variants(folder, **common, each_k=True)
    assert crossed[: len(plain)] == plain
    names = [f"{kind} %, k = {k}" for kind in ("inter-pruned 25", "intra-pruned 50") for k in (2, 4)]  # 8 is its own k
    assert [variant.name for variant in crossed[len(plain) :]] == names
    by_name = {variant.name: variant for variant in crossed}
    for name in names:
        pruned, variant = by_name[name.partition(", k")[0]], by_name[name]
        assert replace(variant, name=pruned.name, allocation=None) == pruned
        assert set(variant.allocation.top_k.values()) == {int(name[-1])}
        assert variant.allocation.model.num_experts == (48 if name.startswith("inter") else 64)


def test_variants_are_known_by_their_names():
    folder = str(SHAPES / "olmoe-1b-7b")
    chosen = {"uniform": [2], "shares": [0.5], "dropped": [0.25], "narrowed": [0.5], "folders": ["other"]}
    made = variants.make_variants(folder, load_format="dummy", allocations={}, each_k=True, **chosen)
    for variant in made:
        assert variants.is_one_of(variant.name, **chosen) == (variant.name != "base"), variant.name
        owners = [key for key, value in chosen.items() if variants.is_one_of(variant.name, **{key: value})]
        assert len(owners) == (variant.name != "base"), (variant.name, owners)
    assert variants.is_one_of("a.json", allocations=["a.json"]) and not variants.is_one_of("b, 50 %", shares=[0.5])


def name_variants(folder, allocations, **options):
    made = variants.make_variants(str(folder), load_format="auto", allocations=allocations, **options)
    return {variant.name: variant.allocation for variant in made}


def test_made_up_variants_share_the_compensation_whose_maps_they_find_and_say_so(tmp_path):
    folder = make_checkpoint("olmoe", tmp_path / "olmoe")
    document = to_search_document(allocate_from_weights(folder, (1, 3, 2)))
    plain = read_allocation(document)
    pairs = [(0, 1), (1, 3), *((layer, 2) for layer in range(3))]
    tensors = draw_tensors(plain.model, pairs, hidden=64)
    named = write_corrections(tmp_path / "a.safetensors", tensors, describe(plain.model, 4))
    one = read_allocation(document | {"gate_exponent": 0.5, "compensation": named}, folder=tmp_path)
    found = name_variants(folder, {"a.json": one}, uniform=(2, 3, 4), uncompensated=True)
    assert list(found) == [
        *("base", "a.json", "a.json, no compensation", "uniform k = 2, compensated", "uniform k = 2, no compensation"),
        *("uniform k = 3, no compensation", "uniform k = 4, compensated", "uniform k = 4, no compensation"),
    ]
    how = {
        name: allocation and (allocation.gate_exponent, allocation.compensation) for name, allocation in found.items()
    }
    assert all(value == (None if name == "base" else (None, None) if "no comp" in name else (0.5, one.compensation))
               for name, value in how.items())  # fmt: skip
    assert (
        found["a.json, no compensation"].top_k == one.top_k and found["uniform k = 2, compensated"].folder == one.folder
    )
    other = read_allocation(document | {"gate_exponent": 1.0, "compensation": named}, folder=tmp_path)
    two = name_variants(folder, {"a.json": one, "b.json": other}, uniform=(2,), shares=(0.5,))
    assert [name for name in two if "k" in name] == [
        f"{name}, no compensation" for name in ("uniform k = 2", "mixed k, 50 %", "uniform k = 2, 50 %")
    ]
    assert list(name_variants(folder, {"a.json": plain}, uniform=(2,))) == ["base", "a.json", "uniform k = 2"]
    for name in two:
        chosen = {"allocations": ["a.json", "b.json"], "uniform": [2], "shares": [0.5]}
        assert variants.is_one_of(name, **chosen) is (name != "base")
    assert variants.is_one_of("a.json, no compensation", allocations=["a.json"])
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(AllocationError, match="a.safetensors: not the file that the allocation names"):
        name_variants(folder, {"a.json": one})
    with pytest.raises(AllocationError, match="a.safetensors: not the file that the allocation names"):
        variants.make_variants(str(folder), load_format="dummy", allocations={"a.json": one})


def test_an_exported_folder_has_the_file_that_its_config_names(tmp_path):
    folder = make_checkpoint("olmoe", tmp_path / "olmoe")
    document = to_search_document(allocate_from_weights(folder, (1, 3, 2)))
    document = compensate(document, read_allocation(document).model, folder, hidden=64)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"lexi_allocation": document}))
    exported = variants.Variant("exported", str(folder))
    assert variants.find_allocation(exported).folder == str(folder)
    variants.check_comparable([exported])
    (folder / "corrections.safetensors").unlink()
    with pytest.raises(AllocationError, match="corrections.safetensors: cannot be read"):
        variants.check_comparable([exported])
