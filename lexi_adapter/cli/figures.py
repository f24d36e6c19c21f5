"""Figures of the results of `bench` and `tradeoff`, as the bytes of PNG, SVG and PDF files."""

import io
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from lexi_adapter.cli.console import spell
from lexi_adapter.cli.placement import Box, place, trace
from lexi_adapter.cli.tables import find_line, name_model
from lexi_adapter.errors import AdapterError
from lexi_adapter.evaluation.tradeoff import Panel, Point

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
    """Bars of tokens per second with the spread of the rounds, a panel for every workload."""
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
        axes.set_ylim(len(names) - 0.4, -0.6)  # the first on top
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(spell(name_model(document["model"])), x=0.01, ha="left")
    return save_figure(figure, file_format)


COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#8c8c8c", "#ccb974", "#64b5cd")


@_draw_plain_text()
def draw_bench_lines(document: Mapping[str, Any], file_format: str) -> bytes:
    """Tokens per second over active experts per layer, a line for every pruning level: the paper's figure 2.

    A line joins the variants with one k in all layers. Others, searched or mixed, are points with their names.
    """
    from matplotlib.figure import Figure

    workloads = document["workloads"]
    figure = Figure(figsize=(1 + 4.2 * len(workloads), 4.4), layout="constrained")
    grid = figure.subplots(1, len(workloads), squeeze=False)[0]
    levels = list(dict.fromkeys(_find_level(variant) for variant in document["variants"]))
    named: dict[Any, list[_Label]] = {axes: [] for axes in grid}
    for axes, workload in zip(grid, workloads, strict=True):
        for level in levels:
            points = []
            for variant in document["variants"]:
                if _find_level(variant) == level:
                    top_k = list(variant["engine"]["top_k"].values())
                    line = find_line(document, variant["name"], workload)
                    points.append((sum(top_k) / len(top_k), line, variant["name"], len(set(top_k)) == 1))
            joined = sorted((x, line["median"]) for x, line, _, uniform in points if uniform)
            colour = COLOURS[levels.index(level) % len(COLOURS)]
            axes.plot(*zip(*joined, strict=True), color=colour, label=spell(level)) if joined else None
            for x, line, name, uniform in points:
                middle, low, high = (line[key] for key in ("median", "lowest", "highest"))
                spread = [[middle - low], [high - middle]]
                style = (
                    {"color": colour, "marker": "o"} if uniform else {"color": "#222222", "marker": "x", "zorder": 3}
                )
                axes.errorbar(x, middle, yerr=spread, markersize=5, capsize=2, **style)
                named[axes] += [] if uniform else [_Label((x, middle), name, "#222222")]
        axes.set_title(spell(workload), loc="left", fontsize=9)
        axes.set_xlabel("active experts per token and layer")
        axes.set_ylabel("tokens/s")
        axes.set_ylim(bottom=0)
        axes.margins(x=0.1)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=3, frameon=False, fontsize=8)
    figure.suptitle(spell(name_model(document["model"])), x=0.01, ha="left")
    _label(figure, named)
    return save_figure(figure, file_format)


def _find_level(variant: Mapping[str, Any]) -> str:
    """The pruning level of a variant in `bench`'s results; of those that earlier versions wrote, by its overrides."""
    level = variant.get("pruning", variant["name"] if variant["overrides"] else None)
    return "not pruned" if level is None else level


# Kind of a variant -> colours of its methods, in turn, and marker. In the paper LExI is green.
STYLES = {
    "base": (("#333333",), "*"),
    "allocation": (("#2ca02c", "#1f77b4", "#9467bd", "#17becf", "#8c564b"), "o"),
    "uniform": (("#ff7f0e", "#a0522d", "#ffbb78"), "s"),
    "folder": (("#d62728", "#e377c2", "#bcbd22"), "D"),
}


@_draw_plain_text()
def draw_tradeoff(model: str, panels: Sequence[Panel], file_format: str) -> bytes:
    """The score over tokens per second, a row for every task, a column for every workload: the paper's figures 4 to 8.

    A line joins the budgets of a method. Bars are the standard error of the score, or the 95 % interval of a share of
    right answers, and the lowest and highest round of the throughput.
    """
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys((panel.task, panel.metric) for panel in panels))
    workloads = list(dict.fromkeys(panel.workload for panel in panels))
    figure = Figure(figsize=(1 + 4.2 * len(workloads), 1.2 + 3.4 * len(tasks)), layout="constrained")
    grid = figure.subplots(len(tasks), len(workloads), squeeze=False)
    colours = _choose_colours(panels)
    named: dict[Any, list[_Label]] = {}
    legend: dict[str, Any] = {}
    for panel in panels:
        axes = grid[tasks.index((panel.task, panel.metric))][workloads.index(panel.workload)]
        for method, colour in colours.items():
            points = sorted((p for p in panel.points if p.method == method), key=lambda point: point.throughput)
            if points:
                legend[method] = _draw_method(axes, points, colour)
        named[axes] = [_Label((p.throughput, p.value), p.label, colours[p.method]) for p in panel.points]
        axes.set_title(spell(f"{panel.task}, {panel.workload}"), loc="left", fontsize=9)
        axes.set_xlabel("tokens/s")
        axes.set_ylabel(spell(panel.metric))
        axes.margins(0.15)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(legend.values(), map(spell, legend), loc="outside lower left", ncols=2, frameon=False, fontsize=8)
    title = f"{name_model(model)}; labels: share of the base's active experts"
    figure.suptitle(spell(title), x=0.01, ha="left", fontsize=11)
    _label(figure, named)
    return save_figure(figure, file_format)


def _choose_colours(panels: Sequence[Panel]) -> dict[str, str]:
    """Method -> colour, in the order of the points."""
    methods = dict.fromkeys((point.method, point.kind) for panel in panels for point in panel.points)
    turns = {kind: itertools.cycle(colours) for kind, (colours, _) in STYLES.items()}
    return {method: next(turns[kind]) for method, kind in methods}


def _draw_method(axes: Any, points: Sequence[Point], colour: str) -> Any:
    """Draw the points of one method and the line through them; returns what stands for them in a legend."""
    _, marker = STYLES[points[0].kind]
    for point in points:
        low, high = (point.value - (point.stderr or 0), point.value + (point.stderr or 0))
        if point.interval is not None:
            low, high = min(point.interval[0], point.value), max(point.interval[1], point.value)
        axes.errorbar(
            point.throughput,
            point.value,
            xerr=[[point.throughput - point.lowest], [point.highest - point.throughput]],
            yerr=[[point.value - low], [high - point.value]],
            color=colour,
            elinewidth=0.8,
            capsize=2,
        )
    (line,) = axes.plot(
        [point.throughput for point in points],
        [point.value for point in points],
        color=colour,
        marker=marker,
        markersize=9 if points[0].kind == "base" else 6,
        linewidth=1,
    )
    return line


class _Label(NamedTuple):
    """The text beside a point in the units of its axes."""

    point: tuple[float, float]
    text: str
    colour: str


def _label(figure: Any, named: Mapping[Any, Sequence[_Label]]) -> None:
    """Write every point's label beside it, with a line to it where it is not near; none overlaps another or a point.

    A label for which there is no place is left out: the table has it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    renderer, scale = FigureCanvasAgg(figure).get_renderer(), figure.dpi / 72
    figure.draw_without_rendering()  # settles where the axes are
    figure.set_layout_engine("none")
    for axes, labels in named.items():
        pixels = [tuple(axes.transData.transform(label.point)) for label in labels]
        drawn = [axes.transData.transform(line.get_xydata()) for line in axes.lines]
        bars = [axes.transData.transform(bar) for group in axes.collections for bar in group.get_segments()]
        half = 4 * scale  # of the width of a marker
        markers = [Box(x - half, y - half, x + half, y + half) for points in drawn for x, y in points]
        texts = [Text(text=spell(label.text), fontsize=7, figure=figure, parse_math=False) for label in labels]
        extents = [text.get_window_extent(renderer) for text in texts]
        places = place(
            pixels,
            [(extent.width + 2, extent.height + 2) for extent in extents],
            obstacles=markers,
            lines=[box for path in (*drawn, *bars) for box in trace(path, step=8.0)],
            within=Box(*axes.get_window_extent(renderer).extents),
        )
        for label, (x, y), box in zip(labels, pixels, places, strict=True):
            if box is None:
                continue
            near = math.hypot((box.left + box.right) / 2 - x, (box.bottom + box.top) / 2 - y) < 25 * scale
            axes.annotate(
                spell(label.text),
                label.point,
                xytext=((box.left + 1 - x) / scale, (box.bottom + 1 - y) / scale),
                textcoords="offset points",
                fontsize=7,
                color=label.colour,
                arrowprops=None if near else {"arrowstyle": "-", "linewidth": 0.4, "color": "#888888"},
            )
