"""The report's plots."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from views import ERRORS, View  # noqa: E402

COLUMNS, DPI = 3, 75
TICKS = (0.25, 0.5, 0.7, 1, 1.4, 2, 4, 8, 16, 32)
SIDE_BY_SIDE = ("oracle/increase", "oracle/divergence", "calibrated/relative", "generated/relative", "paper/squared")


def plot_losses(views: Sequence[View], methods: Sequence[str], file: Path) -> None:
    """Loss increase relative to uniform k over the budget, a panel for each model; bars are two standard errors."""
    columns = min(len(views), COLUMNS)
    rows = -(-len(views) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(5 * columns, 3.6 * rows), squeeze=False, layout="constrained")
    for panel, view in zip(panels.flat, views, strict=False):
        shares = [100 * float(share) for share in view.budgets]
        budgets = list(view.budgets.values())
        panel.axhline(1, color="black", linestyle="--", label="uniform")
        for method in methods:
            if method in view.found["cells"]:
                judged = view.on(method)
                ratios = [1 + judged.above(method, budget) for budget in budgets]
                errors = [ERRORS * judged.error(method, budget) for budget in budgets]
                panel.errorbar(shares, ratios, yerr=errors, fmt=".-", elinewidth=0.7, label=method)
        panel.set(title=view.name, xlabel="active experts, % of the model's own", ylabel="loss increase over uniform's")
        panel.set_yscale("log")
        ticks = [tick for tick in TICKS if panel.get_ylim()[0] <= tick <= panel.get_ylim()[1]]
        panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    for panel in panels.flat[len(views) :]:
        panel.remove()
    figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    figure.savefig(file, dpi=DPI)
    plt.close(figure)


def plot_tables(views: Sequence[View], default: str, file: Path) -> None:
    """Tables side by side, each relative to its largest entry: a row for each model."""
    names = dict.fromkeys((*SIDE_BY_SIDE, default))
    names = [name for name in names if any(name in view.found["tables"] for view in views)]
    shape = (len(views), len(names))
    figure, panels = plt.subplots(*shape, figsize=(2.6 * shape[1], 2.4 * shape[0]), squeeze=False, layout="constrained")
    for row, view in zip(panels, views, strict=True):
        for panel, name in zip(row, names, strict=True):
            if name not in view.found["tables"]:
                panel.set_axis_off()
                continue
            table = np.array(view.found["tables"][name])
            panel.imshow(np.sqrt(table / (table.max() or 1.0)), aspect="auto", cmap="viridis", vmin=0, vmax=1)
            panel.set_xticks(range(table.shape[1]), range(1, table.shape[1] + 1), fontsize=6)
            panel.set_title(f"{view.name}\n{name}", fontsize=7)
    figure.supxlabel("k; colour: square root of the loss relative to the table's largest")
    figure.supylabel("MoE layer")
    figure.savefig(file, dpi=DPI)
    plt.close(figure)
