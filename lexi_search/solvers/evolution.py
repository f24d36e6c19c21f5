"""Evolutionary search for the top-k of every layer: LExI (arXiv 2509.02753), stage 2, algorithm 2.

A population of allocations is evolved for each budget: tournament, uniform crossover per unit, balanced ±1 mutation,
repair, elitism. Every individual of every generation keeps its budget, bounds, groups and allowed values.

The paper leaves details open. They are chosen to keep the population diverse, since a population of near copies stops
short of the optimum (`examples/benchmarks/search_gap.py` measures each choice):

- Elitism is per member: each has one child, which replaces it unless the child is worse. So the best is never lost, and
  good allocations that differ from it survive for crossover.
- No copies: a child that equals a member of the population is dropped.
- The repair changes one unit after another, each up to its bound.
- The best uniform k of a budget, where there is one, is in the first population: the result is never worse.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from jaxtyping import Float, Float32, Float64, Int, Int32

from lexi_search.errors import InputError, check_memory
from lexi_search.solvers.exact import Optimum
from lexi_search.solvers.operators import Fitness, Settings, State, Task, start, step
from lexi_search.solvers.problem import (
    Problem,
    discretise,
    drop_dominated,
    find_uniform,
    read_levels,
    sum_over_layers,
    summarise,
)

# The members of a last population that are compared in float64, at most.
FINALISTS = 16
# The number of whole steps that costs are rounded to: few enough that sums are exact in float32.
COST_STEPS = 2**23
# The number of budgets that are evolved at once on one core of a CPU.
BLOCK = 8
# The arrays of a population's size that one generation holds at least: members, mates, children, what repair needs.
COPIES = 4
# The fields of a `Task` that have a row for each budget; the others are shared.
PER_BUDGET = ("budget", "uniform", "target")


class Evolved(NamedTuple):
    """The results of a search, row i for `budgets[i]`. Losses are in the table's unit, histories in the fitness's.

    `generations` is the number that were run. Where a budget ended early, its histories repeat their last value.
    """

    top_k: Int32[np.ndarray, "budgets layers"]
    loss: Float64[np.ndarray, " budgets"]
    best_history: Float32[np.ndarray, "budgets generations"]
    mean_history: Float32[np.ndarray, "budgets generations"]
    generations: Int32[np.ndarray, " budgets"]

    def __repr__(self) -> str:
        return f"<Evolved for {len(self.loss)} budgets: losses {summarise(self.loss)}>"


def _evolve(seed, task: Task, settings: Settings, restarts: int):
    """Evolve one budget: the fittest members of each restart's last population, and the history.

    A random key depends on seed, budget and restart only. A population that has reached its target does not change any
    more, so that a result does not depend on the others in the batch that go on.
    """

    def begin(restart):
        key = random.fold_in(random.fold_in(random.key(seed, impl="threefry2x32"), task.budget), restart)
        start_key, steps_key = random.split(key)
        return steps_key, start(start_key, task, settings)

    keys, states = jax.vmap(begin)(jnp.arange(restarts))
    history = jnp.full((2, settings.generations), jnp.inf)

    def goes_on(carry):
        number, states, _ = carry
        return (number < settings.generations) & ~(states.fitness.min() <= task.target)  # true for NaN

    def generation(carry):
        number, states, history = carry
        states = jax.vmap(lambda key, state: step(random.fold_in(key, number), state, task, settings))(keys, states)
        now = jnp.stack([states.fitness.min(), states.fitness.mean()])
        return number + 1, states, history.at[:, number].set(now)

    number, states, history = lax.while_loop(goes_on, generation, (jnp.int32(0), states, history))
    last = jnp.stack([states.fitness.min(), states.fitness.mean()])
    history = jnp.where(jnp.arange(settings.generations)[None, :] < number, history, last[:, None])
    fittest = lax.top_k(-states.fitness, min(FINALISTS, settings.population))[1]
    levels = jax.vmap(lambda levels, chosen: levels[chosen])(states.levels, fittest)
    return State(levels, jnp.take_along_axis(states.fitness, fittest, axis=1)), *history, number


@partial(jax.jit, static_argnames=("settings", "restarts"))
def _evolve_block(seed, tasks: Task, *, settings: Settings, restarts: int):
    """`_evolve` for some budgets at once; `tasks` has a row for each in the fields of `PER_BUDGET`."""
    axes = Task(*[0 if name in PER_BUDGET else None for name in Task._fields])
    return jax.vmap(lambda task: _evolve(seed, task, settings, restarts), (axes,))(tasks)


def make_tasks(
    problem: Problem,
    uniform: Int[np.ndarray, " budgets"],
    targets: Float[np.ndarray, " budgets"] | None = None,
) -> Task:
    """The problem for the device, with a row for every budget in the fields of `PER_BUDGET`.

    `uniform` is a k for the first population, or 0. Where it is not a level of a unit any more, a level that dominates
    it takes its place.
    """
    costs, budgets = discretise(problem, COST_STEPS)
    layer_costs = problem.costs[:, np.maximum(uniform, 1) - 1]  # [layers, budgets]
    unit_costs = np.stack([layer_costs[problem.unit_of == unit].sum(axis=0) for unit in range(len(costs))], axis=1)
    exists = np.arange(problem.ks.shape[1]) < problem.num_levels[:, None]
    levels = ((problem.unit_costs <= unit_costs[:, :, None]) & exists).sum(axis=2) - 1
    fits = costs[np.arange(len(costs)), levels].sum(axis=1) <= budgets
    levels = np.where(((uniform > 0) & fits & (levels >= 0).all(axis=1))[:, None], levels, -1)
    return Task(
        budget=budgets.astype(np.int32),
        uniform=levels.astype(np.int32),
        target=np.full(len(budgets), -np.inf, np.float32) if targets is None else targets,
        costs=costs.astype(np.int32),
        top=(problem.num_levels - 1).astype(np.int32),
        unit_losses=problem.unit_losses.astype(np.float32),
        losses=problem.losses.astype(np.float32),
        ks=problem.ks.astype(np.int32),
        unit_of=problem.unit_of.astype(np.int32),
    )


def _find_targets(problem: Problem, optimum: Optimum) -> Float32[np.ndarray, " budgets"]:
    """The fitness of the optimal allocations, rounded as on the device: summed unit by unit in float32."""
    first = np.unique(problem.unit_of, return_index=True)[1]
    is_k = problem.ks[None] == optimum.top_k[:, first, None]
    losses = problem.unit_losses.astype(np.float32)[np.arange(len(first)), is_k.argmax(axis=2)]
    return np.where(is_k.any(axis=2).all(axis=1), np.cumsum(losses, axis=1, dtype=np.float32)[:, -1], -np.inf)


def _run(tasks: Task, settings: Settings, *, restarts: int, seed: int):
    """`_evolve_block` over all budgets, in blocks."""
    count = len(tasks.budget)
    # On a CPU one block per core at once, and small, since a block runs until all of its budgets are done. On a GPU all
    # budgets at once. The last block is padded.
    on_cpu = jax.default_backend() == "cpu"
    block = min(count, BLOCK) if on_cpu else count
    rows = np.minimum(np.arange(-(-count // block) * block), count - 1).reshape(-1, block)

    def run(row):
        block_tasks = tasks._replace(**{name: getattr(tasks, name)[row] for name in PER_BUDGET})
        return jax.device_get(_evolve_block(np.uint32(seed), block_tasks, settings=settings, restarts=restarts))

    with ThreadPoolExecutor(max_workers=os.cpu_count() if on_cpu else 1) as pool:
        results = [run(rows[0]), *pool.map(run, rows[1:])]  # the first one compiles
    return jax.tree.map(lambda *blocks: np.concatenate(blocks)[:count], *results)


def _choose(
    problem: Problem, finalists: State, uniform: Int[np.ndarray, " budgets"]
) -> tuple[Int32[np.ndarray, "budgets layers"], Float64[np.ndarray, " budgets"]]:
    """The fittest allocation of each budget and its loss, from finalists [budgets, restarts, finalists].

    The fitness is float32: of the allocations within its rounding of the fittest, the one of least loss in float64 is
    chosen. Where the loss is the fitness, the `uniform` k (or 0) takes part even if rounded costs excluded it.
    """
    levels = finalists.levels.reshape(len(finalists.levels), -1, finalists.levels.shape[-1])
    top_k = read_levels(problem, levels)
    fitness = finalists.fitness.reshape(len(top_k), -1)
    least = fitness.min(axis=1, keepdims=True)
    ties = fitness <= least + len(problem.losses) * np.finfo(np.float32).eps * np.abs(least)
    loss = np.where(ties, sum_over_layers(problem.losses, top_k), np.inf)
    row, chosen = np.arange(len(top_k)), loss.argmin(axis=1)
    top_k, loss = top_k[row, chosen], loss[row, chosen]
    same = np.repeat(np.maximum(uniform, 1)[:, None], top_k.shape[1], axis=1)
    uniform_loss = np.where(uniform > 0, sum_over_layers(problem.losses, same), np.inf)
    better = uniform_loss < loss
    return np.where(better[:, None], same, top_k).astype(np.int32), np.where(better, uniform_loss, loss)


def _check_room(problem: Problem, population: int, generations: int, restarts: int) -> None:
    """Raise InputError where the populations that are evolved at once, or the histories of all, fit no memory."""
    budgets = len(problem.budgets)
    size = 4.0 * COPIES * population * len(problem.ks) * restarts * min(budgets, BLOCK)
    check_memory(f"populations of {population} allocations", size, "lower --population or --restarts")
    size = 4.0 * 2 * generations * budgets
    check_memory(f"histories of {generations} generations", size, "lower --generations")


def search(
    problem: Problem,
    *,
    population: int = 512,
    generations: int = 400,
    mutation_rate: float = 0.25,
    tournament: int = 2,
    restarts: int = 1,
    seed: int = 0,
    fitness: Fitness | None = None,
    optimum: Optimum | None = None,
) -> Evolved:
    """Evolve an allocation for every budget of `problem`, many in one compiled call, on JAX's default device.

    `restarts` populations of `population` members are evolved for each budget over `generations`; a mate is the
    fittest of `tournament` random members; a share `mutation_rate` of the children mutates. Given the `optimum`, a
    budget ends as soon as it is reached. A budget's result depends on `seed` and that budget, not on the others in the
    call.

    `fitness(losses, top_k) -> [population]`, lower is fitter, is traced once and gets the loss table in float32
    [layers, ks] and allocations [population, layers]; infinity excludes an allocation. The default is the paper's, the
    sum over layers. The returned `loss` is the table's sum in float64 whatever the fitness.

    Raises:
        InputError: a setting out of range, or a fitness that is NaN.
    """
    counts = {"population": population, "generations": generations, "tournament": tournament, "restarts": restarts}
    for name, count in counts.items():
        if count < 1:
            raise InputError(f"{name}={count} must be at least 1")
    if not 0 <= mutation_rate <= 1:
        raise InputError(f"mutation_rate={mutation_rate} must be within 0..1")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed={seed} must be within 0..{2**32 - 1}")
    uniform = find_uniform(problem)
    if fitness is None:
        problem = drop_dominated(problem)
    targets = None if optimum is None or fitness is not None else _find_targets(problem, optimum)
    _check_room(problem, population, generations, restarts)
    settings = Settings(population, generations, mutation_rate, tournament, problem.sums_to_budget, fitness)
    tasks = make_tasks(problem, uniform, targets)
    finalists, best, mean, ran = _run(tasks, settings, restarts=restarts, seed=seed)
    if np.isnan(best[:, 0]).any():
        raise InputError("the fitness is NaN for some allocation; it must order every allocation within the bounds")
    top_k, loss = _choose(problem, finalists, uniform if fitness is None else np.zeros_like(uniform))
    return Evolved(top_k, loss, best, mean, ran)
