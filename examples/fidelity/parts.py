"""Tables that were measured on a part of the text, a domain or so many tokens, and what their allocations lose."""

from collections.abc import Sequence

from views import View
from wording import average, change, draw_table, number

ALL = "all"


def list_parts(view: View, method: str) -> dict[str, str]:
    """Part of the text -> the method measured on it; all of the text first, then domains, then sizes in order."""
    domains = view.found["base"]["domains"]
    names = [name.partition("@")[2] for name in view.found["cells"] if name.startswith(f"{method}@")]
    sizes = sorted((name for name in names if name not in domains), key=lambda name: int(name.rstrip("k")))
    found = [*(domain for domain in domains if domain in names), *sizes]
    return {ALL: method} | {name: f"{method}@{name}" for name in found}


def average_budgets(view: View, method: str | None, domain: str) -> float:
    """Mean loss over the budgets of a method's allocations, or of uniform k, on one domain or all."""
    if method is None:
        return average(view.uniform(budget, domain=domain) for budget in view.budgets.values())
    return average(view.loss(method, budget, domain=domain) for budget in view.budgets.values())


def compare_budgets(view: View, method: str, domain: str) -> float:
    """Mean loss over the budgets, relative to that of uniform k."""
    return average_budgets(view, method, domain) / average_budgets(view, None, domain) - 1


def average_parts(views: Sequence[View], method: str) -> list[str]:
    """Loss relative to uniform, both means over budgets, on each domain: mean over models."""
    domains = [*views[0].found["base"]["domains"], "mean"]
    parts = [list_parts(view, method) for view in views]
    rows = []
    for part in dict.fromkeys(part for each in parts for part in each):
        known = [(view, each[part]) for view, each in zip(views, parts, strict=True) if part in each]
        changes = [average(compare_budgets(view, name, domain) for view, name in known) for domain in domains]
        ranks = average(view.found.get("correlations", {}).get(name, {}).get("layers") for view, name in known)
        rows.append((part, *map(change, changes), number(ranks, 3)))
    headers = (f"{method} measured on", *(f"against uniform on {domain}" for domain in domains[:-1]), "mean")
    return draw_table((*headers, "Spearman, layers at one k"), rows)


def tabulate_parts(views: Sequence[View], method: str) -> list[str]:
    """Loss of every model on each domain, mean over budgets."""
    rows = []
    for view in views:
        domains = [*view.found["base"]["domains"], "mean"]
        for part, name in {"uniform": None, **list_parts(view, method)}.items():
            rows.append((view.name, part, *(number(average_budgets(view, name, domain)) for domain in domains)))
    domains = [*views[0].found["base"]["domains"], "mean"]
    return draw_table(("model", f"{method} measured on", *domains), rows)
