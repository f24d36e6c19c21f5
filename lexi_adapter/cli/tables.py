"""Tables of results for a terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.styled import Styled
from rich.table import Table

from lexi_adapter.cli.console import spell
from lexi_adapter.evaluation.tradeoff import Panel
from lexi_adapter.speed.expert_load import Load
from lexi_adapter.speed.latency import Check, Step


def _format(number: float | None) -> str:
    return "" if number is None else f"{number:.4f}" if abs(number) < 1000 else f"{number:.4g}"


def name_model(model: str) -> str:
    """The name of the model in a folder, for titles: its last part, resolved where that is only dots."""
    return Path(model).name if Path(model).name.strip(".") else Path(model).resolve().name


def _make_table() -> Table:
    """A table without columns yet; `_add_title` finishes it."""
    return Table(box=None, pad_edge=False, header_style="dim")


def _add_title(title: str, table: Table) -> Group:
    """A finished table below its title, with no cell folded or cut.

    rich would fold a title of the table itself at the table's width, and cut names and numbers to fit a terminal.
    """
    for column in table.columns:
        column.no_wrap = True
        column.min_width = max(cell_len(spell(str(cell))) for cell in (column.header, *column.cells))
    return Group(Styled(title, "bold"), table)


def tabulate_bench(document: Mapping[str, Any]) -> RenderableType:
    """One row a variant; for every workload tokens per second, their spread over the rounds, speedup over the base."""
    title, table = f"{name_model(document['model'])}: tokens/s, batch x input x output", _make_table()
    table.add_column("variant")
    table.add_column("experts", justify="right")
    for workload in document["workloads"]:
        table.add_column(workload, justify="right")
        table.add_column("", justify="right")
    for variant in document["variants"]:
        cells = []
        for workload in document["workloads"]:
            line = find_line(document, variant["name"], workload)
            spread = 100 * (line["highest"] - line["lowest"]) / 2 / line["median"]
            cells += [f"{line['median']:,.0f} ± {spread:.1f} %", f"{line['speedup']:.2f}x"]
        table.add_row(variant["name"], str(sum(variant["engine"]["top_k"].values())), *cells)
    return _add_title(title, table)


def tabulate_compensation(document: Mapping[str, Any]) -> RenderableType | None:
    """One row a compensated variant whose k another has without; for every workload its throughput over the other's.

    None where there is no such pair.
    """
    title, table = "throughput with compensation over the same k without", _make_table()
    table.add_column("variant")
    for workload in document["workloads"]:
        table.add_column(workload, justify="right")
    for variant in document["variants"]:
        if variant.get("compensation") and (other := _find_uncompensated(document, variant)):
            lines = [[find_line(document, name, w) for name in (variant["name"], other)] for w in document["workloads"]]
            table.add_row(variant["name"], *(f"{one['median'] / two['median']:.3f}" for one, two in lines))
    return _add_title(title, table) if table.row_count else None


def _find_uncompensated(document: Mapping[str, Any], variant: Mapping[str, Any]) -> str | None:
    """The name of a variant of the same weights and k as the model routes by itself."""
    same = (variant["engine"]["top_k"], variant["pruning"], None, None)
    for other in document["variants"]:
        if (other["engine"]["top_k"], other["pruning"], other.get("compensation"), other.get("gate_exponent")) == same:
            return other["name"]
    return None


def find_line(document: Mapping[str, Any], variant: str, workload: str) -> Mapping[str, Any]:
    """The line of one variant and workload in the summary of `bench`."""
    return next(line for line in document["summary"] if (line["variant"], line["workload"]) == (variant, workload))


def tabulate_latency(steps: Sequence[Step]) -> RenderableType:
    """One row a step: milliseconds outside the MoE layers, and of one layer at each k, with half the rounds' range."""
    title = "milliseconds of an engine step: outside the MoE layers (other), and of one MoE layer at each k"
    table = _make_table()
    for name in ("tokens", "other", *(f"k={k + 1}" for k in range(len(steps[0].layer_ms)))):
        table.add_column(name, justify="right")
    for step in sorted(steps, key=lambda step: step.tokens):
        other = f"{step.other_ms:.3f}" + ("" if step.other_spread is None else f" ± {step.other_spread:.3f}")
        spreads = step.layer_spread or [None] * len(step.layer_ms)
        layers = (
            f"{value:.4f}" + ("" if spread is None else f" ± {spread:.4f}")
            for value, spread in zip(step.layer_ms, spreads, strict=True)
        )
        table.add_row(str(step.tokens), other, *layers)
    return _add_title(title, table)


def tabulate_checks(checks: Sequence[Check]) -> RenderableType:
    """One row an allocation: its predicted and measured speed-up, and the error of the prediction."""
    title, table = "speed-up of random allocations, end to end", _make_table()
    for name in ("workload", "experts", "predicted", "measured", "error %"):
        table.add_column(name, justify="right")
    for check in checks:
        values = (f"{check.predicted_speedup:.3f}", f"{check.measured_speedup:.3f}", f"{100 * check.error:+.1f}")
        table.add_row(check.workload, str(sum(check.top_k.values())), *values)
    return _add_title(title, table)


def tabulate_kernels(document: Mapping[str, Any]) -> RenderableType:
    """One row a variant and workload: milliseconds of a card's kernels by kind, from `kernels.combine`.

    "transfer" is communication without the waiting for peers, "exposed" communication while nothing else ran.
    """
    kinds = list(document["kernels"][0]["seconds"])
    title, table = "milliseconds of kernels on one card", _make_table()
    for name in ("variant", "workload"):
        table.add_column(name)
    for name in (*kinds, "transfer", "exposed", "busy"):
        table.add_column(name, justify="right")
    for record in document["kernels"]:
        values = [record["seconds"][kind] for kind in kinds]
        values += [record["transfer"], record["exposed_communication"], record["busy"]]
        table.add_row(
            record["variant"], record["workload"], *("" if value is None else f"{1e3 * value:.2f}" for value in values)
        )
    return _add_title(title, table)


def tabulate_loads(loads: Mapping[str, Mapping[int, Load]]) -> RenderableType:
    """One row a variant and layer: its experts, and measures of uneven load."""
    title, table = "tokens per expert", _make_table()
    table.add_column("variant")
    for name in ("layer", "experts", "max/mean", "variation", "idle %", "active in a step"):
        table.add_column(name, justify="right")
    for name, layers in loads.items():
        for layer, load in sorted(layers.items()):
            values = (
                f"{load.max_over_mean:.2f}",
                f"{load.variation:.2f}",
                f"{100 * load.idle:.1f}",
                f"{load.active:.1f}",
            )
            table.add_row(name, str(layer), str(load.experts), *values)
    return _add_title(title, table)


def tabulate_eval(document: Mapping[str, Any]) -> RenderableType:
    """A row for every task, metric and variant: the score and its difference from the base's, with standard errors.

    Shares of right answers have 95 % intervals beside them, in columns that are there only for such.
    """
    title, table = f"{name_model(document['model'])}, {document['setting']['backend']}", _make_table()
    for name in ("task", "metric", "variant"):
        table.add_column(name)
    shares = any(line.get("interval") for line in document["summary"])
    for name in ("value", "± s.e.", *(["95 %"] * shares), "minus base", "± s.e.", *(["95 %"] * shares)):
        table.add_column(name, justify="right")
    rows = dict.fromkeys((line["task"], line["metric"]) for line in document["summary"])
    for task, metric in rows:
        for line in document["summary"]:
            if (line["task"], line["metric"]) == (task, metric):
                cells = []
                for value, error, interval in (
                    ("value", "stderr", "interval"),
                    ("difference", "difference_stderr", "difference_interval"),
                ):
                    cells += [_format(line[value]), _format(line[error])]
                    cells += [_format_interval(line.get(interval))] if shares else []
                table.add_row(task, f"{metric}, nats" if metric == "loss" else metric, line["variant"], *cells)
    return _add_title(title, table)


def _format_interval(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"


def tabulate_tradeoff(panels: Sequence[Panel]) -> RenderableType:
    """A row for every task, workload and variant: tokens per second and the score."""
    title, table = "quality over throughput", _make_table()
    for name in ("task", "metric", "workload", "variant"):
        table.add_column(name)
    shares = any(point.interval for panel in panels for point in panel.points)
    for name in ("active", "tokens/s", "value", "± s.e.", *(["95 %"] * shares)):
        table.add_column(name, justify="right")
    for panel in panels:
        for point in panel.points:
            active = "" if point.kind == "folder" else "100 %" if point.kind == "base" else point.label
            numbers = (active, f"{point.throughput:,.0f}", _format(point.value), _format(point.stderr))
            numbers += (_format_interval(point.interval),) * shares
            table.add_row(panel.task, panel.metric, panel.workload, point.variant, *numbers)
    return _add_title(title, table)
