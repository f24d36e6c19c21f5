"""What a gate exponent costs in vLLM's routers on this GPU, and whether they then weigh as the definition says.

    python examples/benchmarks/gate_exponent.py [-o gate_exponent.json]

Each router chooses k of its own K experts for random logits, as it is and with the exponent 0.5; CUDA graphs of 50
calls are replayed, as a decode step replays them. Printed: microseconds a call, median of 50 replays, and the largest
difference of a weight from its definition in float64, relative to the token's largest.
"""

from types import SimpleNamespace
from typing import NamedTuple

import click
import torch
from cuda_graphs import time_calls

from lexi_adapter.environment import describe_call
from lexi_adapter.files import write_json
from lexi_adapter.serving.vllm_gates import compensate_layer

EXPONENT = 0.5


class Case(NamedTuple):
    """A router: experts to choose from, the model's own k and the layer's, and arguments of vLLM's own."""

    name: str
    experts: int
    own_top_k: int
    top_k: int
    options: dict


CASES = (
    Case("softmax (OLMoE)", 64, 8, 4, {"renormalize": False}),
    Case("softmax, renormalised (Qwen3)", 128, 8, 3, {"renormalize": True}),
    Case("groups of one (DeepSeek-V2-Lite)", 64, 6, 3, {"renormalize": False, "groups": (1, 1)}),
    Case("groups (DeepSeek-V2)", 160, 6, 3, {"renormalize": False, "groups": (8, 3), "routed_scaling_factor": 16.0}),
    Case("sigmoid, groups, bias (DeepSeek-V3)", 256, 8, 4, {"renormalize": True, "groups": (8, 4), "bias": True}),
)


def make_router(case, top_k, bias):
    from vllm.model_executor.layers.fused_moe.router.router_factory import create_fused_moe_router

    options = dict(case.options)
    if groups := options.pop("groups", None):
        options |= {"use_grouped_topk": True, "num_expert_group": groups[0], "topk_group": groups[1]}
    if options.pop("bias", False):
        options |= {"scoring_func": "sigmoid", "e_score_correction_bias": bias}
    return create_fused_moe_router(top_k=top_k, global_num_experts=case.experts, **options)


def compensate(router, case):
    """A layer's router after the plugin has been there."""
    experts = SimpleNamespace(quant_method=SimpleNamespace(is_monolithic=False), forward_monolithic=None)
    layer = SimpleNamespace(router=router, routed_experts=experts)
    compensate_layer(layer, "layer", case.top_k, case.own_top_k, EXPONENT)
    return layer.router


def find_difference(case, logits, bias, wide, weights, ids):
    """Largest relative difference of `weights` from w_i(K) (S_K / S_k)^b, the experts being those chosen."""
    scores = logits.double().sigmoid() if case.options.get("bias") else logits.double().softmax(-1)
    base, chosen = wide
    own = torch.zeros_like(scores).scatter(1, chosen.long(), base.double())
    mass = scores.gather(1, chosen.long()).sum(-1, keepdim=True) / scores.gather(1, ids.long()).sum(-1, keepdim=True)
    expected = own.gather(1, ids.long()) * mass**EXPONENT
    return float(((weights.double() - expected).abs() / expected.amax(-1, keepdim=True)).max())


def measure(case, tokens):
    generator = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(tokens, case.experts, device="cuda", generator=generator)
    bias = 0.1 * torch.randn(case.experts, device="cuda", generator=generator)
    hidden = torch.zeros(tokens, 1, device="cuda")
    plain, wide = (make_router(case, top_k, bias) for top_k in (case.top_k, case.own_top_k))
    compensated = compensate(make_router(case, case.top_k, bias), case)

    def route(router):
        return router._compute_routing(hidden, logits, None)

    weights, ids = route(compensated)
    _, kept = route(plain)
    return {
        "router": case.name,
        "class": type(plain).__name__,
        "top_k": [case.top_k, case.own_top_k, case.experts],
        "tokens": tokens,
        "microseconds": time_calls(lambda: route(plain)),
        "microseconds_with_exponent": time_calls(lambda: route(compensated)),
        "difference": find_difference(case, logits, bias, route(wide), weights, ids),
        "same_experts": bool((ids.sort(-1).values == kept.sort(-1).values).all()),
    }


@click.command(help=__doc__.splitlines()[0])
@click.option("-o", "--output", default="gate_exponent.json", show_default=True)
def main(output):
    from vllm.config import VllmConfig, set_current_vllm_config

    made_by = describe_call("python examples/benchmarks/gate_exponent.py")
    with set_current_vllm_config(VllmConfig()), torch.inference_mode():
        rows = [measure(case, tokens) for case in CASES for tokens in (16, 8192)]
    for row in rows:
        click.echo(
            f"{row['router']:36} {row['tokens']:5} tokens: {row['microseconds']:6.1f} us, with the exponent "
            f"{row['microseconds_with_exponent']:6.1f}; off by {row['difference']:.1e}, same experts: "
            f"{row['same_experts']}"
        )
    write_json(output, {"rows": rows, "device": torch.cuda.get_device_name(), "made_by": made_by})


if __name__ == "__main__":
    main()
