"""An allocation beside what it has to beat: the k of the same budget that are most alike, and the paper's method."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64

from lexi_search import __version__
from lexi_search.allocation.costs import Cost
from lexi_search.artifacts.allocation import Allocation
from lexi_search.artifacts.codec import short
from lexi_search.artifacts.compensation import Maps
from lexi_search.artifacts.files import read_json_object
from lexi_search.artifacts.profile import Profile, ProfileSettings
from lexi_search.artifacts.serialisation import sha256
from lexi_search.errors import InputError
from lexi_search.profiling.divergence import Judgement, average
from lexi_search.profiling.forward.variants import Variant
from lexi_search.solvers.exact import solve
from lexi_search.solvers.problem import pose, sum_over_layers

OURS, PAPER, COMPENSATED = "this allocation", "the paper's method", "compensated alike"


class Contender(NamedTuple):
    """An allocation beside others: its k per layer, its loss by the profile, and its time and speed-up.

    The loss is None without the compensation that the profile was measured with: nothing is known of its layers then.
    `compensated` says whether it is with the profile's gate exponent and corrections. `judged` is what the whole model
    loses under it on text of its own, and `excess` how much more our allocation loses on the same text; None where
    nothing was judged.
    """

    name: str
    top_k: tuple[int, ...]
    loss: float | None
    ms: float
    speedup: float
    compensated: bool = False
    judged: Judgement | None = None
    excess: Judgement | None = None


def spread_evenly(budget: int, layers: int) -> tuple[int, ...]:
    """The k of `layers` layers that sum to `budget` and differ by one at most, the larger ones spread evenly."""
    return tuple((layer + 1) * budget // layers - layer * budget // layers for layer in range(layers))


def list_contenders(
    profile: Profile, allocation: Allocation, cost: Cost, *, plain: Cost, by_paper: Profile | None = None
) -> tuple[Contender, ...]:
    """The allocation; a uniform k of its budget, or two spread evenly, as the model does and, with a profile that
    compensates, as that does; the paper's, if its profile is given; full k.

    Times are by `cost`, which may count corrections, and of what has none by `plain`. Losses are by the table of
    `profile` that a search minimises by default, which the allocation is the best by.
    """
    layers, full = profile.model.moe_layers, profile.model.top_k
    even = spread_evenly(allocation.budget, len(layers))
    spread = (
        f"k = {even[0]} in every layer" if len(set(even)) == 1 else f"k = {min(even)} and {max(even)} spread evenly"
    )
    rows = {OURS: tuple(allocation.top_k[layer] for layer in layers), spread: even}
    corrected = {OURS} if profile.settings.gate_exponent is not None else set()
    if corrected:
        rows[f"{spread}, {COMPENSATED}"] = even
        corrected |= {f"{spread}, {COMPENSATED}"}
    if by_paper is not None:
        rows[PAPER] = _minimise_norms(by_paper, allocation.budget)
    rows[f"the model's own k = {full}"] = (full,) * len(layers)
    chosen = np.array(list(rows.values()))
    known = [not corrected or name in corrected or min(top_k) == full for name, top_k in rows.items()]
    losses = sum_over_layers(np.asarray(profile.losses(profile.default_loss)), chosen)
    ms = np.where([name in corrected for name in rows], cost.time(chosen), plain.time(chosen))
    return tuple(
        Contender(
            name, top_k, float(loss) if known else None, float(time), float(cost.base_ms / time), name in corrected
        )
        for (name, top_k), loss, time, known in zip(rows.items(), losses, ms, known, strict=True)
    )


def _minimise_norms(profile: Profile, budget: int) -> tuple[int, ...]:
    """The optimum of the paper's objective at a budget, which its evolutionary search looks for."""
    best = solve(pose(np.asarray(profile.losses("frobenius")), np.array([budget])))
    return tuple(best.top_k[0].tolist())


def list_variants(contenders: Sequence[Contender], exponent: float | None, maps: Maps | None = None) -> list[Variant]:
    """What is to be measured: all but the model's own k; those that are compensated with the exponent and the maps."""
    return [Variant(one.top_k, exponent, maps) if one.compensated else Variant(one.top_k) for one in contenders[:-1]]


def describe_judging(profile: Profile, settings: ProfileSettings, variants: Sequence[Variant]) -> dict[str, Any]:
    """What divergences are of, as the head of the file that keeps them."""
    return {
        "format": "lexi-judged",
        "version": 1,
        "lexi_search": __version__,
        "profile_sha256": sha256(profile),
        "seed": settings.seed,
        "variants": [{"top_k": list(one.top_k), "gate_exponent": one.exponent} for one in variants],
    }


def read_divergence(path: Path, header: Mapping[str, Any]) -> np.ndarray | None:
    """The divergences in the file `path`, [variants, sequences]; None where they are of something else."""
    kept = read_json_object(path)
    if not header.items() <= kept.items():
        return None
    rows = kept.get("divergence")
    try:
        divergence = np.array(rows, np.float64)
    except (TypeError, ValueError):
        divergence = np.empty(0)
    if divergence.ndim != 2 or len(divergence) != len(header["variants"]) or divergence.shape[1] < 2:
        raise InputError(f"{path}: divergence is {short(rows)}, expected a list of numbers for each variant; remove it")
    return divergence


def judge_contenders(
    contenders: Sequence[Contender], divergence: Float64[np.ndarray, "variants sequences"]
) -> tuple[Contender, ...]:
    """The contenders with what was measured of each on the same sequences; the model's own k loses nothing."""
    divergence = np.pad(divergence, ((0, 1), (0, 0)))
    rows = zip(contenders, average(divergence), average(divergence[0] - divergence), strict=True)
    return tuple(one._replace(judged=judged, excess=excess) for one, judged, excess in rows)
