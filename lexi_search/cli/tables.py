"""Profiles, allocations and search results as tables for a terminal, and the same as JSON objects for machines."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lexi_search.allocation.allocate import Found
from lexi_search.allocation.comparison import Comparison
from lexi_search.allocation.tradeoff import Front, Point, thin
from lexi_search.artifacts.allocation import Allocation
from lexi_search.artifacts.profile import Profile

if TYPE_CHECKING:
    from lexi_search.profiling.divergence import Judgement
    from lexi_search.profiling.forward import Variant

FOLDED = 16  # columns that a list of k has at least, however narrow the terminal


def tabulate_profile(profile: Profile, *, loss: str, normalised: bool) -> RenderableType:
    """One row per profiled layer: its loss at every k, the tokens it was measured on, the worst relative error."""
    scale = ", relative to the largest" if normalised else ""
    title = f"{profile.model.model_type}: {loss} loss of each layer at each k{scale}"
    table = _table()
    for name in ("layer", *(f"k={k}" for k in range(1, profile.max_k + 1)), "samples", "error %"):
        table.add_column(name, justify="right")
    rows = profile.losses(loss, normalised=normalised)
    pairs = zip(profile.losses(loss), profile.errors(loss), strict=True)
    for (layer, measured), row, pair in zip(sorted(profile.layers.items()), rows, pairs, strict=True):
        error = max((abs(stderr / value) for value, stderr in zip(*pair, strict=True) if value), default=0.0)
        values = (f"{value:.3f}" if normalised else f"{value:.4g}" for value in row)
        table.add_row(str(layer), *values, str(measured.samples), f"{100 * error:.2f}")
    return _entitle(title, table)


def tabulate_allocation(allocation: Allocation) -> RenderableType:
    """One row per MoE layer: its k, in figures and as a bar out of the model's own k, or of `max_k`."""
    full = allocation.max_k or allocation.model.top_k
    title = (
        f"{allocation.model.model_type}: budget {allocation.budget}, {_average(allocation)} experts per layer, "
        f"loss {allocation.loss:.6g}, optimum {allocation.optimal_loss:.6g}"
    )
    table = _table()
    table.add_column("layer", justify="right")
    table.add_column("top_k", justify="right")
    table.add_column(f"of {full}")
    for layer, k in sorted(allocation.top_k.items()):
        table.add_row(str(layer), str(k), "#" * k + "." * (full - k))
    return _entitle(title, table)


def tabulate_search(found: Sequence[Found], targets: Sequence[str] = ()) -> RenderableType:
    """One row per budget, or per target of time, which `targets` names; columns that no row fills are left out."""
    first = found[0].allocation
    title = f"{first.model.model_type}: {len(first.top_k)} MoE layers"
    columns = {
        "budget": lambda f: str(f.allocation.budget),
        "average k": lambda f: _average(f.allocation),
        "ms": lambda f: "" if f.ms is None else f"{f.ms:.6g}",
        "speed-up": lambda f: "" if f.speedup is None else f"{f.speedup:.3f}",
        "loss": lambda f: f"{f.allocation.loss:.6g}",
        "optimum": lambda f: f"{f.allocation.optimal_loss:.6g}",
        "gap %": lambda f: "" if f.allocation.gap is None else f"{100 * f.allocation.gap:.3g}",
        "uniform": lambda f: "" if f.uniform is None else f"{f.uniform.loss:.6g} at {f.uniform.k}",
        "sure %": lambda f: "" if f.share is None else f"{100 * sum(f.share) / len(f.share):.0f}",
        "k per layer": lambda f: " ".join(str(k) for _, k in sorted(f.allocation.top_k.items())),
    }
    table = _table()
    cells = {"target": list(targets)} | {name: [cell(row) for row in found] for name, cell in columns.items()}
    cells = {name: column for name, column in cells.items() if any(column)}
    for name in cells:
        last = name == "k per layer"
        table.add_column(name, justify="left" if last else "right", overflow="fold" if last else "ellipsis")
    for row in zip(*cells.values(), strict=True):
        table.add_row(*row)
    return _entitle(title, table)


def tabulate_front(front: Front, chosen: Point | None = None, *, rows: int = 24) -> RenderableType:
    """Some of the front's points, evenly spread, the chosen one among them and marked."""
    shown = sorted({*thin(front.points, rows), *([chosen] if chosen else [])}, key=front.points.index)
    timed = front.points[0].ms is not None
    table = _table()
    for name in ("budget", *(("ms", "speed-up") if timed else ()), "loss"):
        table.add_column(name, justify="right")
    table.add_column("k per layer", overflow="fold")
    for point in shown:
        times = (f"{point.ms:.6g}", f"{point.speedup:.3f}") if timed else ()
        top_k = " ".join(map(str, point.top_k))
        style = "bold" if point == chosen else None
        table.add_row(str(point.budget), *times, f"{point.loss:.6g}", top_k, style=style)
    within = f", losses within {100 * front.error:.2g} % of the least" if front.error else ""
    named = f"; chosen: budget {chosen.budget}, loss {chosen.loss:.6g}" if chosen else ""
    return _entitle(f"{len(front.points)} Pareto points, {len(shown)} of them{within}{named}", table)


def summarise_found(found: Found) -> dict[str, Any]:
    """What the table of a search says of one allocation, and how sure each layer's k is."""
    summary = summarise(found.allocation)
    if found.ms is not None:
        summary |= {"ms": found.ms, "speedup": found.speedup}
    if found.share is not None:
        layers = map(str, sorted(found.allocation.top_k))
        summary |= {"share": dict(zip(layers, found.share, strict=True)), "regret": found.regret}
    uniform = found.uniform
    return summary | {"uniform_k": uniform and uniform.k, "uniform_loss": uniform and uniform.loss}


def list_points(points: Sequence[Point], layers: Sequence[int]) -> list[dict[str, Any]]:
    """A front's points as JSON objects; `layers` are the decoder layers of their k."""
    rows = []
    for point in points:
        times = {} if point.ms is None else {"ms": point.ms, "speedup": point.speedup}
        top_k = dict(zip(map(str, layers), point.top_k, strict=True))
        rows.append({"budget": point.budget, "loss": point.loss, **times, "top_k": top_k})
    return rows


def summarise(allocation: Allocation) -> dict[str, Any]:
    """What the tables say of an allocation."""
    return {
        "budget": allocation.budget,
        "average_k": allocation.budget / len(allocation.top_k),
        "loss": allocation.loss,
        "optimal_loss": allocation.optimal_loss,
        "gap": allocation.gap,
        "top_k": {str(layer): k for layer, k in allocation.top_k.items()},
    }


def tabulate_comparisons(found: Mapping[tuple[str, str], Comparison], *, title: str) -> RenderableType:
    """One row for each (profile, loss): its rank correlation, how far it goes from uniform to optimum."""
    table = _table()
    first = next(iter(found.values()))
    for name in ("profile", "loss"):
        table.add_column(name)
    for name in ("Spearman", *(f"B={budget}" for budget in first.budgets.tolist())):
        table.add_column(name, justify="right")
    for (path, kind), comparison in found.items():
        closed = ("" if math.isnan(share) else f"{100 * share:.0f} %" for share in comparison.closed.tolist())
        table.add_row(path, kind, f"{comparison.correlation:.3f}", *closed)
    pairs = zip(first.uniform.tolist(), first.optimum.tolist(), strict=True)
    gains = (f"{100 * (1 - optimum / uniform):.1f} %" if uniform else "" for uniform, optimum in pairs)
    table.add_row("", "gain of the optimum over uniform", "", *gains, style="dim")
    return _entitle(title, table)


def list_comparisons(found: Mapping[tuple[str, str], Comparison]) -> list[dict[str, Any]]:
    """The same for machines; entry j of a list is the budget j."""
    return [
        {
            "profile": path,
            "loss": kind,
            "spearman": None if math.isnan(comparison.correlation) else comparison.correlation,
            **{name: getattr(comparison, name).tolist() for name in ("budgets", "uniform", "found", "optimum")},
        }
        for (path, kind), comparison in found.items()
    ]


def tabulate_judgements(variants: Mapping[str, "Variant"], judged: Mapping[str, "Judgement"]) -> RenderableType:
    """One row for each way to run the model, the best first."""
    table = _table()
    table.add_column("allocation")
    for name in ("budget", "exponent", "divergence", "±"):
        table.add_column(name, justify="right")
    for row in list_judgements(variants, judged):
        exponent = "" if row["gate_exponent"] is None else f"{row['gate_exponent']:g}"
        table.add_row(row["name"], str(row["budget"]), exponent, f"{row['divergence']:.4f}", f"{row['stderr']:.4f}")
    return _entitle("divergence of next-token distributions from the model's own, nats per token", table)


def list_judgements(variants: Mapping[str, "Variant"], judged: Mapping[str, "Judgement"]) -> list[dict[str, Any]]:
    """The same for machines."""
    return [
        {"name": name, "budget": sum(variants[name].top_k), "gate_exponent": variants[name].exponent, **found._asdict()}
        for name, found in sorted(judged.items(), key=lambda item: item[1].divergence)
    ]


def list_losses(profile: Profile, *, loss: str, normalised: bool) -> dict[str, Any]:
    """Decoder-layer index -> losses for k = 1, 2, ..."""
    rows = profile.losses(loss, normalised=normalised)
    return {str(layer): list(row) for layer, row in zip(sorted(profile.layers), rows, strict=True)}


def _average(allocation: Allocation) -> str:
    return f"{allocation.budget / len(allocation.top_k):.2f}"


def _table() -> Table:
    return Table(box=None, pad_edge=False, header_style="dim")


def _entitle(title: str, table: Table) -> Group:
    """rich would fold a title of the table's own at the table's width, and cut numbers to fit a terminal."""
    for column in table.columns:
        if column.overflow == "fold":
            column.min_width = FOLDED
        else:
            column.no_wrap = True
            column.min_width = max(map(cell_len, (str(column.header), *map(str, column.cells))))
    return Group(Text(title, style="bold"), table)
