"""The operators of the evolutionary search, on one population of one budget, in JAX.

An individual is an allocation, as levels of units (see `problem`). All that `start` and `step` return keep the budget,
bounds, groups and allowed values.
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

    `budget` and `costs` are whole steps above the cheapest levels. `uniform` is an allocation for the first population,
    or negative. A population whose best fitness is at most `target` needs no more generations. `losses`, `ks` and
    `unit_of` are for a fitness of the k of layers.
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
    """Settings that are static under `jit`. `mutation_rate` is the share of children that mutate.

    With `unit_steps` each level costs one step more than the one below it, and budgets are met exactly. Without a
    `fitness` the sum of the layers' losses is minimised.
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


def _compute_fitness(
    levels: Int[Array, "population units"], task: Task, settings: Settings
) -> Float[Array, " population"]:
    """The fitness of each allocation: by default the paper's, the sum of the layers' losses."""
    if settings.fitness is not None:
        return settings.fitness(task.losses, read_top_k(levels, task))
    return _add_over_units(task.unit_losses, levels)


def read_top_k(levels: Int[Array, "population units"], task: Task) -> Int[Array, "population layers"]:
    """The k of every layer."""
    return _look_up(task.ks, levels)[:, task.unit_of]


def _add_over_units(
    table: Float[Array, "units levels"], levels: Int[Array, "population units"]
) -> Float[Array, " population"]:
    """The sum over units of the entries of `table` at their levels.

    Units are added one after the other, because the order of a library sum may change with the shape of a batch, and a
    budget's result must not depend on the other budgets in the call.
    """

    def add(total, unit):
        row, level = unit
        return total + row[level], None

    # Unrolled into one kernel on a GPU, where launches are slow; on a CPU a loop compiles faster.
    unroll = 1 if jax.default_backend() == "cpu" else len(table)
    total, _ = lax.scan(add, jnp.zeros(len(levels), table.dtype), (table, levels.T), unroll=unroll)
    return total


def repair(
    levels: Int[Array, "population units"], first: Int[Array, " population"], task: Task, *, unit_steps: bool
) -> Int[Array, "population units"]:
    """Bring each allocation to its budget: change unit after unit, in a circle from `first` on, each up to its bound.

    Each unit takes the rest of the change: the whole minus the room of the units visited before it, clipped to 0..room.
    A unit takes many steps in a row, not one step here and one there: where a loss falls most at its last step, most
    units of a good allocation are at a bound.

    With `unit_steps` every budget that the bounds allow is met exactly. Without, costs above the budget are removed
    first, then the rest of the budget is spent as far as the costs' steps fit in.
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
    """Each unit's share of `whole`: in a circle from `first` on, each takes the rest up to its `room`."""
    # A running sum as a product: several times faster than cumsum, and exact, for these are small integers.
    earlier = jnp.triu(jnp.ones((room.shape[1],) * 2, jnp.float32), 1)
    before = jnp.matmul(room.astype(jnp.float32), earlier, precision="highest").astype(jnp.int32)
    visited = before - jnp.take_along_axis(before, first[:, None], axis=1)
    visited = jnp.where(visited < 0, visited + room.sum(axis=1, keepdims=True), visited)
    return jnp.clip(whole - visited, 0, room)


def _look_up(table: Int[Array, "units levels"], levels: Int[Array, "population units"]):
    return jax.vmap(lambda row, level: row[level], (0, 1), 1)(table, levels)


def _find_levels(task: Task, cost: Int[Array, "population units"]) -> Int[Array, "population units"]:
    """The last level of each unit that costs at most `cost`."""
    return (task.costs[None, :, 1:] <= cost[:, :, None]).sum(axis=2, dtype=jnp.int32).clip(0, task.top[None, :])


def start(key: Key[Array, ""], task: Task, settings: Settings) -> State:
    """A random population: levels drawn uniformly, then repaired. The uniform allocation, if any, is the first."""
    units = task.top.shape[0]
    draw = random.uniform(key, (settings.population, units + 1))
    levels = _pick(draw[:, 1:], task.top[None, :] + 1)
    levels = repair(levels, _pick(draw[:, 0], units), task, unit_steps=settings.unit_steps)
    levels = levels.at[0].set(jnp.where(task.uniform[0] < 0, levels[0], task.uniform))
    return State(levels, _compute_fitness(levels, task, settings))


def step(key: Key[Array, ""], state: State, task: Task, settings: Settings) -> State:
    """One generation: each member's child replaces it unless it is worse, or a copy of any member."""
    population, units = state.levels.shape
    draw_key, crossover_key = random.split(key)
    draw = random.uniform(draw_key, (4 + settings.tournament, population))

    mate = _pick(draw[4], population)
    for rival in _pick(draw[5:], population):
        mate = jnp.where(state.fitness[rival] < state.fitness[mate], rival, mate)

    # Uniform crossover: one random bit per unit, 32 from each word.
    words = random.bits(crossover_key, (population, -(-units // 32)))
    bit = jnp.arange(units, dtype=jnp.uint32) % 32
    from_mate = (jnp.repeat(words, 32, axis=1)[:, :units] >> bit[None, :]) & 1
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
    fitness = _compute_fitness(child, task, settings)
    is_copy = (_hash(child)[:, None] == _hash(state.levels)[None, :]).any(axis=1)
    accepted = (fitness <= state.fitness) & ~is_copy
    return State(jnp.where(accepted[:, None], child, state.levels), jnp.where(accepted, fitness, state.fitness))


def _pick(draw: Float[Array, "..."], count: int | Int[Array, "..."]) -> Int[Array, "..."]:
    """Uniform integers in 0 .. count - 1, from uniform draws in [0, 1)."""
    return jnp.floor(draw * jnp.asarray(count, jnp.float32)).astype(jnp.int32)


def _hash(levels: Int[Array, "population units"]) -> UInt[Array, " population"]:
    """A 32-bit hash of each allocation: equal for equal ones, and for others with probability 2^-32."""
    weights = np.random.default_rng(0).integers(2**32, size=levels.shape[1], dtype=np.uint32)
    return (levels.astype(jnp.uint32) * weights[None, :]).sum(axis=1)
