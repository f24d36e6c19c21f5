"""From a profile to allocations: either search at every budget, each result beside the optimum and the uniform k."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lexi_search import __version__
from lexi_search.allocation.costs import Cost
from lexi_search.artifacts.allocation import Allocation
from lexi_search.artifacts.profile import Profile
from lexi_search.artifacts.serialisation import sha256
from lexi_search.errors import InputError
from lexi_search.solvers.evolution import search
from lexi_search.solvers.exact import solve
from lexi_search.solvers.operators import Fitness
from lexi_search.solvers.problem import Constraints, Problem, find_uniform, pose, sum_over_layers
from lexi_search.solvers.uncertainty import judge

METHODS = ("evolution", "exact")


class Uniform(NamedTuple):
    """The same k in every layer, which meets a budget, and its loss."""

    k: int
    loss: float


class Found(NamedTuple):
    """An allocation and what to judge it by.

    `uniform` is the best uniform k of the same budget, None where there is none. With a cost: `ms` and `speedup`
    against the model's own k, of the whole mix of steps. `share` and `regret` are the profile's uncertainty
    (`uncertainty.Certainty`), None where it was not asked for; `history` is the best and the mean fitness after each
    generation, None for the exact method.
    """

    allocation: Allocation
    uniform: Uniform | None
    ms: float | None = None
    speedup: float | None = None
    share: tuple[float, ...] | None = None
    regret: float | None = None
    history: tuple[np.ndarray, np.ndarray] | None = None


def allocate(
    profile: Profile,
    budgets: Sequence[int] | Sequence[float],
    *,
    cost: Cost | None = None,
    constraints: Constraints | None = None,
    loss: str | None = None,
    method: str = "evolution",
    fitness: Fitness | None = None,
    resamples: int = 0,
    seed: int = 0,
    **settings: int | float,
) -> tuple[Found, ...]:
    """One allocation per budget, in the order of `budgets`.

    Budgets are experts per token summed over layers or, with a `cost`, milliseconds of its mix, of which an allocation
    takes at most that many. `loss` is a kind that the profile holds, its `default_loss` if None. `settings` and
    `fitness` are `evolution.search`'s own; the optimum beside a result is that of the summed loss whatever the fitness.
    `resamples` tables judge how sure the result is.

    Raises InputError where the profile lacks a layer, for an unknown method, and as `problems.pose`.
    """
    if method not in METHODS:
        raise InputError(f"method {method!r} is unknown, expected one of {', '.join(METHODS)}")
    loss = loss or profile.default_loss
    problem = pose_profile(profile, budgets, cost=cost, constraints=constraints, loss=loss)
    best = solve(problem)
    if method == "exact":
        if fitness is not None:
            raise InputError("the exact method minimises the summed loss only; use evolution for another fitness")
        found, histories = best, [None] * len(best.loss)
    else:
        found = search(problem, fitness=fitness, optimum=best, seed=seed, **settings)
        histories = list(zip(found.best_history, found.mean_history, strict=True))
    uniform = find_uniform(problem)
    shares, regrets = [None] * len(found.loss), [None] * len(found.loss)
    if resamples:
        sure = judge(problem, np.asarray(profile.errors(loss)), found.top_k, resamples=resamples, seed=seed)
        shares, regrets = [tuple(row) for row in sure.share.tolist()], sure.regret.tolist()
    made_by = describe_origin(profile, constraints, loss=loss, method=method)
    if method == "evolution":
        made_by |= {"seed": seed, **settings}
    times = speedups = [None] * len(found.loss)
    if cost is not None:
        times = cost.time(found.top_k).tolist()
        speedups = [cost.base_ms / ms for ms in times]
    results = []
    for i, top_k in enumerate(found.top_k):
        spent = {"ms": times[i], "speedup": speedups[i], "budget_ms": float(budgets[i])}
        paid = {} if cost is None else {"cost": cost.describe() | spent}
        allocation = make_allocation(
            profile,
            top_k.tolist(),
            loss=found.loss[i],
            # Grouped layers are added in another order: the least of two roundings of the same sum.
            optimal_loss=min(best.loss[i], found.loss[i]) / (1 + best.error),
            made_by={**made_by, **paid},
        )
        results.append(
            Found(
                allocation,
                make_uniform(problem, int(uniform[i])),
                times[i],
                speedups[i],
                shares[i],
                regrets[i],
                histories[i],
            )
        )
    return tuple(results)


def pose_profile(
    profile: Profile,
    budgets: Sequence[int] | Sequence[float] | None,
    *,
    cost: Cost | None,
    constraints: Constraints | None,
    loss: str,
) -> Problem:
    """The problem of a whole profile, budgets as in `allocate`; InputError where it lacks a layer."""
    missing = sorted(set(profile.model.moe_layers) - set(profile.layers))
    if missing:
        raise InputError(
            f"the profile lacks {len(missing)} of the model's {len(profile.model.moe_layers)} MoE layers, the first is "
            f"{missing[0]}; an allocation needs them all, so profile without --layers, or merge the parts"
        )
    table = np.asarray(profile.losses(loss))
    if cost is None:
        return pose(table, None if budgets is None else np.asarray(budgets), constraints=constraints)
    if cost.ms.shape != table.shape:
        raise InputError(f"costs are measured up to k = {cost.ms.shape[1]}, losses up to {table.shape[1]} (--max-k)")
    caps = None if budgets is None else np.asarray(budgets, np.float64)
    return pose(table, caps, costs=cost.ms, fixed_cost=cost.other_ms, constraints=constraints)


def make_uniform(problem: Problem, k: int) -> Uniform | None:
    """The uniform k with its loss; None for 0."""
    return Uniform(k, float(sum_over_layers(problem.losses, np.full(len(problem.losses), k)))) if k else None


def make_allocation(
    profile: Profile, top_k: Sequence[int], *, loss: float, optimal_loss: float, made_by: dict[str, Any]
) -> Allocation:
    """The allocation of `top_k`, one for each MoE layer in order."""
    return Allocation(
        model=profile.model,
        top_k=dict(zip(profile.model.moe_layers, top_k, strict=True)),
        budget=sum(top_k),
        loss=float(loss),
        optimal_loss=float(optimal_loss),
        made_by=made_by,
        gate_exponent=profile.settings.gate_exponent,
        max_k=profile.settings.max_k,
    )


def describe_origin(profile: Profile, constraints: Constraints | None, *, loss: str, method: str) -> dict[str, Any]:
    """What an allocation says of how it was made; layers of constraints by their index in the decoder."""
    given, layers = constraints or Constraints(), profile.model.moe_layers
    bounds = {
        name: bound if isinstance(bound, int) else dict(zip(map(str, layers), map(int, bound), strict=True))
        for name, bound in (("min_k", given.min_k), ("max_k", given.max_k))
        if bound is not None
    }
    groups = {"groups": [[layers[row] for row in group] for group in given.groups]} if given.groups else {}
    allowed = {"allowed_k": list(given.allowed_k)} if given.allowed_k is not None else {}
    origin = {"lexi_search": __version__, "profile_sha256": sha256(profile), "loss": loss, "method": method}
    return {**origin, **bounds, **allowed, **groups}
