"""Does the evolutionary search reach the exact optimum with its defaults, and what does that cost?

    python examples/benchmarks/search_gap.py [--profile profile.json ...] [-o examples/benchmarks/results/search_gap]

First table: every budget of every (layers, k) on made-up loss tables of several kinds, one measured table, and given
profiles. A budget is unsolved if its loss is above that of the dynamic programme, however little; the gap is relative
to that loss. An evaluation is the fitness of one allocation. Compile is what the first call of a shape takes longer
than the second.

Second table: what each choice of `lexi_search.solvers.evolution` is worth. A second implementation of algorithm 2,
in NumPy and for one budget at a time, makes one change after another on the way from the textbook's reading (both
parents by tournament, children replace everybody but the best, repair by single steps at random layers) to the
search's own.
"""

import inspect
import json
import os
import platform
import sys
import time
from datetime import date
from pathlib import Path

import click
import jax
import numpy as np

from lexi_search.artifacts.profile import LOSS_KINDS
from lexi_search.artifacts.serialisation import read_profile
from lexi_search.solvers.evolution import search
from lexi_search.solvers.exact import solve
from lexi_search.solvers.problem import pose

LAYERS, KS = (12, 16, 24, 32, 61), (2, 4, 6, 8)
KINDS = ("convex", "concave", "alike", "monotone", "noise")
DEFAULTS = {
    name: inspect.signature(search).parameters[name].default
    for name in ("population", "generations", "mutation_rate", "tournament", "restarts", "seed")
}
POPULATION, GENERATIONS, MUTATION_RATE, TOURNAMENT = list(DEFAULTS.values())[:4]
ROUNDING = 1e-12  # relative; the NumPy variants add in another order than the dynamic programme

# Rise of the held-out cross-entropy, in 1e-6 nats, of a trained OLMoE-shaped model (12 layers, 32 experts, top-8) when
# one layer alone runs k = 1..7 experts; where the rise is below 0 (layer 2 at 7, layer 8 at 6 and 7), 0.
TRAINED = """
    71440 30942 14762 7900 3746 1542 303
    7236 4014 2445 1506 896 491 98
    8799 4509 2394 1296 620 285 0
    7005 3561 2276 1270 595 181 60
    9006 4640 2709 1514 863 497 157
    10338 5446 2789 1624 982 512 226
    10572 5314 2788 1615 868 401 134
    7750 3536 1836 1135 455 143 103
    8424 3910 1757 738 120 0 0
    14887 6892 3708 2150 1293 482 203
    17919 7993 4374 2464 1386 598 194
    48565 22224 11295 5617 2883 1218 419
"""


def make_table(kind, layers=12, last_k=8, seed=0):
    """A loss table [layers, last_k] of a kind; the last column is 0 except in "noise"."""
    rng = np.random.default_rng([seed, layers, last_k])
    k = np.arange(1, last_k + 1)
    scale = rng.lognormal(0, 0.6, (layers, 1))
    match kind:
        case "convex":  # like squared norms
            return scale * ((last_k / k) ** rng.uniform(0.8, 2.5, (layers, 1)) - 1)
        case "concave":  # like Frobenius norms: roots of what the dropped experts carried, so the last step is largest
            share = rng.uniform(0.6, 0.95, (layers, 1)) ** k
            return scale * np.sqrt((share.sum(axis=1, keepdims=True) - share.cumsum(axis=1)).clip(0))
        case "alike":  # concave, and layers differ by 1 %
            return np.sqrt((last_k - k) / last_k) * rng.normal(1, 0.01, (layers, 1))
        case "monotone":  # falls by steps of any size: convex and concave pieces
            return -np.sort(-rng.random((layers, last_k)), axis=1) * (k < last_k)
        case "noise":  # not even monotone
            return rng.random((layers, last_k))
        case "trained":
            return np.pad(np.array(TRAINED.split(), float).reshape(12, 7) / 1e6, ((0, 0), (0, 1)))
    raise ValueError(kind)


def compare(kind, losses, budgets, compile_s):
    """One row of the first table."""
    problem = pose(losses, budgets)
    start = time.perf_counter()
    found = search(problem)
    run_s = time.perf_counter() - start
    best = solve(problem).loss
    excess = found.loss - best
    evaluations = len(budgets) * POPULATION * (GENERATIONS + 1)
    return {
        "layers": losses.shape[0],
        "k": losses.shape[1],
        "table": kind,
        "budgets": len(budgets),
        "unsolved": int((excess > 0).sum()),
        "max_gap": float(np.divide(excess, best, out=excess.copy(), where=best > 0).max()),
        "evaluations_per_s": evaluations / run_s,
        "compile_s": compile_s,
        "run_s": run_s,
    }


def measure_gaps(profiles):
    tables = [(kind, layers, k) for layers in LAYERS for k in KS for kind in KINDS]
    tables = [(kind, make_table(kind, layers, k)) for kind, layers, k in tables] + [("trained", make_table("trained"))]
    for path in profiles:
        tables += [(f"{Path(path).stem}, {loss}", np.array(read_profile(path).losses(loss))) for loss in LOSS_KINDS]
    compiled = {}
    for kind, losses in tables:
        layers, last_k = losses.shape
        budgets = np.arange(layers, layers * last_k + 1)
        if losses.shape not in compiled:
            start = time.perf_counter()
            search(pose(losses, budgets))
            first_s = time.perf_counter() - start
            compiled[losses.shape] = first_s - compare(kind, losses, budgets, 0)["run_s"]
        yield compare(kind, losses, budgets, compiled[losses.shape])


def repair_by_single_steps(rng, top_k, budget, last_k):
    """Move to the budget by one step at a time, each at a random layer that has room."""
    top_k = top_k.copy()
    while (off := np.flatnonzero(top_k.sum(axis=1) != budget)).size:
        rows = top_k[off]
        sign = np.sign(budget - rows.sum(axis=1, keepdims=True))
        has_room = np.where(sign > 0, rows < last_k, rows > 1)
        top_k[off, (rng.random(rows.shape) * has_room).argmax(axis=1)] += sign[:, 0]
    return top_k


def repair_by_filling(rng, top_k, budget, last_k):
    """Move to the budget layer by layer from a random one on, each as far as its bound allows."""
    layers = top_k.shape[1]
    order = (rng.integers(layers, size=(len(top_k), 1)) + np.arange(layers)) % layers
    k = np.take_along_axis(top_k, order, axis=1)
    missing = budget - k.sum(axis=1, keepdims=True)
    room = np.where(missing > 0, last_k - k, k - 1)
    k += np.sign(missing) * np.clip(np.abs(missing) - (room.cumsum(axis=1) - room), 0, room)
    np.put_along_axis(top_k, order, k, axis=1)
    return top_k


def evolve_in_numpy(losses, budget, rng, *, repair, elitism_at_every_place, drop_copies):
    """Algorithm 2 for one budget with the search's settings; the loss of the best allocation."""
    layers, last_k = losses.shape
    place, layer = np.arange(POPULATION), np.arange(layers)
    marks = rng.integers(2**62, size=layers)

    def select():
        rivals = rng.integers(POPULATION, size=(TOURNAMENT, POPULATION))
        return rivals[loss[rivals].argmin(axis=0), place]

    top_k = repair(rng, rng.integers(1, last_k + 1, (POPULATION, layers)), budget, last_k)
    loss = losses[layer, top_k - 1].sum(axis=1)
    for _ in range(GENERATIONS):
        parent = place if elitism_at_every_place else select()
        child = np.where(rng.random(top_k.shape) < 0.5, top_k[parent], top_k[select()])
        donor, receiver = rng.integers(layers, size=(2, POPULATION))
        moves = (child[place, donor] > 1) & (child[place, receiver] < last_k)
        moves &= rng.random(POPULATION) < MUTATION_RATE
        child[place, donor] -= moves
        child[place, receiver] += moves
        child = repair(rng, child, budget, last_k)
        child_loss = losses[layer, child - 1].sum(axis=1)
        born = child_loss <= loss if elitism_at_every_place else place != loss.argmin()
        if drop_copies:
            born &= ~np.isin(child @ marks, top_k @ marks)
        top_k[born], loss[born] = child[born], child_loss[born]
    return loss.min()


VARIANTS = {
    "textbook": (repair_by_single_steps, False, False),
    "+ repair by filling": (repair_by_filling, False, False),
    "+ elitism at every place": (repair_by_filling, True, False),
    "+ copies dropped (the search)": (repair_by_filling, True, True),
    "the search with single steps": (repair_by_single_steps, True, True),
    "the search with one elite": (repair_by_filling, False, True),
}


def measure_variants():
    layers, last_k = 61, 8
    budgets = np.arange(layers, layers * last_k + 1)[20::40]
    for kind in ("convex", "concave", "monotone"):
        losses = make_table(kind, layers, last_k)
        best = solve(pose(losses, budgets)).loss
        for name, (repair, everywhere, drop_copies) in VARIANTS.items():
            start = time.perf_counter()
            options = {"repair": repair, "elitism_at_every_place": everywhere, "drop_copies": drop_copies}
            found = [evolve_in_numpy(losses, b, np.random.default_rng(b), **options) for b in budgets]
            gap = np.array(found) / best - 1
            yield {
                "table": kind,
                "variant": name,
                "budgets": len(budgets),
                "unsolved": int((gap > ROUNDING).sum()),
                "mean_gap": float(gap.clip(0).mean()),
                "max_gap": float(gap.clip(0).max()),
                "evaluations_per_s": len(budgets) * POPULATION * (GENERATIONS + 1) / (time.perf_counter() - start),
            }


def describe_machine():
    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return {
        "command": " ".join(["python", *sys.argv]),
        "date": date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "cpu": f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores",
        "load_average": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "numpy": np.__version__},
        "settings": DEFAULTS,
    }


def show(value):
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def tabulate(rows):
    yield "| " + " | ".join(rows[0]) + " |"
    yield "|" + "---|" * len(rows[0])
    for row in rows:
        yield "| " + " | ".join(map(show, row.values())) + " |"


@click.command(help=__doc__.splitlines()[0])
@click.option("--profile", "profiles", multiple=True, type=click.Path(exists=True), help="Add the tables of a profile.")
@click.option("-o", "--output", help="Write the numbers to OUTPUT.json and the tables to OUTPUT.md.")
def main(profiles, output):
    result = {"machine": describe_machine(), "gaps": [], "variants": []}
    for name, measured in (("gaps", measure_gaps(profiles)), ("variants", measure_variants())):
        for row in measured:
            result[name].append(row)
            click.echo("  ".join(f"{key} {show(value)}" for key, value in row.items()))
            if output:  # after every row: hours of measuring are not lost with the last of them
                write(output, result)


def write(output, result):
    header = [f"- {key}: {value}" for key, value in result["machine"].items()]
    text = ["# Gap to the optimum and time of the search", "", *header]
    for rows in filter(None, (result["gaps"], result["variants"])):
        text += ["", *tabulate(rows)]
    Path(f"{output}.md").write_text("\n".join([*text, ""]))
    Path(f"{output}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
