"""The first figure of README: what is lost over how much faster the model runs, by method, from committed results.

    python examples/benchmarks/quality_over_speed.py [-o FIGURE]

The loss is that of an OLMoE of 43 M parameters on held-out text, the speed that of OLMoE-1B-7B's shape with the same
share of its active experts, from the times that `lexi-adapter latency` measured. Both models have k = 8, so a share is
the same k in each. Every method is drawn at the speed of uniform k with as many active experts.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

import click
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from lexi_search.allocation.costs import weigh
from lexi_search.artifacts.cost_table import CostTable
from lexi_search.artifacts.serialisation import read_cost_table

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "fidelity"))

from records import read_results  # noqa: E402  (after its folder is on the path)

LOSSES = HERE.parent / "fidelity" / "results" / "compensated" / "olmoe-43m.csv"
TIMES = HERE / "results" / "h100" / "serving_latency_olmoe-1b-7b.json"
WORKLOAD, MIX = "16 prompts of 512 tokens, 128 new ones", {16: 128, 8192: 1}
CURVES = {
    "paper/frobenius": ("LExI as in the paper", "#c2410c", "s"),
    "uniform": ("the same k in every layer", "#6b7280", "o"),
    "compensated/divergence": ("lexi-search", "#15803d", "D"),
}


def find_speedups(table: CostTable) -> dict[int, float]:
    """k -> how many times as fast the workload runs with k experts in every layer as with the model's own."""
    cost = weigh(table, table.model, mix=MIX)
    rows = np.tile(np.arange(1, table.model.top_k + 1)[:, None], len(table.model.moe_layers))
    return {k: float(cost.base_ms / ms) for k, ms in enumerate(cost.time(rows), 1)}


def find_points(results, speedups: Mapping[int, float]) -> dict[str, list[tuple[float, float]]]:
    """Method -> (speed-up, loss increase in nats per token) at every budget that is a k in every layer."""
    layers, judged = int(results.facts["layers"]), max(row.tokens for row in results.rows)
    points = {method: [] for method in CURVES}
    budgets = {row.budget for row in results.rows if row.method in points and row.method != "uniform"}
    for row in results.rows:
        if row.method in points and row.tokens == judged and row.budget in budgets and row.budget % layers == 0:
            points[row.method].append((speedups[row.budget // layers], row.increase))
    return points


def make_table(points: Mapping[str, list[tuple[float, float]]]) -> list[str]:
    """The points as a Markdown table, a row for each speed."""
    by_speed = {speed: [] for values in points.values() for speed, _ in sorted(values)}
    for values in points.values():
        for speed, loss in values:
            by_speed[speed].append(f"{loss:.4f}")
    heads = ["times as fast", *(label for label, _, _ in CURVES.values())]
    rows = [[f"{speed:.2f}", *losses] for speed, losses in sorted(by_speed.items())]
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)]


def draw(points: Mapping[str, list[tuple[float, float]]], device: str) -> Figure:
    """The figure, a curve for each method."""
    card = device.removeprefix("NVIDIA ").split()[0]
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.add_subplot(
        xlabel=f"times as fast: OLMoE-1B-7B's shape in vLLM on one {card}, {WORKLOAD}",
        ylabel="loss increase [nats per token]\nan OLMoE of 43 M parameters",
        yscale="log",
    )
    for method, (label, colour, marker) in CURVES.items():
        axes.plot(*zip(*sorted(points[method]), strict=True), color=colour, marker=marker, label=label, linewidth=2)
    axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%.1f"))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


@click.command()
@click.option("-o", "output", default=str(HERE / "results" / "quality_over_speed.svg"), show_default=True)
def main(output: str) -> None:
    """Draw README's first figure from committed results, and print its points."""
    matplotlib.rcParams |= {"svg.hashsalt": "lexi", "svg.fonttype": "none", "font.family": "sans-serif"}
    table = read_cost_table(str(TIMES))
    points = find_points(read_results(LOSSES), find_speedups(table))
    draw(points, table.device).savefig(output, metadata={"Date": None})
    click.echo("\n".join(make_table(points)))


if __name__ == "__main__":
    main()
