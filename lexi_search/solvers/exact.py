"""The exact optimum of stage 2 for every budget at once: by dynamic programming over layers, or the Pareto front.

Where the k must sum to the budget, one dynamic programme in JAX solves all budgets of a table, or of many tables. With
costs, groups or allowed values the Pareto front of cost and loss (`pareto`) holds every optimum.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float64, Int, Int32

from lexi_search.solvers.pareto import read_top_k, trace
from lexi_search.solvers.problem import Problem, discretise, read_levels, sum_over_layers, summarise

# The number of whole steps that real costs are rounded to where many tables are solved together.
COST_STEPS = 2**14
# The size of the choices, an int16 each, of the tables that are solved at once.
BLOCK_BYTES = 2**28


class Optimum(NamedTuple):
    """Row i belongs to `budgets[i]`; losses are in the unit of the table. `error`: see `pareto.Frontier`."""

    top_k: Int32[np.ndarray, "budgets layers"]
    loss: Float64[np.ndarray, " budgets"]
    error: float = 0.0

    def __repr__(self) -> str:
        return f"<Optimum of {len(self.loss)} budgets: losses {summarise(self.loss)}>"


def solve(problem: Problem) -> Optimum:
    """Allocations of least summed loss, one per budget of `problem`.

    Exact in float64, not merely close: rounded addition is monotonic, so the programme's minimum is the minimum over
    all allocations of the sum taken from the first layer to the last (`problem.sum_over_layers`). Where several k of a
    layer tie, the smallest is taken, decided from the last layer back to the first. Time and memory grow with
    layers^2 x levels^2 and layers^2 x levels, whatever the budgets; with costs, with the points of the front.
    """
    if problem.sums_to_budget:
        top_k = solve_many(problem, problem.losses[None])[0]
        return Optimum(top_k, sum_over_layers(problem.losses, top_k))
    frontier = trace(problem)
    points = np.searchsorted(frontier.cost, problem.budgets, side="right") - 1
    top_k = read_top_k(frontier, problem, points)
    return Optimum(top_k, sum_over_layers(problem.losses, top_k), frontier.error)


def solve_many(
    problem: Problem, tables: Float64[np.ndarray, "tables layers ks"]
) -> Int32[np.ndarray, "tables budgets layers"]:
    """The best allocation of each table at each budget of `problem`, in one compiled call on JAX's device.

    Exact where costs are whole numbers, such as experts; otherwise in `COST_STEPS` steps (see `problem.discretise`).
    """
    costs, budgets = discretise(problem, COST_STEPS)
    steps = int(costs[:, -1].sum())
    block = max(1, BLOCK_BYTES // (len(costs) * (steps + 1)))
    with jax.enable_x64(True):
        levels = [
            _solve_many(
                jnp.asarray(_sum_units(problem, tables[first : first + block])),
                jnp.asarray(costs),
                jnp.asarray(budgets),
                steps=steps,
                exactly=problem.sums_to_budget,
            )
            for first in range(0, len(tables), block)
        ]
        return read_levels(problem, np.concatenate([np.asarray(block) for block in levels]))


def solve_each(
    problems: Sequence[Problem], tables: Float64[np.ndarray, "tables layers ks"]
) -> Int32[np.ndarray, "tables budgets layers"]:
    """The best allocation of each table under the costs and budgets of its own problem, otherwise as `solve_many`."""
    parts = [discretise(problem, COST_STEPS) for problem in problems]
    losses = [_sum_units(problem, table[None])[0] for problem, table in zip(problems, tables, strict=True)]
    costs, budgets = (np.stack(part) for part in zip(*parts, strict=True))
    steps = int(costs[:, :, -1].sum(axis=1).max())
    block = max(1, BLOCK_BYTES // (costs.shape[1] * (steps + 1)))
    with jax.enable_x64(True):
        levels = []
        for first in range(0, len(tables), block):
            some = slice(first, first + block)
            levels += list(np.asarray(_solve_apart(np.stack(losses[some]), costs[some], budgets[some], steps=steps)))
    return np.stack([read_levels(problem, level) for problem, level in zip(problems, levels, strict=True)])


def _sum_units(
    problem: Problem, tables: Float64[np.ndarray, "tables layers ks"]
) -> Float64[np.ndarray, "tables units levels"]:
    """Each table's losses by unit and level; infinite past a unit's last level."""
    layers = np.arange(len(problem.losses))
    chosen = tables[:, layers[:, None], problem.ks[problem.unit_of] - 1]
    summed = np.zeros((len(tables), *problem.ks.shape))
    np.add.at(summed, (slice(None), problem.unit_of), chosen)
    return np.where(np.arange(problem.ks.shape[1]) < problem.num_levels[:, None], summed, np.inf)


@partial(jax.jit, static_argnames=("steps", "exactly"))
def _solve_many(
    losses: Float[Array, "tables units levels"],
    costs: Int[Array, "units levels"],
    budgets: Int[Array, " budgets"],
    *,
    steps: int,
    exactly: bool,
) -> Int[Array, "tables budgets units"]:
    """The level of each unit, by dynamic programming over the cost spent, 0..steps."""
    return jax.vmap(partial(_solve_one, steps=steps, exactly=exactly), (0, None, None))(losses, costs, budgets)


@partial(jax.jit, static_argnames=("steps",))
def _solve_apart(
    losses: Float[Array, "tables units levels"],
    costs: Int[Array, "tables units levels"],
    budgets: Int[Array, "tables budgets"],
    *,
    steps: int,
) -> Int[Array, "tables budgets units"]:
    return jax.vmap(partial(_solve_one, steps=steps, exactly=False))(losses, costs, budgets)


def _solve_one(
    table: Float[Array, "units levels"],
    costs: Int[Array, "units levels"],
    budgets: Int[Array, " budgets"],
    *,
    steps: int,
    exactly: bool,
) -> Int[Array, "budgets units"]:
    def add_unit(best, unit):
        row, cost = unit
        before = jax.vmap(lambda c: lax.dynamic_slice(jnp.concatenate([never, best]), (steps - c,), best.shape))
        total = before(cost) + row[:, None]
        return total.min(axis=0), total.argmin(axis=0).astype(jnp.int16)

    # best[e]: the least loss of the units so far at a cost of exactly e if `exactly`, else of at most e.
    never = jnp.full(steps, jnp.inf)
    nothing = jnp.concatenate([jnp.zeros(1), never]) if exactly else jnp.zeros(steps + 1)
    _, choice = lax.scan(add_unit, nothing, (table, costs))

    def step_back(left, unit):
        choice, cost = unit
        level = choice[left].astype(jnp.int64)
        return left - cost[level], level

    _, levels = lax.scan(step_back, budgets, (choice, costs), reverse=True)
    return levels.T
