"""The tables of the report, as Markdown, each from the views alone."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from views import HALF, PLAIN, View, list_cells
from wording import average, change, draw_table, number, share

TOKENS = "measured on / judged on / judged on for the floors"
SHARED = "Times were taken while other models used the same GPU, and say nothing"


def list_models(views: Sequence[View]) -> list[str]:
    rows = []
    for view in views:
        base = view.found["base"]
        rows.append(
            (
                view.name,
                base["model_type"],
                f"{base['parameters'] / 1e6:.1f}",
                base["layers"],
                f"{base['top_k']} of {base['num_experts']}",
                *(f"{name} {loss:.3f}" for name, loss in base["cross_entropy"].items() if name == "mean"),
                f"{base['measured_tokens']:,} / {view.tokens:,} / {view.on(view.oracle).tokens:,}",
            )
        )
    return draw_table(
        ("model", "family", "M parameters", "MoE layers", "k", "loss unreduced", f"tokens {TOKENS}"), rows
    )


def tabulate_cells(view: View, default: str) -> list[str]:
    """Loss increase of every method at every budget, and the share of the gap that it closes; a table for each number
    of tokens that methods were judged on."""
    counts = {method: view.on(method).tokens for method in view.methods}
    lines = []
    for tokens in sorted(set(counts.values()), reverse=True):
        methods = [method for method in view.methods if counts[method] == tokens]
        lines += [f"Judged on {tokens:,} tokens.", "", *tabulate_methods(view.on(methods[0]), methods, default)]
    return lines


def tabulate_methods(view: View, methods: Sequence[str], default: str) -> list[str]:
    budgets = view.budgets.values()
    rows = [("uniform", *(number(view.uniform(budget)) for budget in budgets))]
    for method in methods:
        own = view.find_own(method)
        cells = [f"{number(view.loss(method, b))} ({share(view.closed(method, b))})" for b in budgets]
        rows.append((method if own is None else f"{method}, its exponent {own:g}", *cells))
    rows.append((f"uniform, exponent {HALF}", *(number(view.uniform(b, exponent=HALF)) for b in budgets)))
    for method in methods:
        if view.find_own(method) is None:
            cells = [number(view.loss(method, budget, exponent=HALF)) for budget in budgets]
            rows.append((f"{method}, exponent {HALF}", *cells))
    if "refined" in view.found and "judged_tokens" not in view.found:  # of the fewer windows
        found = [view.found["refined"][str(budget)][PLAIN][view.measure]["mean"] for budget in budgets]
        rows.append(("whole allocations", *map(number, found)))
    for method in dict.fromkeys((view.oracle, default)):
        if method in methods:
            errors = [view.judged(method, budget)["stderr"] for budget in budgets]
            rows.append((f"standard error of {method}", *map(number, errors)))
    headers = [f"{100 * float(part):g} %: {budget}" for part, budget in view.budgets.items()]
    return draw_table(("allocation from", *headers), rows)


def tabulate_measures(views: Sequence[View]) -> list[str]:
    """Uniform k by both measures: of a model that predicts text as it is, small losses are the same by both."""
    rows = []
    for view in views:
        for k, found in enumerate(view.on(view.oracle).reduced, 1):
            divergence = found["divergence"]["mean"]
            ratio, error = (value / divergence for value in (found["increase"]["mean"], found["stderr"]))
            rows.append((view.name, k, number(divergence), f"{ratio:.2f} ± {error:.2f}"))
    return draw_table(("model", "k", "divergence", "increase / divergence"), rows)


def tabulate_exponents(views: Sequence[View]) -> list[str]:
    """Loss increase of uniform k under each exponent, and the best for each k."""
    rows = []
    for view in views:
        found = view.found["uniform"]
        for k in range(1, view.found["base"]["top_k"]):
            increases = {name: found[name][k - 1]["increase"]["mean"] for name in (PLAIN, *list_exponents(view))}
            best = min(list_exponents(view), key=increases.get)
            rows.append((view.name, k, *map(number, increases.values()), best))
    return draw_table(("model", "k", PLAIN, *list_exponents(views[0]), "best"), rows)


def list_exponents(view: View) -> list[str]:
    """Those that uniform k was judged with."""
    return sorted((name for name in view.found["uniform"] if name != PLAIN), key=float)


RANKS = {
    "all entries": "entries",
    "layers at one k": "layers",
    "random allocations": "random",
    "of one budget": "random_at_a_budget",
}


def read_ranks(view: View) -> dict[str, list[float | None]]:
    """Table -> its Spearman correlations with brute force, with random allocations, and with each domain's."""
    domains = view.found["base"]["domains"]
    return {
        name: [*(found[key] for key in RANKS.values()), *(found["domains"].get(domain) for domain in domains)]
        for name, found in view.found.get("correlations", {}).items()
        if "@" not in name
    }


def tabulate_correlations(views: Sequence[View]) -> list[str]:
    """Spearman of every table with brute force, on all the text and on each domain, and with random allocations."""
    rows = [
        (view.name, name, *(number(value, 3) for value in values))
        for view in views
        for name, values in read_ranks(view).items()
    ]
    return draw_table(("model", "table", *name_ranks(views)), rows)


def average_correlations(views: Sequence[View]) -> list[str]:
    """The same, mean over models."""
    ranks = [read_ranks(view) for view in views]
    rows = []
    for name in dict.fromkeys(name for each in ranks for name in each):
        columns = zip(*(each[name] for each in ranks if name in each), strict=True)
        rows.append((name, *(number(average(column), 3) for column in columns)))
    return draw_table(("table, mean over models", *name_ranks(views)), rows)


def name_ranks(views: Sequence[View]) -> list[str]:
    return [*RANKS, *(f"layers at one k, {domain}" for domain in views[0].found["base"]["domains"])]


def tabulate_compounding(views: Sequence[View]) -> list[str]:
    """Real increase over the sum of single-layer increases."""
    rows = []
    for view in views:
        for of in ("uniform", "oracle", "random"):
            ratios = [
                row["real"] / row["sum"]
                for row in view.found.get("compounding", ())
                if row["of"] == of and row["sum"] > 0
            ]
            if ratios:
                rows.append(
                    (
                        view.name,
                        of,
                        len(ratios),
                        *(f"{value:.2f}" for value in (min(ratios), fmean(ratios), max(ratios))),
                    )
                )
    return draw_table(("model", "allocations", "number", "real / sum: least", "mean", "most"), rows)


def tabulate_refined(views: Sequence[View]) -> list[str]:
    """What running whole allocations finds beyond the optimum of a sum."""
    rows = []
    for view, budget in list_cells(views):
        if "refined" not in view.found:
            continue
        cell = view.found["refined"][str(budget)]
        first, *_, last = *cell["history"], cell["history"][-1]
        found, oracle = cell[PLAIN]["increase"]["mean"], view.loss("oracle/increase", budget)
        losses = map(number, (view.loss("oracle/divergence", budget), oracle, found))
        changes = (last / first - 1 if first else None, found / oracle - 1 if oracle > 0 else None)
        rows.append((view.name, budget, cell["evaluated"], *losses, *map(change, changes)))
    headers = ("model", "budget", "run", "oracle/divergence, its start", "oracle/increase", "found")
    return draw_table((*headers, "change of the measured divergence", "loss increase against oracle/increase"), rows)


def find_times(view: View) -> Mapping[str, float]:
    """Milliseconds by name, if nothing else used the GPU meanwhile."""
    times = view.found.get("times", {})
    return times["ms"] if times.get("alone") else {}


def tabulate_times(views: Sequence[View]) -> list[str]:
    """Milliseconds of a forward pass; those that were taken beside other models are left out."""
    rows = [
        (view.name, f"{view.found['times']['tokens']:,}", view.found["times"]["dtype"], name, f"{ms:.2f}")
        for view in views
        for name, ms in find_times(view).items()
    ]
    shared = [view.name for view in views if "times" in view.found and not find_times(view)]
    lines = draw_table(("model", "tokens", "element type", "allocation", "ms"), rows) if rows else []
    return lines + ([f"{SHARED}: {', '.join(shared)}.", ""] if shared else [])


def tabulate_pruned(views: Sequence[View]) -> list[str]:
    """Pruned models beside uniform k and the oracle: where experts are narrower, of as many active parameters, and,
    where there are times, of the same time, interpolated between measured ones."""
    rows, timed = [], any(find_times(view) for view in views)
    for view in views:
        for name, cell in view.found.get("pruned", {}).items():
            if "left_out" in cell:
                rows.append((view.name, name, cell["left_out"], *(["-"] * (5 if timed else 2))))
                continue
            what, part = name.split()
            budget = view.budgets.get(f"{1 - float(part):g}") if what == "width" else None
            active = (None, None) if budget is None else (view.uniform(budget), view.loss(view.oracle, budget))
            row = (view.name, name, *map(number, (cell["increase"]["mean"], *active)))
            rows.append((*row, *show_same_time(view, name)) if timed else row)
    headers = ("model", "pruned", "loss increase", "uniform of as many active parameters", "oracle of as many")
    return draw_table((*headers, "ms", "uniform of that time", "oracle of that time") if timed else headers, rows)


def show_same_time(view: View, pruned: str) -> list[str]:
    """Milliseconds of a pruned model, and what uniform k and the oracle's allocations lose in that time."""
    times = find_times(view)
    if pruned not in times:
        return ["-"] * 3
    oracle = [(times[f"oracle {budget}"], view.loss(view.oracle, budget)) for budget in view.budgets.values()]
    same = (find_same_time(view, pruned), interpolate(oracle, times[pruned]))
    return [f"{times[pruned]:.2f}", *map(number, same)]


def find_same_time(view: View, pruned: str) -> float | None:
    """What uniform k of the time of a pruned model loses; None where there is no such time."""
    times = find_times(view)
    ks = range(1, view.found["base"]["top_k"] + 1)
    points = [(times[f"uniform {k}"], view.uniform(k * view.layers)) for k in ks if f"uniform {k}" in times]
    return interpolate(points, times[pruned]) if pruned in times else None


def interpolate(points: Sequence[tuple[float, float]], at: float) -> float | None:
    """Linear between points of (time, loss) on either side; None outside of them."""
    points = sorted(points)
    for (low, first), (high, second) in zip(points, points[1:], strict=False):
        if low <= at <= high:
            return first + (second - first) * ((at - low) / (high - low) if high > low else 0.0)
    return None


def list_skipped(views: Sequence[View]) -> list[str]:
    """What is not in the study, and why."""
    skipped: Mapping[str, str] = {
        f"{view.name}, {piece}": reason for view in views for piece, reason in view.found["skipped"].items()
    }
    return [f"- {name}: {reason}" for name, reason in skipped.items()] + [""] if skipped else ["Nothing.", ""]
