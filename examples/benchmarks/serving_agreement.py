"""Does vLLM, with the LExI plugin, compute what transformers computes under the same allocation?

    python examples/benchmarks/serving_agreement.py CHECKPOINT ALLOCATION [EXPORTED] [--dtype bfloat16] [--eager]
        [--engine '{"tensor_parallel_size": 2}']

Prompts are pieces of Python's standard library. vLLM runs twice, each time in a process of its own: the untouched
CHECKPOINT, and the EXPORTED folder, or without one the CHECKPOINT with ALLOCATION by --additional-config. Beside them
transformers runs the checkpoint as it is and under ALLOCATION, in the same element type. Printed, and written with -o:
the largest and mean absolute difference of prompt log-probabilities for each pair, how many prompts continue with the
same greedy tokens, and the k of every layer read from the live engine. What rounding alone does, transformers shows
against itself in float32, for each of the two: where fewer experts are active, one that rounding swaps weighs more.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import click

PROMPTS, LENGTH, NEW_TOKENS = 32, 128, 32


def read_prompts(checkpoint):
    """Token ids of `PROMPTS` pieces of `LENGTH` tokens, from modules of the standard library."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(checkpoint) / "tokenizer.json"))
    files = sorted(Path(os.__file__).parent.glob("*.py"))[::4]
    pieces = (tokenizer.encode(file.read_text(encoding="utf-8", errors="replace")).ids for file in files)
    return [ids[200 : 200 + LENGTH] for ids in pieces if len(ids) >= 200 + LENGTH][:PROMPTS]


def run_vllm(model, prompts, dtype, eager, options):
    """Log-probabilities, greedy tokens and k per layer, from an engine in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # `read_top_k` travels to the workers
    from vllm import LLM, SamplingParams
    from vllm import __version__ as version

    from lexi_adapter.serving.vllm_build import read_top_k

    # A key-value cache of known size: an engine that measured free memory would see what its neighbours take.
    memory = {"kv_cache_memory_bytes": 2**30, "gpu_memory_utilization": 0.05}
    llm = LLM(model, dtype=dtype, enforce_eager=eager, max_model_len=LENGTH + NEW_TOKENS, **memory | options)
    workers = llm.apply_model(read_top_k)
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    return {
        "vllm": version,
        "top_k": {str(layer): k for worker in workers for layer, k in worker.items()},
        "workers": len(workers),
        "logprobs": [[next(iter(place.values())).logprob for place in o.prompt_logprobs[1:]] for o in outputs],
        "tokens": [list(o.outputs[0].token_ids) for o in outputs],
    }


def run_transformers(checkpoint, allocation, prompts, dtype):
    import torch
    import transformers

    import lexi_adapter

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).to(device).eval()
    if allocation:
        lexi_adapter.apply(model, allocation)
    tokens = torch.tensor(prompts, device=device)
    with torch.inference_mode():
        logprobs = model(tokens).logits[:, :-1].float().log_softmax(dim=-1)
        chosen = logprobs.gather(-1, tokens[:, 1:, None])[..., 0].tolist()
        new = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        )
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "transformers": transformers.__version__,
        "logprobs": chosen,
        "tokens": new[:, LENGTH:].tolist(),
    }


def compare(ours, theirs):
    pairs = zip(sum(ours["logprobs"], []), sum(theirs["logprobs"], []), strict=True)
    differences = [abs(a - b) for a, b in pairs]
    same = sum(a[: len(b)] == b[: len(a)] for a, b in zip(ours["tokens"], theirs["tokens"], strict=True))
    return {
        "largest": max(differences),
        "mean": sum(differences) / len(differences),
        "same_continuations": f"{same} of {len(ours['tokens'])}",
    }


def run_apart(**job):
    """`run_vllm` or `run_transformers` in a new process: engines hold memory until theirs ends."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        if subprocess.run([sys.executable, __file__, "--job", json.dumps(job), "-o", str(path)]).returncode:
            raise click.ClickException(f"{job['engine']} failed; its own message is above")
        return json.loads(path.read_text())


@click.command(help=__doc__.splitlines()[0])
@click.argument("folders", nargs=-1)
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--eager", is_flag=True, help="No torch.compile and no CUDA graphs.")
@click.option("--engine", default="{}", help="Other arguments of vllm.LLM, as JSON.")
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Write the numbers here as JSON.")
@click.option("--job", hidden=True)
def main(folders, dtype, eager, engine, output, job):
    if job:
        job = json.loads(job)
        function = {"vllm": run_vllm, "transformers": run_transformers}[job.pop("engine")]
        Path(output).write_text(json.dumps(function(**job)))
        return
    checkpoint, allocation, *exported = folders
    options = json.loads(engine)
    described = json.loads(Path(allocation).read_text())
    given = {} if exported else {"additional_config": {"lexi_allocation": allocation}}
    shared = {"prompts": read_prompts(checkpoint), "dtype": dtype}
    vllm = {"engine": "vllm", "eager": eager, **shared}
    reference = {"engine": "transformers", "checkpoint": checkpoint, **shared}
    jobs = (
        {**vllm, "model": checkpoint, "options": options},
        {**vllm, "model": exported[0] if exported else checkpoint, "options": options | given},
        {**reference, "allocation": None},
        {**reference, "allocation": allocation},
        {**reference, "allocation": None, "dtype": "float32"},
        {**reference, "allocation": allocation, "dtype": "float32"},
    )
    with ThreadPoolExecutor(len(jobs)) as pool:
        base, mixed, base_reference, mixed_reference, *exact = pool.map(lambda job: run_apart(**job), jobs)
    result = {
        "command": " ".join(["python", "examples/benchmarks/serving_agreement.py", *map(shlex.quote, sys.argv[1:])]),
        "device": base_reference["device"],
        "date": date.today().isoformat(),
        "vllm": base["vllm"],
        "transformers": base_reference["transformers"],
        "dtype": dtype,
        "cuda_graphs": not eager,
        "workers": base["workers"],
        "prompts": [len(shared["prompts"]), LENGTH],
        "gate_exponent": described.get("gate_exponent"),
        "compensation": described.get("compensation"),
        "top_k": {"base": base["top_k"], "mixed": mixed["top_k"]},
        "base, vLLM against transformers": compare(base, base_reference),
        "mixed, vLLM against transformers": compare(mixed, mixed_reference),
        "base, transformers against itself in float32": compare(base_reference, exact[0]),
        "mixed, transformers against itself in float32": compare(mixed_reference, exact[1]),
        "mixed against base, vLLM": compare(mixed, base),
    }
    text = json.dumps(result, indent=1)
    if output:
        Path(output).write_text(text + "\n")
    click.echo(text)


if __name__ == "__main__":
    main()
