"""Seconds of the passes of `lexi-search profile` with one GPU and with several, on a checkpoint that one of them holds.

    python examples/benchmarks/profile_replicas.py CONFIG FOLDER [--layers N] [--gpus 1 --gpus 2 ...]
        [--samples 4096 --samples 32768 ...] [-o replicas.json] [-- OPTIONS OF PROFILE]

CONFIG and FOLDER are those of `profile_phases.py`, which makes the checkpoint unless it is there. For each number of
samples and of GPUs there are two runs, in processes of their own that see so many GPUs: one that compiles, into a cache
for all runs, and one that is measured. Printed are seconds of all passes but the first, which reads the files; of each
phase, where "text" leaves out that pass and "the rest" are divergences of all variants; how many times as fast they are
as with the smallest number of GPUs; and the largest relative difference between losses of the two profiles.

`--visible` says how a process is shown so many devices. Without GPUs it is by default `JAX_NUM_CPU_DEVICES={count}`, on
the CPU: that shows that it works and not how fast.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import click
import numpy as np
from profile_phases import list_facts, make_checkpoint, read_phases, run_profile
from profile_scaling import COUNT

from lexi_search.artifacts.serialisation import read_profile

VISIBLE = {"cpu": "JAX_NUM_CPU_DEVICES={count}", "gpu": "CUDA_VISIBLE_DEVICES={devices}"}


def show_devices(template, count):
    """The environment of a process that is to see so many devices."""
    name, value = template.split("=", 1)
    there = os.environ.get(name, "") if "{devices}" in value else ""
    devices = there.split(",") if there else list(map(str, range(count)))
    return {name: value.format(count=count, devices=",".join(devices[:count]))}


def list_seconds(phases):
    """Phase -> its seconds, without the first pass of all; and of all passes together."""
    seconds = {name: taken for name, (taken, _) in phases.items()}
    passes = [each or [taken] for name, (taken, each) in phases.items() if name not in ("opening", "the rest")]
    first = next(name for name in phases if name != "opening")
    seconds[first] -= passes[0][0]
    return {"passes": sum(map(sum, passes)) - passes[0][0], **seconds}


def compare(one, other):
    """The largest relative difference between losses of two profiles, of each kind."""
    found = {}
    for kind in ("rms", "relative", "divergence"):
        a, b = (np.array([getattr(loss, kind) for loss in profile.layers.values()]) for profile in (one, other))
        largest = np.maximum(np.abs(a), np.abs(b))
        found[kind] = float(np.divide(np.abs(a - b), largest, where=largest > 0, out=np.zeros_like(a)).max())
    return found


def measure(folder, cache, options, environment):
    """The second of two runs: its seconds, what it said, and its profile."""
    with tempfile.TemporaryDirectory() as place:
        for run in ("compiling", "measured"):
            output = Path(place) / f"{run}.json"
            seconds, said = run_profile(folder, cache, options, output=output, environment=environment)
        return seconds, said, read_profile(output)


@click.command(help=__doc__.splitlines()[0], context_settings={"ignore_unknown_options": True})
@click.argument("config", type=click.Path(path_type=Path, exists=True))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--layers", type=int, help="[default: the model's]")
@click.option("--gpus", "numbers", multiple=True, type=click.IntRange(1), help="[default: 1 and all there are]")
@click.option("--samples", "sizes", multiple=True, type=int, default=(4096, 32768), show_default=True)
@click.option(
    "--visible", help=f"NAME=VALUE with {{count}} or {{devices}}.  [default: {' or '.join(VISIBLE.values())}]"
)
@click.option("-o", "--output", type=click.Path(path_type=Path))
@click.argument("options", nargs=-1)
def main(config, folder, layers, numbers, sizes, visible, output, options):
    described = json.loads((config / "config.json").read_text())
    described["num_hidden_layers"] = layers or described["num_hidden_layers"]
    if not folder.exists():
        make_checkpoint(described, folder)
    counted = subprocess.run([sys.executable, "-c", COUNT], stdout=subprocess.PIPE, text=True, check=True).stdout
    there, backend, device = counted.strip().split("|")
    numbers = sorted(set(numbers or (1, max(int(there), 2))))
    if backend != "cpu" and numbers[-1] > int(there):
        raise click.ClickException(f"--gpus {numbers[-1]}: this host shows {there}")
    result = {
        "command": " ".join(["python examples/benchmarks/profile_replicas.py", *sys.argv[1:]]),
        "device": device,
        "host": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "date": date.today().isoformat(),
        "gigabytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e9,
        "layers": described["num_hidden_layers"],
        "rows": [],
    }
    click.echo(f"{config.name}, {result['layers']} layers, {result['gigabytes']:.1f} GB, {device}")
    with tempfile.TemporaryDirectory() as cache:
        for samples in sizes:
            base = None
            for gpus in numbers:
                environment = show_devices(visible or VISIBLE.get(backend, VISIBLE["gpu"]), gpus)
                own = [*options, "--samples", str(samples)]
                whole, said, profile = measure(folder, cache, own, environment)
                phases = read_phases(said)
                seconds = list_seconds(phases)
                row = {"samples": samples, "gpus": gpus, "profile_s": whole, "phases": phases, "seconds": seconds}
                row["said"] = list_facts(said)
                click.echo(f"{samples} samples, {gpus} GPUs: profile {whole:.1f} s; {row['said'][0].split('; ')[-1]}")
                base = base or (seconds, profile)
                row["times_as_fast"] = {
                    name: base[0][name] / taken for name, taken in seconds.items() if taken and name in base[0]
                }
                row["difference"] = compare(base[1], profile)
                for name, times in row["times_as_fast"].items():
                    click.echo(f"  {name:13} {seconds[name]:7.2f} s {times:6.2f} times as fast")
                click.echo("  differences: " + ", ".join(f"{name} {n:.2g}" for name, n in row["difference"].items()))
                result["rows"].append(row)
                if output:
                    output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
