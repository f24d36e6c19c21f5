"""What a user asks for in one word, a budget, a speed or a loss, and the allocation that is best within it."""

import math
from functools import partial
from typing import NamedTuple

from lexi_search.allocation.allocate import AllocationResult, allocate
from lexi_search.allocation.costs import Cost
from lexi_search.allocation.tradeoff import Front, find_fastest_within, find_front
from lexi_search.artifacts.identity import ModelIdentity
from lexi_search.artifacts.profile import Profile
from lexi_search.errors import InputError
from lexi_search.solvers.problem import CAP_TOLERANCE

RESAMPLES = 200


class Target(NamedTuple):
    """The one thing that is asked for: `kind` is "budget", "speedup" or "max_loss".

    A budget is in experts, a speed-up over the model's own k. A largest loss is in the loss's own unit or, if
    `relative`, a share of what the layers lose in sum with one expert each.
    """

    kind: str
    value: float
    relative: bool = False


def check_target(target: Target, model: ModelIdentity, cost: Cost, device: str) -> None:
    """Raise InputError for a target that no profile can make reachable; `device` is what the costs are of."""
    kind, value, _ = target
    layers = len(model.moe_layers)
    full = layers * model.top_k
    if kind == "budget" and not layers <= value < full:
        raise InputError(
            f"--budget {value} is outside {layers} to {full - 1}, what allocations smaller than the model's "
            f"own, {full}, have"
        )
    if kind == "speedup":
        most = cost.base_ms / (cost.other_ms + float(cost.ms.min(axis=1).sum()))
        shown = math.floor(1e4 * most) / 1e4  # a target of what is shown is within reach
        if not 1 < value <= most * (1 + CAP_TOLERANCE):
            what = f"by the {device}" if cost.estimated else f"on {device}"
            raise InputError(
                f"--target-speedup {value:g} is not above 1 and at most {shown:g}, what the fastest k in every "
                f"layer reaches {what}"
            )


def sum_largest(profile: Profile) -> float:
    """The sum of what the layers lose with one expert each: the loss that shares are of."""
    return sum(row[0] for row in profile.losses(profile.default_loss))


def find_limit(profile: Profile, target: Target) -> float:
    """The largest loss that a target of kind "max_loss" allows."""
    return target.value * sum_largest(profile) if target.relative else target.value


def search_target(profile: Profile, target: Target, cost: Cost) -> tuple[AllocationResult, Front]:
    """The exact optimum within the target with its certainty, and the front of loss over the sum of k."""
    seed = profile.settings.seed
    front = find_front(profile, seed=seed)
    search = partial(allocate, profile, method="exact", resamples=RESAMPLES, seed=seed)
    if target.kind == "budget":
        [result] = search([int(target.value)])
        return result, front
    if target.kind == "speedup":
        [result] = search([cost.base_ms / target.value], cost=cost)
        return result, front
    timed, limit = find_front(profile, cost=cost, seed=seed), find_limit(profile, target)
    point = find_fastest_within(timed, limit)
    if all(k == profile.model.top_k for k in point.top_k):
        least = min((other.loss for other in timed.points if other != point), default=0.0)
        largest = sum_largest(profile)
        share = f", {_round_up(100 * least / largest):g}% of what one expert in every layer loses" if least else ""
        asked = f"{100 * target.value:g}% ({limit:.3g})" if target.relative else f"{limit:g}"
        raise InputError(
            f"--max-loss {asked} is out of reach: the least that a faster allocation loses is "
            f"{_round_up(least):g}{share}"
        )
    [result] = search([point.limit], cost=cost)
    return result, front


def _round_up(value: float) -> float:
    """The number of three digits that is `value` or just above it."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2) if value else 1.0
    return math.ceil(value / unit) * unit
