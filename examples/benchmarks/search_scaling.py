"""How the time of both searches grows with layers, k, budgets and population; many profiles at once; a whole command.

    python examples/benchmarks/search_scaling.py -o examples/benchmarks/results/search_scaling_h100
    python examples/benchmarks/search_scaling.py -o examples/benchmarks/results/search_scaling_cpu --command --short

One thing varies at a time around 32 layers, k up to 8, all budgets, a population of 512 and 400 generations. Every time
is the smallest of three after a first call that compiles. `--command` also times `lexi-search search` on a 61-layer
profile with every budget: a fresh process, import and compilation included, with an empty and with a filled cache.
Writes OUTPUT.json and OUTPUT.png.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np
from search_gap import GENERATIONS, POPULATION, describe_machine, make_table

from lexi_search.artifacts.identity import ModelIdentity
from lexi_search.artifacts.profile import LayerLoss, Profile, ProfileSettings
from lexi_search.artifacts.serialisation import write_profile
from lexi_search.solvers.evolution import search
from lexi_search.solvers.exact import solve, solve_many
from lexi_search.solvers.problem import pose

AXES = {
    "layers": (12, 24, 32, 48, 61),
    "k": (2, 4, 6, 8, 10),
    "budgets": (1, 8, 64, 225),
    "population": (64, 128, 256, 512, 1024),
}
PROFILES = 1000


def make_budgets(layers, last_k, count=None):
    every = np.arange(layers, layers * last_k + 1)
    return every if count is None else every[np.linspace(0, len(every) - 1, count + 2).round().astype(int)[1:-1]]


def time_of(run):
    run()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def measure(axis, value):
    settings = {"layers": 32, "k": 8, "budgets": None, "population": POPULATION} | {axis: value}
    losses = make_table("convex", settings["layers"], settings["k"])
    problem = pose(losses, make_budgets(settings["layers"], settings["k"], settings["budgets"]))
    seconds = time_of(lambda: search(problem, population=settings["population"]))
    evaluations = len(problem.budgets) * settings["population"] * (GENERATIONS + 1)
    return {
        "axis": axis,
        "value": value,
        "budgets": len(problem.budgets),
        "evolution_s": seconds,
        "evaluations_per_s": evaluations / seconds,
        "exact_s": time_of(lambda: solve(problem)),
    }


def measure_exact():
    """All budgets of 61 layers and k up to 8: one profile, and many."""
    problem = pose(make_table("convex", 61, 8), make_budgets(61, 8))
    tables = np.stack([make_table("convex", 61, 8, seed) for seed in range(PROFILES)])
    return {
        "one_profile_s": time_of(lambda: solve(problem)),
        "profiles": PROFILES,
        "many_profiles_s": time_of(lambda: solve_many(problem, tables)),
    }


def write_big_profile(path):
    layers = {
        index: LayerLoss(2, 4096, row, errors, row, errors)
        for index, row in enumerate(map(tuple, make_table("convex", 61, 8).tolist()))
        for errors in [tuple(value / 200 for value in row)]
    }
    identity = ModelIdentity(
        "deepseek_v3", 61, 256, 8, tuple(range(61)), "model.layers.{}.mlp.gate.weight", "num_experts_per_tok", "0" * 64
    )
    settings = ProfileSettings("paper", 0, 4, 512, "bfloat16", 0.01, 2**20)
    write_profile(path, Profile(identity, settings, layers, {"lexi_search": "benchmark"}))


def measure_command():
    with tempfile.TemporaryDirectory() as folder:
        write_big_profile(Path(folder) / "profile.json")
        arguments = ["search", "profile.json", "--budgets", "61:488:1", "-o", "allocations"]
        call = [sys.executable, "-c", "from lexi_search.cli.main import main; main()", *arguments]
        environment = {**os.environ, "XDG_CACHE_HOME": f"{folder}/cache"}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        seconds = {}
        for name in ("empty_cache_s", "filled_cache_s"):
            start = time.perf_counter()
            subprocess.run(call, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
            seconds[name] = time.perf_counter() - start
        return {"command": "lexi-search search profile.json --budgets 61:488:1", "layers": 61, "k": 8, **seconds}


def draw(rows, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3), layout="constrained")
    for axes, axis in zip(figure.subplots(1, len(AXES), sharey=True), AXES, strict=True):
        some = [row for row in rows if row["axis"] == axis]
        for name in ("evolution_s", "exact_s"):
            axes.loglog([row["value"] for row in some], [row[name] for row in some], "o-", label=name[:-2])
        axes.set_xlabel(axis)
        axes.set_xticks([row["value"] for row in some], [str(row["value"]) for row in some])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("seconds")
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=130)


@click.command(help=__doc__.splitlines()[0])
@click.option("-o", "--output", required=True, help="Writes OUTPUT.json and OUTPUT.png.")
@click.option("--command", is_flag=True, help="Time the whole command too.")
@click.option("--short", is_flag=True, help="Leave the growth with layers, k, budgets and population out.")
def main(output, command, short):
    result = {"machine": describe_machine(), "exact": measure_exact(), "scaling": []}
    click.echo(result["exact"])
    if command:
        result["command"] = measure_command()
        click.echo(result["command"])
    Path(f"{output}.json").write_text(json.dumps(result, indent=1) + "\n")
    for axis, values in AXES.items() if not short else ():
        for value in values:
            result["scaling"].append(measure(axis, value))
            click.echo(result["scaling"][-1])
            Path(f"{output}.json").write_text(json.dumps(result, indent=1) + "\n")
    if not short:
        draw(result["scaling"], f"{output}.png")


if __name__ == "__main__":
    main()
