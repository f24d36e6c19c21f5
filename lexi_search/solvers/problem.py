"""The allocation problem that both searches solve, checked once.

Choose one top-k per layer so that the summed loss is smallest (LExI, arXiv 2509.02753, stage 2) and

- without costs, the k sum to the budget, as in the paper; where groups or allowed values leave gaps between the
  possible sums, they sum to at most the budget;
- with costs, such as measured milliseconds, the summed cost is at most the budget.

Layers that must share their k are one *unit*; the k that a unit may take are its *levels*, in order of cost. Everything
here is host-side NumPy; nothing knows a model.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int, Int32, Int64, Real

from lexi_search.errors import InputError

# A cap that was computed from the cost of an allocation must still admit it, whatever the order of summation. Relative
# to the cost of the most expensive allocation, and above the difference that `pareto` takes for equality.
CAP_TOLERANCE = 1e-11
LARGEST = 1e30  # of losses and costs: their sums over layers are finite in float32
LEAST_COST = 1e-300  # smaller costs count as zero, since dividing by them would overflow
_Budgets = Real[np.ndarray, "..."] | Sequence[float]  # as a user gives them: their shape is checked


class Constraints(NamedTuple):
    """Constraints on an allocation besides its budget. A layer's number is its row in the loss table.

    A bound is one number for all layers or one for each; `max_k` is by default the table's last k. A layer whose bounds
    are equal keeps that k whatever `allowed_k` says. Layers of one group have the same k; groups must not overlap.
    """

    min_k: int | Sequence[int] = 1
    max_k: int | Sequence[int] | None = None
    allowed_k: tuple[int, ...] | None = None
    groups: tuple[tuple[int, ...], ...] = ()


class Problem(NamedTuple):
    """A checked problem. `losses[l, k - 1]` is the loss of layer l with k experts, in any unit that adds over layers.

    Unit u takes k = `ks[u, j]` at its level j < `num_levels[u]`; its costs rise with j. Entries past the last level
    repeat it. If `sums_to_budget`, every unit is a layer, its levels are consecutive k, and the k must sum to the
    budget exactly; else costs sum to at most `budgets`.
    """

    losses: Float64[np.ndarray, "layers ks"]
    costs: Float64[np.ndarray, "layers ks"]
    budgets: Float64[np.ndarray, " budgets"]
    unit_of: Int64[np.ndarray, " layers"]
    ks: Int64[np.ndarray, "units levels"]
    num_levels: Int64[np.ndarray, " units"]
    unit_losses: Float64[np.ndarray, "units levels"]
    unit_costs: Float64[np.ndarray, "units levels"]
    sums_to_budget: bool

    def __repr__(self) -> str:
        layers, ks = self.losses.shape
        return f"<Problem of {layers} layers, k from 1 to {ks}, {len(self.budgets)} budgets>"


def pose(
    losses: Real[np.ndarray, "..."],  # [layers, ks]; shapes are checked below
    budgets: _Budgets | None,
    *,
    costs: Real[np.ndarray, "..."] | None = None,  # [layers, ks]
    fixed_cost: float = 0.0,
    constraints: Constraints | None = None,
) -> Problem:
    """Check a loss table, budgets, costs and constraints, and return them as a `Problem`.

    Budgets in costs include `fixed_cost`, which is spent whatever the k; those of the `Problem` do not. Without budgets
    (None) the problem is that of the whole front, `pareto.trace`. Losses need not fall as k grows, nor be convex: a
    smaller k with less loss is taken where the constraints allow it. Subnormal numbers count as zero.

    Raises:
        InputError: a loss or cost that is NaN, infinite or negative, by layer and k; tables of different shapes;
            constraints that contradict each other or name a layer or k that does not exist; a budget that no allocation
            meets.
    """
    losses = _check_table(losses, "loss")
    layers, last_k = losses.shape
    in_experts = costs is None
    costs = np.tile(np.arange(1.0, last_k + 1), (layers, 1)) if costs is None else _check_table(costs, "cost")
    if costs.shape != losses.shape:
        raise InputError(f"costs are {costs.shape[0]} x {costs.shape[1]}, losses {layers} x {last_k}; they must agree")
    constraints = constraints or Constraints()
    allowed = _find_allowed(constraints, layers, last_k)
    unit_of = _find_units(constraints.groups, layers)
    units = [_make_unit(losses, costs, allowed, np.flatnonzero(unit_of == unit)) for unit in range(unit_of.max() + 1)]
    width = max(len(ks) for ks, _, _ in units)
    ks, unit_losses, unit_costs = (
        np.stack([np.pad(unit[i], (0, width - len(unit[i])), mode="edge") for unit in units]) for i in range(3)
    )
    num_levels = np.array([len(unit[0]) for unit in units])
    consecutive = all((np.diff(ks) == 1).all() for ks, _, _ in units)
    sums_to_budget = in_experts and len(units) == layers and consecutive
    if budgets is None:
        budgets = np.empty(0)
    elif in_experts:
        budgets = _check_sums(budgets, unit_costs)
    else:
        budgets = _check_caps(budgets, unit_costs, fixed_cost)
    return Problem(losses, costs, budgets, unit_of, ks, num_levels, unit_losses, unit_costs, sums_to_budget)


def replace_losses(problem: Problem, losses: Float64[np.ndarray, "layers ks"]) -> Problem:
    """The problem with other losses; its units and their levels stay as they are."""
    rows = losses[np.arange(len(losses))[:, None], problem.ks[problem.unit_of] - 1]
    summed = np.zeros(problem.ks.shape)
    np.add.at(summed, problem.unit_of, rows)
    return problem._replace(losses=losses, unit_losses=summed)


def drop_dominated(problem: Problem) -> Problem:
    """The problem without dominated levels, which cost no less and lose no less than another level of their unit.

    The optimum is the same for a fitness that adds over layers. A problem whose k must sum to the budget is unchanged.
    """
    if problem.sums_to_budget:
        return problem
    kept = []
    for losses, count in zip(problem.unit_losses, problem.num_levels, strict=True):
        least_before = np.minimum.accumulate(np.concatenate([[np.inf], losses[: count - 1]]))
        kept.append(np.flatnonzero(losses[:count] < least_before))
    width = max(map(len, kept))
    level = np.stack([np.pad(levels, (0, width - len(levels)), mode="edge") for levels in kept])
    ks, losses, costs = (
        np.take_along_axis(values, level, axis=1) for values in (problem.ks, problem.unit_losses, problem.unit_costs)
    )
    return problem._replace(
        ks=ks, unit_losses=losses, unit_costs=costs, num_levels=np.array([len(levels) for levels in kept])
    )


def find_uniform(problem: Problem) -> Int64[np.ndarray, " budgets"]:
    """For each budget, the k of least loss that meets it as the k of every layer; 0 where there is none."""
    best, least = np.zeros(len(problem.budgets), np.int64), np.full(len(problem.budgets), np.inf)
    levels = np.arange(problem.ks.shape[1]) < problem.num_levels[:, None]
    for k in range(1, problem.losses.shape[1] + 1):
        if not ((problem.ks == k) & levels).any(axis=1).all():
            continue
        top_k = np.full(len(problem.losses), k)
        cost, loss = sum_over_layers(problem.costs, top_k), sum_over_layers(problem.losses, top_k)
        fits = (cost == problem.budgets) if problem.sums_to_budget else (cost <= problem.budgets)
        best, least = np.where(fits & (loss < least), k, best), np.where(fits & (loss < least), loss, least)
    return best


def discretise(problem: Problem, most: int) -> tuple[Int64[np.ndarray, "units levels"], Int64[np.ndarray, " budgets"]]:
    """Costs and budgets in whole steps above the cost of the cheapest levels.

    Whole-number costs stay as they are if their largest sum is at most `most`. Otherwise a step is 1 / `most` of the
    largest sum; costs are rounded up and budgets down, so that no allocation exceeds its budget. The effect is that of
    a budget smaller by at most one step per unit.
    """
    base = problem.unit_costs[:, :1]
    extra, left = problem.unit_costs - base, problem.budgets - base.sum()
    largest, scale = extra[:, -1].sum(), 1.0
    if not (problem.unit_costs == np.floor(problem.unit_costs)).all() or largest > most:
        scale = most / max(largest, LEAST_COST)
    costs = np.ceil(extra * scale * (1 - 1e-15)).astype(np.int64)
    return costs, np.clip(np.floor(left * scale), 0, costs[:, -1].sum()).astype(np.int64)


def read_levels(problem: Problem, levels: Int[np.ndarray, "*batch units"]) -> Int32[np.ndarray, "*batch layers"]:
    """The k of every layer, from the level of every unit."""
    return problem.ks[np.arange(len(problem.ks)), levels][..., problem.unit_of].astype(np.int32)


def sum_over_layers(
    table: Float64[np.ndarray, "layers ks"], top_k: Int[np.ndarray, "*batch layers"]
) -> Float64[np.ndarray, "*batch"]:
    """Loss or cost of allocations: the sum over layers, added in float64 from the first layer to the last.

    The order is part of the result: the dynamic programme adds in the same one, so that equal allocations have equal
    losses to the last bit and a gap is never negative.
    """
    chosen = table[np.arange(table.shape[0]), np.asarray(top_k) - 1]
    return np.cumsum(chosen, axis=-1)[..., -1]


def summarise(values: Float64[np.ndarray, " values"]) -> str:
    """The first few of the values, for a `repr`."""
    more = ", ..." if len(values) > 4 else ""
    return ", ".join(f"{value:.4g}" for value in values[:4].tolist()) + more


def _check_table(table: Real[np.ndarray, "..."], what: str) -> Float64[np.ndarray, "layers ks"]:
    table = np.array(table, np.float64)
    if table.ndim != 2 or 0 in table.shape:
        shape = f"not of shape {table.shape}"
        raise InputError(f"the {what} of each layer at each k must be a table with at least one of each, {shape}")
    wrong = np.argwhere(~(np.abs(table) <= LARGEST) | (table < 0))
    if len(wrong):
        layer, column = wrong[0]
        value = table[layer, column]
        bounds = f"it must be finite, at least 0 and at most {LARGEST:g}"
        raise InputError(f"{what} of layer {layer} at k={column + 1} is {value}; {bounds}")
    # Compiled code may take subnormal numbers for zero where NumPy does not: they would disagree about the optimum.
    table[table < np.finfo(np.float64).tiny] = 0.0
    return table


def _find_allowed(constraints: Constraints, layers: int, last_k: int) -> Bool[np.ndarray, "layers ks"]:
    """Whether each layer may take each k."""
    ends = {"min_k": constraints.min_k, "max_k": last_k if constraints.max_k is None else constraints.max_k}
    bounds = {}
    for name, bound in ends.items():
        values = np.asarray(bound)
        if not np.issubdtype(values.dtype, np.integer) or values.ndim > 1 or values.size not in (1, layers):
            raise InputError(f"{name}={bound} must be an integer or one for each of the {layers} layers")
        if ((values < 1) | (values > last_k)).any():
            raise InputError(f"{name}={bound} must be an integer in 1..{last_k}, the k that the losses cover")
        bounds[name] = np.broadcast_to(values, layers)
    low, high = bounds["min_k"], bounds["max_k"]
    if (crossed := np.flatnonzero(low > high)).size:
        layer = crossed[0]
        raise InputError(f"min_k={low[layer]} is above max_k={high[layer]} in layer {layer}")
    k = np.arange(1, last_k + 1)
    within = (low[:, None] <= k) & (k <= high[:, None])
    if constraints.allowed_k is None:
        return within
    if wrong := [value for value in constraints.allowed_k if not 1 <= value <= last_k]:
        raise InputError(f"allowed_k has {wrong[0]}; the losses cover k in 1..{last_k}")
    return within & (np.isin(k, constraints.allowed_k) | (low == high)[:, None])


def _find_units(groups: Sequence[Sequence[int]], layers: int) -> Int64[np.ndarray, " layers"]:
    """The unit of each layer, numbered in order of their first layers."""
    leader, seen = np.arange(layers), set[int]()
    for group in groups:
        for layer in group:
            if not 0 <= layer < layers:
                raise InputError(f"group {list(group)} has layer {layer}; the table has {layers} layers")
            if layer in seen:
                raise InputError(f"layer {layer} is in two groups; put them together")
            leader[layer] = min(group)
            seen.add(layer)
    return np.unique(leader, return_inverse=True)[1].reshape(-1)


def _make_unit(losses, costs, allowed, members) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The k, losses and costs of one unit's levels, cheapest first."""
    ks = np.flatnonzero(allowed[members].all(axis=0)) + 1
    if not ks.size:
        raise InputError(f"no k is left for layers {members.tolist()}: their bounds and allowed values exclude all")
    loss, cost = (table[members][:, ks - 1].sum(axis=0) for table in (losses, costs))
    order = np.lexsort((loss, cost))
    return ks[order], loss[order], cost[order]


def _check_sums(budgets: _Budgets, unit_costs: Float64[np.ndarray, "units levels"]) -> Float64[np.ndarray, " budgets"]:
    budgets = _check_list(budgets, np.integer, "integers")
    least, most = unit_costs[:, 0].sum(), unit_costs[:, -1].sum()
    for budget in budgets[(budgets < least) | (budgets > most)]:
        raise InputError(f"budget {budget} is outside {least:g}..{most:g}, what the layers and constraints allow")
    return budgets.astype(np.float64)


def _check_caps(
    budgets: _Budgets, unit_costs: Float64[np.ndarray, "units levels"], fixed_cost: float
) -> Float64[np.ndarray, " budgets"]:
    budgets = _check_list(budgets, np.number, "numbers")
    if not np.isfinite(budgets).all():
        raise InputError("budgets must be finite")
    least, most = unit_costs[:, 0].sum(), unit_costs[:, -1].sum()
    caps = budgets - fixed_cost + CAP_TOLERANCE * (most + fixed_cost)
    for budget in budgets[caps < least]:
        least = f"{fixed_cost + least:g}, the least that the layers and constraints allow"
        raise InputError(f"budget {budget:g} is below {least}")
    return caps.astype(np.float64)


def _check_list(budgets: _Budgets, kind: type, name: str) -> Real[np.ndarray, " budgets"]:
    budgets = np.asarray(budgets)
    if budgets.ndim != 1 or not len(budgets) or not np.issubdtype(budgets.dtype, kind):
        raise InputError(f"budgets must be a non-empty list of {name}")
    return budgets
