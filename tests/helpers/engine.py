"""Allocations for tiny checkpoints, and real vLLM engines to run them, each in a process that ends with the test."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import corrections
import torch
from safetensors.torch import load_file, save_file
from tiny import make_checkpoint
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from lexi_adapter.model.compensation import EXPORTED
from lexi_search.allocation.export import make_vllm_overrides, write_folder
from lexi_search.artifacts.allocation import Allocation
from lexi_search.artifacts.serialisation import to_document
from lexi_search.checkpoint.reader import open_checkpoint
from lexi_search.models.model import describe

HIDDEN = 64  # of every tiny model
WORKER = Path(__file__).with_name("engine_worker.py")
PROMPTS = [[3, 4, 5, 6, 7, 8, 9, 10], [100, 90, 80, 70, 60, 50], [200, 3, 201, 5, 202, 7, 203]]

# The CPU build's own rotary embedding is wrong for DeepSeek-V2's, and where queries come as [tokens, heads, head_dim],
# which it takes for one head. Torch's is right.
ROTATION = {"compilation_config": {"custom_ops": ["all", "-rotary_embedding"]}}
# The only width of latent attention that vLLM's CPU build has kernels for. Those that it prefers on processors with AMX
# do not take float32.
LATENT_ATTENTION = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "head_dim": 64}
LATENT_OPTIONS = ROTATION | {"attention_backend": "CPU_MLA"}
TYPES = ["linear_attention", "full_attention", "linear_attention"]
# Families beside the ones of `tiny.FAMILIES`, tried under one mixed allocation each, with what the engine's CPU build
# needs: heads of its kernels' sizes, and sixteen bits for gated delta nets.
MORE = {
    "axk1": LATENT_ATTENTION,
    "cohere2_moe": dict(tie_word_embeddings=True),
    "exaone_moe": {},
    "gemma4_text": {},
    "granitemoehybrid": dict(
        num_hidden_layers=3, layer_types=TYPES, mamba_n_heads=8, mamba_d_head=16, mamba_d_state=24
    ),
    "lfm2_moe": dict(num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"], tie_word_embeddings=True),
    "qwen3_next": dict(num_hidden_layers=3, layer_types=TYPES, linear_key_head_dim=128, linear_value_head_dim=128),
}
CHANGES = MORE | {"deepseek_v2": LATENT_ATTENTION, "deepseek_vl2": LATENT_ATTENTION}
OPTIONS = {
    "axk1": LATENT_OPTIONS,
    "lfm2_moe": ROTATION,
    "qwen3_next": {"dtype": "bfloat16"},
    "deepseek_v2": LATENT_OPTIONS,
    "deepseek_vl2": LATENT_OPTIONS | {"limit_mm_per_prompt": {"image": 0}, "skip_tokenizer_init": False},
    "deepseek": {"trust_remote_code": True},
    "minicpm": {"trust_remote_code": True},
}
WORKER_PROCESSES = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
SUBSTITUTED = ("deepseek_vl2", "minicpm")  # see engine_worker.SUBSTITUTES


class Run(NamedTuple):
    """The results of a process with engines, one per job, and everything it printed."""

    results: list[dict]
    log: str


def make_servable(family, folder):
    """The family's tiny checkpoint in a shape that vLLM's CPU build serves, with a tokenizer of one word per token."""
    make_checkpoint(family, folder, **CHANGES.get(family, {}))
    vocabulary = {f"t{token}": token for token in range(255)} | {"<image>": 255}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t0")), eos_token="t1", pad_token="t2"
    ).save_pretrained(folder)
    if family == "deepseek_vl2":  # vLLM's class wants these two vectors even if it leaves out the vision tower
        tensors = load_file(folder / "model.safetensors")
        vector = torch.zeros_like(tensors["language.model.norm.weight"])
        save_file(tensors | {"image_newline": vector, "view_seperator": vector.clone()}, folder / "model.safetensors")
    return folder


def allocate(folder, top_k=(1, 3, 2)):
    """An allocation for the checkpoint that gives its MoE layers the numbers of `top_k`, in turn."""
    model = describe(open_checkpoint(str(folder))).identity
    chosen = {layer: top_k[place % len(top_k)] for place, layer in enumerate(model.moe_layers)}
    return Allocation(
        model=model, top_k=chosen, budget=sum(chosen.values()), loss=0.0, optimal_loss=0.0, made_by={"test": True}
    )


def compensate(allocation, folder, name="corrections.safetensors"):
    """The path of the allocation with a gate exponent and random corrections, written into a folder of its own."""
    folder.mkdir()
    document = corrections.compensate(to_document(allocation), allocation.model, folder, hidden=HIDDEN)
    (folder / document["compensation"]["file"]).rename(folder / name)
    document["compensation"]["file"] = name
    (folder / "allocation.json").write_text(json.dumps(document))
    return folder / "allocation.json"


def export_compensated(allocation, folder, target):
    """Write and return a folder exported with the allocation and random corrections."""
    export(allocation, folder, target)
    document = json.loads(compensate(allocation, target / "written", EXPORTED).read_text())
    (target / "written" / EXPORTED).rename(target / EXPORTED)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").unlink()
    (target / "config.json").write_text(json.dumps(config | {"lexi_allocation": document}))
    return target


def export(allocation, folder, target):
    """Write and return the exported folder, `target`."""
    config = json.loads((folder / "config.json").read_text())
    write_folder(str(target), str(folder), make_vllm_overrides(allocation, config))
    return target


class Served(NamedTuple):
    """A servable OLMoE folder, an allocation for it, and the folder exported with it."""

    root: Path
    folder: Path
    allocation: Allocation
    exported: Path


def make_served(root):
    folder = make_servable("olmoe", root / "olmoe")
    allocation = allocate(folder)
    return Served(root, folder, allocation, export(allocation, folder, root / "exported"))


def make_overrides(served, **changes):
    """The --hf-overrides that the export would have given, with `changes`."""
    return make_vllm_overrides(served.allocation, json.loads((served.folder / "config.json").read_text())) | changes


def make_job(model, family="olmoe", *, substitute=None, max_tokens=8, status=False, **options):
    """One engine to start and the prompts to run on it, with what it states of its layers if `status`."""
    return {
        "model": str(model),
        "options": OPTIONS.get(family, {}) | options,
        "prompts": PROMPTS,
        "max_tokens": max_tokens,
        "status": status,
        "substitute": substitute or (family if family in SUBSTITUTED else None),
    }


def job_with(served, document, **options):
    """A job on the original folder, with the allocation (or its path) in additional_config."""
    return make_job(served.folder, additional_config={"lexi_allocation": document}, **options)


def two_workers():
    """Environment and options of an engine with two tensor-parallel workers, each on a core of its own if there are."""
    first, *rest = sorted(os.sched_getaffinity(0))
    cores = {"VLLM_CPU_OMP_THREADS_BIND": f"{first}|{rest[0] if rest else first}"}
    return WORKER_PROCESSES | cores, {"tensor_parallel_size": 2}


def run_engines(*jobs, **environment):
    """Run the jobs in turn in one new process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        done = start(sys.executable, str(WORKER), str(path), input=json.dumps(jobs), **environment)
        assert path.exists(), done.stderr[-3000:]
        return Run([_read_result(result) for result in json.loads(path.read_text())], done.stdout + done.stderr)


def start(*command, timeout=900, input=None, **environment):
    """Run a command in the environment that vLLM's CPU build needs on a small machine, and capture what it prints."""
    defaults = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    return subprocess.run(
        command,
        env=os.environ | defaults | environment,
        input=input,
        capture_output=True,
        text=True,
        errors="backslashreplace",
        timeout=timeout,
    )


def _read_result(result):
    layers = {int(layer): k for layer, k in result.get("top_k", {}).items()}
    return result | ({"top_k": layers} if layers else {})
