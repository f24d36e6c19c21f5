"""The report's plots."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from views import View  # noqa: E402

COLUMNS = 3
SIDE_BY_SIDE = ("oracle/increase", "oracle/divergence", "calibrated/relative", "generated/relative", "paper/squared")


def plot_losses(views: Sequence[View], methods: Sequence[str], file: Path) -> None:
    """Loss increase over the budget, a panel for each model."""
    columns = min(len(views), COLUMNS)
    rows = -(-len(views) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(5 * columns, 4 * rows), squeeze=False, layout="constrained")
    for panel, view in zip(panels.flat, views, strict=False):
        shares = [100 * float(share) for share in view.budgets]
        budgets = list(view.budgets.values())
        panel.plot(shares, [view.uniform(budget) for budget in budgets], "k--", label="uniform")
        for method in methods:
            if method in view.found["cells"]:
                panel.plot(shares, [view.increase(method, budget) for budget in budgets], ".-", label=method)
        panel.set(
            title=view.name, xlabel="active experts, % of the model's own", ylabel="loss increase, nats per token"
        )
        panel.grid(alpha=0.3)
    for panel in panels.flat[len(views) :]:
        panel.remove()
    panels.flat[0].legend(fontsize=8)
    figure.savefig(file, dpi=110)
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
    figure.savefig(file, dpi=110)
    plt.close(figure)
