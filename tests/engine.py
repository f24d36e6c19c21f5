"""Allocations for tiny checkpoints, and real vLLM engines to run them, each in a process that ends with the test."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny import make_checkpoint
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from lexi_search.artifacts import Allocation, to_document
from lexi_search.checkpoint import open_checkpoint
from lexi_search.exporters import make_vllm_overrides, write_folder
from lexi_search.models import describe

WORKER = Path(__file__).with_name("engine_worker.py")
PROMPTS = [[3, 4, 5, 6, 7, 8, 9, 10], [100, 90, 80, 70, 60, 50], [200, 3, 201, 5, 202, 7, 203]]
# vLLM's own rotary embedding of DeepSeek-V2 is wrong on the CPU; torch's is right.
NATIVE_ROTARY = {"compilation_config": {"custom_ops": ["all", "-rotary_embedding"]}}
OPTIONS = {
    "deepseek_v2": NATIVE_ROTARY,
    "deepseek_vl2": NATIVE_ROTARY | {"limit_mm_per_prompt": {"image": 0}, "skip_tokenizer_init": False},
    "minicpm": {"trust_remote_code": True},
}


# The only width of latent attention that vLLM's CPU build has kernels for.
LATENT_ATTENTION = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "head_dim": 64}
CHANGES = {"deepseek_v2": LATENT_ATTENTION, "deepseek_vl2": LATENT_ATTENTION}


def make_servable(family, folder):
    """The family's tiny checkpoint, in a shape that vLLM's CPU build can serve."""
    make_checkpoint(family, folder, **CHANGES.get(family, {}))
    if family == "deepseek_vl2":
        _complete_vision(folder)
    return folder


def _complete_vision(folder):
    """What vLLM's class loads besides the language model: two vectors, and a tokenizer that knows an image's place."""
    tensors = load_file(folder / "model.safetensors")
    width = tensors["language.model.norm.weight"].shape[0]
    save_file(tensors | {name: torch.zeros(width) for name in VISION}, folder / "model.safetensors")
    vocabulary = {f"t{token}": token for token in range(255)} | {"<image>": 255}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t0")), eos_token="t1", pad_token="t2"
    ).save_pretrained(folder)


VISION = ("image_newline", "view_seperator")


def allocate(folder, top_k=(1, 3, 2)):
    """An allocation for the checkpoint that gives its MoE layers the numbers of `top_k`, in turn."""
    model = describe(open_checkpoint(str(folder))).identity
    chosen = {layer: top_k[place % len(top_k)] for place, layer in enumerate(model.moe_layers)}
    return Allocation(
        model=model, top_k=chosen, budget=sum(chosen.values()), loss=0.0, optimal_loss=0.0, made_by={"test": True}
    )


def export(allocation, folder, target):
    """The folder that a serving team would get."""
    config = json.loads((folder / "config.json").read_text())
    write_folder(str(target), str(folder), make_vllm_overrides(allocation, config))
    return target


def make_job(model, options=None, prompts=PROMPTS, max_tokens=8, substitute=None):
    return {
        "model": str(model),
        "options": options or {},
        "prompts": prompts,
        "max_tokens": max_tokens,
        "substitute": substitute,
    }


def run_engines(*jobs, **environment):
    """Results of the jobs, run in turn by one new process; see engine_worker."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "results.json"
        done = start(sys.executable, str(WORKER), str(result), input=json.dumps(jobs), **environment)
        assert result.exists(), done.stderr[-3000:]
        return [_with_layers(job_result) for job_result in json.loads(result.read_text())]


def start(*command, input=None, timeout=300, **environment):
    """Run a command with vLLM's environment for a small machine, and capture its output."""
    defaults = dict(
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_NO_USAGE_STATS="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        HF_HUB_OFFLINE="1",
    )
    return subprocess.run(
        command, env=os.environ | defaults | environment, input=input, capture_output=True, text=True, timeout=timeout
    )


def _with_layers(result):
    if "top_k" in result:
        result["top_k"] = {int(layer): k for layer, k in result["top_k"].items()}
    return result


def to_json(allocation):
    return to_document(allocation)
