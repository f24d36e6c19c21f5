"""The operators of the evolutionary search, on one population of one budget, in JAX.

Individuals are levels of units (see `problems`). Every one that leaves `start` or `step` keeps its budget, bounds,
groups and allowed values.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from jaxtyping import Array, Float, Int, Key, UInt

Fitness = Callable[[Float[Array, "layers ks"], Int[Array, "population layers"]], Float[Array, " population"]]


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
    return _look_up(task.ks, levels)[:, task.unit_of]


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
