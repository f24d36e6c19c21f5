"""The plugin's changes to a Hugging Face configuration before vLLM reads it."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
from engine import allocate
from tiny import make_checkpoint
from transformers import OlmoeConfig

from lexi_adapter.allocation import CompensationFile, read_allocation
from lexi_adapter.errors import AllocationError
from lexi_adapter.model.folder import READ_AS_STORED
from lexi_adapter.serving.vllm_build import _comparing, check_files, explain_uncompared, leave_out
from lexi_adapter.serving.vllm_plugin import _locate, _looks_like_key, check_model, prepare, restore
from lexi_search.allocation.export import make_vllm_overrides
from lexi_search.artifacts.serialisation import to_document

ARCHITECTURES = {"architectures": ["OlmoeForCausalLM"]}


@pytest.fixture(scope="module")
def allocation(tmp_path_factory):
    return allocate(make_checkpoint("olmoe", tmp_path_factory.mktemp("config") / "olmoe"))


def make_config(**changes):
    values = {"num_hidden_layers": 3, "num_experts": 16, "num_experts_per_tok": 4}
    return OlmoeConfig(**values | ARCHITECTURES | changes)


def test_a_restored_config_is_the_model_s_own_with_the_allocation_beside_it(allocation):
    config = make_config(**make_vllm_overrides(allocation, ARCHITECTURES))
    assert config.is_heterogeneous and config.architectures == ["LexiOlmoeForCausalLM"]
    restore(config)
    left = {"lexi_allocation": to_document(allocation), "allow_global_per_layer_attribute_access": True}
    assert config.to_dict() == make_config(**left).to_dict()
    restore(config)
    assert config.to_dict() == make_config(**left).to_dict()


def test_a_config_without_an_allocation_is_left_alone():
    restore(SimpleNamespace(architectures=1))  # by --hf-overrides
    restore(SimpleNamespace(architectures=[None, 1]))
    for changes in ({}, {"per_layer_config": {"1": {"hidden_act": "gelu"}}}, {"architectures": None}):
        config = make_config(**changes)
        restore(config)
        assert config.to_dict() == make_config(**changes).to_dict()


def test_other_values_of_layers_stay(allocation):
    overrides = make_vllm_overrides(allocation, ARCHITECTURES)
    overrides["per_layer_config"]["1"]["hidden_act"] = "gelu"
    config = make_config(**overrides)
    restore(config)
    assert config.per_layer_attributes == {"hidden_act"}
    assert [layer.hidden_act for layer in config.per_layer_config] == ["silu", "gelu", "silu"]
    assert [layer.num_experts_per_tok for layer in config.per_layer_config] == [4, 4, 4]


def test_refuses_layers_that_are_not_the_allocation_s(allocation):
    overrides = make_vllm_overrides(allocation, ARCHITECTURES)
    with pytest.raises(AllocationError, match=r"differ in layers \[2\]"):
        restore(
            make_config(
                **overrides | {"per_layer_config": {"0": {"num_experts_per_tok": 1}, "1": {"num_experts_per_tok": 3}}}
            )
        )
    with pytest.raises(AllocationError, match="there is no lexi_allocation beside it"):
        restore(make_config(architectures=["LexiOlmoeForCausalLM"]))


def ask(additional=None, **config):
    """What is left of a vLLM configuration, of a model with these keys in its config, without an allocation."""
    model_config = SimpleNamespace(hf_config=make_config(**config))
    settings = SimpleNamespace(additional_config=additional or {}, model_config=model_config)
    prepare(settings)
    return settings


ALMOST = [
    "lexi-allocation",
    "Lexi_Allocation",
    "LEXI_ALLOCATION",
    "lexiallocation",
    "lexi_alocation",
    "lexi_allocatoin",
]
ALMOST += [
    "lexi_allocations",
    "exi_alocation",
    "lexy_allokation",
    "lexi_allocaton_",
    "lexi allocation",
    "xxlexi_allocation",
]


@pytest.mark.parametrize("name", ALMOST)
@pytest.mark.parametrize("nested", [False, True])
def test_a_key_that_is_almost_ours_stops_the_start(name, nested):
    values = {"a": {"b": {name: "a.json"}}} if nested else {name: "a.json"}
    found = f"a.b.{name}" if nested else name
    for place, arguments in (("--additional-config", {"additional": values}), ("--hf-overrides", values)):
        with pytest.raises(AllocationError, match=f"{place} has {found}, which (looks like|this plugin)"):
            ask(**arguments)


def test_an_allocation_under_no_key_of_ours_stops_the_start(allocation):
    document = to_document(allocation)
    for place, arguments in (("--additional-config", {"additional": document}), ("--hf-overrides", document)):
        with pytest.raises(AllocationError, match=f"{place} is an allocation itself"):
            ask(**arguments)
    for values in ({"lexi": document}, {"text": {"lexi_allocation": document}}, {"text": {"lexi_allocation": None}}):
        for arguments in ({"additional": values}, values):
            with pytest.raises(AllocationError, match="looks like an allocation and is not read"):
                ask(**arguments)


def test_a_null_stops_the_start(allocation):
    for arguments in ({"additional": {"lexi_allocation": None}}, {"lexi_allocation": None}):
        with pytest.raises(AllocationError, match="lexi_allocation in .* is null; give it as"):
            ask(**arguments)
    overridden = make_vllm_overrides(allocation, ARCHITECTURES) | {"architectures": ["A"], "lexi_allocation": None}
    with pytest.raises(AllocationError, match="is null"):
        ask(**overridden)


def test_a_key_inside_the_language_model_s_config_stops_the_start():
    with pytest.raises(AllocationError, match=r"text_config.lexi_allocation, which looks like"):
        ask(text_config=make_config(lexi_allocation="a.json"))


@pytest.mark.parametrize("name", ["lexi_anything", "lexi", "LEXI_k", "lexi-budget"])
def test_an_additional_key_of_ours_that_is_not_known_stops_the_start(name):
    with pytest.raises(AllocationError, match=f"--additional-config has {name}, which this plugin does not know"):
        ask({name: "a.json"})


def test_other_keys_do_not():
    others = {"allocation": 1, "format": "pt", "local_allocation": 3, "": 4, "inner": {"lexi": 1}}
    assert ask(others, **others, lexi=2).additional_config == others
    assert ask().additional_config == {}


def test_every_key_of_two_edits_is_seen():
    letters, ours = "abcz_0", "lexiallocation"

    def edit(name):
        place, letter = rng.randrange(len(name)), rng.choice(letters)
        return rng.choice(
            [
                name[:place] + name[place + 1 :],
                name[:place] + letter + name[place:],
                name[:place] + letter + name[place + 1 :],
                name[:place] + name[place : place + 2][::-1] + name[place + 2 :],
            ]
        )

    rng = random.Random(0)
    for _ in range(3000):
        name = edit(edit(ours) if rng.random() < 0.5 else ours)
        assert _looks_like_key(name), name


def test_the_weights_of_a_hub_id_are_compared_once_they_are_there(allocation, tmp_path, monkeypatch):
    """The loader gets a snapshot somewhere in a cache; a fine-tune's routers differ, its config does not."""
    base, tuned = (make_checkpoint("olmoe", tmp_path / name, seed=seed) for name, seed in (("base", 0), ("tuned", 1)))
    here = {"org/base": base, "org/tuned": tuned}

    def prepare_weights(self, model_name_or_path, revision=None, subfolder=None):
        return str(here[model_name_or_path]), files, True

    files = ["a/model.safetensors"]

    prepare_weights = _comparing(prepare_weights)
    assert prepare_weights(None, "org/tuned", None)[0] == str(tuned)  # nothing is asked for
    model = read_allocation(to_document(allocate(base))).model
    monkeypatch.setattr("lexi_adapter.serving.vllm_build._awaited", {"org/base": model, "org/tuned": model})
    assert prepare_weights(None, model_name_or_path="org/base")[0] == str(base)
    with pytest.raises(AllocationError, match="tuned holds other router weights than the allocation was made for"):
        prepare_weights(None, "org/tuned", None)
    assert prepare_weights(None, "org/tuned", subfolder="vision")  # not the model's own
    files[:] = ["consolidated.safetensors"]
    with pytest.raises(AllocationError, match="vLLM reads consolidated.safetensors and not model.safetensors, of"):
        prepare_weights(None, "org/base", None)


class Log(list):
    def warning(self, text, *values):
        self.append(text % values)


@pytest.mark.parametrize("suffix", [".bin", ".pt"])
def test_weights_that_are_no_safetensors_are_named(allocation, tmp_path, monkeypatch, suffix):
    monkeypatch.setattr("lexi_adapter.serving.vllm_build.logger", log := Log())
    (tmp_path / f"model{suffix}").write_bytes(b"")
    check_files(allocation.model, tmp_path, [f"model{suffix}"])
    line = f"LExI: the router weights of {tmp_path} were not compared with the allocation's: it holds no safetensors"
    assert log == [line]


ELSEWHERE = ("pt", "npcache", "mistral", "tensorizer", "sharded_state", "ipc_cache", "one's own")


def test_formats_that_read_other_files_than_safetensors_are_named(tmp_path):
    for name in (*READ_AS_STORED, "dummy"):
        assert explain_uncompared(str(tmp_path), name) is None
        assert (explain_uncompared("org/name", name) is None) == (name != "runai_streamer")
    for name in ELSEWHERE:
        for model in (str(tmp_path), "org/name"):
            assert explain_uncompared(model, name) == f"--load-format {name} reads what cannot be compared"


def serve(model, load_format, **config):
    """The part of a VllmConfig that `check_model` reads."""
    config = make_config(**config)
    model_config = SimpleNamespace(model=str(model), hf_config=config, hf_text_config=config)
    return SimpleNamespace(model_config=model_config, load_config=SimpleNamespace(load_format=load_format))


def test_a_folder_is_compared_where_its_safetensors_are_read(allocation, tmp_path):
    base, tuned = (make_checkpoint("olmoe", tmp_path / name, seed=seed) for name, seed in (("base", 0), ("tuned", 1)))
    model = read_allocation(to_document(replace(allocation, model=allocate(base).model)))
    for name in READ_AS_STORED:
        check_model(model, serve(base, name))
        with pytest.raises(AllocationError, match="tuned holds other router weights"):
            check_model(model, serve(tuned, name))
    for name in ("dummy", *ELSEWHERE):
        check_model(model, serve(tuned, name))


@pytest.mark.parametrize("name", ["org/name", None])
def test_an_override_of_the_k_stops_the_start_before_a_worker_is_there(allocation, tmp_path, name):
    folder = make_checkpoint("olmoe", tmp_path)
    model = read_allocation(to_document(replace(allocation, model=allocate(folder).model)))
    with pytest.raises(AllocationError, match="num_experts_per_tok, after --hf-overrides, is 2, .*; leave"):
        check_model(model, serve(name or folder, "auto", num_experts_per_tok=2))


def test_a_compensation_is_no_file_of_weights():
    files = ["a/model.safetensors", "a/lexi_compensation.safetensors"]
    assert leave_out(("a", files, True, None)) == ("a", files[:1], True, None)
    assert leave_out(files) == files[:1]


def test_the_compensation_of_a_hub_id_is_fetched_beside_its_config(allocation, monkeypatch, tmp_path):
    named = replace(read_allocation(to_document(allocation)), gate_exponent=0.5)
    named = replace(named, compensation=CompensationFile("lexi_compensation.safetensors", 4, "0" * 64))
    fetched = []

    def fetch(*asked, **others):
        fetched.append((*asked, others["revision"]))
        if others["revision"] != "main":
            raise OSError("there is no such file\nand more")
        return str(tmp_path / asked[1])

    monkeypatch.setattr("transformers.utils.cached_file", fetch)
    model = SimpleNamespace(model="somebody/olmoe", revision="main")
    assert _locate(named, model).folder == str(tmp_path)
    assert fetched == [("somebody/olmoe", "lexi_compensation.safetensors", "main")]
    with pytest.raises(AllocationError, match="somebody/olmoe: its lexi_allocation names .* there is no such file$"):
        _locate(named, SimpleNamespace(model="somebody/olmoe", revision="other"))
    here = replace(named, folder="/here")
    assert _locate(here, model) is here
