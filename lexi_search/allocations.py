"""From a profile to allocations: the evolutionary search at every budget, each result beside the exact optimum."""

from collections.abc import Sequence

import numpy as np

from lexi_search import __version__
from lexi_search.artifacts import Allocation, Profile, sha256
from lexi_search.budgets import allocation_loss
from lexi_search.errors import InputError
from lexi_search.evolution import search
from lexi_search.exact import solve


def allocate(
    profile: Profile,
    budgets: Sequence[int],
    *,
    loss: str = "frobenius",
    min_k: int = 1,
    max_k: int | None = None,
    seed: int = 0,
    **settings: int | float,
) -> tuple[Allocation, ...]:
    """One allocation per budget, in the order of `budgets`. `settings` are `evolution.search`'s own.

    Raises InputError where the profile lacks a layer, and as `budgets.pose`.
    """
    missing = sorted(set(profile.model.moe_layers) - set(profile.layers))
    if missing:
        raise InputError(
            f"the profile lacks {len(missing)} of the model's {len(profile.model.moe_layers)} MoE layers, the first is "
            f"{missing[0]}; an allocation needs them all, so profile without --layers"
        )
    table, wanted = np.asarray(profile.losses(loss)), np.asarray(budgets)
    bounds = {"min_k": min_k, "max_k": profile.model.top_k if max_k is None else max_k}
    found = search(table, wanted, **bounds, seed=seed, **settings)
    optimum = solve(table, wanted, **bounds)
    made_by = {
        "lexi_search": __version__,
        "profile_sha256": sha256(profile),
        "loss": loss,
        "seed": seed,
        **bounds,
        **settings,
    }
    return tuple(
        Allocation(
            model=profile.model,
            top_k=dict(zip(profile.model.moe_layers, top_k.tolist(), strict=True)),
            budget=int(top_k.sum()),
            loss=float(value),
            optimal_loss=float(best),
            made_by=made_by,
        )
        for top_k, value, best in zip(found.top_k, found.loss, optimum.loss, strict=True)
    )


def uniform_loss(profile: Profile, budget: int, *, loss: str = "frobenius") -> float | None:
    """The loss of the same k in every layer; None where the budget is not that k times the number of layers."""
    k, rest = divmod(budget, len(profile.layers))
    if rest or not 1 <= k <= profile.model.top_k:
        return None
    return float(allocation_loss(np.asarray(profile.losses(loss)), np.full(len(profile.layers), k)))
