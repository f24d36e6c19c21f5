"""The plugin's changes to a Hugging Face configuration before vLLM reads it."""

import pytest
from engine import allocate
from tiny import make_checkpoint
from transformers import OlmoeConfig

from lexi_adapter.errors import AllocationError
from lexi_adapter.serving.vllm_plugin import restore
from lexi_search.allocation.export import make_vllm_overrides
from lexi_search.artifacts.serialisation import to_document

ARCHITECTURES = {"architectures": ["OlmoeForCausalLM"]}


@pytest.fixture(scope="module")
def allocation(tmp_path_factory):
    return allocate(make_checkpoint("olmoe", tmp_path_factory.mktemp("config") / "olmoe"))


def make_config(**changes):
    return OlmoeConfig(num_hidden_layers=3, num_experts=16, num_experts_per_tok=4, **ARCHITECTURES | changes)


def test_a_restored_config_is_the_model_s_own_with_the_allocation_beside_it(allocation):
    config = make_config(**make_vllm_overrides(allocation, ARCHITECTURES))
    assert config.is_heterogeneous and config.architectures == ["LexiOlmoeForCausalLM"]
    restore(config)
    left = {"lexi_allocation": to_document(allocation), "allow_global_per_layer_attribute_access": True}
    assert config.to_dict() == make_config(**left).to_dict()
    restore(config)
    assert config.to_dict() == make_config(**left).to_dict()


def test_a_config_without_an_allocation_is_left_alone():
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
