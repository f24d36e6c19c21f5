"""Seconds of each phase of `lexi-search profile` on a whole checkpoint, beside a plain sequential read of its files.

    python examples/benchmarks/profile_phases.py CONFIG FOLDER [--layers N] [--run cold --run warm] [-o phases.json]
        [-- OPTIONS OF PROFILE]

CONFIG is a folder with a config.json. FOLDER is made, unless it is there already, on the disk that is to be measured:
a checkpoint of that shape, of its first `--layers` layers, in shards of a layer each, whose weights are cut from one
pool of N(0, 0.02) in bfloat16. Each run is a process of its own: `cold` after the files were dropped from the page
cache and with an empty cache of compiled programs, `warm` with both as the last run left them. Before each, the files
are read from start to end into one buffer, under the same conditions. What `profile --verbose` says is kept: seconds of
each phase and pass, bytes that were read, and the most host and device memory.
"""

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import click
import ml_dtypes
import numpy as np
from read_rate import drop_from_cache, read_plainly
from safetensors.numpy import save_file

POOL = 1 << 27  # numbers
# model_type -> what its checkpoints call the MoE block, and an expert's gate, up and down projection
NAMES = {
    "olmoe": ("mlp", "gate_proj", "up_proj", "down_proj"),
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
}
PROFILE = "from lexi_search.cli.main import main; main()"


def list_ends(config):
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    yield from (("model.embed_tokens.weight", (vocabulary, hidden)), ("lm_head.weight", (vocabulary, hidden)))
    yield "model.norm.weight", (hidden,)


def list_layer(config, layer):
    """Names and shapes of a decoder layer's tensors."""
    hidden, heads, kv_heads = (config[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    head = config.get("head_dim") or hidden // heads
    experts = config.get("num_experts") or config["num_local_experts"]
    width = config.get("moe_intermediate_size") or config["intermediate_size"]
    block, gate, up, down = NAMES[config["model_type"]]
    stem = f"model.layers.{layer}."
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield f"{stem}{norm}.weight", (hidden,)
    for name, rows in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
        yield f"{stem}self_attn.{name}_proj.weight", (rows * head, hidden)
    yield f"{stem}self_attn.o_proj.weight", (hidden, heads * head)
    if config["model_type"] != "mixtral":
        whole = config["model_type"] == "olmoe"
        for name, rows in (("q", heads), ("k", kv_heads)):
            yield f"{stem}self_attn.{name}_norm.weight", (rows * head if whole else head,)
    yield f"{stem}{block}.gate.weight", (experts, hidden)
    for expert in range(experts):
        for name, shape in ((gate, (width, hidden)), (up, (width, hidden)), (down, (hidden, width))):
            yield f"{stem}{block}.experts.{expert}.{name}.weight", shape


def make_checkpoint(config, folder):
    """Write config, index and shards; norms are 1."""
    rng, weight_map = np.random.default_rng(0), {}
    pool = (0.02 * rng.standard_normal(POOL, np.float32)).astype(ml_dtypes.bfloat16)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    shards = [list_ends(config), *(list_layer(config, layer) for layer in range(config["num_hidden_layers"]))]
    for number, shard in enumerate(shards):
        tensors = {}
        for name, shape in shard:
            size = int(np.prod(shape))
            start = int(rng.integers(POOL - size)) if size < POOL else 0
            values = pool[start : start + size] if size <= POOL else np.tile(pool, -(-size // POOL))[:size]
            tensors[name] = np.ones(shape, ml_dtypes.bfloat16) if len(shape) == 1 else values.reshape(shape)
        file = f"model-{number:05d}-of-{len(shards) - 1:05d}.safetensors"
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    os.sync()


def run_profile(folder, cache, options, *, output=None, environment=None):
    """Seconds of a whole process, and what it says on stderr; the profile is kept in the file `output`, if any."""
    with tempfile.TemporaryDirectory() as place:
        output = str(output or f"{place}/profile.json")
        command = [sys.executable, "-c", PROFILE, "profile", str(folder), "-o", output, "--verbose"]
        start = time.perf_counter()
        caching = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        done = subprocess.run(
            [*command, *options], env=os.environ | caching | (environment or {}), capture_output=True, text=True
        )
        seconds = time.perf_counter() - start
    if done.returncode:
        raise click.ClickException(done.stderr[-2000:])
    return seconds, done.stderr


def read_phases(said):
    """Phase -> (seconds, seconds of each pass)."""
    found = {}
    for line in said.splitlines():
        if match := re.fullmatch(r"([a-z ]+): (?:\d+ pass(?:es)?, )?([\d.]+) s(?: \(([\d., ]+)\))?", line):
            each = [float(one) for one in match[3].split(", ")] if match[3] else []
            found[match[1]] = (float(match[2]), each)
    return found


def list_facts(said):
    """The lines that say what was planned, read and held."""
    return [line for line in said.splitlines() if re.match(r"plan|read|host memory|.*: at most", line)]


@click.command(help=__doc__.splitlines()[0], context_settings={"ignore_unknown_options": True})
@click.argument("config", type=click.Path(path_type=Path, exists=True))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--layers", type=int, help="[default: the model's]")
@click.option("--run", "runs", multiple=True, default=("cold", "warm"), type=click.Choice(("cold", "warm")))
@click.option("-o", "--output", type=click.Path(path_type=Path))
@click.argument("options", nargs=-1)
def main(config, folder, layers, runs, output, options):
    described = json.loads((config / "config.json").read_text())
    described["num_hidden_layers"] = layers or described["num_hidden_layers"]
    if not folder.exists():
        make_checkpoint(described, folder)
    files = sorted(folder.glob("*.safetensors"))
    result = {
        "command": " ".join(["python examples/benchmarks/profile_phases.py", *sys.argv[1:]]),
        "host": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "date": date.today().isoformat(),
        "gigabytes": sum(path.stat().st_size for path in files) / 1e9,
        "layers": described["num_hidden_layers"],
        "runs": [],
    }
    click.echo(f"{config.name}, {described['num_hidden_layers']} layers, {result['gigabytes']:.1f} GB")
    with tempfile.TemporaryDirectory() as cache:
        programs = cache
        for run in runs:
            if run == "cold":
                drop_from_cache(files)
            start = time.perf_counter()
            read_plainly(files)
            reading = time.perf_counter() - start
            if run == "cold":
                drop_from_cache(files)
            programs = tempfile.mkdtemp(dir=cache) if run == "cold" else programs
            seconds, said = run_profile(folder, programs, options)
            phases = read_phases(said)
            lines = list_facts(said)
            result["runs"].append(
                {"run": run, "read_s": reading, "profile_s": seconds, "phases": phases, "said": lines}
            )
            parts = ", ".join(f"{name} {taken:.1f}" for name, (taken, _) in phases.items())
            click.echo(f"{run}: plain read {reading:.1f} s, profile {seconds:.1f} s: {parts}")
            for line in lines:
                click.echo(f"  {line}")
            if output:
                output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
