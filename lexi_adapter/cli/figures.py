"""Figures of the results of `bench` and `tradeoff`, as the bytes of PNG, SVG and PDF files."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lexi_adapter.cli.console import spell
from lexi_adapter.cli.tables import find_line
from lexi_adapter.errors import AdapterError
from lexi_adapter.evaluation.tradeoff import Panel

FIGURE_FORMATS = ("png", "svg", "pdf")


def find_format(path: str) -> str:
    """The format of a figure, from its file's name. AdapterError for any other than `FIGURE_FORMATS`.

    ImportError where matplotlib is missing: before the measuring, not after.
    """
    import matplotlib  # noqa: F401

    file_format = Path(path).suffix[1:]
    if file_format not in FIGURE_FORMATS:
        raise AdapterError(f"no figure as {path}; name a file that ends in one of {', '.join(FIGURE_FORMATS)}")
    return file_format


@contextmanager
def _draw_plain_text() -> Iterator[None]:
    """A context in which matplotlib shows every text as it is: names of files are not formulas."""
    from matplotlib import rc_context

    with rc_context({"text.parse_math": False}):
        yield


def save_figure(figure: Any, file_format: str) -> bytes:
    """The bytes of a figure's file; an SVG's are the same for the same figure."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "lexi"}):
        figure.savefig(buffer, format=file_format, dpi=150, metadata={"Date": None} if file_format == "svg" else None)
    return buffer.getvalue()


@_draw_plain_text()
def draw_bench(document: Mapping[str, Any], file_format: str) -> bytes:
    """Bars of tokens per second, a panel for every workload: the paper's figure 2, with the spread of the rounds."""
    from matplotlib.figure import Figure

    names = [variant["name"] for variant in document["variants"]]
    workloads = document["workloads"]
    figure = Figure(figsize=(1.5 + 3.2 * len(workloads), 1.2 + 0.32 * len(names)), layout="constrained")
    for axes, workload in zip(
        figure.subplots(1, len(workloads), sharey=True, squeeze=False)[0], workloads, strict=True
    ):
        lines = [find_line(document, name, workload) for name in names]
        medians = [line["median"] for line in lines]
        below = [line["median"] - line["lowest"] for line in lines]
        above = [line["highest"] - line["median"] for line in lines]
        rows = range(len(names))
        axes.barh(rows, medians, xerr=[below, above], color="#4c72b0", error_kw={"elinewidth": 1, "capsize": 2})
        axes.set_yticks(rows, [spell(name) for name in names])
        axes.axvline(medians[0], color="#333333", linewidth=0.8, linestyle=":")
        axes.set_title(spell(workload), loc="left")
        axes.set_xlabel("tokens/s")
        axes.invert_yaxis() if axes is figure.axes[0] else None
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(spell(document["model"]), x=0.01, ha="left")
    return save_figure(figure, file_format)


# Kind of a variant -> colour and marker. In the paper LExI is green; pruned models are other folders.
STYLES = {
    "base": ("#333333", "*"),
    "allocation": ("#2ca02c", "o"),
    "uniform": ("#ff7f0e", "s"),
    "folder": ("#d62728", "D"),
}


@_draw_plain_text()
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
            position = (point.throughput, point.value)
            axes.annotate(spell(point.variant), position, xytext=(5, 5), textcoords="offset points", fontsize=7)
        axes.set_title(spell(f"{panel.task}, {panel.workload}"), loc="left", fontsize=9)
        axes.set_xlabel("tokens/s")
        axes.set_ylabel(spell(panel.metric))
        axes.margins(0.15)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(spell(title), x=0.01, ha="left")
    return save_figure(figure, file_format)
