"""What was evaluated, as a table for a terminal and as the figure of LExI's accuracy over throughput."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType

from lexi_adapter.reports import entitle, make_table, plain_text, save_figure, spell
from lexi_adapter.tradeoff import Panel

# The paper has LExI in green; pruned models are other folders.
STYLES = {
    "base": ("#333333", "*"),
    "allocation": ("#2ca02c", "o"),
    "uniform": ("#ff7f0e", "s"),
    "folder": ("#d62728", "D"),
}


def tabulate_eval(document: Mapping[str, Any]) -> RenderableType:
    """A row for every task, metric and variant: the score and its difference from the base's, with standard errors."""
    title, table = f"{document['model']}, {document['setting']['backend']}", make_table()
    for name in ("task", "metric", "variant"):
        table.add_column(name)
    for name in ("value", "± s.e.", "minus base", "± s.e."):
        table.add_column(name, justify="right")
    rows = dict.fromkeys((line["task"], line["metric"]) for line in document["summary"])
    for task, metric in rows:
        for line in document["summary"]:
            if (line["task"], line["metric"]) == (task, metric):
                numbers = (line[name] for name in ("value", "stderr", "difference", "difference_stderr"))
                table.add_row(task, metric, line["variant"], *map(_format, numbers))
    return entitle(title, table)


def _format(number: float | None) -> str:
    return "" if number is None else f"{number:.4f}" if abs(number) < 1000 else f"{number:.4g}"


def tabulate_tradeoff(panels: Sequence[Panel]) -> RenderableType:
    """A row for every task, workload and variant: tokens per second and the score."""
    title, table = "quality over throughput", make_table()
    for name in ("task", "metric", "workload", "variant"):
        table.add_column(name)
    for name in ("tokens/s", "value", "± s.e."):
        table.add_column(name, justify="right")
    for panel in panels:
        for point in panel.points:
            numbers = (f"{point.throughput:,.0f}", _format(point.value), _format(point.stderr))
            table.add_row(panel.task, panel.metric, panel.workload, point.variant, *numbers)
    return entitle(title, table)


@plain_text()
def draw_tradeoff(title: str, panels: Sequence[Panel], file_format: str) -> bytes:
    """The score over tokens per second, a row for every task, a column for every workload: the paper's figures 4 to 8.

    Bars are the standard error of the score, and the lowest and highest round of the throughput.
    """
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys((panel.task, panel.metric) for panel in panels))
    workloads = list(dict.fromkeys(panel.workload for panel in panels))
    figure = Figure(figsize=(1 + 4.2 * len(workloads), 0.8 + 3.4 * len(tasks)), layout="constrained")
    grid = figure.subplots(len(tasks), len(workloads), squeeze=False)
    for panel in panels:
        axes = grid[tasks.index((panel.task, panel.metric))][workloads.index(panel.workload)]
        for point in panel.points:
            colour, marker = STYLES[point.kind]
            axes.errorbar(
                point.throughput,
                point.value,
                xerr=[[point.throughput - point.lowest], [point.highest - point.throughput]],
                yerr=point.stderr,
                color=colour,
                marker=marker,
                markersize=9 if point.kind == "base" else 6,
                elinewidth=0.8,
                capsize=2,
            )
            place = (point.throughput, point.value)
            axes.annotate(spell(point.variant), place, xytext=(5, 5), textcoords="offset points", fontsize=7)
        axes.set_title(spell(f"{panel.task}, {panel.workload}"), loc="left", fontsize=9)
        axes.set_xlabel("tokens/s")
        axes.set_ylabel(spell(panel.metric))
        axes.margins(0.15)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(spell(title), x=0.01, ha="left")
    return save_figure(figure, file_format)
