"""The evolutionary search beside DEAP, pymoo and plain Python: gap to the optimum and evaluations a second.

    pip install deap pymoo
    python examples/benchmarks/search_competitors.py [-o examples/benchmarks/results/search_competitors_cpu.json]
    python examples/benchmarks/search_competitors.py --alone [-o .../search_competitors_h100.json]

All get the same loss tables and the same number of evaluations: members x (generations + 1) for each budget. An
evaluation is the fitness of one allocation on its budget. `lexi_search` runs every budget of a table in one call, timed
after a first call that compiles. The others need seconds to minutes for one budget, so they run some of the budgets,
evenly spread; with --alone none. The others run in one thread, `lexi_search` on every core. A rate by CPU seconds is
what one core does, also on a machine that is not idle.

- plain Python: algorithm 2 of the paper read literally; tournament, uniform crossover, ±1 mutation, repair by random
  steps, one elite.
- DEAP 1.4: the same operators on DEAP's toolbox, with its own selection, statistics off.
- pymoo 0.6: its genetic algorithm for integers as its documentation has it (SBX and polynomial mutation, rounded),
  repaired to the budget in NumPy.
"""

import importlib.util
import json
import random
import time

import click
import numpy as np
from search_gap import GENERATIONS, MUTATION_RATE, POPULATION, TOURNAMENT, describe_machine, make_table, show

from lexi_search.solvers.evolution import search
from lexi_search.solvers.exact import solve
from lexi_search.solvers.problem import pose

LAYERS, KS, KINDS = (12, 24, 32, 61), (2, 4, 8), ("convex", "concave", "monotone")
EVALUATIONS = POPULATION * (GENERATIONS + 1)


def repair(top_k, budget, last_k, rng):
    """Random single steps until the budget is met, in place."""
    missing = budget - sum(top_k)
    step = 1 if missing > 0 else -1
    while missing:
        layer = rng.randrange(len(top_k))
        if 1 <= top_k[layer] + step <= last_k:
            top_k[layer] += step
            missing -= step
    return top_k


def vary(mother, father, budget, last_k, rng):
    """A child: uniform crossover, one expert moved with probability `MUTATION_RATE`, repaired."""
    child = [a if rng.random() < 0.5 else b for a, b in zip(mother, father, strict=True)]
    if rng.random() < MUTATION_RATE:
        donor, receiver = rng.randrange(len(child)), rng.randrange(len(child))
        if child[donor] > 1 and child[receiver] < last_k:
            child[donor] -= 1
            child[receiver] += 1
    return repair(child, budget, last_k, rng)


def make_random(layers, budget, last_k, rng):
    return repair([rng.randint(1, last_k) for _ in range(layers)], budget, last_k, rng)


def run_python(losses, budget, seed):
    rng, (layers, last_k), rows = random.Random(seed), losses.shape, losses.tolist()

    def judge(top_k):
        return sum(row[k - 1] for row, k in zip(rows, top_k, strict=True))

    def select():
        return min((rng.randrange(POPULATION) for _ in range(TOURNAMENT)), key=fitness.__getitem__)

    members = [make_random(layers, budget, last_k, rng) for _ in range(POPULATION)]
    fitness = [judge(member) for member in members]
    for _ in range(GENERATIONS):
        elite = min(range(POPULATION), key=fitness.__getitem__)
        born = [vary(members[select()], members[select()], budget, last_k, rng) for _ in range(POPULATION - 1)]
        members, fitness = [members[elite], *born], [fitness[elite], *map(judge, born)]
    return min(fitness), None


def run_deap(losses, budget, seed):
    from deap import base, creator, tools

    rng, (layers, last_k), rows = random.Random(seed), losses.shape, losses.tolist()
    random.seed(seed)  # DEAP's own operators draw from here
    if not hasattr(creator, "Member"):
        creator.create("Least", base.Fitness, weights=(-1.0,))
        creator.create("Member", list, fitness=creator.Least)
    toolbox = base.Toolbox()
    toolbox.register("evaluate", lambda member: (sum(row[k - 1] for row, k in zip(rows, member, strict=True)),))
    toolbox.register("mate", tools.cxUniform, indpb=0.5)
    toolbox.register("select", tools.selTournament, tournsize=TOURNAMENT)

    def judge(members):
        for member in members:
            member.fitness.values = toolbox.evaluate(member)

    def finish(member):
        member[:] = vary(member, member, budget, last_k, rng)
        del member.fitness.values

    members = [creator.Member(make_random(layers, budget, last_k, rng)) for _ in range(POPULATION)]
    judge(members)
    for _ in range(GENERATIONS):
        elite = tools.selBest(members, 1)
        born = [toolbox.clone(member) for member in toolbox.select(members, POPULATION)]
        for mother, father in zip(born[::2], born[1::2], strict=True):
            toolbox.mate(mother, father)
        for child in born:
            finish(child)
        judge(born)
        members = elite + tools.selBest(born, POPULATION - 1)
    return min(member.fitness.values[0] for member in members), None


def run_pymoo(losses, budget, seed):
    from pymoo.algorithms.soo.nonconvex.ga import GA
    from pymoo.core.problem import Problem
    from pymoo.core.repair import Repair
    from pymoo.operators.crossover.sbx import SBX
    from pymoo.operators.mutation.pm import PM
    from pymoo.operators.repair.rounding import RoundingRepair
    from pymoo.operators.sampling.rnd import IntegerRandomSampling
    from pymoo.optimize import minimize

    (layers, last_k), rng, count = losses.shape, np.random.default_rng(seed), [0]

    class OnBudget(Repair):
        def _do(self, problem, X, **kwargs):
            top_k = np.clip(np.round(X).astype(int), 1, last_k)
            while (off := np.flatnonzero(top_k.sum(axis=1) != budget)).size:
                sign = np.sign(budget - top_k[off].sum(axis=1, keepdims=True))
                has_room = np.where(sign > 0, top_k[off] < last_k, top_k[off] > 1)
                top_k[off, (rng.random(has_room.shape) * has_room).argmax(axis=1)] += sign[:, 0]
            return top_k

    class Allocations(Problem):
        def _evaluate(self, X, out, *args, **kwargs):
            count[0] += len(X)
            out["F"] = losses[np.arange(layers), X.astype(int) - 1].sum(axis=1)

    result = minimize(
        Allocations(n_var=layers, n_obj=1, xl=1, xu=last_k, vtype=int),
        GA(
            pop_size=POPULATION,
            sampling=IntegerRandomSampling(),
            crossover=SBX(vtype=float, repair=RoundingRepair()),
            mutation=PM(vtype=float, repair=RoundingRepair()),
            repair=OnBudget(),
            eliminate_duplicates=False,  # comparing all with all takes a hundred times as long
        ),
        termination=("n_eval", EVALUATIONS),
        seed=seed,
        verbose=False,
    )
    return float(result.F[0]), count[0]


COMPETITORS = {"plain Python": run_python, "DEAP": run_deap, "pymoo": run_pymoo}


class Clocks:
    """Seconds since it was made: on the wall, and of this process' CPU time in all of its threads."""

    def __init__(self):
        self.start = time.perf_counter(), time.process_time()

    def read(self):
        return time.perf_counter() - self.start[0], time.process_time() - self.start[1]


def measure_ours(losses, budgets, best):
    problem = pose(losses, budgets)
    search(problem)
    clocks = Clocks()
    found = search(problem)
    seconds = clocks.read()
    return summarise("lexi_search", len(budgets), found.loss, best, EVALUATIONS * len(budgets), seconds)


def measure_competitor(name, losses, budgets, best):
    clocks = Clocks()
    results = [COMPETITORS[name](losses, int(budget), seed) for seed, budget in enumerate(budgets)]
    seconds = clocks.read()
    evaluations = sum(count or EVALUATIONS for _, count in results)
    return summarise(name, len(budgets), np.array([loss for loss, _ in results]), best, evaluations, seconds)


def summarise(name, budgets, loss, best, evaluations, seconds):
    gap = np.divide(loss - best, best, where=best > 0, out=np.zeros_like(best))
    gap = np.where(gap < 1e-12, 0, gap)  # the others add in another order
    return {
        "search": name,
        "budgets": budgets,
        "above_optimum": int((gap > 0).sum()),
        "mean_gap": float(gap.mean()),
        "max_gap": float(gap.max()),
        "evaluations_per_s": evaluations / seconds[0],
        "evaluations_per_cpu_s": evaluations / seconds[1],
        "seconds_per_budget": seconds[0] / budgets,
    }


@click.command(help=__doc__.splitlines()[0])
@click.option("--alone", is_flag=True, help="Only lexi_search, such as on a GPU.")
@click.option("--budgets", "count", default=2, help="Budgets of each table that the others run.")
@click.option("--layers", "all_layers", multiple=True, type=int, default=LAYERS)
@click.option("--ks", multiple=True, type=int, default=KS)
@click.option("-o", "--output", help="JSON file to write, after every table.")
def main(alone, count, all_layers, ks, output):
    machine = describe_machine()
    if not alone:
        missing = [name for name in ("deap", "pymoo") if importlib.util.find_spec(name) is None]
        if missing:
            raise click.ClickException(f"pip install {' '.join(missing)}")
    rows = []
    for layers in all_layers:
        for last_k in ks:
            for kind in KINDS:
                losses = make_table(kind, layers, last_k)
                budgets = np.arange(layers, layers * last_k + 1)
                best = solve(pose(losses, budgets)).loss
                table = {"layers": layers, "k": last_k, "table": kind}
                measured = [measure_ours(losses, budgets, best)]
                if not alone:
                    some = np.unique(np.linspace(0, len(budgets) - 1, count + 2).round().astype(int)[1:-1])
                    # One kind of table is enough to see how fast the others are; their gap is seen on all at k = 8.
                    names = COMPETITORS if kind == "convex" or last_k == ks[-1] else ()
                    measured += [measure_competitor(name, losses, budgets[some], best[some]) for name in names]
                for row in measured:
                    rows.append(table | row)
                    click.echo("  ".join(f"{name} {show(value)}" for name, value in rows[-1].items()))
                if output:
                    with open(output, "w") as file:
                        json.dump({"machine": machine, "rows": rows}, file, indent=1)
                        file.write("\n")


if __name__ == "__main__":
    main()
