"""Checkpoints as people have them: each read like its intact twin by both packages, or refused with the real cause."""

import json
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import make_checkpoint

from lexi_adapter.errors import AdapterError
from lexi_adapter.model.folder import INDEX
from lexi_adapter.model.identity import describe_checkpoint
from lexi_search.checkpoint.reader import open_checkpoint
from lexi_search.errors import InputError
from lexi_search.models.decoder_stack import describe_decoder
from lexi_search.models.model import describe

EXPERTS = "model.layers.{}.mlp.experts."
CACHES = (
    *("kv_scale", "k_scale", "q_scale", "v_zero_point", "k_proj.k_scale", "k_proj.output_scale", "v_proj.output_scale"),
    *("q_proj.output_scale", "prob_output_scale", "q.scale", "k_cache.scale", "v_cache.scale"),
)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("original"))
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def write(folder, config, tensors, *, shards=1, index=True):
    """The model in a folder: its layers' tensors spread over `shards` files in order."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    parts = np.array_split(sorted(tensors), shards)
    files = {f"model-{i:05}-of-{shards:05}.safetensors": part.tolist() for i, part in enumerate(parts, 1)}
    for file, names in files.items():
        save_file({name: tensors[name] for name in names}, folder / file)
    if index:
        weight_map = {name: file for file, names in files.items() for name in names}
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def edit_index(folder, edit):
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    (folder / INDEX).write_text(json.dumps({"weight_map": edit(weight_map)}))


def understand(folder):
    """What both packages make of a folder, and the bytes of every tensor that the decoder uses."""
    checkpoint = open_checkpoint(folder)
    model = describe(checkpoint)
    ours, theirs = model.identity, describe_checkpoint(folder)
    assert (ours.router_sha256, ours.moe_layers, ours.top_k) == (theirs.router_sha256, theirs.moe_layers, theirs.top_k)
    decoder = describe_decoder(checkpoint, model)
    return model, decoder, {name: checkpoint[name].tobytes() for name in checkpoint if ".layers." in name}


def refuse(folder, *reasons):
    with pytest.raises(InputError) as ours:
        describe(open_checkpoint(folder))
    with pytest.raises(AdapterError) as theirs:
        describe_checkpoint(folder)
    lines = [str(ours.value), str(theirs.value)]
    for line in lines:
        assert "\n" not in line and str(folder) in line
        assert all(reason in line for reason in reasons), line


def leave_routers_out(weight_map):
    return {n: f for n, f in weight_map.items() if not n.endswith("mlp.gate.weight") or ".0." in n}


def move_by_one(weight_map):
    files = sorted(set(weight_map.values()))
    return {n: files[(files.index(f) + 1) % len(files)] for n, f in weight_map.items()}


def name_what_is_nowhere(weight_map):
    return weight_map | {EXPERTS.format(0) + "gate_up_proj": next(iter(weight_map.values()))}


@pytest.mark.parametrize("edit", [leave_routers_out, move_by_one, name_what_is_nowhere])
def test_an_index_that_is_wrong_about_tensors(original, edit, tmp_path):
    whole, wrong = (write(tmp_path / name, *original, shards=3) for name in ("whole", "wrong"))
    edit_index(wrong, edit)
    assert understand(wrong) == understand(whole)


def test_an_index_of_a_tied_model_that_names_an_lm_head(original, tmp_path):
    config, tensors = original[0] | {"tie_word_embeddings": True}, dict(original[1])
    del tensors["lm_head.weight"]
    whole, wrong = (write(tmp_path / name, config, tensors, shards=2) for name in ("whole", "wrong"))
    edit_index(wrong, lambda weight_map: weight_map | {"lm_head.weight": max(weight_map.values())})
    assert understand(wrong) == understand(whole)
    assert understand(whole)[1].ends.head.weight.name == "model.embed_tokens.weight"


def test_an_index_that_names_experts_one_by_one_where_the_shards_hold_them_together(original, tmp_path):
    config, separate = original
    tensors = {name: tensor for name, tensor in separate.items() if ".experts." not in name}
    for stem in map(EXPERTS.format, range(3)):
        gate, up, down = (
            np.stack([separate[f"{stem}{e}.{part}_proj.weight"] for e in range(16)]) for part in ("gate", "up", "down")
        )
        tensors |= {stem + "gate_up_proj": np.concatenate([gate, up], 1), stem + "down_proj": down}
    whole, wrong = (write(tmp_path / name, config, tensors, shards=2) for name in ("whole", "wrong"))
    edit_index(
        wrong, lambda weight_map: dict.fromkeys(separate, min(weight_map.values())) | {"x": max(weight_map.values())}
    )
    assert understand(wrong) == understand(whole)


def test_shards_whose_names_count_too_many(original, tmp_path):
    whole, wrong = (write(tmp_path / name, *original, shards=2, index=name == "whole") for name in ("whole", "wrong"))
    for shard in list(wrong.glob("*.safetensors")):
        shard.rename(shard.with_name(shard.name.replace("of-00002", "of-00004")))
    assert understand(wrong) == understand(whole)


def test_an_lm_head_of_its_own_counts_where_the_config_says_tied(original, tmp_path):
    config, tensors = original
    whole = write(tmp_path / "whole", config | {"tie_word_embeddings": False}, tensors)
    tied = write(tmp_path / "tied", config | {"tie_word_embeddings": True}, tensors)
    assert understand(tied) == understand(whole)
    assert understand(whole)[1].ends.head.weight.name == "lm_head.weight"


@pytest.mark.parametrize("name", CACHES)
def test_scales_of_caches_change_nothing(original, name, tmp_path):
    config, tensors = original
    scales = {f"model.layers.{layer}.self_attn.{name}": np.float32(0.05).reshape(1) for layer in range(3)}
    whole, scaled = write(tmp_path / "whole", config, tensors), write(tmp_path / "scaled", config, tensors | scales)
    assert understand(scaled)[:2] == understand(whole)[:2]


def test_an_unused_tensor_of_four_bit_numbers(original, tmp_path):
    whole, other = (write(tmp_path / name, *original) for name in ("whole", "other"))
    raw = (other / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    end = len(raw) - 8 - length
    header["vision.scale"] = {"dtype": "F4", "shape": [2, 4], "data_offsets": [end, end + 4]}
    head = json.dumps(header).encode()
    (other / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + raw[8 + length :] + bytes(4))
    assert understand(other) == understand(whole)


def test_a_router_that_is_in_no_shard(original, tmp_path):
    config, tensors = original
    left = {name: tensor for name, tensor in tensors.items() if name != "model.layers.1.mlp.gate.weight"}
    refuse(write(tmp_path, config, left), "layer 1 has", "no router model.layers.1.mlp.gate.weight", "complete?")


@pytest.mark.parametrize("missing", [2, 3, 4])
def test_a_shard_that_is_missing_without_an_index(original, missing, tmp_path):
    folder = write(tmp_path, *original, shards=6, index=False)
    (folder / f"model-{missing:05}-of-00006.safetensors").unlink()
    with pytest.raises(InputError, match=f"model-{missing:05}-of-00006.safetensors is not there, so the download is"):
        describe(open_checkpoint(folder))


def test_layers_that_a_missing_shard_held(original, tmp_path):
    config, tensors = original
    left = {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name}
    folder = write(tmp_path, config, left)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    refuse(folder, "layer 1 has", "model-00002-of-00002.safetensors is not there, so the download is incomplete")


def test_a_shard_that_the_index_does_not_name(original, tmp_path):
    config, tensors = original
    split = {name: ".layers.1." in name for name in tensors}
    folder = write(tmp_path, config, {name: tensors[name] for name in tensors if not split[name]})
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file({name: tensors[name] for name in tensors if split[name]}, folder / "b.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "a.safetensors")}))
    refuse(folder, "layer 1 has", f"b.safetensors is there, but not named in {INDEX}, so it is not read")


def test_a_shard_that_git_lfs_has_yet_to_fetch(original, tmp_path):
    folder = write(tmp_path, *original)
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refuse(folder, "model.safetensors: a pointer of Git LFS, not the file itself; fetch that with git lfs pull")


def test_shards_without_a_tensor(original, tmp_path):
    refuse(write(tmp_path, original[0], {}), "the safetensors files hold no tensors")


@pytest.mark.parametrize("ending", ["qweight", "weight_packed"])
def test_a_router_that_is_packed(original, ending, tmp_path):
    config, tensors = dict(original[0]), dict(original[1])
    method = "gptq" if ending == "qweight" else "compressed-tensors"
    weights = {"num_bits": 4, "group_size": 32}
    group = {"targets": ["Linear"], "format": "pack-quantized", "weights": weights}
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 32, "config_groups": {"a": group}}
    for layer in range(3):
        stem = f"model.layers.{layer}.mlp.gate."
        del tensors[stem + "weight"]
        if method == "gptq":
            shapes = {"qweight": (8, 16), "qzeros": (2, 2)}
            tensors |= {stem + name: np.zeros(shape, np.int32) for name, shape in shapes.items()}
            tensors[stem + "scales"] = np.ones((2, 16), np.float16)
        else:
            tensors[stem + "weight_packed"] = np.zeros((16, 8), np.int32)
            tensors |= {stem + "weight_scale": np.ones((16, 2), np.float16), stem + "weight_shape": np.array([16, 64])}
    refuse(write(tmp_path, config, tensors), "router model.layers.0.mlp.gate", "is quantised; only plain routers")


def stack_as_mlx(tensors):
    for stem in map("model.layers.{}.mlp.".format, range(3)):
        for part in ("gate_proj", "up_proj", "down_proj"):
            experts = [tensors.pop(f"{stem}experts.{e}.{part}.weight") for e in range(16)]
            tensors[f"{stem}switch_mlp.{part}.weight"] = np.stack(experts)


def replace_by_vectors(tensors):
    for stem in map(EXPERTS.format, range(3)):
        for part in ("gate_proj", "up_proj", "down_proj"):
            del tensors[f"{stem}3.{part}.weight"]
        tensors[f"{stem}3.novice"] = np.zeros(64, np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (stack_as_mlx, "mlp.switch_mlp.down_proj.weight is MLX's layout, which is not read"),
        (replace_by_vectors, "the expert has model.layers.0.mlp.experts.3.novice instead"),
    ],
)
def test_experts_of_another_kind(original, change, message, tmp_path):
    tensors = dict(original[1])
    change(tensors)
    with pytest.raises(InputError, match=message) as caught:
        describe(open_checkpoint(write(tmp_path, original[0], tensors)))
    assert "download" not in str(caught.value)
