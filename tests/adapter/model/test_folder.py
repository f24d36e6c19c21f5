"""Whether an allocation fits a model folder: every way in which it may not, and `lexi-adapter check`, which says so."""

import hashlib
import json
import shutil
from dataclasses import replace

import pytest
from click.testing import CliRunner
from corrections import compensate
from engine import allocate, export
from safetensors.numpy import load_file, save_file
from tiny import FAMILIES, make_checkpoint

from lexi_adapter.allocation import read_allocation
from lexi_adapter.cli import main
from lexi_adapter.cli.commands import check as checking
from lexi_adapter.errors import AdapterError, AllocationError
from lexi_adapter.model.folder import (
    check_folder,
    find_limit,
    find_lm_head,
    find_routers,
    find_vocabulary,
    has_weights,
)
from lexi_adapter.serving.vllm_plugin import check_lm_head
from lexi_adapter.tasks.texts import check_length
from lexi_search.artifacts.serialisation import to_document, write_allocation


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: make_checkpoint(family, root / family) for family in FAMILIES}


@pytest.fixture
def olmoe(checkpoints, tmp_path):
    """A folder of its own that a test may damage, and the allocation made from it."""
    folder = shutil.copytree(checkpoints["olmoe"], tmp_path / "olmoe")
    return folder, allocate(folder)


def model_of(allocation):
    return read_allocation(to_document(allocation)).model


def rewrite_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def rewrite_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(folder, allocation, kind=AllocationError):
    with pytest.raises(AdapterError) as caught:
        check_folder(model_of(allocation), folder)
    assert type(caught.value) is kind
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    return message


@pytest.mark.parametrize("family", FAMILIES)
def test_an_allocation_fits_the_folder_it_was_made_from_and_no_other(checkpoints, family):
    model = model_of(allocate(checkpoints[family]))
    check_folder(model, checkpoints[family])
    assert sorted(find_routers(model, checkpoints[family])) == list(model.moe_layers)
    for other in set(FAMILIES) - {family}:
        refusal(checkpoints[other], allocate(checkpoints[family]))


def test_shards_are_found_through_the_index(tmp_path):
    folder = make_checkpoint("mixtral", tmp_path / "sharded", shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    check_folder(model_of(allocate(folder)), folder)


@pytest.mark.parametrize("name", ["lm_head.weight", "lm_head.qweight", "language_model.lm_head.weight_packed"])
def test_an_lm_head_may_be_packed(olmoe, name):
    """Of a class of vLLM that never ties: with a packed LM head it loads one, without any it would serve noise."""
    folder, _ = olmoe
    rewrite_weights(folder, lambda tensors: tensors.update({name: tensors.pop("lm_head.weight")}))
    assert find_lm_head(folder) == name
    check_lm_head("olmoe", folder)
    rewrite_weights(folder, lambda tensors: tensors.update({"lm_head.bias": tensors.pop(name)}))
    with pytest.raises(AdapterError, match="its LM head is tied"):
        check_lm_head("olmoe", folder)


def test_prediction_layers_past_the_decoder_do_not_count(olmoe):
    folder, allocation = olmoe

    def add_prediction_layer(tensors):
        tensors["model.layers.3.mlp.gate.weight"] = tensors["model.layers.0.mlp.gate.weight"]

    rewrite_weights(folder, add_prediction_layer)
    check_folder(model_of(allocation), folder)


def test_other_weights(olmoe, tmp_path):
    folder, allocation = olmoe
    other = make_checkpoint("olmoe", tmp_path / "other", seed=1)
    assert "other router weights" in refusal(other, allocation)
    rewrite_weights(folder, lambda tensors: tensors["model.layers.2.mlp.gate.weight"].__imul__(1.0001))
    assert "other router weights" in refusal(folder, allocation)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "mixtral"}, "model_type is 'mixtral', the allocation was made for 'olmoe'"),
        ({"num_hidden_layers": 4}, "num_hidden_layers is 4, the allocation was made for 3"),
        ({"num_experts_per_tok": 8}, "num_experts_per_tok is 8, the allocation was made for 4"),
    ],
)
def test_another_config(olmoe, changes, expected):
    folder, allocation = olmoe
    rewrite_config(folder, **changes)
    assert expected in refusal(folder, allocation)


def test_a_router_missing_extra_or_of_another_size(olmoe):
    folder, allocation = olmoe
    name = "model.layers.1.mlp.gate.weight"
    rewrite_weights(folder, lambda tensors: tensors.update({name: tensors[name][:8]}))
    assert "router of layer 1 has shape [8, 64], the allocation was made for 16 experts" in refusal(folder, allocation)
    rewrite_weights(folder, lambda tensors: tensors.pop(name))
    assert "none for layers [1] of the allocation" in refusal(folder, allocation)
    fewer = replace(allocation, model=replace(allocation.model, moe_layers=(0,)), top_k={0: 1}, budget=1)
    assert "layers [2] have one, the allocation has no top-k for them" in refusal(folder, fewer)


@pytest.mark.parametrize("path", ["", "text_config", "language_config", "llm_config", "thinker_config.text_config"])
def test_limits_are_found_wherever_the_config_of_the_language_model_lies(path):
    config = {"max_position_embeddings": 128, "vocab_size": 256}
    for key in reversed(path.split(".") if path else []):
        config = {key: config}
    config |= {"model_type": "qwen3_omni_moe"}
    assert (find_limit(config), find_vocabulary(config)) == (128, 256)
    check_length("--length", 128, find_limit(config))
    with pytest.raises(AdapterError, match="--length of 129 tokens is more than the model's 128 positions"):
        check_length("--length", 129, find_limit(config))


def test_broken_files(olmoe):
    folder, allocation = olmoe
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for broken in (whole[:-4], whole[:100], b"", (2**40).to_bytes(8, "little") + whole[8:], b"\2\0\0\0\0\0\0\0[]"):
        weights.write_bytes(broken)
        assert "fetch it again" in refusal(folder, allocation, AdapterError)
    (folder / "config.json").write_text("[]")
    assert "not a JSON object" in refusal(folder, allocation, AdapterError)
    (folder / "config.json").unlink()
    assert "cannot read" in refusal(folder, allocation, AdapterError)


def check(*arguments):
    result = CliRunner().invoke(main.main, ["check", *map(str, arguments)])
    assert result.exit_code in (0, 2), result.output
    assert result.exit_code == 0 or (result.output.startswith("Error: ") and result.output.count("\n") == 1)
    return result.stdout if result.exit_code == 0 else result.output.removeprefix("Error: ").strip()


def list_next(*arguments):
    return [line for line in CliRunner().invoke(main.main, ["check", *map(str, arguments)]).stderr.splitlines()]


@pytest.mark.parametrize("family", FAMILIES)
def test_check_command_says_what_fits(checkpoints, tmp_path, family):
    allocation = allocate(checkpoints[family], top_k=(2, 3))
    write_allocation(tmp_path / "a.json", allocation)
    layers = len(allocation.top_k)
    listed = " ".join(f"{layer}:{k}" for layer, k in sorted(allocation.top_k.items()))
    expected = (
        f"fits: {allocation.model.model_type}, {allocation.budget} of {4 * layers} active experts per token "
        f"over {layers} MoE layers, sha256 {hashlib.sha256((tmp_path / 'a.json').read_bytes()).hexdigest()[:12]}; "
        f"top-k of each: {listed}\n"
    )
    exported = export(allocation, checkpoints[family], tmp_path / "exported")
    serve = [f"next: vllm serve {exported}", "next: lexi-adapter check {} --url http://localhost:8000"]
    export_it = f"next: lexi-search export {tmp_path}/a.json --to vllm --model {checkpoints[family]} -o served/"
    for words, folder, follows in (
        ((tmp_path / "a.json", "--model", checkpoints[family]), checkpoints[family], [export_it]),
        ((tmp_path / "a.json", "--model", exported), exported, serve),
        ((exported,), exported, serve),
    ):
        assert check(*words) == expected
        done = [f"done: {words[0]} fits {folder}", *(line.format(words[0]) for line in follows)]
        assert list_next(*words) == done


def test_check_command_refuses_in_one_line(olmoe, tmp_path, monkeypatch):
    folder, allocation = olmoe
    path = tmp_path / "a.json"
    assert f"cannot read the allocation {path}" in check(path, "--model", folder)
    write_allocation(path, allocation)
    assert f"cannot read {tmp_path}/nowhere/config.json" in check(path, "--model", tmp_path / "nowhere")
    exported = export(allocate(folder, top_k=(4, 4, 1)), folder, tmp_path / "exported")
    assert "exported with another allocation" in check(path, "--model", exported)
    rewrite_config(folder, num_experts_per_tok=2)
    assert "num_experts_per_tok is 2" in check(path, "--model", folder)
    rewrite_config(folder, num_experts_per_tok=4)
    write_allocation(path, replace(allocation, model=replace(allocation.model, model_type="phimoe")))
    rewrite_config(folder, model_type="phimoe")
    assert "the routing of phimoe knows top-k 2 only" in check(path, "--model", folder)
    rewrite_config(folder, model_type="olmoe")
    write_allocation(path, allocation)
    monkeypatch.setattr(checking, "find_vllm_version", lambda: "0.34.0")
    assert "vLLM 0.34.0 cannot apply an allocation: lexi_adapter supports vLLM 0.26 to 0.33" in check(
        path, "--model", folder
    )


def test_check_command_says_what_it_could_not_check(olmoe, tmp_path, monkeypatch):
    folder, allocation = olmoe
    write_allocation(tmp_path / "a.json", allocation)
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(checking, "find_vllm_version", lambda: None)
    first, *notes = check(tmp_path / "a.json", "--model", folder).splitlines()
    assert first.startswith("fits: olmoe")
    assert notes == [
        "note: no safetensors files there, so the weights were not compared",
        "note: vLLM is not installed here, so its version was not checked",
    ]


def test_check_command_takes_an_exported_folder_itself_and_says_what_is_wrong_with_it(olmoe, tmp_path):
    folder, allocation = olmoe
    assert f"{folder}/config.json has no lexi_allocation: vLLM would serve the model's own k" in check(folder)
    write_allocation(tmp_path / "a.json", allocation)
    assert "name the model's folder by --model" in check(tmp_path / "a.json")
    assert "name an exported folder" in check() and "name an exported folder" in check("--model", folder)
    exported = export(allocation, folder, tmp_path / "exported")
    assert check(exported).startswith("fits: olmoe")
    whole = json.loads((exported / "config.json").read_text())
    rewrite_config(exported, per_layer_config=whole["per_layer_config"] | {"1": {"num_experts_per_tok": 4}})
    assert f"{exported}/config.json: per_layer_config and lexi_allocation differ in layer 1" in check(exported)
    rewrite_config(exported, per_layer_config=whole["per_layer_config"], architectures=["OlmoeForCausalLM"])
    assert "note: exported for transformers" in check(exported)
    rewrite_config(exported, num_experts_per_tok=2)
    assert "num_experts_per_tok is 2" in check(exported)


def test_check_command_says_that_a_compensation_is_whole(olmoe, tmp_path):
    folder, allocation = olmoe
    document = compensate(to_document(allocation), allocation.model, tmp_path, hidden=64)
    (tmp_path / "a.json").write_text(json.dumps(document))
    size = (tmp_path / "corrections.safetensors").stat().st_size
    shutil.copy(tmp_path / "corrections.safetensors", folder)
    config = json.loads((folder / "config.json").read_text())
    exported = shutil.copytree(folder, tmp_path / "exported")
    (exported / "config.json").write_text(json.dumps(config | {"lexi_allocation": document}))
    for words in ((tmp_path / "a.json", "--model", folder), (exported,), (tmp_path / "a.json", "--model", exported)):
        fits, said = check(*words).splitlines()[:2]
        assert "gate exponent 0.5, compensation of rank 4 (" in fits
        assert said == f"compensation: corrections.safetensors, rank 4, {size / 1e6:.3g} MB, is whole"
    other = compensate(to_document(allocation), allocation.model, tmp_path, hidden=64, seed=1)
    assert "not the file that the allocation names" in check(tmp_path / "a.json", "--model", folder)
    (tmp_path / "a.json").write_text(json.dumps(other))
    assert "exported with another allocation" in check(tmp_path / "a.json", "--model", exported)
    narrow = compensate(to_document(allocation), allocation.model, tmp_path, hidden=32)
    (tmp_path / "a.json").write_text(json.dumps(narrow))
    assert "is BF16 [32, 4], BF16 [64, 4] expected" in check(tmp_path / "a.json", "--model", folder)
    (exported / "corrections.safetensors").unlink()
    assert "corrections.safetensors: cannot be read (No such file or directory)" in check(exported)


def test_a_file_of_corrections_is_no_shard_of_the_model(olmoe):
    """As in an exported folder without an index, whose shards are all safetensors files."""
    folder, allocation = olmoe
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    compensate(to_document(allocation), allocation.model, folder, hidden=64)
    (folder / "corrections.safetensors").rename(folder / "lexi_compensation.safetensors")
    check_folder(model_of(allocation), folder)
    assert len(find_routers(model_of(allocation), folder)) == 3
    (folder / "model-00001-of-00001.safetensors").unlink()
    assert not has_weights(folder)
