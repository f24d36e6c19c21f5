"""The report's first page: plain sentences, every number from the results."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from floors import split
from gaps import LEAST_GAIN, MEASURES
from sections import find_same_time, find_times, list_exponents
from views import HALF, PLAIN, View, list_cells
from wording import average, change, count, percent, share

REFERENCES = ("oracle/increase", "calibrated/relative", "generated/relative")
PAPER = ("paper/frobenius", "paper/squared")
SMALL = 0.02  # nats


def conclude(views: Sequence[View], default: str) -> list[str]:
    """What was found, a sentence each."""
    cells = list(list_cells(views, views[0].oracle))
    families = {view.found["base"]["model_type"] for view in views}
    lines = [
        f"{len(views)} trained models of {len(families)} families, {len(cells)} cells of model and budget; in "
        f"{len(split(cells)[0])} of them the oracle gains at least {percent(LEAST_GAIN)} over uniform."
    ]
    lines += [describe_method(name, views) for name in dict.fromkeys((default, *REFERENCES, *PAPER))]
    lines += [describe_exponent(views), describe_both(views, default), describe_compounding(views)]
    lines += [describe_refined(views), describe_pruned(views), describe_pruned_in_time(views), describe_measures(views)]
    if any("times" in view.found and not find_times(view) for view in views):
        lines.append("Nothing is said of equal time for models whose times were taken beside others; see Times.")
    left_out = sorted({piece for view in views for piece in view.found["skipped"]})
    if left_out:
        lines.append(f"Left out of at least one model: {', '.join(left_out)}; the reasons are at the end.")
    return [f"- {line}" for line in lines if line] + [""]


def describe_method(name: str, views: Sequence[View]) -> str:
    if not list(list_cells(views, name)):
        return f"`{name}` was not measured."
    parts = []
    for measure in MEASURES:
        cells = list(list_cells([replace(view, measure=measure) for view in views], name))
        above = [view.above(name, budget) for view, budget in cells]
        closed = average(view.closed(name, budget) for view, budget in cells)
        parts.append(
            f"by {measure} {change(fmean(above))} in the mean and {change(max(above))} at worst, above uniform in "
            f"{count(value > 0 for value in above)} cells, {share(closed)} of the gap closed where there is one"
        )
    return f"`{name}` against uniform: {'; '.join(parts)}."


def describe_exponent(views: Sequence[View]) -> str:
    better, best, changes = [], [], []
    for view in views:
        rows = view.found["uniform"]
        for k in range(view.found["base"]["top_k"] - 1):
            increases = {name: rows_of_k[k]["increase"]["mean"] for name, rows_of_k in rows.items()}
            better.append(increases[HALF] < increases[PLAIN])
            changes.append(increases[HALF] / increases[PLAIN] - 1)
            best.append(float(min(list_exponents(view), key=increases.get)))
    return (
        f"With gate exponent {HALF}, uniform k loses {change(fmean(changes))} against plain in the mean, less in "
        f"{count(better)} cases of model and k; the best exponent tried lies between {min(best):g} and {max(best):g}, "
        f"{fmean(best):.2f} in the mean."
    )


def describe_both(views: Sequence[View], default: str) -> str:
    """The exponent and the allocation, apart and together, in the same cells."""
    cells = list(list_cells(views, default))
    if not cells:
        return ""
    exponent = fmean(view.uniform(budget, exponent=HALF) / view.uniform(budget) - 1 for view, budget in cells)
    alone = fmean(view.above(default, budget) for view, budget in cells)
    both = fmean(view.above(default, budget, exponent=HALF) for view, budget in cells)
    return (
        f"In the cells, against plain uniform in the mean: the exponent {HALF} alone {change(exponent)}, the "
        f"allocation of `{default}` alone {change(alone)}, both {change(both)}."
    )


def describe_compounding(views: Sequence[View]) -> str:
    rows = [row for view in views for row in view.found.get("compounding", ()) if row["sum"] > 0]
    ratios = {
        of: [row["real"] / row["sum"] for row in rows if row["of"] == of] for of in ("uniform", "oracle", "random")
    }
    parts = [f"{fmean(values):.2f} times for {of} allocations" for of, values in ratios.items() if values]
    return f"Losses compound: whole allocations lose the sum of their single-layer increases {', '.join(parts)}."


def describe_refined(views: Sequence[View]) -> str:
    cells = [cell for cell in list_cells(views) if "refined" in cell[0].found]
    parts = []
    for name in ("oracle/divergence", "oracle/increase"):
        changes = [
            view.found["refined"][str(budget)][PLAIN]["increase"]["mean"] / view.loss(name, budget) - 1
            for view, budget in cells
            if view.loss(name, budget) > 0
        ]
        if changes:
            found = (fmean(changes), min(changes), max(changes))
            parts.append("{} in the mean ({} to {}) against {}".format(*map(change, found), name))
    if not parts:
        return ""
    return f"A search that runs whole allocations changes the held-out loss increase by {', '.join(parts)}."


def describe_pruned(views: Sequence[View]) -> str:
    """Narrower experts beside uniform k of as many active parameters."""
    ratios = []
    for view in views:
        for name, cell in view.found.get("pruned", {}).items():
            what, part = name.split()
            budget = view.budgets.get(f"{1 - float(part):g}")
            if what == "width" and budget is not None and "increase" in cell and view.uniform(budget) > 0:
                ratios.append(cell["increase"]["mean"] / view.uniform(budget))
    if not ratios:
        return ""
    return (
        f"Narrower experts lose more than uniform k of as many active parameters in "
        f"{count(ratio > 1 for ratio in ratios)} cases, {min(ratios):.1f} to {max(ratios):.1f} times as much."
    )


def describe_pruned_in_time(views: Sequence[View]) -> str:
    """Pruned models beside uniform k of the same measured time."""
    parts = []
    for what, name in (("experts", "fewer"), ("width", "narrower")):
        pairs = [
            (cell["increase"]["mean"], same)
            for view in views
            for pruned, cell in view.found.get("pruned", {}).items()
            if pruned.startswith(what) and "increase" in cell and (same := find_same_time(view, pruned)) is not None
        ]
        if pairs:
            known = count(lost > same for lost, same in pairs)
            losses = [f"{fmean(each):.4f}" for each in zip(*pairs, strict=True)]
            parts.append(f"{name} experts lose more in {known} cases, {losses[0]} against {losses[1]} nats in the mean")
    return f"Against uniform k of the same measured time in transformers: {'; '.join(parts)}." if parts else ""


def describe_measures(views: Sequence[View]) -> str:
    """Where both measures of uniform k agree."""
    ratios: dict[bool, list[float]] = {True: [], False: []}
    for view in views:
        for found in view.on(view.oracle).reduced:
            divergence = found["divergence"]["mean"]
            ratios[divergence < SMALL].append(found["increase"]["mean"] / divergence)
    parts = [
        f"{fmean(values):.2f} times the divergence where that is {'below' if small else 'at least'} {SMALL} nats"
        for small, values in ratios.items()
        if values
    ]
    return f"The cross-entropy of uniform k grows by {' and '.join(parts)}." if parts else ""
