"""Profiles, allocations and results as tables for a terminal, and as JSON objects for programs."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.styled import Styled
from rich.table import Table

from lexi_search.allocation.allocate import AllocationResult
from lexi_search.allocation.comparison import Comparison
from lexi_search.allocation.tradeoff import Front, Point, thin
from lexi_search.artifacts.allocation import Allocation
from lexi_search.artifacts.profile import Profile
from lexi_search.cli.console import format_share, spell

if TYPE_CHECKING:
    from lexi_search.artifacts.records import Record
    from lexi_search.profiling.divergence import Judgement
    from lexi_search.profiling.forward.variants import Variant

# The unit of each loss; the sums over layers that allocations have are in the same.
UNITS = {
    "frobenius": "units of the layer's output",
    "rms": "units of the layer's output",
    "squared": "squared units of the layer's output",
    "relative": "of the hidden state's square",
    "divergence": "nats per token",
    "increase": "nats per token",
}
COMPARED = ("budgets", "uniform", "found", "optimum", "lead_error", "closed_error", "distinguishable")
_MIN_WIDTH = 16  # of a list of k that is folded, in characters, however narrow the terminal
_LONGEST_BAR = 1000  # characters for a layer; no model has as many active experts


def tabulate_profile(profile: Profile, *, loss: str, normalised: bool) -> RenderableType:
    """One row per profiled layer: its loss at every k, the number of tokens, the largest relative error."""
    scale = "relative to the largest" if normalised else f"in {UNITS[loss]}"
    title = f"{profile.model.model_type}: {loss} loss of each layer at each k, {scale}"
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
    """One row per MoE layer: its k, as a number and as a bar out of the model's own k or `max_k`."""
    full = allocation.max_k or allocation.model.top_k
    title = (
        f"{allocation.model.model_type}: {describe_budget(allocation)}, loss {allocation.loss:.6g}, optimum "
        f"{allocation.optimal_loss:.6g}{_name_unit(allocation)}"
    )
    table = _table()
    table.add_column("layer", justify="right")
    table.add_column("top_k", justify="right")
    if full <= _LONGEST_BAR:
        table.add_column(f"of {full}")
    for layer, k in sorted(allocation.top_k.items()):
        bar = ["#" * k + "." * (full - k)] if full <= _LONGEST_BAR else []
        table.add_row(str(layer), str(k), *bar)
    return _entitle(title, table)


def tabulate_search(results: Sequence[AllocationResult], targets: Sequence[str] = ()) -> RenderableType:
    """One row per budget, or per target of time by its name in `targets`; empty columns are left out."""
    first = results[0].allocation
    title = f"{first.model.model_type}: {len(first.top_k)} MoE layers, loss in{_name_unit(first)}"
    if any(result.expected_gain is not None and result.allocation.gap for result in results):
        title += "; k are best by losses shrunk towards their mean over layers, gap is by those of the profile"
    columns = {
        "budget": lambda r: str(r.allocation.budget),
        "share %": lambda r: f"{100 * find_share(r.allocation):.4g}",
        "average k": lambda r: _average(r.allocation),
        "ms": lambda r: "" if r.ms is None else f"{r.ms:.6g}",
        "speed-up": lambda r: "" if r.speedup is None else f"{r.speedup:.3f}",
        "loss": lambda r: f"{r.allocation.loss:.6g}",
        "optimum": lambda r: f"{r.allocation.optimal_loss:.6g}",
        "gap %": lambda r: "" if r.allocation.gap is None else f"{100 * r.allocation.gap:.3g}",
        "uniform": lambda r: "" if r.uniform is None else f"{r.uniform.loss:.6g} at {r.uniform.k}",
        "sure %": lambda r: "" if r.share is None else f"{100 * sum(r.share) / len(r.share):.0f}",
        "k per layer": lambda r: " ".join(str(k) for _, k in sorted(r.allocation.top_k.items())),
    }
    table = _table()
    cells = {"target": list(targets)} | {name: [cell(result) for result in results] for name, cell in columns.items()}
    cells = {name: column for name, column in cells.items() if any(column)}
    for name in cells:
        last = name == "k per layer"
        table.add_column(name, justify="left" if last else "right", overflow="fold" if last else "ellipsis")
    for row in zip(*cells.values(), strict=True):
        table.add_row(*row)
    return _entitle(title, table)


def tabulate_front(front: Front, chosen: Point | None = None, *, title: str, rows: int = 24) -> RenderableType:
    """Some of the front's points, evenly spaced, and the chosen one, in bold."""
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
    choice = f"; chosen: budget {chosen.budget}, loss {chosen.loss:.6g}" if chosen else ""
    return _entitle(f"{title}: {len(front.points)} Pareto points, {len(shown)} of them{within}{choice}", table)


def summarise_result(result: AllocationResult) -> dict[str, Any]:
    """A row of `tabulate_search` as a JSON object, with the certainty of each layer's k."""
    summary = summarise(result.allocation)
    if result.ms is not None:
        summary |= {"ms": result.ms, "speedup": result.speedup}
    if result.share is not None:
        layers = map(str, sorted(result.allocation.top_k))
        summary |= {"share": dict(zip(layers, result.share, strict=True)), "regret": result.regret}
    if result.expected_gain is not None:
        summary |= {"expected_gain": result.expected_gain, "fallback": "fallback" in result.allocation.made_by}
    uniform = result.uniform
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
    """An allocation as a JSON object."""
    return {
        "budget": allocation.budget,
        "average_k": allocation.budget / len(allocation.top_k),
        "loss": allocation.loss,
        "optimal_loss": allocation.optimal_loss,
        "gap": allocation.gap,
        "top_k": {str(layer): k for layer, k in allocation.top_k.items()},
    }


def tabulate_comparisons(
    comparisons: Mapping[tuple[str, str], Comparison], profiles: Mapping[str, Profile], *, title: str
) -> RenderableType:
    """One row per (profile, loss): its rank correlation, and the share of the gap from uniform to optimum it closes."""
    table = _table()
    first = next(iter(comparisons.values()))
    for name in ("profile", "compensation", "loss"):
        table.add_column(name)
    for name in ("Spearman", *(f"B={budget}" for budget in first.budgets.tolist())):
        table.add_column(name, justify="right")
    for (path, kind), comparison in comparisons.items():
        figures = (comparison.closed.tolist(), comparison.closed_error.tolist(), comparison.distinguishable.tolist())
        closed = (
            "" if math.isnan(share) else f"{'' if clear else '~ '}{100 * share:.0f} ±{100 * error:.0f} %"
            for share, error, clear in zip(*figures, strict=True)
        )
        made_up = describe_compensation(profiles[path]) or "none"
        table.add_row(path, made_up, kind, f"{comparison.correlation:.3f}", *closed)
    pairs = zip(first.uniform.tolist(), first.optimum.tolist(), strict=True)
    gains = (f"{100 * (1 - optimum / uniform):.1f} %" if uniform else "" for uniform, optimum in pairs)
    table.add_row("", "", "gain of the optimum over uniform", "", *gains, style="dim")
    return _entitle(title, table)


def tabulate_judgements(variants: Mapping[str, "Variant"], judged: Mapping[str, "Judgement"]) -> RenderableType:
    """One row per variant, the best first."""
    table = _table()
    table.add_column("allocation")
    for name in ("budget", "exponent", "rank", "divergence", "±"):
        table.add_column(name, justify="right")
    for row in list_judgements(variants, judged):
        made_up = ("" if row[name] is None else f"{row[name]:g}" for name in ("gate_exponent", "compensation_rank"))
        table.add_row(row["name"], str(row["budget"]), *made_up, f"{row['divergence']:.4f}", f"{row['stderr']:.4f}")
    return _entitle("divergence of next-token distributions from the model's own, nats per token", table)


def list_judgements(variants: Mapping[str, "Variant"], judged: Mapping[str, "Judgement"]) -> list[dict[str, Any]]:
    """The rows of `tabulate_judgements` as JSON objects."""
    return [
        {
            "name": name,
            "budget": sum(variants[name].top_k),
            "gate_exponent": variants[name].exponent,
            "compensation_rank": len(next(iter(maps.values())).A) if (maps := variants[name].maps) else None,
            **judgement._asdict(),
        }
        for name, judgement in sorted(judged.items(), key=lambda item: item[1].divergence)
    ]


def tabulate_rows(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str) -> RenderableType:
    """Cells that are text already, the first of each row a name."""
    table = _table()
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    return _entitle(title, table)


def list_losses(profile: Profile, *, loss: str, normalised: bool) -> dict[str, Any]:
    """Decoder-layer index -> losses for k = 1, 2, ..."""
    rows = profile.losses(loss, normalised=normalised)
    return {str(layer): list(row) for layer, row in zip(sorted(profile.layers), rows, strict=True)}


def describe_budget(allocation: Allocation) -> str:
    """The budget as a sum, a share of the model's own, and an average."""
    own = len(allocation.top_k) * allocation.model.top_k
    share = format_share(find_share(allocation))
    return f"budget {allocation.budget} of {own} ({share}, {_average(allocation)} experts per layer on average)"


def describe_profile(profile: Profile, loss: str) -> str:
    """What a profile holds, and how well it is known, in one line."""
    pairs = zip(sum(profile.losses(loss), ()), sum(profile.errors(loss), ()), strict=True)
    errors = sorted(error / value for value, error in pairs if value)
    known = f", known to {format_share(errors[len(errors) // 2])} in the median (standard error)" if errors else ""
    count = f"{len(profile.layers)} of {len(profile.model.moe_layers)} MoE layers"
    background_k = profile.settings.background_k if loss == "divergence" else None
    others = "" if background_k is None else f"all other layers at k = {background_k}"
    known += "".join(f"; {said}" for said in (profile.text, describe_compensation(profile), others) if said)
    return f"{profile.model.model_type}: {loss} loss of {count} at k from 1 to {profile.max_k}{known}"


def describe_compensation(profile: Profile) -> str:
    """What the losses of a profile were measured with to make up for dropped experts; empty for nothing."""
    exponent, rank = profile.settings.gate_exponent, profile.settings.compensation_rank
    said = "" if exponent is None else f"gate exponent {exponent:g}"
    return said if rank is None else f"{said} and corrections of rank {rank}"


def explain_rank(profile: Profile, asked: int | None) -> str | None:
    """The line that says that no correction can have the rank that was `asked` for; None where there is none to say."""
    rank = profile.settings.compensation_rank
    if asked is None or rank is None or asked <= rank:
        return None
    return (
        f"--rank {asked}: corrections of this model have at most {rank}, by its experts and hidden size, and have that"
    )


def tabulate_record(record: "Record") -> RenderableType:
    """The rows of a record as they are."""
    table = _table()
    for index, name in enumerate(record.columns):
        numeric = all(_is_number(row[index]) for row in record.rows)
        last = index == len(record.columns) - 1 and not numeric
        table.add_column(name, justify="right" if numeric else "left", overflow="fold" if last else "ellipsis")
    for row in record.rows:
        table.add_row(*map(str, row))
    return _entitle(record.title, table)


def _is_number(value: Any) -> bool:
    try:
        return value == "" or float(value) is not None
    except ValueError:
        return False


def describe_result(result: AllocationResult) -> str:
    """What a search found, in one line."""
    allocation = result.allocation
    least, most = min(allocation.top_k.values()), max(allocation.top_k.values())
    spread = f"k = {least} in every layer" if least == most else f"k from {least} to {most}"
    times = "" if result.ms is None else f", {result.ms:.4g} ms, {result.speedup:.3f} times as fast"
    against, uniform = "", result.uniform
    if uniform is not None and uniform.loss > allocation.loss:
        against = f", {format_share(1 - allocation.loss / uniform.loss)} less than k = {uniform.k} in every layer"
    loss = f"loss {allocation.loss:.4g}{_name_unit(allocation)}{against}"
    return f"{describe_budget(allocation)}{times}: {spread}, {loss}"


def explain_fallbacks(named: Mapping[str, AllocationResult]) -> str | None:
    """The line that says for which budgets, by name, k are as even as can be, and why; None where for none."""
    gains = {name: result.expected_gain for name, result in named.items() if "fallback" in result.allocation.made_by}
    if not gains:
        return None
    most = format_share(max(0.0, *gains.values()))
    return (
        f"budget {', '.join(gains)}: k as even as can be, for the profile cannot tell a better one: "
        f"expected gain {'at most ' if len(gains) > 1 else ''}{most}"
    )


def find_share(allocation: Allocation) -> float:
    """The budget as a share of that with the model's own k."""
    return allocation.budget / (len(allocation.top_k) * allocation.model.top_k)


def _name_unit(allocation: Allocation) -> str:
    unit = UNITS.get(str(allocation.made_by.get("loss")))
    return f" {unit}" if unit else ""


def _average(allocation: Allocation) -> str:
    return f"{allocation.budget / len(allocation.top_k):.2f}"


def _table() -> Table:
    return Table(box=None, pad_edge=False, header_style="dim")


def _entitle(title: str, table: Table) -> Group:
    """The table under its title; rich would fold its own title at the table's width, and cut numbers to fit."""
    for column in table.columns:
        if column.overflow == "fold":
            column.min_width = _MIN_WIDTH
        else:
            column.no_wrap = True
            column.min_width = max(cell_len(spell(str(cell))) for cell in (column.header, *column.cells))
    return Group(Styled(title, "bold"), table)
