"""Exports of an allocation, and that transformers and vLLM's own argument parsing accept them."""

import csv
import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from synthetic import make_allocation

from lexi_search.allocation import export
from lexi_search.artifacts import serialisation
from lexi_search.checkpoint import folder as folders
from lexi_search.errors import InputError

CONFIG = {
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "num_hidden_layers": 4,
    "num_experts_per_tok": 4,
}
NESTED = {
    "model_type": "deepseek_vl_v2",
    "language_config": {"num_hidden_layers": 4, "num_experts_per_tok": 4, "vocab_size": 9},
}


def make_nested_allocation():
    return make_allocation(
        model_type="deepseek_vl_v2", moe_layers=(1, 2, 3), top_k_key="language_config.num_experts_per_tok"
    )


@pytest.fixture
def folder(tmp_path):
    """A model folder as downloads leave it: files that are links into a blob store, a sub-folder, hidden things."""
    model, blobs = tmp_path / "model", tmp_path / "blobs"
    for path in (model / "original", model / ".cache", blobs):
        path.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(CONFIG))
    (model / "tokenizer.json").write_text("{}")
    (model / "params.json").write_text("{}")
    (model / "original" / "notes.txt").write_text("notes")
    (blobs / "abc").write_bytes(b"weights")
    (model / "model.safetensors").symlink_to("../blobs/abc")
    return model


def snapshot(folder):
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.is_dir() or path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


def test_flat_list_and_csv_have_every_layer_in_order():
    allocation = make_allocation(12, 4)
    assert export.list_top_k(allocation) == {str(layer): allocation.top_k[layer] for layer in range(12)}
    rows = list(csv.reader(export.format_csv(allocation).splitlines()))
    assert rows == [["layer", "top_k"], *([str(layer), str(allocation.top_k[layer])] for layer in range(12))]


def test_overlay_sits_where_the_models_own_k_is():
    layers = {"0": {"num_experts_per_tok": 1}, "1": {"num_experts_per_tok": 2}}
    overlay = {"per_layer_config": layers, "allow_global_per_layer_attribute_access": True}
    assert export.make_overlay(make_allocation(2)) == overlay
    nested = export.make_overlay(make_nested_allocation())
    assert set(nested) == {"language_config"}
    assert set(nested["language_config"]["per_layer_config"]) == {"1", "2", "3"}


def test_layers_that_differ_in_attention_keep_what_the_config_says_of_them():
    """In Gemma 4, an overlay would take the place of what transformers makes attention of."""
    allocation = make_allocation(model_type="gemma4_text", top_k_key="top_k_experts")
    with pytest.raises(InputError, match="per_layer_config of gemma4_text is of its attention and cannot hold the k"):
        export.make_overlay(allocation)
    config = {"architectures": ["Gemma4ForCausalLM"], "per_layer_config": {"1": {"head_dim": 64}}}
    config |= {"model_type": "gemma4_text", "num_hidden_layers": 4, "num_experts": 8, "top_k_experts": 4}
    export.check_config(allocation.model, config)
    overrides = export.make_vllm_overrides(allocation, config)
    assert overrides.keys() == {"architectures", "lexi_allocation"}


def test_gate_exponent_is_refused_where_no_config_can_say_it():
    with pytest.raises(InputError, match="a config cannot hold a gate exponent; apply the allocation itself"):
        export.make_overlay(make_allocation(gate_exponent=0.5))
    overrides = export.make_vllm_overrides(make_allocation(gate_exponent=0.5), CONFIG)
    assert overrides["lexi_allocation"]["gate_exponent"] == 0.5


def test_vllm_overrides_name_the_alias_and_carry_the_allocation():
    allocation = make_allocation()
    overrides = export.make_vllm_overrides(allocation, CONFIG)
    assert overrides["architectures"] == ["LexiOlmoeForCausalLM"]
    assert overrides["lexi_allocation"] == serialisation.to_document(allocation)
    assert overrides["per_layer_config"]["3"] == {"num_experts_per_tok": 4}
    nested = export.make_vllm_overrides(make_nested_allocation(), NESTED)
    assert nested["architectures"] == ["LexiDeepseekVLV2ForCausalLM"]
    assert "per_layer_config" not in nested
    with pytest.raises(InputError, match="config.json names no architectures"):
        export.make_vllm_overrides(allocation, {**CONFIG, "architectures": []})


def test_command_survives_the_shell():
    overrides = {"quote": "it's", "n": 1}
    words = shlex.split(export.format_vllm_command("my model", "olmoe", overrides))
    assert words[:4] == ["vllm", "serve", "my model", "--hf-overrides"]
    assert json.loads(words[4]) == overrides
    assert export.format_vllm_command("folder", "olmoe") == "vllm serve folder"
    assert export.format_vllm_command("folder", "minicpm") == "vllm serve folder --trust-remote-code"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "mixtral"}, "the allocation is for model_type 'olmoe', the config has 'mixtral'"),
        ({"num_hidden_layers": 5}, "the allocation is for num_hidden_layers 4, the config has 5"),
        ({"num_experts": 16}, "the allocation is for num_experts 8, the config has 16"),
        ({"num_experts_per_tok": 2}, "the allocation is for num_experts_per_tok 4, the config has 2"),
        ({"per_layer_config": {}}, "the config already has values per layer; export from the model's original folder"),
        ({"lexi_allocation": {}}, "the config already has values per layer"),
    ],
)
def test_config_of_another_model_is_refused(changes, message):
    model = make_allocation().model
    export.check_config(model, CONFIG)
    with pytest.raises(InputError, match=message):
        export.check_config(model, CONFIG | changes)


def test_config_without_the_nested_part_is_refused():
    model = make_nested_allocation().model
    export.check_config(model, NESTED)
    for config in ({"model_type": "deepseek_vl_v2"}, NESTED | {"language_config": None}):
        with pytest.raises(InputError, match="the allocation is for num_hidden_layers 4, the config has None"):
            export.check_config(model, config)


def test_config_may_leave_the_top_k_to_the_default_of_its_class():
    export.check_config(make_allocation().model, {k: v for k, v in CONFIG.items() if k != "num_experts_per_tok"})


def test_config_may_have_a_value_for_each_layer():
    model = make_allocation().model
    export.check_config(model, CONFIG | {"num_experts_per_tok": [4] * 4})
    export.check_config(
        model, {k: v for k, v in CONFIG.items() if k != "num_hidden_layers"} | {"layers_block_type": []}
    )
    with pytest.raises(InputError, match=r"num_experts_per_tok 4, the config has \[4, 2\]"):
        export.check_config(model, CONFIG | {"num_experts_per_tok": [4, 2]})


def test_merge_goes_into_objects_and_keeps_the_base():
    base = {"a": 1, "b": {"c": 2, "d": {"e": 3}}}
    assert export.merge(base, {"b": {"d": {"f": 4}, "c": {}}, "g": 5}) == {
        "a": 1,
        "b": {"c": {}, "d": {"e": 3, "f": 4}},
        "g": 5,
    }
    assert base == {"a": 1, "b": {"c": 2, "d": {"e": 3}}}


def test_folder_links_all_but_the_config(folder, tmp_path):
    before = snapshot(folder)
    export.write_folder(str(tmp_path / "out"), str(folder), {"added": {"x": 1}})
    out = tmp_path / "out"
    assert sorted(os.listdir(out)) == ["config.json", "model.safetensors", "original", "tokenizer.json"]
    assert json.loads((out / "config.json").read_text()) == CONFIG | {"added": {"x": 1}}
    assert not (out / "config.json").is_symlink()
    assert (out / "model.safetensors").read_bytes() == b"weights"
    assert (out / "original" / "notes.txt").read_text() == "notes"
    assert all(os.readlink(out / name) == f"../model/{name}" for name in ("model.safetensors", "original"))
    assert snapshot(folder) == before
    out.rename(tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "model.safetensors").read_bytes() == b"weights"


def test_folders_of_one_parent_move_together_and_others_alone(folder, tmp_path):
    models = tmp_path / "models"
    models.mkdir()
    folder = folder.rename(models / "weights")
    (models / "alias").symlink_to("weights")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(b"weights")
    for source, name in (("weights", "beside"), ("alias", "by-alias")):
        export.write_folder(str(models / name), str(models / source), {"lexi_allocation": {"n": 1}})
    export.write_folder(str(tmp_path / "far"), str(folder), {})
    assert os.readlink(tmp_path / "far" / "tokenizer.json") == str(folder / "tokenizer.json")
    moved = models.rename(tmp_path / "moved")
    for name in ("beside", "by-alias"):
        assert (moved / name / "model.safetensors").read_bytes() == b"weights"
        export.write_folder(str(moved / name), str(moved / "weights"), {"lexi_allocation": {"n": 2}}, force=True)


def test_copies_need_no_model_and_are_replaced_only_as_they_were_left(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "LARGE", 8)  # as if the weights were larger than what is hashed
    (tmp_path / "blobs" / "abc").write_bytes(b"the weights")
    out, first, second = tmp_path / "out", {"lexi_allocation": {"n": 1}}, {"lexi_allocation": {"n": 2}}
    export.write_folder(str(out), str(folder), first, copy=True)
    assert not any(path.is_symlink() for path in out.rglob("*"))
    export.write_folder(str(out), str(folder), second, copy=True, force=True)
    for name in ("model.safetensors", "original/notes.txt"):
        whole = (out / name).read_bytes()
        (out / name).write_bytes(b"other bytes")
        with pytest.raises(InputError, match=f"{name} there is not as the earlier export left it"):
            export.write_folder(str(out), str(folder), first, copy=True, force=True)
        os.truncate(out / name, 0)
        shutil.copy2(folder / name, out / name)
        assert (out / name).read_bytes() == whole
    (out / "original" / "added.txt").write_text("mine")
    with pytest.raises(InputError, match="original/added.txt there is not as the earlier export left it"):
        export.write_folder(str(out), str(folder), first, copy=True, force=True)
    shutil.rmtree(folder)
    assert (out / "model.safetensors").read_bytes() == b"the weights"


def test_copies_that_have_no_room_are_refused_before_any_is_made(folder, tmp_path, monkeypatch):
    before, usage = snapshot(tmp_path), shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"copies need 0.0 GB, 0.0 GB are free in .*; make room, or export links"):
        export.write_folder(str(tmp_path / "out"), str(folder), {}, copy=True)
    assert snapshot(tmp_path) == before


def test_folder_from_a_relative_path(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export.write_folder("out", "model", {})
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == b"weights"


def test_an_empty_folder_is_taken_and_a_full_one_is_not(folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    export.write_folder(str(out), str(folder), {"lexi_allocation": {"n": 1}})
    first = snapshot(out)
    with pytest.raises(InputError, match="an earlier export is there; --force replaces it"):
        export.write_folder(str(out), str(folder), {"lexi_allocation": {"n": 2}})
    assert snapshot(out) == first
    export.write_folder(str(out), str(folder), {"lexi_allocation": {"n": 2}}, force=True)
    assert json.loads((out / "config.json").read_text())["lexi_allocation"] == {"n": 2}
    assert (tmp_path / "blobs" / "abc").read_bytes() == b"weights"
    assert sorted(os.listdir(tmp_path)) == ["blobs", "model", "out"]


@pytest.mark.parametrize("config", [None, "{}", "not json"])
def test_force_never_replaces_what_is_no_export(folder, tmp_path, config):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    if config is not None:
        (out / "config.json").write_text(config)
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match="not empty and no earlier export; choose another name or remove it"):
        export.write_folder(str(out), str(folder), {}, force=True)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "out, message",
    [
        ("model", "it overlaps the model folder"),
        ("model/export", "it overlaps the model folder"),
        ("alias/export", "it overlaps the model folder"),
        (".", "it overlaps the model folder"),
        ("blobs/abc", "not a folder; choose another name"),
        ("absent/out", r"No such file or directory \(.*absent\)"),
        ("blobs/abc/out", r"Not a directory \(.*abc\)"),
    ],
)
def test_places_that_cannot_be_exported_to(folder, tmp_path, out, message):
    (tmp_path / "alias").symlink_to("model")
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match=f"cannot write .*: {message}"):
        export.write_folder(str(tmp_path / out), str(folder), {}, force=True)
    assert snapshot(tmp_path) == before


def test_models_that_are_not_here(tmp_path):
    with pytest.raises(InputError, match="org/model: no such folder; links need the model on this machine"):
        export.write_folder(str(tmp_path / "out"), "org/model", {})
    with pytest.raises(InputError, match="cannot read .*config.json: No such file or directory"):
        export.write_folder(str(tmp_path / "out"), str(tmp_path), {})
    with pytest.raises(InputError, match="absent: no such folder"):
        export.read_config(str(tmp_path / "absent"))


@pytest.mark.parametrize("failing", ["symlink_to", "rename"])
def test_a_failed_export_leaves_things_as_they_were(folder, tmp_path, monkeypatch, failing):
    monkeypatch.setattr(folders, "_exchange", lambda *_: False)  # as on a file system that cannot
    out = tmp_path / "out"
    export.write_folder(str(out), str(folder), {"lexi_allocation": {"n": 1}})
    before, calls = snapshot(tmp_path), []
    original = getattr(Path, failing)

    def fail_second(self, *arguments):
        calls.append(self)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return original(self, *arguments)

    monkeypatch.setattr(Path, failing, fail_second)
    with pytest.raises(InputError, match="cannot write .*out: No space left on device"):
        export.write_folder(str(out), str(folder), {"lexi_allocation": {"n": 2}}, force=True)
    monkeypatch.undo()
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2"])
def test_transformers_loads_an_exported_folder(tmp_path, family):
    """Without any plugin: the weights are the model's, the config says the k of each layer, and keeps it when saved."""
    model_folder = tiny.make_checkpoint(family, tmp_path / "model")
    reference = tiny.build_reference(family)
    blocks = tiny.find_moe_blocks(reference)
    layers, model_type = reference.config.num_hidden_layers, reference.config.model_type
    experts = next(iter(blocks.values())).gate.weight.shape[0]
    allocation = make_allocation(
        layers, 4, model_type=model_type, moe_layers=tuple(sorted(blocks)), num_experts=experts
    )
    export.check_config(allocation.model, export.read_config(str(model_folder)))
    out = tmp_path / "out"
    export.write_folder(str(out), str(model_folder), export.make_transformers_overrides(allocation))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    for name, value in reference.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    assert read_top_k(loaded.config, blocks) == allocation.top_k
    loaded.save_pretrained(tmp_path / "again")
    again = transformers.AutoConfig.from_pretrained(tmp_path / "again")
    assert read_top_k(again, blocks) == allocation.top_k
    assert again.lexi_allocation == serialisation.to_document(allocation)


def read_top_k(config, layers):
    return {layer: config.per_layer_config[layer].num_experts_per_tok for layer in layers}


@pytest.mark.parametrize("form", ["json", "csv"])
def test_plain_numbers_are_refused_where_they_would_be_another_model(form):
    with pytest.raises(InputError, match=f"{form} cannot hold the allocation's gate exponent; take --to vllm"):
        export.format_text(make_allocation(gate_exponent=0.5), form)
