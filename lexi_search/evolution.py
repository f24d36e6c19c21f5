"""Evolutionary search for the top-k of every layer: LExI (arXiv 2509.02753), stage 2, algorithm 2.

A population of allocations is evolved for each budget: tournament, uniform crossover per layer, balanced ±1 mutation,
projection back on to the budget, elitism. Every individual meets its budget and bounds in every generation.

What the paper leaves open is chosen so that the population stays varied, since a population of near copies stops short
of the optimum (`examples/benchmarks/search_gap.py` measures each choice):

- Elitism holds at every place: a child is born to each member and takes that parent's place unless it is worse. So the
  best is never lost, and good allocations that differ from it live on to be crossed.
- No copies: a child that equals a member already there is dropped.
- The projection spends its steps on one layer after another, each up to its bound.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from jaxtyping import Array, Float, Float32, Float64, Int, Int32, Key, Real, UInt

from lexi_search.budgets import allocation_loss, pose
from lexi_search.errors import InputError

# Members of a last population, at most, that are compared in float64.
FINALISTS = 16

Fitness = Callable[[Float[Array, "layers ks"], Int[Array, "population layers"]], Float[Array, " population"]]


class Evolved(NamedTuple):
    """Row i belongs to `budgets[i]`. Losses are in the unit of the table; the histories in that of the fitness."""

    top_k: Int32[np.ndarray, "budgets layers"]
    loss: Float64[np.ndarray, " budgets"]
    best_history: Float32[np.ndarray, "budgets generations"]
    mean_history: Float32[np.ndarray, "budgets generations"]


class Task(NamedTuple):
    """One budget's problem on the device."""

    losses: Float[Array, "layers ks"]
    budget: Int[Array, ""]
    min_k: Int[Array, ""]
    max_k: Int[Array, ""]


class Settings(NamedTuple):
    """What is fixed at compile time. `mutation_rate` is the share of children that mutate."""

    population: int
    generations: int
    mutation_rate: float
    tournament: int
    fitness: Fitness


class State(NamedTuple):
    """A population and its fitness, lower is fitter."""

    top_k: Int[Array, "population layers"]
    fitness: Float[Array, " population"]


def additive_loss(
    losses: Float[Array, "layers ks"], population: Int[Array, "population layers"]
) -> Float[Array, " population"]:
    """The paper's fitness: the loss of each layer at its k, summed over layers.

    Added layer after layer, because the order of a library sum may change with the shape of a batch, and a budget's
    result must not change with the company it is searched in.
    """

    def add(total, layer):
        row, k = layer
        return total + row[k - 1], None

    total, _ = lax.scan(add, jnp.zeros(len(population), losses.dtype), (losses, population.T))
    return total


def project(
    top_k: Int[Array, "population layers"],
    first: Int[Array, " population"],
    budget: Int[Array, ""],
    min_k: Int[Array, ""],
    max_k: Int[Array, ""],
) -> Int[Array, "population layers"]:
    """Move each allocation on to the budget by ±1 steps, spent layer by layer from `first` on and round to it again.

    Each layer takes what is still missing, up to its bound: missing minus the room of the layers visited before it,
    clipped to 0..room. So steps sum to what is missing whenever the room suffices, which it does for every budget
    within layers * min_k .. layers * max_k. Steps in a row on one layer, not one here and one there: where a loss falls
    most at its last step, the good allocations have most layers at a bound.
    """
    missing = budget - top_k.sum(axis=1, keepdims=True)
    room = jnp.where(missing > 0, max_k - top_k, top_k - min_k)
    # A running sum as a product: several times faster than cumsum, and exact, for these are small integers.
    earlier = jnp.triu(jnp.ones((top_k.shape[1],) * 2, jnp.float32), 1)
    before = jnp.matmul(room.astype(jnp.float32), earlier, precision="highest").astype(jnp.int32)
    whole = room.sum(axis=1, keepdims=True)
    visited = before - jnp.take_along_axis(before, first[:, None], axis=1)
    visited = jnp.where(visited < 0, visited + whole, visited)
    return top_k + jnp.sign(missing) * jnp.clip(jnp.abs(missing) - visited, 0, room)


def start(key: Key[Array, ""], task: Task, settings: Settings) -> State:
    """A random population on the budget: every k uniform within its bounds, then projected."""
    layers = task.losses.shape[0]
    draw = random.uniform(key, (settings.population, layers + 1))
    top_k = task.min_k + _pick(draw[:, 1:], task.max_k - task.min_k + 1)
    top_k = project(top_k, _pick(draw[:, 0], layers), task.budget, task.min_k, task.max_k)
    return State(top_k, settings.fitness(task.losses, top_k))


def step(key: Key[Array, ""], state: State, task: Task, settings: Settings) -> State:
    """One generation: a child for every member, whose place it takes unless it is worse or a copy of any member."""
    population, layers = state.top_k.shape
    draw_key, coin_key = random.split(key)
    draw = random.uniform(draw_key, (4 + settings.tournament, population))

    mate = _pick(draw[4], population)
    for rival in _pick(draw[5:], population):
        mate = jnp.where(state.fitness[rival] < state.fitness[mate], rival, mate)

    # Uniform crossover: one random bit a layer, 32 from each word.
    words = random.bits(coin_key, (population, -(-layers // 32)))
    place = jnp.arange(layers, dtype=jnp.uint32) % 32
    from_mate = (jnp.repeat(words, 32, axis=1)[:, :layers] >> place[None, :]) & 1
    child = jnp.where(from_mate == 1, state.top_k[mate], state.top_k)

    # Balanced mutation: one expert from donor to receiver, where both bounds allow it.
    donor, receiver = _pick(draw[0], layers)[:, None], _pick(draw[1], layers)[:, None]
    moves = (
        (jnp.take_along_axis(child, donor, axis=1) > task.min_k)
        & (jnp.take_along_axis(child, receiver, axis=1) < task.max_k)
        & (draw[2] < settings.mutation_rate)[:, None]
    )
    layer = jnp.arange(layers)[None, :]
    change = (layer == receiver).astype(jnp.int32) - (layer == donor).astype(jnp.int32)
    child = child + jnp.where(moves, change, 0)

    child = project(child, _pick(draw[3], layers), task.budget, task.min_k, task.max_k)
    fitness = settings.fitness(task.losses, child)
    mark, marks = _fingerprint(child), _fingerprint(state.top_k)
    is_copy = (mark[:, None] == marks[None, :]).any(axis=1)
    born = (fitness <= state.fitness) & ~is_copy
    return State(jnp.where(born[:, None], child, state.top_k), jnp.where(born, fitness, state.fitness))


def _pick(draw: Float[Array, "..."], count: int | Int[Array, ""]) -> Int[Array, "..."]:
    """Uniform draws in [0, 1) as uniform integers in 0 .. count - 1."""
    return jnp.floor(draw * jnp.asarray(count, jnp.float32)).astype(jnp.int32)


def _fingerprint(top_k: Int[Array, "population layers"]) -> UInt[Array, " population"]:
    """A 32-bit mark of each allocation: equal for equal ones, and for others with probability 2^-32."""
    weights = np.random.default_rng(0).integers(2**32, size=top_k.shape[1], dtype=np.uint32)
    return (top_k.astype(jnp.uint32) * weights[None, :]).sum(axis=1)


def _evolve(key: Key[Array, ""], task: Task, settings: Settings):
    """The fittest of one population in the end, as a State, and its best and mean fitness after each generation."""
    start_key, steps_key = random.split(key)

    def generation(state, number):
        state = step(random.fold_in(steps_key, number), state, task, settings)
        return state, (state.fitness.min(), state.fitness.mean())

    state, history = lax.scan(generation, start(start_key, task, settings), jnp.arange(settings.generations))
    fittest = lax.top_k(-state.fitness, min(FINALISTS, settings.population))[1]
    return State(state.top_k[fittest], state.fitness[fittest]), *history


@partial(jax.jit, static_argnames=("settings", "restarts"))
def _evolve_all(seed, losses, budgets, min_k, max_k, *, settings: Settings, restarts: int):
    """`_evolve` for all budgets x restarts at once. A key depends on seed, budget and restart and on nothing else."""

    def evolve(budget, restart):
        key = random.fold_in(random.fold_in(random.key(seed), budget), restart)
        return _evolve(key, Task(losses, budget, min_k, max_k), settings)

    over_restarts = jax.vmap(evolve, (None, 0))
    finalists, best, mean = jax.vmap(over_restarts, (0, None))(budgets, jnp.arange(restarts))
    return finalists, best.min(axis=1), mean.mean(axis=1)


def _choose(
    losses: Float64[np.ndarray, "layers ks"], finalists: State
) -> tuple[Int32[np.ndarray, "budgets layers"], Float64[np.ndarray, " budgets"]]:
    """The fittest allocation of each budget and its loss, from finalists [budgets, restarts, finalists].

    The fitness is float32: those within its rounding of the fittest are told apart by their loss in float64.
    """
    layers = losses.shape[0]
    top_k = finalists.top_k.reshape(len(finalists.top_k), -1, layers)
    fitness = finalists.fitness.reshape(len(top_k), -1)
    least = fitness.min(axis=1, keepdims=True)
    level = fitness <= least + layers * np.finfo(np.float32).eps * np.abs(least)
    loss = allocation_loss(losses, top_k)
    row, chosen = np.arange(len(top_k)), np.where(level, loss, np.inf).argmin(axis=1)
    return top_k[row, chosen], loss[row, chosen]


def search(
    losses: Real[np.ndarray, "layers ks"],
    budgets: Int[np.ndarray, " budgets"],
    *,
    min_k: int = 1,
    max_k: int | None = None,
    population: int = 512,
    generations: int = 400,
    mutation_rate: float = 0.25,
    tournament: int = 2,
    restarts: int = 1,
    seed: int = 0,
    fitness: Fitness = additive_loss,
) -> Evolved:
    """Evolve an allocation for every budget, all in one compiled call, on whatever device JAX uses.

    `losses[l, k - 1]` is the loss of layer l with k experts; each returned row has sum == budget and
    min_k <= k <= max_k (default: the table's last k). `restarts` populations of `population` members are evolved for
    each budget over `generations`; a mate is the fittest of `tournament` random members; a share `mutation_rate` of
    the children mutates. A budget's result depends on `seed` and that budget, not on the others in the call.

    `fitness(losses, population) -> [population]`, lower is fitter, is traced once and sees the table in float32; by
    default the paper's sum over layers. `loss` is the table's sum in float64 whatever the fitness.

    Raises InputError as `budgets.pose`, and for a setting out of range or a fitness that is NaN.
    """
    problem = pose(losses, budgets, min_k=min_k, max_k=max_k)
    counts = {"population": population, "generations": generations, "tournament": tournament, "restarts": restarts}
    for name, count in counts.items():
        if count < 1:
            raise InputError(f"{name}={count} must be at least 1")
    if not 0 <= mutation_rate <= 1:
        raise InputError(f"mutation_rate={mutation_rate} must be within 0..1")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed={seed} must be within 0..{2**32 - 1}")

    finalists, best, mean = jax.device_get(
        _evolve_all(
            np.uint32(seed),
            problem.losses.astype(np.float32),
            problem.budgets.astype(np.int32),
            np.int32(problem.min_k),
            np.int32(problem.max_k),
            settings=Settings(population, generations, mutation_rate, tournament, fitness),
            restarts=restarts,
        )
    )
    if np.isnan(best).any():
        raise InputError("the fitness is NaN for some allocation; it must order every allocation within the bounds")
    return Evolved(*_choose(problem.losses, finalists), best, mean)
