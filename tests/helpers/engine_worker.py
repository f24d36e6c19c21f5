"""Runs vLLM engines one after the other in a process of its own: JSON jobs on standard input, JSON results in a file.

A job is {"model": folder, "options": {...}, "prompts": [[token, ...], ...], "max_tokens": n, "substitute": name}. Its
result holds the top-k of every MoE layer read from the live modules, prompt log-probabilities and greedy tokens; or the
error. A substitute (see `SUBSTITUTES`) stands in for what vLLM's CPU build lacks, or breaks something on purpose.
"""

import gc
import json
import os
import sys
from contextlib import ExitStack, nullcontext
from functools import wraps
from pathlib import Path
from unittest import mock

DEFAULTS = dict(
    dtype="float32",
    max_model_len=64,
    max_num_batched_tokens=64,
    enforce_eager=True,
    skip_tokenizer_init=True,
    gpu_memory_utilization=0.1,
    seed=0,
)


def torch_moe_kernels():
    """MiniCPM's block calls two Triton kernels by name: the same in plain torch."""
    import torch
    import vllm.model_executor.models.minicpm as minicpm

    def fused_topk(hidden, logits, top_k, renormalize):
        weights, ids = logits.float().softmax(-1).topk(top_k)
        return (weights / weights.sum(-1, keepdim=True) if renormalize else weights), ids, None

    def fused_experts(hidden, gate_up, down, weights, ids):
        out = torch.zeros_like(hidden)
        for token, expert in ((t, e) for t in range(ids.shape[0]) for e in range(ids.shape[1])):
            gate, up = (gate_up[ids[token, expert]] @ hidden[token]).chunk(2)
            out[token] += weights[token, expert] * (down[ids[token, expert]] @ (torch.nn.functional.silu(gate) * up))
        return out

    return mock.patch.multiple(minicpm, fused_topk=fused_topk, fused_experts=fused_experts)


def no_vision_tower():
    """DeepSeek-VL2's tower needs timm and torchvision; prompts of text alone never reach it."""
    import torch
    from vllm.model_executor.models.deepseek_vl2 import DeepseekVLV2ForCausalLM

    return mock.patch.object(DeepseekVLV2ForCausalLM, "_init_vision_module", lambda *_, **__: torch.nn.Module())


def newer_vllm():
    """A vLLM that nobody has read yet."""
    import vllm

    return mock.patch.object(vllm, "__version__", "0.34.0")


def unknown_blocks():
    """An adapter that has never heard of MiniCPM's block."""
    from lexi_adapter.serving import vllm_build

    return mock.patch.object(vllm_build, "OWN_BLOCKS", ())


def stubborn_router():
    """A vLLM whose factory makes its router with another top-k than it was asked for."""
    from vllm.model_executor.layers.fused_moe import layer

    make = layer.create_fused_moe_router
    return mock.patch.object(layer, "create_fused_moe_router", lambda *, top_k, **rest: make(top_k=4, **rest))


def external_routing():
    """vLLM's transformers backend as it serves a block that it cannot read: routed by transformers' own code."""
    import vllm.model_executor.models.transformers.moe as backend

    return mock.patch.object(backend.MoEBlockFuser, "match", lambda *_: None)


def monolithic_kernel():
    """A vLLM whose kernel of the experts routes as well, as some of FlashInfer's do."""
    from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

    return mock.patch.object(FusedMoEMethodBase, "is_monolithic", property(lambda _: True))


def simulated_routing():
    """vLLM's setting that replaces every router by one that chooses at random."""
    return mock.patch.dict(os.environ, VLLM_MOE_ROUTING_SIMULATION_STRATEGY="uniform_random")


def corrupted_layer():
    """A vLLM that gives one layer's kernels another top-k than its router, once all are built."""

    def corrupt(layers):
        layers[1].mlp.experts.moe_config.experts_per_token = 4

    return change_built_layers(corrupt)


def projected_experts():
    """A vLLM whose experts work on a projection of the layer's input."""
    import torch

    def project(layers):
        layers[0].mlp.experts.routed_output_transform = torch.nn.Identity()

    return change_built_layers(project)


def change_built_layers(change):
    from vllm.model_executor.models.olmoe import OlmoeForCausalLM

    build = OlmoeForCausalLM.__init__

    @wraps(build)  # vLLM looks at the signature
    def build_and_change(self, *args, **kwargs):
        build(self, *args, **kwargs)
        change(self.model.layers)

    return mock.patch.object(OlmoeForCausalLM, "__init__", build_and_change)


def hub_id():
    """A model whose files are found only when they are loaded, as those of a hub id are."""
    from lexi_adapter.serving import vllm_build, vllm_plugin

    patches = ExitStack()
    for module in (vllm_build, vllm_plugin):
        patches.enter_context(mock.patch.object(module, "is_folder", lambda _: False))
    return patches


def vanishing_file():
    """An allocation's file that is gone as soon as the first process has read it."""
    from lexi_adapter.serving import vllm_plugin

    read = vllm_plugin.read_allocation

    def read_and_remove(source, **options):
        allocation = read(source, **options)
        if isinstance(source, str):
            os.unlink(source)
        return allocation

    return mock.patch.object(vllm_plugin, "read_allocation", read_and_remove)


SUBSTITUTES = {
    "minicpm": torch_moe_kernels,
    "deepseek_vl2": no_vision_tower,
    "newer_vllm": newer_vllm,
    "unknown_blocks": unknown_blocks,
    "stubborn_router": stubborn_router,
    "external_routing": external_routing,
    "monolithic_kernel": monolithic_kernel,
    "simulated_routing": simulated_routing,
    "corrupted_layer": corrupted_layer,
    "projected_experts": projected_experts,
    "hub_id": hub_id,
    "vanishing_file": vanishing_file,
}


def run(job):
    from vllm import LLM, SamplingParams

    from lexi_adapter.serving import vllm_status
    from lexi_adapter.serving.vllm_build import read_top_k

    llm = LLM(job["model"], **DEFAULTS | job["options"])
    top_k, *others = llm.apply_model(read_top_k)
    assert all(other == top_k for other in others), "workers differ"
    sampling = SamplingParams(max_tokens=job["max_tokens"], temperature=0, detokenize=False, prompt_logprobs=0)
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    status = {"status": vllm_status.merge(llm.collective_rpc(vllm_status.METHOD))} if job["status"] else {}
    return status | {
        "top_k": top_k,
        "logprobs": [[next(iter(place.values())).logprob for place in o.prompt_logprobs[1:]] for o in outputs],
        "tokens": [list(o.outputs[0].token_ids) for o in outputs],
    }


def run_guarded(job):
    from vllm.distributed import cleanup_dist_env_and_memory

    try:
        with SUBSTITUTES[job["substitute"]]() if job["substitute"] else nullcontext():
            return run(job)
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}
    finally:
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    results = [run_guarded(job) for job in json.load(sys.stdin)]
    Path(sys.argv[1]).write_text(json.dumps(results))
