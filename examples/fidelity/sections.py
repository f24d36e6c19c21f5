"""The tables and sentences of the report, as Markdown, each from the views alone."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean

from gaps import LEAST_GAIN
from views import ORACLE, PLAIN, View, is_wide, list_cells

ABOVE = 0.05  # how far above uniform an allocation may be where there is little to gain
HALF = "0.5"  # the gate exponent that every allocation was judged with


def draw_table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = [headers, ["---"] * len(headers), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines] + [""]


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def average(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


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
                f"{base['measured_tokens']:,} / {base['judged_tokens']:,}",
            )
        )
    return draw_table(
        ("model", "family", "M parameters", "MoE layers", "k", "loss unreduced", "tokens measured / judged"), rows
    )


def tabulate_cells(view: View) -> list[str]:
    """Loss increase of every method at every budget, and the share of the gap that it closes."""
    budgets = view.budgets
    rows = [("uniform", *(number(view.uniform(budget)) for budget in budgets.values()))]
    for method in view.methods:
        cells = [
            f"{number(view.increase(method, budget))} ({percent(view.closed(method, budget))})"
            for budget in budgets.values()
        ]
        own = view.find_own(method)
        rows.append((method if own is None else f"{method}, its exponent {own:g}", *cells))
    for name, find in (
        ("uniform", view.uniform),
        *((m, _reader(view, m)) for m in view.methods if view.find_own(m) is None),
    ):
        rows.append((f"{name}, exponent {HALF}", *(number(find(budget, exponent=HALF)) for budget in budgets.values())))
    if "refined" in view.found:
        refined = view.found["refined"]
        rows.append(
            ("whole allocations", *(number(refined[str(b)][PLAIN]["increase"]["mean"]) for b in budgets.values()))
        )
    errors = (view.found["cells"][ORACLE][str(budget)][PLAIN]["stderr"] for budget in budgets.values())
    rows.append(("standard error of the oracle's", *map(number, errors)))
    headers = [f"{100 * float(share):g} %: {budget}" for share, budget in budgets.items()]
    return draw_table(("allocation from", *headers), rows)


def _reader(view: View, method: str) -> Callable[..., float]:
    return lambda budget, exponent: view.increase(method, budget, exponent=exponent)


def compare_methods(views: Sequence[View]) -> list[str]:
    """Each method over all models and budgets that have it."""
    rows = []
    for method in dict.fromkeys(name for view in views for name in view.methods):
        cells = [(view, budget) for view, budget in list_cells(views) if method in view.found["cells"]]
        wide = [cell for cell in cells if is_wide(*cell)]
        narrow = [cell for cell in cells if not is_wide(*cell)]
        rows.append(
            (
                method,
                percent(average(view.closed(method, budget) for view, budget in wide)),
                percent(min((view.closed(method, budget) for view, budget in wide), default=None)),
                f"{sum(view.above(method, budget) > 0 for view, budget in wide)} of {len(wide)}",
                percent(max((view.above(method, budget) for view, budget in narrow), default=None)),
                f"{sum(view.above(method, budget) > ABOVE for view, budget in narrow)} of {len(narrow)}",
            )
        )
    gain = percent(LEAST_GAIN)
    headers = (
        "allocation from",
        f"gap closed, mean (oracle gains {gain} or more)",
        "least",
        "above uniform",
        "most above uniform (oracle gains less)",
        f"above by more than {percent(ABOVE)}",
    )
    return draw_table(headers, rows)


def judge_default(views: Sequence[View], default: str) -> list[str]:
    """The floor and the aim of the default, each with what was found."""
    cells = [(view, budget) for view, budget in list_cells(views) if default in view.found["cells"]]
    if not cells:
        return [f"No model has a table {default}: its profile is among what is left out.", ""]
    wide = [cell for cell in cells if is_wide(*cell)]
    narrow = [cell for cell in cells if not is_wide(*cell)]
    beaten = sum(view.above(default, budget) < 0 for view, budget in wide)
    mean = average(view.closed(default, budget) for view, budget in wide)
    near = sum(view.above(default, budget) <= ABOVE for view, budget in narrow)
    compensated = sum(view.increase(default, budget, exponent=HALF) < view.uniform(budget) for view, budget in cells)
    aimed = sum(
        (view.closed(default, budget) or 0) >= 0.8 and view.above(default, budget) <= 0 for view, budget in wide
    )
    rows = [
        (f"below uniform where the oracle gains {percent(LEAST_GAIN)} or more", f"{beaten} of {len(wide)} cells"),
        ("gap closed there, mean (floor: 50 %)", percent(mean)),
        ("at least 80 % closed there (aim)", f"{aimed} of {len(wide)} cells"),
        (f"at most {percent(ABOVE)} above uniform elsewhere", f"{near} of {len(narrow)} cells"),
        (f"with gate exponent {HALF}, below plain uniform", f"{compensated} of {len(cells)} cells"),
    ]
    return draw_table((f"default: {default}", "found"), rows)


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


def tabulate_correlations(views: Sequence[View]) -> list[str]:
    """Spearman of every table with brute force, on all the text and on each domain, and with random allocations."""
    domains = views[0].found["base"]["domains"]
    rows = []
    for view in views:
        for name, found in view.found.get("correlations", {}).items():
            if "@" not in name:
                values = [found[key] for key in ("entries", "layers", "random", "random_at_a_budget")]
                values += [found["domains"].get(domain) for domain in domains]
                rows.append((view.name, name, *map(_short, values)))
    headers = ("model", "table", "all entries", "layers at one k", "random allocations", "of one budget")
    return draw_table((*headers, *(f"layers at one k, {domain}" for domain in domains)), rows)


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


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


def tabulate_parts(views: Sequence[View], method: str, parts: Callable[[str], bool], what: str) -> list[str]:
    """Allocations from tables measured on a part of the text: real increase by domain, mean over budgets."""
    rows = []
    for view in views:
        names = [
            name for name in view.found["cells"] if name == method or (name.startswith(f"{method}@") and parts(name))
        ]
        domains = [*view.found["base"]["domains"], "mean"]
        uniform = [
            average(view.uniform(budget, domain=domain) for budget in view.budgets.values()) for domain in domains
        ]
        rows.append((view.name, "uniform", *map(number, uniform), "-"))
        for name in names:
            means = [
                average(view.increase(name, budget, domain=domain) for budget in view.budgets.values())
                for domain in domains
            ]
            ranks = view.found.get("correlations", {}).get(name, {})
            label = name.partition("@")[2] or "all"
            rows.append((view.name, label, *map(number, means), _short(ranks.get("layers"))))
    domains = [*views[0].found["base"]["domains"], "mean"]
    return draw_table(("model", what, *domains, "Spearman, layers at one k"), rows)


def tabulate_refined(views: Sequence[View]) -> list[str]:
    """What running whole allocations finds beyond the optimum of a sum."""
    rows = []
    for view, budget in list_cells(views):
        if "refined" not in view.found:
            continue
        cell = view.found["refined"][str(budget)]
        first, *_, last = *cell["history"], cell["history"][-1]
        found, oracle = cell[PLAIN]["increase"]["mean"], view.increase(ORACLE, budget)
        losses = map(number, (view.increase("oracle/divergence", budget), oracle, found))
        changes = (last / first - 1 if first else None, found / oracle - 1 if oracle > 0 else None)
        rows.append((view.name, budget, cell["evaluated"], *losses, *map(percent, changes)))
    headers = ("model", "budget", "run", "oracle/divergence, its start", ORACLE, "found")
    return draw_table((*headers, "change of the measured divergence", f"loss increase against {ORACLE}"), rows)


def tabulate_times(views: Sequence[View]) -> list[str]:
    """Milliseconds of a forward pass."""
    rows = [
        (view.name, f"{view.found['times']['tokens']:,}", view.found["times"]["dtype"], name, f"{ms:.2f}")
        for view in views
        for name, ms in view.found.get("times", {}).get("ms", {}).items()
    ]
    return draw_table(("model", "tokens", "element type", "allocation", "ms"), rows)


def tabulate_pruned(views: Sequence[View]) -> list[str]:
    """Pruned models beside uniform k and the oracle: of the same time, interpolated between measured ones, and, where
    experts are narrower, of as many active parameters."""
    rows = []
    for view in views:
        times = view.found.get("times", {}).get("ms", {})
        ks = range(1, view.found["base"]["top_k"] + 1)
        uniform = [
            (times[f"uniform {k}"], view.found["uniform"][PLAIN][k - 1]["increase"]["mean"]) for k in ks if times
        ]
        oracle = [(times[f"oracle {b}"], view.increase(ORACLE, b)) for b in view.budgets.values() if times]
        for name, cell in view.found.get("pruned", {}).items():
            if "left_out" in cell:
                rows.append((view.name, name, "-", cell["left_out"], *"----"))
                continue
            same = [number(interpolate(points, cell["ms"])) for points in (uniform, oracle)]
            what, share = name.split()
            budget = view.budgets.get(f"{1 - float(share):g}") if what == "width" else None
            active = (
                ["-", "-"] if budget is None else [number(view.uniform(budget)), number(view.increase(ORACLE, budget))]
            )
            rows.append((view.name, name, f"{cell['ms']:.2f}", number(cell["increase"]["mean"]), *same, *active))
    headers = ("model", "pruned", "ms", "loss increase", "uniform of that time", "oracle of that time")
    return draw_table((*headers, "uniform of as many active parameters", "oracle of as many"), rows)


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
