"""Allocations from a profile: a search at every budget, each result beside the optimum and the uniform k."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from lexi_search import __version__
from lexi_search.allocation.costs import Cost
from lexi_search.artifacts.allocation import Allocation
from lexi_search.artifacts.profile import Profile
from lexi_search.artifacts.serialisation import sha256
from lexi_search.errors import InputError
from lexi_search.solvers.evolution import Evolved, search
from lexi_search.solvers.exact import Optimum, solve
from lexi_search.solvers.operators import Fitness
from lexi_search.solvers.problem import Constraints, Problem, find_uniform, pose, sum_over_layers
from lexi_search.solvers.robust import CAUTION, Caution, Choice, choose
from lexi_search.solvers.uncertainty import judge

METHODS = ("evolution", "exact")


class Uniform(NamedTuple):
    """A uniform k that meets a budget, and its loss."""

    k: int
    loss: float


class AllocationResult(NamedTuple):
    """An allocation and the figures to judge it by.

    `uniform` is the best uniform k of the same budget, None where there is none. With a cost: `ms` and `speedup`
    against the model's own k, over the whole mix of steps. `share` and `regret` are the profile's uncertainty
    (`solvers.uncertainty.Certainty`), None without resampling; `history` is the best and the mean fitness after each
    generation, None for the exact method. `expected_gain` is that of the allocation found over the most even one of the
    budget, which takes its place where that is too little (`solvers.robust.Choice`); None where that was not asked.
    """

    allocation: Allocation
    uniform: Uniform | None
    ms: float | None = None
    speedup: float | None = None
    share: tuple[float, ...] | None = None
    regret: float | None = None
    history: tuple[np.ndarray, np.ndarray] | None = None
    expected_gain: float | None = None

    def __repr__(self) -> str:
        uniform = "" if self.uniform is None else f", k = {self.uniform.k} everywhere {self.uniform.loss:.4g}"
        times = "" if self.ms is None else f", {self.ms:.4g} ms"
        sure = "" if self.share is None else f", sure {100 * sum(self.share) / len(self.share):.0f} %"
        return f"<AllocationResult: {self.allocation!r}{uniform}{times}{sure}>"


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
    caution: Caution | None = CAUTION,
    **settings: int | float,
) -> tuple[AllocationResult, ...]:
    """One allocation per budget, in the order of `budgets`.

    Budgets are experts per token summed over layers or, with a `cost`, the most milliseconds that its mix may take.
    `loss` is one that the profile holds, its `default_loss` if None. `settings` and `fitness` are those of
    `evolution.search`; optima are of the summed loss for any fitness. `resamples` tables give a result's certainty.

    Where `needs_caution`, an allocation is the best by losses shrunk towards their mean, or as even as can be, as
    `caution` says; its loss and optimum are by the profile's own table. If None, it is the best by that.

    Raises InputError where the profile lacks a layer, for an unknown method, and as `problem.pose`.
    """
    if method not in METHODS:
        raise InputError(f"method {method!r} is unknown, expected one of {', '.join(METHODS)}")
    if method != "evolution" and fitness is not None:
        raise InputError("the exact method minimises the summed loss only; use evolution for another fitness")
    loss = loss or profile.default_loss
    problem = pose_profile(profile, budgets, cost=cost, constraints=constraints, loss=loss)
    optimum = solve(problem)
    made_by = describe_origin(profile, constraints, loss=loss, method=method)
    if method == "evolution":
        made_by |= {"seed": seed, **settings}

    def find(posed: Problem) -> Optimum | Evolved:
        best = optimum if posed is problem else solve(posed)
        return search(posed, fitness=fitness, optimum=best, seed=seed, **settings) if method == "evolution" else best

    choice, origins = None, [made_by] * len(optimum.loss)
    if caution is not None and fitness is None and needs_caution(profile, loss):
        choice = choose_carefully(profile, problem, caution, loss=loss, seed=seed, find=find)
        origins = [made_by | note for note in describe_fallbacks(choice, caution)]
    found = choice.found if choice is not None else find(problem)
    top_k = choice.top_k if choice is not None else found.top_k
    results = _make_results(profile, problem, budgets, top_k, optimum, origins=origins, cost=cost)
    more = {} if choice is None else {"expected_gain": choice.expected_gain.tolist()}
    if method == "evolution":
        more["history"] = list(zip(found.best_history, found.mean_history, strict=True))
    if resamples:
        repose = _find_reposing(problem, budgets, cost, constraints)
        sure = judge(problem, np.asarray(profile.errors(loss)), top_k, resamples=resamples, seed=seed, **repose)
        more |= {"share": list(map(tuple, sure.share.tolist())), "regret": sure.regret.tolist()}
    return tuple(
        result._replace(**{name: values[i] for name, values in more.items()}) for i, result in enumerate(results)
    )


def _make_results(
    profile: Profile,
    problem: Problem,
    budgets: Sequence[float],
    top_k: Int[np.ndarray, "budgets layers"],
    optimum: Optimum,
    *,
    origins: Sequence[dict[str, Any]],
    cost: Cost | None,
) -> list[AllocationResult]:
    """The allocations `top_k` with their losses, each beside the optimum and the uniform k of its budget."""
    uniform, losses = find_uniform(problem), sum_over_layers(problem.losses, top_k)
    times = speedups = [None] * len(top_k)
    if cost is not None:
        times = cost.time(top_k).tolist()
        speedups = [cost.base_ms / ms for ms in times]
    return [
        AllocationResult(
            allocation=make_allocation(
                profile,
                row.tolist(),
                loss=losses[i],
                # Grouped layers are added in another order: the smaller of two roundings of the same sum counts.
                optimal_loss=min(optimum.loss[i], losses[i]) / (1 + optimum.error),
                made_by=origins[i] | describe_spending(cost, times[i], speedups[i], budget_ms=budgets[i]),
            ),
            uniform=_make_uniform(problem, int(uniform[i])),
            ms=times[i],
            speedup=speedups[i],
        )
        for i, row in enumerate(top_k)
    ]


def needs_caution(profile: Profile, loss: str) -> bool:
    """Whether the most even allocation takes the place of one that is not surely better: for the default loss of a
    profile with corrections."""
    return profile.settings.compensation_rank is not None and loss == profile.default_loss == "divergence"


def choose_carefully(profile: Profile, problem: Problem, caution: Caution, *, loss: str, **settings: Any) -> Choice:
    """The choice for each of the problem's budgets, by the profile's standard errors; settings of `robust.choose`."""
    return choose(problem, np.asarray(profile.errors(loss)), **caution._asdict(), **settings)


def describe_fallbacks(choice: Choice, caution: Caution) -> list[dict[str, Any]]:
    """What each allocation records that is as even as can be, since none was expected to be better by enough."""
    return [
        {"fallback": {"expected_gain": gain, "threshold": float(caution.threshold)}} if fallback else {}
        for gain, fallback in zip(choice.expected_gain.tolist(), choice.fallback, strict=True)
    ]


def _find_reposing(
    problem: Problem, budgets: Sequence[float], cost: Cost | None, constraints: Constraints | None
) -> dict[str, Any]:
    """What `uncertainty.judge` needs to resample the costs; empty where their errors are not known."""
    if cost is None or cost.errors is None:
        return {}
    caps = np.asarray(budgets, np.float64)

    def repose(costs: np.ndarray) -> Problem:
        return pose(problem.losses, caps, costs=costs, fixed_cost=cost.other_ms, constraints=constraints)

    return {"cost_errors": cost.errors, "repose": repose}


def pose_profile(
    profile: Profile,
    budgets: Sequence[int] | Sequence[float] | None,
    *,
    cost: Cost | None,
    constraints: Constraints | None,
    loss: str,
) -> Problem:
    """The allocation problem of a profile, budgets as in `allocate`; InputError where it lacks a layer."""
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


def _make_uniform(problem: Problem, k: int) -> Uniform | None:
    """The uniform k and its loss; None for k = 0."""
    return Uniform(k, float(sum_over_layers(problem.losses, np.full(len(problem.losses), k)))) if k else None


def make_allocation(
    profile: Profile, top_k: Sequence[int], *, loss: float, optimal_loss: float, made_by: dict[str, Any]
) -> Allocation:
    """The allocation with the k of `top_k`, one for each MoE layer in order."""
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
    """The origin that an allocation records; constraints name layers by their index in the decoder."""
    limits, layers = constraints or Constraints(), profile.model.moe_layers
    bounds = {
        name: bound if isinstance(bound, int) else dict(zip(map(str, layers), map(int, bound), strict=True))
        for name, bound in (("min_k", limits.min_k), ("max_k", limits.max_k))
        if bound is not None
    }
    groups = {"groups": [[layers[row] for row in group] for group in limits.groups]} if limits.groups else {}
    allowed = {"allowed_k": list(limits.allowed_k)} if limits.allowed_k is not None else {}
    origin = {"lexi_search": __version__, "profile_sha256": sha256(profile), "loss": loss, "method": method}
    if profile.settings.compensation_rank is not None:
        origin["compensation_rank"] = profile.settings.compensation_rank
    if "text_sha256" in profile.made_by:
        origin["text_sha256"] = profile.made_by["text_sha256"]
    return {**origin, **bounds, **allowed, **groups}


def describe_spending(
    cost: Cost | None, ms: float | None, speedup: float | None, *, budget_ms: float | None = None
) -> dict[str, Any]:
    """The cost that an allocation records beside its origin; empty where there is no cost."""
    if cost is None:
        return {}
    limit = {} if budget_ms is None else {"budget_ms": float(budget_ms)}
    return {"cost": cost.describe() | {"ms": ms, "speedup": speedup} | limit}
