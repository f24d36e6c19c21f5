"""The gate exponent in vLLM's routers as they are on CUDA, with stand-ins for the kernels; engines test the CPU's."""

import sys
from types import SimpleNamespace

import pytest
import torch

from lexi_adapter.errors import AdapterError, AllocationError
from lexi_adapter.serving import vllm_gates
from lexi_adapter.serving.kernels.gates import compensate
from lexi_adapter.serving.vllm_gates import compensate_layer
from lexi_adapter.serving.vllm_names import FIRST, ROUTERS

OWN, TOP_K, EXPONENT = 4, 2, 0.5
LOGITS = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


class Router:
    """A softmax router that renormalises; its kernel returns what it chose best first, or in some other order."""

    scoring_func = "softmax"
    e_score_correction_bias = None
    best_first = True

    def __init__(self):
        self.top_k, self.widths = TOP_K, []

    def _compute_routing(self, hidden_states, router_logits, indices_type, *, input_ids=None):
        self.widths.append(self.top_k)
        weights, ids = router_logits.softmax(-1).topk(self.top_k)
        weights = weights / weights.sum(-1, keepdim=True)
        return (weights, ids) if self.best_first else (weights.flip(-1), ids.flip(-1))


def make_layer(name="FusedTopKRouter", **attributes):
    """A built layer as vllm_gates sees it, whose router is a class of that name."""
    experts = SimpleNamespace(quant_method=SimpleNamespace(is_monolithic=False), forward_monolithic=lambda **_: None)
    return SimpleNamespace(router=type(name, (Router,), attributes)(), routed_experts=experts)


@pytest.fixture
def cuda(monkeypatch, narrow):
    """A platform that says it is CUDA, compiles without generating code, and interprets kernels."""
    platform = SimpleNamespace(is_cuda=lambda: True, simple_compile_backend="eager")
    monkeypatch.setitem(sys.modules, "vllm.platforms", SimpleNamespace(current_platform=platform))
    monkeypatch.setitem(sys.modules, "lexi_adapter.serving.kernels.triton_gates", SimpleNamespace(narrow=narrow))
    vllm_gates.fuse.cache_clear()
    yield
    vllm_gates.fuse.cache_clear()


def expect():
    """The weights of the definition, as experts x tokens."""
    scores = LOGITS.softmax(-1)
    base, ids = scores.topk(OWN)
    base = base / base.sum(-1, keepdim=True)
    return torch.zeros(5, 8).scatter(1, ids[:, :TOP_K], compensate(base, base[:, :TOP_K], EXPONENT))


@pytest.mark.parametrize(("name", "order"), ROUTERS.items())
def test_a_compensated_router_chooses_and_weighs_by_the_definition(cuda, name, order):
    layer = make_layer(name, best_first=order == FIRST)
    compensate_layer(layer, "layer 0", TOP_K, OWN, EXPONENT)
    weights, ids = layer.router._compute_routing(torch.zeros(5, 1), LOGITS, None, input_ids=None)
    assert weights.shape == ids.shape == (5, TOP_K) and weights.is_contiguous() and ids.is_contiguous()
    torch.testing.assert_close(torch.zeros(5, 8).scatter(1, ids, weights), expect())
    assert layer.router.top_k == TOP_K  # as the kernels and buffers were sized for
    assert layer.router.widths == ([OWN, TOP_K] if order is None else [OWN])  # one choice where the order is known


@pytest.mark.parametrize(
    ("name", "attributes"),
    [
        ("FusedTopKBiasRouter", {"scoring_func": "sqrtsoftplus"}),  # whose kernel was not read
        ("GroupedTopKRouter", {"e_score_correction_bias": torch.zeros(8)}),  # whose weights are not what selects
    ],
)
def test_where_the_order_is_not_known_the_router_chooses_again(cuda, name, attributes):
    layer = make_layer(name, best_first=False, **attributes)
    compensate_layer(layer, "layer 0", TOP_K, OWN, EXPONENT)
    weights, ids = layer.router._compute_routing(torch.zeros(5, 1), LOGITS, None)
    torch.testing.assert_close(torch.zeros(5, 8).scatter(1, ids, weights), expect())
    assert layer.router.widths == [OWN, TOP_K]


def test_what_routes_by_itself_is_refused_at_once_or_when_it_runs(cuda):
    for name, attributes, message in (
        ("ZeroExpertRouter", {}, "layer 0: no gate exponent can be applied in a ZeroExpertRouter"),
        ("GroupedTopKRouter", {"num_fused_shared_experts": 1}, "layer 0: .* where shared experts are routed"),
    ):
        with pytest.raises(AllocationError, match=message):
            compensate_layer(make_layer(name, **attributes), "layer 0", TOP_K, OWN, EXPONENT)
    layer = make_layer()
    compensate_layer(layer, "layer 0", TOP_K, OWN, EXPONENT)
    with pytest.raises(AdapterError, match="layer 0: the kernel of SimpleNamespace routes by itself"):
        layer.routed_experts.forward_monolithic(x=None, router_logits=None)
    layer.routed_experts.quant_method.is_monolithic = True
    with pytest.raises(AdapterError, match="take another with --moe-backend triton"):
        compensate_layer(layer, "layer 0", TOP_K, OWN, EXPONENT)
