"""What was measured, as tables for a terminal and as the figure of LExI's throughput."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lexi_adapter.allocation import AllocationError
from lexi_adapter.latency import Check, Step
from lexi_adapter.loads import Load

FIGURE_FORMATS = ("png", "svg", "pdf")


def make_table() -> Table:
    """A table without columns yet, to be given to `entitle` in the end."""
    return Table(box=None, pad_edge=False, header_style="dim")


def entitle(title: str, table: Table) -> Group:
    """rich would fold a title of the table's own at the table's width, and cut names and numbers to fit a terminal."""
    for column in table.columns:
        column.no_wrap = True
        column.min_width = max(map(cell_len, (str(column.header), *map(str, column.cells))))
    return Group(Text(title, style="bold"), table)


def tabulate_bench(document: Mapping[str, Any]) -> RenderableType:
    """One row a variant; for every workload tokens per second, their spread over the rounds, the factor on the base."""
    title, table = f"{document['model']}: tokens/s, batch x input x output", make_table()
    table.add_column("variant")
    table.add_column("experts", justify="right")
    for workload in document["workloads"]:
        table.add_column(workload, justify="right")
        table.add_column("", justify="right")
    for variant in document["variants"]:
        cells = []
        for workload in document["workloads"]:
            line = _find_line(document, variant["name"], workload)
            spread = 100 * (line["highest"] - line["lowest"]) / 2 / line["median"]
            cells += [f"{line['median']:,.0f} ± {spread:.1f} %", f"{line['speedup']:.2f}x"]
        table.add_row(variant["name"], str(sum(variant["engine"]["top_k"].values())), *cells)
    return entitle(title, table)


def _find_line(document: Mapping[str, Any], variant: str, workload: str) -> Mapping[str, Any]:
    return next(line for line in document["summary"] if (line["variant"], line["workload"]) == (variant, workload))


def find_format(path: str) -> str:
    """The format of a figure by its file's name. AllocationError for others than `FIGURE_FORMATS`.

    ImportError where nothing can be drawn: before the measuring, not after.
    """
    import matplotlib  # noqa: F401

    file_format = Path(path).suffix[1:]
    if file_format not in FIGURE_FORMATS:
        raise AllocationError(f"no figure as {path}; name a file that ends in one of {', '.join(FIGURE_FORMATS)}")
    return file_format


@contextmanager
def plain_text() -> Iterator[None]:
    """Of what draws: matplotlib shows every text as it is, for names of files are no formulas."""
    from matplotlib import rc_context

    with rc_context({"text.parse_math": False}):
        yield


def spell(name: str) -> str:
    """A name of a file as a text that can be drawn: bytes of it that are no UTF-8 are spelt out."""
    return name.encode(errors="backslashreplace").decode()


@plain_text()
def draw_bench(document: Mapping[str, Any], file_format: str) -> bytes:
    """Bars of tokens per second, a panel for every workload: the paper's figure 2, with the spread of the rounds."""
    from matplotlib.figure import Figure

    names = [variant["name"] for variant in document["variants"]]
    workloads = document["workloads"]
    figure = Figure(figsize=(1.5 + 3.2 * len(workloads), 1.2 + 0.32 * len(names)), layout="constrained")
    for axes, workload in zip(
        figure.subplots(1, len(workloads), sharey=True, squeeze=False)[0], workloads, strict=True
    ):
        lines = [_find_line(document, name, workload) for name in names]
        medians = [line["median"] for line in lines]
        below = [line["median"] - line["lowest"] for line in lines]
        above = [line["highest"] - line["median"] for line in lines]
        places = range(len(names))
        axes.barh(places, medians, xerr=[below, above], color="#4c72b0", error_kw={"elinewidth": 1, "capsize": 2})
        axes.set_yticks(places, [spell(name) for name in names])
        axes.axvline(medians[0], color="#333333", linewidth=0.8, linestyle=":")
        axes.set_title(spell(workload), loc="left")
        axes.set_xlabel("tokens/s")
        axes.invert_yaxis() if axes is figure.axes[0] else None
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(spell(document["model"]), x=0.01, ha="left")
    return save_figure(figure, file_format)


def save_figure(figure: Any, file_format: str) -> bytes:
    """The bytes of a figure's file; an SVG's are the same for the same figure."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "lexi"}):
        figure.savefig(buffer, format=file_format, dpi=150, metadata={"Date": None} if file_format == "svg" else None)
    return buffer.getvalue()


def tabulate_latency(steps: Sequence[Step]) -> RenderableType:
    """One row a step: milliseconds outside the MoE layers, and of one layer at each k."""
    title, table = "milliseconds of an engine step", make_table()
    for name in ("tokens", "other", *(f"k={k + 1}" for k in range(len(steps[0].layer_ms)))):
        table.add_column(name, justify="right")
    for step in sorted(steps, key=lambda step: step.tokens):
        table.add_row(str(step.tokens), f"{step.other_ms:.3f}", *(f"{value:.4f}" for value in step.layer_ms))
    return entitle(title, table)


def tabulate_checks(checks: Sequence[Check]) -> RenderableType:
    """One row an allocation: its speed-up as the steps predict it, as it was measured, and the difference."""
    title, table = "speed-up of random allocations, end to end", make_table()
    for name in ("workload", "experts", "predicted", "measured", "error %"):
        table.add_column(name, justify="right")
    for check in checks:
        values = (f"{check.predicted_speedup:.3f}", f"{check.measured_speedup:.3f}", f"{100 * check.error:+.1f}")
        table.add_row(check.workload, str(sum(check.top_k.values())), *values)
    return entitle(title, table)


def tabulate_kernels(document: Mapping[str, Any]) -> RenderableType:
    """One row a variant and workload: milliseconds of a card's kernels by kind, as `kernels.combine` gives them.

    "transfer" is communication without the waiting for peers, "exposed" the communication beside which nothing ran.
    """
    kinds = list(document["kernels"][0]["seconds"])
    title, table = "milliseconds of kernels on one card", make_table()
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
    return entitle(title, table)


def tabulate_loads(loads: Mapping[str, Mapping[int, Load]]) -> RenderableType:
    """One row a variant and layer."""
    title, table = "tokens per expert", make_table()
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
    return entitle(title, table)
