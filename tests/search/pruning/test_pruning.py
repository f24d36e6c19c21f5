"""Pruned checkpoints: the values left are the old ones, and compute what the whole model does without the rest."""

import contextlib
import json
import re
from fractions import Fraction

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional
import transformers
from command_line import refuse, succeed
from command_line import run as run_command
from engine import PROMPTS, make_job, make_servable, run_engines
from hypothesis import given
from hypothesis import strategies as st
from quantised import CASES, gpt_oss
from safetensors.torch import load_file, save_file

from lexi_search.checkpoint.reader import INDEX, open_checkpoint
from lexi_search.errors import InputError
from lexi_search.models.decoder_stack import describe_decoder
from lexi_search.models.loading.streaming import stream_layers
from lexi_search.models.model import describe
from lexi_search.profiling.forward.sampling import draw_tokens
from lexi_search.profiling.forward.variants import Run
from lexi_search.pruning import prune as pruning

QUARTER = Fraction(1, 4)
BOUND = {"jamba", "hunyuan_v1_moe", "llama4", "llama4_text"}  # dense layers or shared experts have the width by one key
MAX_K = {"llama4": 2, "llama4_text": 2}  # where the model's own k is 1
HASHED = {"deepseek_v4"}  # refused: a table names the experts of every token
PRUNED = [name for name in tiny.ALL_FAMILIES if name not in HASHED]
SAMPLES = 256
WIDTHS = {32, 96}  # of the tiny models' experts


def prune(folder, target, **shares):
    return pruning.prune(str(folder), str(target), samples=SAMPLES, **shares)


def read_tensors(folder):
    """Stored name -> (type, shape, bytes)."""
    checkpoint = open_checkpoint(folder)
    return {name: (entry.dtype, entry.shape, checkpoint[name].tobytes()) for name, entry in checkpoint.entries.items()}


def read_layers(folder, max_k=None):
    """Layer -> router and, as NumPy arrays, each expert's fields, without those that are None."""
    checkpoint = open_checkpoint(folder)
    model = describe(checkpoint, max_k=max_k)
    return {
        layer: (
            np.asarray(weights.router),
            None if weights.bias is None else np.asarray(weights.bias),
            [{k: np.asarray(v) for k, v in expert._asdict().items() if v is not None} for expert in weights.experts],
        )
        for layer, weights in stream_layers(checkpoint, model, model.layers)
    }


def find_rows(part, whole):
    """The places of the rows of `part` in `whole`, whose rows all differ."""
    return [next(place for place, other in enumerate(whole) if np.array_equal(row, other)) for row in part]


def number_layers(kept):
    return {int(re.search(r"layers\.(\d+)\.", name)[1]): experts for name, experts in kept.items()}


def check_remains(before, after, kept):
    """(Layer, expert) -> kept channels; the values left of every expert must be the old ones, in the old order."""
    channels = {}
    for layer, (router, bias, experts) in after.items():
        old_router, old_bias, old_experts = before[layer]
        assert list(kept[layer]) == sorted(set(kept[layer])) and len(kept[layer]) == len(experts)
        np.testing.assert_array_equal(router, old_router[list(kept[layer])])
        if bias is not None:
            np.testing.assert_array_equal(bias, old_bias[list(kept[layer])])
        for number, expert in zip(kept[layer], experts, strict=True):
            old = old_experts[number]
            rows = find_rows(expert["up"], old["up"])
            assert rows == sorted(set(rows)) and set(expert) == set(old)
            for field, values in expert.items():
                left = old[field]
                if field not in ("down_bias", "limit"):
                    left = left[:, rows] if field == "down" else left[rows]
                np.testing.assert_array_equal(values, left)
            channels[layer, number] = rows
    return channels


@pytest.fixture(scope="module", params=PRUNED)
def family(request, tmp_path_factory):
    """A family's name, its checkpoint, and the record of its pruning."""
    folder = tiny.make_checkpoint(request.param, tmp_path_factory.mktemp(request.param) / "whole")
    shares = {"experts": QUARTER} | ({} if request.param in BOUND else {"width": QUARTER})
    pruned = prune(folder, folder.with_name("pruned"), **shares)
    return request.param, folder, pruned


ROUTERS = (
    "gate.weight",
    "gate.wg.weight",
    "router.weight",
    "router.layer.weight",
    "router.gate.weight",
    "router.proj.weight",
)
BIASES = ("e_score_correction_bias", "expert_bias")


@contextlib.contextmanager
def masked(block, kept, channels):
    """The whole block with the removed parts masked: experts by their logits, channels by zeros in their columns."""
    parameters = dict(block.named_parameters()) | dict(block.named_buffers())
    [router] = [value for name, value in parameters.items() if name in ROUTERS]
    gone, linear = [expert for expert in range(len(router)) if expert not in kept], torch.nn.functional.linear
    with torch.no_grad():
        for name, value in parameters.items():
            if name.endswith(BIASES):
                value[..., gone] = -1e4
            if name == "experts.down_proj":
                for expert, rows in channels.items():
                    left = torch.zeros(*WIDTHS & set(value.shape[1:]))
                    left[rows] = 1
                    value[expert] *= left if len(left) == value.shape[2] else left[:, None]

    def lose(x, weight, bias=None):
        out = linear(x, weight, bias)
        if weight.data_ptr() == router.data_ptr():
            out[..., gone] = -1e9
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", lose)
        yield


def run(block, x):
    with torch.no_grad():
        output = block(x[None])
    return output[0] if isinstance(output, tuple) else output


def test_the_values_left_are_the_old_ones_and_compute_the_same(family):
    name, folder, pruned = family
    kept, target = number_layers(pruned.kept_experts), folder.with_name("pruned")
    before, after = read_layers(folder, MAX_K.get(name)), read_layers(target, MAX_K.get(name))
    channels = check_remains(before, after, kept)
    assert {len(experts) for experts in kept.values()} == {pruned.num_experts[1]} == {pruned.num_experts[0] * 3 // 4}
    assert {len(rows) for rows in channels.values()} == {pruned.width[1]}
    assert pruned.width[1] == pruned.width[0] * (4 if name in BOUND else 3) // 4
    if name in tiny.REWRITES and name not in ("kimi_k25", "gemma4"):
        return  # transformers has no class that loads it
    reference = tiny.build_reference(name)
    loaded, info = type(reference).from_pretrained(target, attn_implementation="eager", output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "mismatched_keys", "error_msgs"))
    blocks, x = tiny.find_moe_blocks(loaded.eval()), torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    for layer, block in tiny.find_moe_blocks(reference).items():
        whole, ours = run(block, x), run(blocks[layer], x)
        with masked(block, kept[layer], {expert: channels[layer, expert] for expert in kept[layer]}):
            torch.testing.assert_close(ours, run(block, x), rtol=0, atol=2e-5)
        assert (ours - whole).abs().max() > 1e-3


@pytest.mark.parametrize("name", sorted(HASHED))
def test_a_model_that_looks_experts_up_by_token_is_refused(name, tmp_path):
    folder = tiny.make_checkpoint(name, tmp_path / "whole")
    for shares in ({"experts": QUARTER}, {"width": QUARTER}):
        with pytest.raises(InputError, match="layers.0.ffn.gate.tid2eid names the experts of every token"):
            prune(folder, tmp_path / "pruned", **shares)
        assert not (tmp_path / "pruned").exists()


@pytest.mark.parametrize("name", PRUNED)
def test_nothing_pruned_is_every_byte(name, tmp_path):
    """Also in several shards."""
    folder = tiny.make_checkpoint(name, tmp_path / "whole", shard_size="300KB" if name not in tiny.REWRITES else "5GB")
    pruned = prune(folder, tmp_path / "same")
    before, after = (open_checkpoint(place) for place in (folder, tmp_path / "same"))
    assert read_tensors(folder) == read_tensors(tmp_path / "same")
    assert {n: e.file.name for n, e in before.entries.items()} == {n: e.file.name for n, e in after.entries.items()}
    assert (folder / INDEX).exists() == (tmp_path / "same" / INDEX).exists()
    assert before.config == after.config and pruned.size[0] == pruned.size[1]


def test_untouched_tensors_and_other_files_stay(tmp_path):
    folder = tiny.make_checkpoint("qwen2_moe", tmp_path / "whole", shard_size="400KB")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "consolidated.safetensors").write_bytes(
        b""
    )  # weights in another layout would be those of the whole model
    (folder / "pytorch_model.bin").write_bytes(b"old")
    prune(folder, tmp_path / "pruned", experts=QUARTER, width=QUARTER)
    before, after = read_tensors(folder), read_tensors(tmp_path / "pruned")
    assert {n: t for n, t in before.items() if ".mlp." not in n or ".shared_" in n}.items() <= after.items()
    names = {path.name for path in (tmp_path / "pruned").iterdir()}
    assert {"tokenizer.json", "generation_config.json", INDEX, "lexi-pruning.json"} < names
    assert not names & {"consolidated.safetensors", "pytorch_model.bin"}
    index = json.loads((tmp_path / "pruned" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in after.values())


@given(st.data())
def test_selection(data):
    groups, size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 12))
    scores = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=groups * size, max_size=groups * size))
    count = groups * data.draw(st.integers(1, size))
    chosen = pruning.select(np.array(scores), count, num_groups=groups)
    assert list(chosen) == sorted(set(chosen)) and len(chosen) == count
    for group in range(groups):
        places = range(group * size, (group + 1) * size)
        kept = [place for place in places if place in chosen]
        assert kept == sorted(sorted(places, key=lambda place: -scores[place])[: count // groups])  # a stable sort


@given(st.integers(1, 4096), st.fractions(0, 1))
def test_count_is_the_nearest(total, share):
    left = pruning.count_left(total, share)
    assert abs(left - total * (1 - share)) <= Fraction(1, 2)
    assert pruning.count_left(total, Fraction(0)) == total


# The channels that stay or go together where experts are 96 wide and the model 64; None: they cannot be told apart.
UNITS = {
    "fp8 blocks": None,  # of 40 inputs of down: the last one hangs over
    "fp8 tensor": 1,
    "fbgemm fp8": 1,
    "fbgemm fp8 columns": 1,
    "modelopt fp8": 1,
    "compressed fp8 rows": 1,
    "compressed fp8 blocks": 48,
    "compressed int8 rows": 1,
    "compressed int8 groups, zeros": 16,
    "compressed int4": 32,
    "compressed int4, zeros": 16,
    "compressed int4, ordered": None,
    "compressed int8 packed rows": 4,
    "compressed mxfp4": 32,
    "compressed nvfp4": 16,
    "modelopt nvfp4": 16,
    "gptq": 16,
    "gptq desc_act": None,
    "gptq v2": 16,
    "gptq int8 rows": 4,
    "awq": 16,
}
SMALL = dict(num_hidden_layers=1, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=96)


def quantise(folder, target, make, config):
    """The checkpoint with experts of this format, and config.json in agreement."""
    stored, rng, tensors = load_file(folder / "model.safetensors"), np.random.default_rng(4), {}
    for name, tensor in stored.items():
        tensors |= make(rng, name, *tensor.shape).tensors if ".experts." in name else {name: tensor.bfloat16()}
    target.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors")
    whole = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16", "quantization_config": config}
    (target / "config.json").write_text(json.dumps(whole))
    return target


@pytest.mark.parametrize("case", UNITS)
def test_quantised_experts_are_cut_as_they_are_stored(case, tmp_path):
    """Judged by their dequantised values: those left equal the old ones to the bit."""
    folder = tiny.make_checkpoint("qwen3_moe", tmp_path / "plain", **SMALL)
    folder = quantise(folder, tmp_path / "whole", CASES[case], CASES[case].config)
    unit, target = UNITS[case], tmp_path / "pruned"
    if unit is None:
        with pytest.raises(InputError, match="experts.0.down_proj.*; prune experts, not width"):
            prune(folder, target, width=Fraction(1, 3))
    pruned = prune(folder, target, experts=QUARTER, width=Fraction(1, 2 if unit == 48 else 3) if unit else Fraction(0))
    channels = check_remains(read_layers(folder), read_layers(target), number_layers(pruned.kept_experts))
    assert pruned.num_experts == (4, 3) and pruned.width == (96, {None: 96, 48: 48}.get(unit, 64))
    for rows in channels.values():
        runs = np.reshape(rows, (-1, unit or 1))
        assert (runs == runs[:, :1] + np.arange(unit or 1)).all() and not (runs[:, 0] % (unit or 1)).any()


def test_quantised_experts_in_two_tensors(tmp_path):
    """gpt-oss: rows of gate and up in turn, channels of down in groups of 32, biases as they are."""
    tiny.make_checkpoint("gpt_oss", tmp_path / "plain", num_hidden_layers=1, intermediate_size=96)
    stored, rng = load_file(tmp_path / "plain/model.safetensors"), np.random.default_rng(5)
    tensors = {n: t for n, t in stored.items() if ".experts." not in n or n.endswith("_bias")}
    for name, out, into in (("gate_up_proj", 192, 64), ("down_proj", 64, 96)):
        made = [gpt_oss(rng, "model.layers.0.mlp.experts." + name, out, into).tensors for _ in range(16)]
        tensors |= {part: torch.stack([one[part] for one in made]) for part in made[0]}
    (tmp_path / "whole").mkdir()
    save_file(tensors, tmp_path / "whole/model.safetensors")
    config = json.loads((tmp_path / "plain/config.json").read_text()) | {
        "quantization_config": {"quant_method": "mxfp4"}
    }
    (tmp_path / "whole/config.json").write_text(json.dumps(config))
    pruned = prune(tmp_path / "whole", tmp_path / "pruned", experts=QUARTER, width=Fraction(1, 3))
    assert (pruned.num_experts, pruned.width) == ((16, 12), (96, 64))
    layers = read_layers(tmp_path / "whole"), read_layers(tmp_path / "pruned")
    check_remains(*layers, number_layers(pruned.kept_experts))


def test_layers_that_predict_are_pruned_too(tmp_path):
    """Past num_hidden_layers, or in a part of their own; a talker has a config of its own and stays."""
    folder = tiny.make_checkpoint("qwen3_next", tmp_path / "whole", num_hidden_layers=3)
    tensors = load_file(folder / "model.safetensors")
    last = {name: tensor for name, tensor in tensors.items() if "layers.2.mlp." in name}
    tensors |= {name.replace("model.layers.2", "mtp.layers.0"): tensor.clone() for name, tensor in last.items()}
    tensors |= {name.replace("model.layers.2", "talker.layers.0"): tensor.clone() for name, tensor in last.items()}
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    pruned = prune(folder, tmp_path / "pruned", experts=QUARTER, width=QUARTER)
    layers = {f"model.layers.{layer}.mlp" for layer in range(3)}
    assert set(pruned.kept_experts) == layers | {"mtp.layers.0.mlp"}
    after = load_file(tmp_path / "pruned/model.safetensors")
    assert after["mtp.layers.0.mlp.gate.weight"].shape == (12, 64)
    assert after["mtp.layers.0.mlp.experts.11.down_proj.weight"].shape == (64, 24)
    assert "mtp.layers.0.mlp.experts.12.down_proj.weight" not in after
    assert all(torch.equal(after[name], tensor) for name, tensor in tensors.items() if name.startswith("talker."))


def test_the_important_stay(tmp_path):
    """Experts whose output is nothing go first, as do channels that lead nowhere, wherever they are."""
    folder = tiny.make_checkpoint("olmoe", tmp_path / "whole")
    tensors = load_file(folder / "model.safetensors")
    for layer, expert in ((0, 3), (1, 0), (2, 15)):
        tensors[f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"].zero_()
    tensors["model.layers.1.mlp.experts.7.down_proj.weight"][:, [2, 30]] = 0
    save_file(tensors, folder / "model.safetensors")
    pruned = prune(folder, tmp_path / "pruned", experts=Fraction(1, 16), width=Fraction(1, 16))
    kept = number_layers(pruned.kept_experts)
    assert {layer: set(range(16)) - set(experts) for layer, experts in kept.items()} == {0: {3}, 1: {0}, 2: {15}}
    up = [
        tensors["model.layers.1.mlp.experts.7.up_proj.weight"],
        load_file(tmp_path / "pruned/model.safetensors")[
            f"model.layers.1.mlp.experts.{kept[1].index(7)}.up_proj.weight"
        ],
    ]
    assert set(range(32)) - set(find_rows(up[1].numpy(), up[0].numpy())) == {2, 30}


def test_groups_keep_as_many_experts_each(tmp_path):
    folder = tiny.make_checkpoint("deepseek_v3", tmp_path / "whole")
    pruned = prune(folder, tmp_path / "pruned", experts=Fraction(1, 2))
    for experts in pruned.kept_experts.values():
        assert [sum(expert // 4 == group for expert in experts) for group in range(4)] == [2] * 4
    with pytest.raises(InputError, match="4 of 16 experts would be left; k = 4 needs 8, 2 in each of 4 groups"):
        prune(folder, tmp_path / "more", experts=Fraction(3, 4))


def test_shared_experts_are_padded(tmp_path):
    """Two of width 32 are three of width 24 with zeros behind, or four of width 16 as they are."""
    folder = tiny.make_checkpoint("deepseek_v2", tmp_path / "whole")
    before = load_file(folder / "model.safetensors")
    for share, count, extent in ((QUARTER, 3, 72), (Fraction(1, 2), 4, 64)):
        pruned = prune(folder, tmp_path / str(count), width=share)
        after = load_file(tmp_path / f"{count}/model.safetensors")
        assert pruned.shared_experts == (2, count)
        assert json.loads((tmp_path / f"{count}/config.json").read_text())["n_shared_experts"] == count
        for name in (name for name in before if ".shared_experts." in name):
            axis = int("down_proj" in name)
            assert after[name].shape[axis] == extent
            assert torch.equal(after[name].narrow(axis, 0, 64), before[name])
            assert not after[name].narrow(axis, 64, extent - 64).any()


def test_shared_experts_that_the_config_does_not_count_are_padded(tmp_path):
    """DeepSeek-V2's class says that there are two, where the config says nothing."""
    folder = tiny.make_checkpoint("deepseek_v2", tmp_path / "whole")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "n_shared_experts"}))
    assert prune(folder, tmp_path / "pruned", width=QUARTER).shared_experts == (2, 3)
    assert json.loads((tmp_path / "pruned/config.json").read_text())["n_shared_experts"] == 3


def test_importance_can_be_measured_on_text_that_the_model_generates(folder):
    reference = tiny.build_reference("olmoe")
    checkpoint = open_checkpoint(tiny.save_checkpoint("olmoe", reference, folder / "whole"))
    succeed("prune", "whole", "--experts", "25%", "--input", "weights", "--samples", "64", "-o", "pruned")
    model = describe(checkpoint)
    run = Run(checkpoint, model, describe_decoder(checkpoint, model), "float32")
    tokens = torch.tensor(draw_tokens(run, sequences=1, length=64, seed=0)).long()
    seen, blocks = {}, tiny.find_moe_blocks(reference)
    for layer, block in blocks.items():
        block.register_forward_hook(lambda _, inputs, __, layer=layer: seen.update({layer: inputs[0][0]}))
    with torch.no_grad():
        reference(tokens, use_cache=False)
    kept = json.loads((folder / "pruned/lexi-pruning.json").read_text())["kept_experts"]
    for layer, weights in stream_layers(checkpoint, model, model.layers):
        x = seen[layer].double().numpy()
        scores = torch.tensor(x @ np.asarray(weights.router, np.float64).T).softmax(-1).numpy()
        importance = np.zeros(len(weights.experts))
        for token, score in zip(x, scores, strict=True):
            for number in np.argsort(-score)[: model.top_k].tolist():
                gate, up, down = (np.asarray(part, np.float64) for part in weights.experts[number][:3])
                silu = gate @ token / (1 + np.exp(-gate @ token))
                importance[number] += (score[number] * np.linalg.norm(down @ (silu * (up @ token)))) ** 2
        assert kept[f"model.layers.{layer}.mlp"] == sorted(np.argsort(-importance)[:12].tolist())


def test_profile_search_and_export_of_a_pruned_checkpoint(folder):
    tiny.make_checkpoint("olmoe", folder / "whole")
    printed = succeed("prune", "whole", "--experts", "20%", "--width", "25%", "-o", "pruned", "--samples", "256")
    assert printed.splitlines()[:2] == ["experts a layer: 16 -> 13 (-18.8 %)", "channels an expert: 32 -> 24 (-25 %)"]
    assert printed.splitlines()[-1] == "pruned"
    note = json.loads((folder / "pruned/lexi-pruning.json").read_text())
    assert (note["format"], note["version"], note["num_experts"], note["width"]) == (
        "lexi-pruning",
        1,
        [16, 13],
        [32, 24],
    )
    assert {len(experts) for experts in note["kept_experts"].values()} == {13}
    for arguments in (
        ("profile", "pruned", "--batch", "1", "--length", "32", "--samples", "64"),
        ("search", "profile.json", "--budget", "6", "-o", "allocation.json"),
    ):
        assert run_command(*arguments).exit_code == 0  # so small a sample is told to be noisy
    succeed("export", "allocation.json", "--to", "transformers", "--model", "pruned", "-o", "exported")
    assert json.loads((folder / "exported/config.json").read_text())["num_experts"] == 13
    assert len(open_checkpoint(folder / "exported")) == len(open_checkpoint(folder / "pruned"))
    assert "already pruned, says lexi-pruning.json there" in refuse("prune", "pruned", "--width", "5%", "-o", "again")
    again = refuse("prune", "whole", "--experts", "25%", "-o", "pruned")
    assert (
        again == f"cannot write {folder / 'pruned'}: not empty and no earlier export; choose another name or remove it"
    )


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        ("olmoe", [], "nothing to prune; give --experts or --width"),
        ("olmoe", ["--experts", "100%"], "--experts 100% leaves nothing; write a share below 100%, such as 25%"),
        ("olmoe", ["--experts", "-1%"], "is not understood"),
        ("olmoe", ["--width", "0.25"], "--width '0.25' is not understood"),
        ("olmoe", ["--experts", "80%"], "3 of 16 experts would be left; k = 4 needs 4"),
        ("olmoe", ["--width", "99%"], "no channel is left of 32, which come 1 at a time; prune less"),
        ("jamba", ["--width", "25%"], "feed_forward.*is as wide as the experts, by one key .intermediate_size.; prune"),
        ("llama4", ["--width", "25%"], "shared_expert.*is as wide as the experts, by one key"),
        ("absent", ["--width", "25%"], "absent: no such folder"),
    ],
)
def test_refusals(family, arguments, message, folder):
    if family != "absent":
        tiny.make_checkpoint(family, folder / family)
    assert re.search(message, refuse("prune", family, "-o", "out", *arguments))


def change_config(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


def add_tensor(name):
    def change(folder):
        tensors = load_file(folder / "model.safetensors")
        save_file(tensors | {name: torch.ones(16, 2)}, folder / "model.safetensors")

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_config(lexi_allocation={}), "the config has values per layer; prune the model's original folder"),
        (change_config(intermediate_size=31), "intermediate_size is 31, but the experts are 32 wide"),
        (add_tensor("model.layers.0.mlp.experts.scale"), "how to prune tensor model.layers.0.mlp.experts.scale is not"),
        (add_tensor("mtp_block.0.mlp.experts.0.w1.weight"), "how to prune tensor mtp_block.0.mlp.experts.0.w1.weight"),
        (
            add_tensor("model.layers.0.mlp.experts.0.up_proj.x"),
            "how to narrow tensor model.layers.0.mlp.experts.0.up_pro",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "no safetensors shards"),
        (lambda folder: (folder / INDEX).write_text('{"weight_map": {"x": "other.safetensors"}}'), "no such shard"),
    ],
)
def test_refusals_of_checkpoints(change, message, folder):
    tiny.make_checkpoint("olmoe", folder / "model")
    change(folder / "model")
    assert message in refuse("prune", "model", "--experts", "25%", "--width", "25%", "--samples", "64", "-o", "out")


def test_a_failure_midway_leaves_nothing(folder, monkeypatch):
    tiny.make_checkpoint("olmoe", folder / "model")

    def fill_the_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pruning, "write_shards", fill_the_disk)
    assert "cannot write out: No space left on device" in refuse("prune", "model", "--experts", "25%", "-o", "out")


def test_engine_runs_what_transformers_runs(tmp_path):
    """Groups, removed experts and channels, and padded shared experts in one model."""
    folder = make_servable("deepseek_v2", tmp_path / "whole")
    pruned = prune(folder, tmp_path / "pruned", experts=QUARTER, width=QUARTER)
    assert (pruned.num_experts, pruned.width, pruned.shared_experts) == ((16, 12), (32, 24), (2, 3))
    [result] = run_engines(make_job(tmp_path / "pruned", "deepseek_v2", max_tokens=1)).results
    assert "logprobs" in result, result
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    for prompt, logprobs in zip(map(torch.tensor, PROMPTS), result["logprobs"], strict=True):
        with torch.no_grad():
            scores = model(prompt[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        expected = scores.gather(1, prompt[1:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=0, atol=1e-3)
