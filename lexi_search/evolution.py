"""Evolutionary search for the top-k of every layer: LExI (arXiv 2509.02753), stage 2, algorithm 2.

A population of allocations is evolved for each budget: tournament, uniform crossover per unit, balanced ±1 mutation,
repair, elitism. Every individual of every generation keeps its budget, bounds, groups and allowed values.

What the paper leaves open is chosen so that the population stays varied, since a population of near copies stops short
of the optimum (`examples/benchmarks/search_gap.py` measures each choice):

- Elitism holds at every place: a child is born to each member and takes that parent's place unless it is worse. So the
  best is never lost, and good allocations that differ from it live on to be crossed.
- No copies: a child that equals a member already there is dropped.
- The repair spends its steps on one unit after another, each up to its bound.
- The best uniform k of a budget, where there is one, is in the first population: the result is never worse.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from jaxtyping import Array, Float, Float32, Float64, Int, Int32, Key, UInt

from lexi_search.errors import InputError
from lexi_search.exact import Optimum
from lexi_search.problems import Problem, drop_dominated, find_uniform, sum_over_layers

# Members of a last population, at most, that are compared in float64.
FINALISTS = 16
# Costs become whole numbers whose largest sum is below this: their sums are exact, in float32 too.
COST_STEPS = 2**23
# Budgets that are evolved at once on a CPU.
BLOCK = 64

Fitness = Callable[[Float[Array, "layers ks"], Int[Array, "population layers"]], Float[Array, " population"]]


class Evolved(NamedTuple):
    """Row i belongs to `budgets[i]`. Losses are in the unit of the table; the histories in that of the fitness.

    `generations` is how many were run. Histories go on with the last of them where a budget was left early.
    """

    top_k: Int32[np.ndarray, "budgets layers"]
    loss: Float64[np.ndarray, " budgets"]
    best_history: Float32[np.ndarray, "budgets generations"]
    mean_history: Float32[np.ndarray, "budgets generations"]
    generations: Int32[np.ndarray, " budgets"]


class Task(NamedTuple):
    """One budget's problem on the device, in levels of units; `top` is each unit's last level.

    `budget` and `costs` are whole steps, counted from the cheapest levels on. `uniform` is an allocation for the first
    population, or negative. A population whose best fitness is at most `target` needs no more generations. `losses`,
    `ks` and `unit_of` are for a fitness that wants the k of layers.
    """

    budget: Int[Array, ""]
    uniform: Int[Array, " units"]
    target: Float[Array, ""]
    costs: Int[Array, "units levels"]
    top: Int[Array, " units"]
    unit_losses: Float[Array, "units levels"]
    losses: Float[Array, "layers ks"]
    ks: Int[Array, "units levels"]
    unit_of: Int[Array, " layers"]


class Settings(NamedTuple):
    """What is fixed at compile time. `mutation_rate` is the share of children that mutate.

    With `unit_steps` a level costs one step more than the one below it, and budgets are met exactly. Without a
    `fitness` the loss summed over layers is minimised.
    """

    population: int
    generations: int
    mutation_rate: float
    tournament: int
    unit_steps: bool
    fitness: Fitness | None


class State(NamedTuple):
    """A population, as levels of units, and its fitness, lower is fitter."""

    levels: Int[Array, "population units"]
    fitness: Float[Array, " population"]


def judge(levels: Int[Array, "population units"], task: Task, settings: Settings) -> Float[Array, " population"]:
    """The fitness: by default the paper's, the loss of each layer at its k, summed."""
    if settings.fitness is not None:
        return settings.fitness(task.losses, read_top_k(levels, task))
    return add_over_units(task.unit_losses, levels)


def read_top_k(levels: Int[Array, "population units"], task: Task) -> Int[Array, "population layers"]:
    """The k of every layer."""
    ks = jax.vmap(lambda row, level: row[level], (0, 1), 1)(task.ks, levels)
    return ks[:, task.unit_of]


def add_over_units(
    table: Float[Array, "units levels"], levels: Int[Array, "population units"]
) -> Float[Array, " population"]:
    """Sum over units of what `table` has at each one's level.

    Added unit after unit, because the order of a library sum may change with the shape of a batch, and a budget's
    result must not change with the company it is searched in.
    """

    def add(total, unit):
        row, level = unit
        return total + row[level], None

    # One kernel on a GPU, where launches are dear; on a CPU a loop compiles faster.
    unroll = 1 if jax.default_backend() == "cpu" else len(table)
    total, _ = lax.scan(add, jnp.zeros(len(levels), table.dtype), (table, levels.T), unroll=unroll)
    return total


def repair(
    levels: Int[Array, "population units"], first: Int[Array, " population"], task: Task, *, unit_steps: bool
) -> Int[Array, "population units"]:
    """Bring each allocation to its budget, spending what is over or left unit by unit from `first` on and round again.

    Each unit takes what is still to be spent, up to its bound: the whole minus the room of the units visited before
    it, clipped to 0..room. In a row on one unit, not one step here and one there: where a loss falls most at its last
    step, the good allocations have most units at a bound.

    With `unit_steps` the budget is met exactly, wherever it lies within what the bounds allow. Without, what is over
    goes first, then what is left is spent as far as the steps of the costs fit in.
    """
    if unit_steps:
        missing = task.budget - levels.sum(axis=1, keepdims=True)
        room = jnp.where(missing > 0, task.top[None, :] - levels, levels)
        return levels + jnp.sign(missing) * _share_out(jnp.abs(missing), room, first)

    cost = _look_up(task.costs, levels)
    over = jnp.maximum(cost.sum(axis=1, keepdims=True) - task.budget, 0)
    levels = _find_levels(task, cost - _share_out(over, cost, first))
    cost = _look_up(task.costs, levels)
    left = task.budget - cost.sum(axis=1, keepdims=True)
    room = task.costs[:, -1][None, :] - cost
    return _find_levels(task, cost + _share_out(left, room, first))


def _share_out(
    whole: Int[Array, "population 1"], room: Int[Array, "population units"], first: Int[Array, " population"]
) -> Int[Array, "population units"]:
    """What each unit takes of `whole`, unit by unit from `first` on and round to it again, each up to its room."""
    # A running sum as a product: several times faster than cumsum, and exact, for these are small integers.
    earlier = jnp.triu(jnp.ones((room.shape[1],) * 2, jnp.float32), 1)
    before = jnp.matmul(room.astype(jnp.float32), earlier, precision="highest").astype(jnp.int32)
    visited = before - jnp.take_along_axis(before, first[:, None], axis=1)
    visited = jnp.where(visited < 0, visited + room.sum(axis=1, keepdims=True), visited)
    return jnp.clip(whole - visited, 0, room)


def _look_up(table: Int[Array, "units levels"], levels: Int[Array, "population units"]):
    return jax.vmap(lambda row, level: row[level], (0, 1), 1)(table, levels)


def _find_levels(task: Task, cost: Int[Array, "population units"]) -> Int[Array, "population units"]:
    """The last level of each unit that costs no more than this."""
    return (task.costs[None, :, 1:] <= cost[:, :, None]).sum(axis=2, dtype=jnp.int32).clip(0, task.top[None, :])


def start(key: Key[Array, ""], task: Task, settings: Settings) -> State:
    """A random population: every level uniform within its bounds, then repaired; the uniform k comes first."""
    units = task.top.shape[0]
    draw = random.uniform(key, (settings.population, units + 1))
    levels = _pick(draw[:, 1:], task.top[None, :] + 1)
    levels = repair(levels, _pick(draw[:, 0], units), task, unit_steps=settings.unit_steps)
    levels = levels.at[0].set(jnp.where(task.uniform[0] < 0, levels[0], task.uniform))
    return State(levels, judge(levels, task, settings))


def step(key: Key[Array, ""], state: State, task: Task, settings: Settings) -> State:
    """One generation: a child for every member, whose place it takes unless it is worse or a copy of any member."""
    population, units = state.levels.shape
    draw_key, coin_key = random.split(key)
    draw = random.uniform(draw_key, (4 + settings.tournament, population))

    mate = _pick(draw[4], population)
    for rival in _pick(draw[5:], population):
        mate = jnp.where(state.fitness[rival] < state.fitness[mate], rival, mate)

    # Uniform crossover: one random bit a unit, 32 from each word.
    words = random.bits(coin_key, (population, -(-units // 32)))
    place = jnp.arange(units, dtype=jnp.uint32) % 32
    from_mate = (jnp.repeat(words, 32, axis=1)[:, :units] >> place[None, :]) & 1
    child = jnp.where(from_mate == 1, state.levels[mate], state.levels)

    # Balanced mutation: one level from donor to receiver, where both bounds allow it.
    donor, receiver = _pick(draw[0], units)[:, None], _pick(draw[1], units)[:, None]
    moves = (
        (jnp.take_along_axis(child, donor, axis=1) > 0)
        & (jnp.take_along_axis(child, receiver, axis=1) < task.top[receiver])
        & (draw[2] < settings.mutation_rate)[:, None]
    )
    unit = jnp.arange(units)[None, :]
    change = (unit == receiver).astype(jnp.int32) - (unit == donor).astype(jnp.int32)
    child = child + jnp.where(moves, change, 0)

    child = repair(child, _pick(draw[3], units), task, unit_steps=settings.unit_steps)
    fitness = judge(child, task, settings)
    mark, marks = _fingerprint(child), _fingerprint(state.levels)
    is_copy = (mark[:, None] == marks[None, :]).any(axis=1)
    born = (fitness <= state.fitness) & ~is_copy
    return State(jnp.where(born[:, None], child, state.levels), jnp.where(born, fitness, state.fitness))


def _pick(draw: Float[Array, "..."], count: int | Int[Array, "..."]) -> Int[Array, "..."]:
    """Uniform draws in [0, 1) as uniform integers in 0 .. count - 1."""
    return jnp.floor(draw * jnp.asarray(count, jnp.float32)).astype(jnp.int32)


def _fingerprint(levels: Int[Array, "population units"]) -> UInt[Array, " population"]:
    """A 32-bit mark of each allocation: equal for equal ones, and for others with probability 2^-32."""
    weights = np.random.default_rng(0).integers(2**32, size=levels.shape[1], dtype=np.uint32)
    return (levels.astype(jnp.uint32) * weights[None, :]).sum(axis=1)


def _evolve(seed, task: Task, settings: Settings, restarts: int):
    """One budget: the fittest of each restart's population in the end, and the history.

    A key depends on seed, budget and restart and on nothing else. A population that has reached its target stays as it
    is, so that a result does not depend on which others still go on.
    """

    def begin(restart):
        key = random.fold_in(random.fold_in(random.key(seed), task.budget), restart)
        start_key, steps_key = random.split(key)
        return steps_key, start(start_key, task, settings)

    keys, states = jax.vmap(begin)(jnp.arange(restarts))
    history = jnp.full((2, settings.generations), jnp.inf)

    def is_open(carry):
        number, states, _ = carry
        return (number < settings.generations) & ~(states.fitness.min() <= task.target)  # open where it is NaN

    def generation(carry):
        number, states, history = carry
        states = jax.vmap(lambda key, state: step(random.fold_in(key, number), state, task, settings))(keys, states)
        now = jnp.stack([states.fitness.min(), states.fitness.mean()])
        return number + 1, states, history.at[:, number].set(now)

    number, states, history = lax.while_loop(is_open, generation, (jnp.int32(0), states, history))
    fittest = lax.top_k(-states.fitness, min(FINALISTS, settings.population))[1]
    levels = jax.vmap(lambda levels, chosen: levels[chosen])(states.levels, fittest)
    return State(levels, jnp.take_along_axis(states.fitness, fittest, axis=1)), *history, number


@partial(jax.jit, static_argnames=("settings", "restarts"))
def _evolve_all(seed, tasks: Task, *, settings: Settings, restarts: int):
    """`_evolve` for all budgets: blocks of them one after another, those of a block at once."""
    own = ("budget", "uniform", "target")  # of each budget; the rest is one for all

    def evolve_block(block):
        axes = Task(*[0 if name in own else None for name in Task._fields])
        block_tasks = tasks._replace(**dict(zip(own, block, strict=True)))
        return jax.vmap(lambda task: _evolve(seed, task, settings, restarts), (axes,))(block_tasks)

    return lax.map(evolve_block, tuple(getattr(tasks, name) for name in own))


def make_tasks(problem: Problem, targets: Float[np.ndarray, " budgets"] | None = None) -> Task:
    """The problem as the device has it: a row of `budget`, `uniform` and `target` for every budget, the rest shared."""
    base = problem.unit_costs[:, :1]
    extra, left = problem.unit_costs - base, problem.budgets - base.sum()
    scale = 1.0
    if not (problem.unit_costs == np.floor(problem.unit_costs)).all() or extra[:, -1].sum() >= COST_STEPS:
        scale = (COST_STEPS - len(base)) / (extra[:, -1].sum() or 1.0)
    # Costs are rounded up and budgets down, so that no allocation exceeds its budget.
    costs = np.ceil(extra * scale * (1 - 1e-15))
    budgets = np.clip(np.floor(left * scale), 0, costs[:, -1].sum())

    uniform = find_uniform(problem)
    is_k = problem.ks[None] == uniform[:, None, None]
    levels = np.where(is_k.any(axis=2).all(axis=1, keepdims=True), is_k.argmax(axis=2), -1)
    fits = (costs[np.arange(len(costs)), levels].sum(axis=1) <= budgets)[:, None]
    return Task(
        budget=budgets.astype(np.int32),
        uniform=np.where(fits, levels, -1).astype(np.int32),
        target=np.full(len(budgets), -np.inf, np.float32) if targets is None else targets,
        costs=costs.astype(np.int32),
        top=(problem.num_levels - 1).astype(np.int32),
        unit_losses=problem.unit_losses.astype(np.float32),
        losses=problem.losses.astype(np.float32),
        ks=problem.ks.astype(np.int32),
        unit_of=problem.unit_of.astype(np.int32),
    )


def find_targets(problem: Problem, optimum: Optimum) -> Float32[np.ndarray, " budgets"]:
    """The fitness of the optimal allocations, rounded as the device rounds it: unit by unit, in float32."""
    first = np.unique(problem.unit_of, return_index=True)[1]
    is_k = problem.ks[None] == optimum.top_k[:, first, None]
    losses = problem.unit_losses.astype(np.float32)[np.arange(len(first)), is_k.argmax(axis=2)]
    return np.where(is_k.any(axis=2).all(axis=1), np.cumsum(losses, axis=1, dtype=np.float32)[:, -1], -np.inf)


def _run(problem: Problem, tasks: Task, settings: Settings, *, restarts: int, seed: int) -> Evolved:
    count = len(tasks.budget)
    # A CPU is fastest on what fits its cache; a GPU wants everything at once. The last block is filled up.
    block = min(count, BLOCK if jax.default_backend() == "cpu" else count)
    order = np.minimum(np.arange(-(-count // block) * block), count - 1).reshape(-1, block)
    rows = {name: getattr(tasks, name)[order] for name in ("budget", "uniform", "target")}
    found = _evolve_all(np.uint32(seed), tasks._replace(**rows), settings=settings, restarts=restarts)
    finalists, best, mean, ran = jax.tree.map(
        lambda array: array.reshape(-1, *array.shape[2:])[:count], jax.device_get(found)
    )
    top_k, loss = _choose(problem, finalists, is_sum=settings.fitness is None)
    last = np.minimum(np.arange(settings.generations), np.maximum(ran, 1)[:, None] - 1)
    histories = (np.take_along_axis(history, last, axis=1) for history in (best, mean))
    return Evolved(top_k, loss, *histories, ran)


def _choose(
    problem: Problem, finalists: State, *, is_sum: bool
) -> tuple[Int32[np.ndarray, "budgets layers"], Float64[np.ndarray, " budgets"]]:
    """The fittest allocation of each budget and its loss, from finalists [budgets, restarts, finalists].

    The fitness is float32: those within its rounding of the fittest are told apart by their loss in float64. Where
    that is the fitness, the uniform k takes part whether or not whole steps of cost had room for it.
    """
    levels = finalists.levels.reshape(len(finalists.levels), -1, finalists.levels.shape[-1])
    top_k = problem.ks[np.arange(len(problem.ks)), levels][..., problem.unit_of].astype(np.int32)
    fitness = finalists.fitness.reshape(len(top_k), -1)
    least = fitness.min(axis=1, keepdims=True)
    level = fitness <= least + len(problem.losses) * np.finfo(np.float32).eps * np.abs(least)
    loss = np.where(level, sum_over_layers(problem.losses, top_k), np.inf)
    row, chosen = np.arange(len(top_k)), loss.argmin(axis=1)
    top_k, loss = top_k[row, chosen], loss[row, chosen]
    uniform = find_uniform(problem)
    if is_sum and uniform.any():
        same = np.repeat(np.maximum(uniform, 1)[:, None], top_k.shape[1], axis=1)
        uniform_loss = sum_over_layers(problem.losses, same)
        better = (uniform > 0) & (uniform_loss < loss)
        top_k, loss = np.where(better[:, None], same, top_k), np.where(better, uniform_loss, loss)
    return top_k.astype(np.int32), loss


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
    """Evolve an allocation for every budget of `problem`, all in one compiled call, on whatever device JAX uses.

    `restarts` populations of `population` members are evolved for each budget over `generations`; a mate is the
    fittest of `tournament` random members; a share `mutation_rate` of the children mutates. Given the `optimum`, a
    budget is left as soon as it is reached. A budget's result depends on `seed` and that budget, not on the others in
    the call.

    `fitness(losses, top_k) -> [population]`, lower is fitter, is traced once and sees the loss table in float32
    [layers, ks] and allocations [population, layers]; infinity bars an allocation. By default the paper's sum over
    layers. `loss` is the table's sum in float64 whatever the fitness.

    Raises InputError for a setting out of range or a fitness that is NaN.
    """
    counts = {"population": population, "generations": generations, "tournament": tournament, "restarts": restarts}
    for name, count in counts.items():
        if count < 1:
            raise InputError(f"{name}={count} must be at least 1")
    if not 0 <= mutation_rate <= 1:
        raise InputError(f"mutation_rate={mutation_rate} must be within 0..1")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed={seed} must be within 0..{2**32 - 1}")
    if fitness is None:
        problem = drop_dominated(problem)

    targets = None if optimum is None or fitness is not None else find_targets(problem, optimum)
    settings = Settings(population, generations, mutation_rate, tournament, problem.sums_to_budget, fitness)
    found = _run(problem, make_tasks(problem, targets), settings, restarts=restarts, seed=seed)
    if np.isnan(found.best_history[:, 0]).any():
        raise InputError("the fitness is NaN for some allocation; it must order every allocation within the bounds")
    return found
