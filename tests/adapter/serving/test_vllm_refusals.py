"""Every way in which an allocation must stop vLLM from starting, with one line that says why; with real engines."""

import json
import sys
from types import SimpleNamespace

import pytest
from engine import allocate, compensate, export, job_with, make_job, make_overrides, make_served, run_engines, start
from tiny import make_checkpoint

from lexi_adapter.errors import AdapterError
from lexi_adapter.serving.vllm_plugin import check_settings
from lexi_search.artifacts.serialisation import to_document

REFUSALS = {}


def refusal(name, line, kind="AllocationError"):
    """Register a function that makes, from the served model, a job that must fail with `line` in an error of `kind`."""

    def register(make):
        REFUSALS[name] = (make, line, kind)
        return make

    return register


def change(document, *, model=None, **top_k):
    """The document with other values in its model or for some layers (`None` takes the layer out); the budget fits."""
    layers = {layer.removeprefix("layer"): k for layer, k in top_k.items()}
    layers = {layer: k for layer, k in (document["top_k"] | layers).items() if k is not None}
    return document | {"model": document["model"] | (model or {}), "top_k": layers, "budget": sum(layers.values())}


@refusal("another family", "config.json: model_type is 'olmoe', the allocation was made for 'mixtral'")
def another_family(served):
    return job_with(served, to_document(allocate(make_checkpoint("mixtral", served.root / "mixtral"))))


@refusal("another depth", "num_hidden_layers is 3, the allocation was made for 4")
def another_depth(served):
    return job_with(served, change(to_document(served.allocation), model={"num_hidden_layers": 4}))


@refusal("other weights", "other router weights than the allocation was made for")
def other_weights(served):
    return job_with(served, to_document(allocate(make_checkpoint("olmoe", served.root / "other", seed=1))))


@refusal("a missing layer", "top_k lacks layers [1]")
def missing_layer(served):
    return job_with(served, change(to_document(served.allocation), layer1=None))


@refusal("an extra layer", "top_k has layers [7]")
def extra_layer(served):
    return job_with(served, change(to_document(served.allocation), layer7=2))


@refusal("more than the model's own k", "top_k of layer 0 is 5, more than the model's own 4")
def more_than_own(served):
    return job_with(served, change(to_document(served.allocation), layer0=5))


@refusal("another k by an override", "num_experts_per_tok, after --hf-overrides, is 2, the allocation was made for 4")
def another_k_by_an_override(served):
    return make_job(served.exported, hf_overrides={"num_experts_per_tok": 2})


@refusal("almost our key", "--additional-config has lexi-allocation, which looks like an allocation")
def almost_our_key(served):
    return make_job(served.folder, additional_config={"lexi-allocation": to_document(served.allocation)})


@refusal("a null over the exported one", "lexi_allocation in config.json or --hf-overrides is null")
def null_over_the_exported_one(served):
    return make_job(served.exported, hf_overrides={"lexi_allocation": None})


@refusal("a corrupt file", "corrupt.json is not JSON")
def corrupt_file(served):
    path = served.root / "corrupt.json"
    path.write_text(json.dumps(to_document(served.allocation))[:-20])
    return job_with(served, str(path))


@refusal("no file", "nowhere.json: No such file or directory; name an existing file")
def no_file(served):
    return job_with(served, str(served.root / "nowhere.json"))


@refusal("another format", 'its "format" is \'lexi-profile\', expected "lexi-allocation"')
def another_format(served):
    return job_with(served, to_document(served.allocation) | {"format": "lexi-profile"})


@refusal("two that disagree", "--additional-config and config.json or --hf-overrides hold different allocations")
def two_that_disagree(served):
    other = to_document(allocate(served.folder, (3, 1, 4)))
    return make_job(served.exported, additional_config={"lexi_allocation": other})


@refusal("an alias without an allocation", "but there is no lexi_allocation beside it")
def alias_alone(served):
    folder = export(served.allocation, served.folder, served.root / "bare")
    config = json.loads((folder / "config.json").read_text())
    del config["lexi_allocation"]
    (folder / "config.json").write_text(json.dumps(config))
    return make_job(folder)


@refusal("layers without an allocation", "per_layer_config sets num_experts_per_tok without a lexi_allocation")
def layers_alone(served):
    overrides = make_overrides(served)
    del overrides["lexi_allocation"], overrides["architectures"]
    return make_job(served.folder, hf_overrides=overrides)


@refusal("layers that disagree", "per_layer_config and lexi_allocation differ in layers [0]")
def layers_that_disagree(served):
    layers = make_overrides(served)["per_layer_config"] | {"0": {"num_experts_per_tok": 2}}
    return make_job(served.folder, hf_overrides=make_overrides(served, per_layer_config=layers))


@refusal(
    "a tied LM head",
    "has no lm_head.weight: its LM head is tied to the embeddings, which vLLM ignores",
    "AdapterError",
)
def tied_lm_head(served):
    folder = make_checkpoint("olmoe", served.root / "tied", tie_word_embeddings=True)
    return job_with(served, to_document(allocate(folder))) | {"model": str(folder)}


@refusal("one-sided all2all", "flashinfer_nvlink_one_sided has one top-k for all layers", "AdapterError")
def one_sided_all2all(served):
    return make_job(served.exported, all2all_backend="flashinfer_nvlink_one_sided")


@refusal(
    "a newer vLLM", "vLLM 0.34.0 cannot apply an allocation: lexi_adapter supports vLLM 0.26 to 0.33", "AdapterError"
)
def newer_vllm(served):
    return make_job(served.exported, substitute="newer_vllm")


# From here on nothing can be known before vLLM builds the model: without weights, or of what vLLM itself does.


@refusal(
    "a layer it lacks", "vLLM builds MoE layer model.layers.2.mlp.experts, but the allocation has no top-k for layer 2"
)
def layer_it_lacks(served):
    document = change(to_document(served.allocation), model={"moe_layers": [0, 1]}, layer2=None)
    return job_with(served, document, load_format="dummy")


@refusal("a dense layer", "Qwen2MoeForCausalLM: vLLM builds no MoE layer that this adapter knows for layers [1]")
def dense_layer(served):
    folder = make_checkpoint("qwen2_moe", served.root / "qwen2_moe")
    document = change(to_document(allocate(folder)), model={"moe_layers": [0, 1, 2]}, layer1=1)
    return make_job(folder, additional_config={"lexi_allocation": document}, load_format="dummy")


@refusal("other weights from the hub", "other router weights than the allocation was made for")
def other_weights_from_the_hub(served):
    document = to_document(allocate(make_checkpoint("olmoe", served.root / "another", seed=1)))
    return job_with(served, document, substitute="hub_id")


@refusal("other experts", "builds model.layers.0.mlp.experts with num_experts = 8, but the allocation was made for 16")
def other_experts(served):
    return make_job(served.exported, load_format="dummy", hf_overrides={"num_experts": 8})


@refusal("another k", "vLLM builds model.layers.0.mlp.experts with top_k = 2, but the allocation was made for 4")
def another_k(served):
    return job_with(
        served, to_document(served.allocation), load_format="dummy", hf_overrides={"num_experts_per_tok": 2}
    )


@refusal(
    "an unknown family", "MiniCPMForCausalLM: vLLM builds no MoE layer that this adapter knows for layers [0, 1, 2]"
)
def unknown_family(served):
    folder = make_checkpoint("minicpm", served.root / "minicpm")
    exported = export(allocate(folder), folder, served.root / "minicpm-exported")
    return make_job(exported, "minicpm", substitute="unknown_blocks")


@refusal(
    "a layer that differs", "OlmoeForCausalLM: layer 0 has router.top_k = 4, not the allocation's 1", "AdapterError"
)
def layer_that_differs(served):
    return make_job(served.exported, substitute="stubborn_router")


@refusal("a layer that changes", "layer 1 has moe_config.experts_per_token = 4, not the allocation's 3", "AdapterError")
def layer_that_changes(served):
    return make_job(served.exported, substitute="corrupted_layer")


@refusal(
    "a routing of its own",
    "routes by its own custom_routing_function: this adapter cannot give it top-k 1",
    "AdapterError",
)
def routing_of_its_own(served):
    return make_job(served.exported, model_impl="transformers", substitute="external_routing")


def shifted(served, **changes):
    return job_with(served, to_document(served.allocation) | {"gate_exponent": 0.5}, **changes)


@refusal(
    "a kernel that routes",
    "layer 0: the kernel of UnquantizedFusedMoEMethod routes by itself and would ignore",
    "AdapterError",
)
def kernel_that_routes(served):
    return shifted(served, substitute="monolithic_kernel")


@refusal("a router that guesses", "layer 0: no gate exponent can be applied in a RoutingSimulatorRouter")
def router_that_guesses(served):
    return shifted(served, substitute="simulated_routing")


def compensated(served, name, **changes):
    """A job under an allocation with corrections whose document has `changes`; and the folder that holds both."""
    path = compensate(served.allocation, served.root / name)
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {key: document[key] | value for key, value in changes.items()}))
    return job_with(served, str(path)), path.parent


@refusal("a compensation whose file is missing", "corrections.safetensors: cannot be read (No such file")
def missing_corrections(served):
    job, folder = compensated(served, "missing")
    (folder / "corrections.safetensors").unlink()
    return job


@refusal("a compensation of another file", "not the file that the allocation names: its SHA-256 is")
def swapped_corrections(served):
    job, folder = compensated(served, "swapped")
    file = folder / "corrections.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\x00\x00\x80\x3f")
    return job


@refusal("a compensation of another rank", "its rank is '4', the allocation's is '8'")
def other_rank(served):
    return compensated(served, "rank", compensation={"rank": 8})[0]


@refusal("a compensation whose place is not known", "it is not known where that is; give the allocation as a file")
def corrections_from_nowhere(served):
    path = compensate(served.allocation, served.root / "nowhere")
    return job_with(served, json.loads(path.read_text()))


@refusal("a compensation in a kernel that routes", "routes by itself and would ignore", "AdapterError")
def corrected_kernel_that_routes(served):
    path = compensate(served.allocation, served.root / "monolithic")
    return job_with(served, str(path), substitute="monolithic_kernel")


@refusal("a compensation of experts that are projected", "layer 0: its experts' output is projected, which takes no")
def projected_experts(served):
    path = compensate(served.allocation, served.root / "projected")
    return job_with(served, str(path), substitute="projected_experts")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Name -> result of every refusal, and of an engine after them all; one process, in turn."""
    served = make_served(tmp_path_factory.mktemp("refusals"))
    jobs = [make(served) for make, *_ in REFUSALS.values()]
    *results, last = run_engines(*jobs, make_job(served.exported)).results
    return dict(zip(REFUSALS, results, strict=True)) | {"last": last, "expected": served.allocation.top_k}


@pytest.mark.parametrize("name", REFUSALS)
def test_vllm_does_not_start_and_says_why_in_one_line(outcomes, name):
    outcome, (_, line, kind) = outcomes[name], REFUSALS[name]
    assert outcome.get("error") == kind, outcome
    assert line in outcome["message"] and "\n" not in outcome["message"], outcome["message"]


def test_the_refusals_leave_nothing_behind(outcomes):
    assert outcomes["last"].get("top_k") == outcomes["expected"], outcomes["last"]


@pytest.mark.parametrize("place", ["model_config", "aux_output_config"])  # of vLLM 0.26; of 0.32 and 0.33
def test_refuses_to_return_routed_experts(place):
    """vLLM itself refuses this on the CPU, so there is no engine to ask."""
    parallel_config = SimpleNamespace(all2all_backend="allgather_reducescatter")
    settings = SimpleNamespace(parallel_config=parallel_config, model_config=None, additional_config={})
    check_settings(settings)
    setattr(settings, place, SimpleNamespace(enable_return_routed_experts=True))
    with pytest.raises(AdapterError, match="enable_return_routed_experts has one top-k for all layers"):
        check_settings(settings)


def test_stops_where_vllm_lacks_what_is_hooked():
    code = """
import vllm.config
from lexi_adapter.serving.vllm_plugin import register
register()
hooked = vllm.config.VllmConfig.__post_init__
register()
assert vllm.config.VllmConfig.__post_init__ is hooked
del vllm.config.ModelConfig.get_model_arch_config
register()
"""
    done = start(sys.executable, "-c", code)
    *_, last = done.stderr.splitlines()
    assert done.returncode == 1 and last.startswith("lexi_adapter.errors.AdapterError: lexi_adapter cannot hook")
    assert "get_model_arch_config" in last and "supports vLLM 0.26 to 0.33" in last
