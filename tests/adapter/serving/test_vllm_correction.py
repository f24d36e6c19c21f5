"""The correction in vLLM's layers as they are on CUDA, with stand-ins for vLLM; engines test the CPU's."""

import sys
from types import SimpleNamespace

import pytest
import torch

from lexi_adapter.errors import AdapterError, AllocationError
from lexi_adapter.model.compensation import Correction
from lexi_adapter.serving import vllm_gates
from lexi_adapter.serving.kernels.correction import correct, find_features
from lexi_adapter.serving.kernels.gates import compensate
from lexi_adapter.serving.vllm_correction import adding, correct_layer, read_source, summing
from lexi_adapter.serving.vllm_gates import read_gate_exponent
from lexi_adapter.serving.vllm_names import ROUTERS

OWN, TOP_K, EXPONENT, EXPERTS, HIDDEN = 4, 2, 0.5, 8, 24
GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(5, EXPERTS, generator=GENERATOR)
INPUT = torch.randn(5, HIDDEN, generator=GENERATOR)
CORRECTION = Correction(
    torch.randn(3, 3 * EXPERTS, generator=GENERATOR).bfloat16(),
    torch.randn(HIDDEN, 3, generator=GENERATOR).bfloat16(),
    torch.randn(HIDDEN, generator=GENERATOR),
)


class Router:
    """A softmax router that renormalises, best first."""

    scoring_func, renormalize, e_score_correction_bias = "softmax", True, None
    num_expert_group = topk_group = 2

    def __init__(self):
        self.top_k = TOP_K

    def _compute_routing(self, hidden_states, router_logits, indices_type, *, input_ids=None):
        weights, ids = router_logits.softmax(-1).topk(self.top_k)
        return weights / weights.sum(-1, keepdim=True), ids.to(indices_type or torch.int32)


@adding
def copy_out(self, output, fused_expert_output, **_):
    output.copy_(fused_expert_output)
    return output


@summing
def sum_up(self, input, output, topk_ids=None, expert_map=None):
    output.copy_(input.sum(1))


class Runner(torch.nn.Module):
    """vLLM's layer in short: expert e gives e + 1 times its input; the output is copied out of a workspace.

    With a `sum` its experts' outputs are summed by it, with these further arguments.
    """

    do_naive_dispatch_combine = _fused_output_is_reduced = False
    shared = sum = None

    def __init__(self, name="FusedTopKRouter", *, scale=1.0, kernel="MoEPrepareAndFinalizeNoDPEPModular", **attributes):
        super().__init__()
        self.routed_output_transform = None
        self.router, self.routed_scaling_factor = type(name, (Router,), attributes)(), scale
        self.moe_config = SimpleNamespace(
            in_dtype=torch.float32, num_logical_experts=EXPERTS, pcp_size=1, is_sequence_parallel=False
        )
        finalize = type(kernel, (), {})()
        method = SimpleNamespace(
            is_monolithic=False, topk_indices_dtype=None, moe_kernel=SimpleNamespace(prepare_finalize=finalize)
        )
        self.routed_experts = SimpleNamespace(quant_method=method)

    def _apply_quant_method(self, hidden_states, router_logits, shared_experts_input, input_ids=None):
        weights, ids = self.router._compute_routing(hidden_states, router_logits, None, input_ids=input_ids)
        outputs = (weights * (ids + 1))[..., None] * hidden_states[:, None]
        workspace = outputs.sum(1)
        if self.sum is not None:
            sum_up(None, outputs, workspace, *self.sum)
        output = torch.empty_like(workspace)
        copied = copy_out(None, output=output, fused_expert_output=workspace)
        return self.shared, copied


class Distributed:
    """The place of this worker in its groups."""

    def __init__(self):
        self.tensor, self.experts = 0, 0

    def get_ep_group(self):
        return SimpleNamespace(rank_in_group=self.experts)

    def get_tensor_model_parallel_rank(self):
        return self.tensor


@pytest.fixture
def distributed(monkeypatch):
    distributed = Distributed()
    monkeypatch.setitem(sys.modules, "vllm.distributed", distributed)
    return distributed


class Calls(list):
    def __init__(self):
        super().__init__()
        self.shapes = []


@pytest.fixture
def kernels(monkeypatch, interpret, distributed):
    """A platform that says it is CUDA, and interpreted kernels; the names called, `shapes` of what they read."""
    calls = Calls()

    def count(name):
        def run(*args, **options):
            calls.append(name)
            calls.shapes.append(tuple(args[0].shape))
            return interpret("triton_correction", name, *args, **options)

        return run

    platform = SimpleNamespace(is_cuda=lambda: True, simple_compile_backend="eager")
    monkeypatch.setitem(sys.modules, "vllm.platforms", SimpleNamespace(current_platform=platform))
    package = "vllm.model_executor.layers.fused_moe.router"
    monkeypatch.setitem(sys.modules, package, SimpleNamespace(fused_topk_router=SimpleNamespace()))
    module = SimpleNamespace(MOST_ROUTED=256, **{name: count(name) for name in ("route", "narrow", "add")})
    monkeypatch.setitem(sys.modules, "lexi_adapter.serving.kernels.triton_correction", module)
    vllm_gates.fuse.cache_clear()
    yield calls
    vllm_gates.fuse.cache_clear()


def expect(scale=1.0, corrected=True):
    """The output of the definition, before the layer multiplies it by `scale`."""
    base, ids = LOGITS.softmax(-1).topk(OWN)
    base = base / base.sum(-1, keepdim=True)
    kept = ids[:, :TOP_K]
    plain = (compensate(base, base[:, :TOP_K], EXPONENT) * (kept + 1)).sum(-1, keepdim=True) * INPUT
    if not corrected:
        return plain
    return correct(plain * scale, find_features(LOGITS, base * scale, ids, kept), *CORRECTION) / scale


def build(*args, **options):
    runner = Runner(*args, **options)
    correct_layer(runner, "layer 0", TOP_K, OWN, EXPONENT, CORRECTION, source="a", device="cpu")
    return runner


def run(runner):
    return runner._apply_quant_method(INPUT, LOGITS, None, input_ids=None)


@pytest.mark.parametrize("name", ROUTERS)
def test_a_layer_adds_the_correction_in_the_kernels_that_run_anyway(kernels, name):
    runner = build(name)
    shared, output = run(runner)
    torch.testing.assert_close(output, expect(), rtol=1e-5, atol=1e-5)
    routed = {"FusedTopKRouter": ["route"], "FusedTopKBiasRouter": ["narrow"], "GroupedTopKRouter": ["narrow"]}
    assert shared is None and kernels == [*routed.get(name, []), "add"]
    assert (read_gate_exponent(runner), read_source(runner)) == (EXPONENT, "a")
    assert set(runner.state_dict()) == set() and len(dict(runner.named_buffers())) == 3  # nothing loads into them


def test_groups_of_one_are_a_plain_softmax(kernels):
    torch.testing.assert_close(run(build("GroupedTopKRouter", num_expert_group=1, topk_group=1))[1], expect())
    assert kernels == ["route", "add"]


@pytest.mark.parametrize("others", [(), (None, None), ("ids", "map")])
def test_experts_that_are_summed_by_a_kernel_get_the_correction_there(kernels, others):
    """Once, whether in the sum or, where it leaves out experts of other workers, in the copy after it."""
    runner = build()
    runner.sum = others
    torch.testing.assert_close(run(runner)[1], expect(), rtol=1e-5, atol=1e-5)
    assert kernels == ["route", "add"]
    assert kernels.shapes[-1] == ((5, HIDDEN) if "map" in others else (5, TOP_K, HIDDEN))
    runner = build(kernel="DeepEPHTPrepareAndFinalize")
    runner.sum = others
    torch.testing.assert_close(run(runner)[1], expect(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(run(Runner())[1], run_with_sum(others))


def run_with_sum(others):
    """The output of a layer without correction."""
    runner = Runner()
    runner.sum = others
    return run(runner)[1]


def test_where_the_output_comes_by_another_way_it_is_added_afterwards(kernels):
    runner = build(kernel="DeepEPHTPrepareAndFinalize")
    runner.shared = torch.ones(5, HIDDEN)
    shared, output = run(runner)
    torch.testing.assert_close(output, expect(), rtol=1e-5, atol=1e-5)
    assert (shared == 1).all() and kernels == ["route", "add"]


def test_a_layer_that_scales_its_output_later_gets_the_correction_in_those_units(kernels):
    for scale in (1.0, 2.5):
        torch.testing.assert_close(run(build(scale=scale))[1], expect(scale), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "ranks", "adds"),
    [
        ({}, (0, 0), True),
        ({}, (1, 1), False),  # tensor parallel, experts spread or not: summed over the tensor-parallel group
        ({}, (0, 2), True),  # another replica's tokens
        ({"do_naive_dispatch_combine": True}, (0, 0), True),
        ({"do_naive_dispatch_combine": True}, (0, 2), False),  # all replicas' tokens, summed over all
        ({"_fused_output_is_reduced": True}, (1, 1), True),
        ({"is_sequence_parallel": True}, (1, 1), True),
        ({"pcp_size": 2}, (0, 1), False),
    ],
)
def test_the_correction_is_added_once_for_every_token(kernels, distributed, changes, ranks, adds):
    distributed.tensor, distributed.experts = ranks
    runner = build()
    runner.moe_config.moe_parallel_config = SimpleNamespace(use_all2all_kernels=False)
    for name, value in changes.items():
        setattr(runner.moe_config if name in vars(runner.moe_config) else runner, name, value)
    torch.testing.assert_close(run(runner)[1], expect(corrected=adds), rtol=1e-5, atol=1e-5)


def test_what_takes_no_correction_is_refused(kernels):
    projected = Runner()
    projected.routed_output_transform = torch.nn.Identity()
    with pytest.raises(AllocationError, match="layer 0: its experts' output is projected.*--compensation exponent"):
        correct_layer(projected, "layer 0", TOP_K, OWN, EXPONENT, CORRECTION, source="a", device="cpu")
    with pytest.raises(AllocationError, match="in a ZeroExpertRouter; .*--compensation none"):
        build("ZeroExpertRouter")
    unfinished = Runner()
    unfinished._apply_quant_method = lambda *_, **__: (None, "pieces")
    correct_layer(unfinished, "layer 0", TOP_K, OWN, EXPONENT, CORRECTION, source="a", device="cpu")
    with pytest.raises(AdapterError, match="layer 0: its kernel leaves the sum over experts to a later one"):
        run(unfinished)
