"""The hooks of vLLM's MoE factory, without an engine: layers that look their experts up by token."""

from types import SimpleNamespace

import pytest
import torch
from engine import allocate
from tiny import make_checkpoint

from lexi_adapter.allocation import read_allocation
from lexi_adapter.errors import AdapterError
from lexi_adapter.serving import vllm_build
from lexi_search.artifacts.serialisation import to_document


class MoERunner(torch.nn.Module):
    """What the engine's factory returns, as far as its top-k goes."""

    def __init__(self, top_k, table):
        super().__init__()
        held = SimpleNamespace(top_k=top_k, experts_per_token=top_k)
        self.router = SimpleNamespace(top_k=top_k, _hash_indices_table=table)
        self.moe_config = held
        self.routed_experts = SimpleNamespace(top_k=top_k, moe_config=held, expert_map_manager=held)


@vllm_build._allocating
def build_layer(num_experts, top_k, prefix, hash_indices_table=None):
    return MoERunner(top_k, hash_indices_table)


def build_model(build, tables):
    token = vllm_build._current.set(build)
    try:
        layers = [
            build_layer(16, 4, f"model.layers.{layer}.ffn.experts", hash_indices_table=table)
            for layer, table in enumerate(tables)
        ]
    finally:
        vllm_build._current.reset(token)
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(layers)
    return model


@pytest.fixture(scope="module")
def allocation(tmp_path_factory):
    folder = make_checkpoint("deepseek_v4", tmp_path_factory.mktemp("deepseek_v4"))
    return read_allocation(to_document(allocate(folder, top_k=(1, 3))))


def test_a_layer_that_looks_its_experts_up_keeps_its_top_k(allocation):
    build = vllm_build.Build(allocation)
    model = build_model(build, [torch.zeros(8, 4), None, None])
    vllm_build.verify(build, model, range(3))
    assert [layer.router.top_k for layer in model.layers] == [4, 1, 3]
    assert vllm_build.read_top_k(model) == allocation.top_k == {1: 1, 2: 3}


def test_a_layer_that_looks_its_experts_up_takes_no_other_top_k(allocation):
    with pytest.raises(AdapterError, match="routes by its own hash_indices_table: this adapter cannot give it top-k 1"):
        build_model(vllm_build.Build(allocation), [torch.zeros(8, 4), torch.zeros(8, 4), None])
