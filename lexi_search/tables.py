"""Profiles, allocations and search results as tables for a terminal, and the same as JSON objects for machines."""

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lexi_search.artifacts import Allocation, Profile


def tabulate_profile(profile: Profile, *, loss: str, normalised: bool) -> RenderableType:
    """One row per profiled layer: its loss at every k, the tokens it was measured on, the worst relative error."""
    scale = ", relative to the largest" if normalised else ""
    title = f"{profile.model.model_type}: {loss} loss of each layer at each k{scale}"
    table = _table()
    for name in ("layer", *(f"k={k}" for k in range(1, profile.model.top_k + 1)), "samples", "error %"):
        table.add_column(name, justify="right")
    rows = profile.losses(loss, normalised=normalised)
    for (layer, measured), row in zip(sorted(profile.layers.items()), rows, strict=True):
        pairs = zip(measured.rms, measured.rms_stderr, strict=True)
        error = max((stderr / rms for rms, stderr in pairs if rms), default=0.0)
        values = (f"{value:.3f}" if normalised else f"{value:.4g}" for value in row)
        table.add_row(str(layer), *values, str(measured.samples), f"{100 * error:.2f}")
    return _entitle(title, table)


def tabulate_allocation(allocation: Allocation) -> RenderableType:
    """One row per MoE layer: its k, in figures and as a bar out of the model's own k."""
    full = allocation.model.top_k
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


def tabulate_search(allocations: Sequence[Allocation], uniform_losses: Sequence[float | None]) -> RenderableType:
    """One row per budget; the loss of a uniform k is blank where the budget is no multiple of the layers."""
    title = f"{allocations[0].model.model_type}: {len(allocations[0].top_k)} MoE layers"
    table = _table()
    for name in ("budget", "average k", "loss", "optimum", "gap %", "uniform"):
        table.add_column(name, justify="right")
    table.add_column("k per layer", overflow="fold")
    for allocation, uniform in zip(allocations, uniform_losses, strict=True):
        table.add_row(
            str(allocation.budget),
            _average(allocation),
            f"{allocation.loss:.6g}",
            f"{allocation.optimal_loss:.6g}",
            "" if allocation.gap is None else f"{100 * allocation.gap:.3g}",
            "" if uniform is None else f"{uniform:.6g}",
            " ".join(str(k) for _, k in sorted(allocation.top_k.items())),
        )
    return _entitle(title, table)


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


def list_losses(profile: Profile, *, loss: str, normalised: bool) -> dict[str, Any]:
    """Decoder-layer index -> losses for k = 1, 2, ..."""
    rows = profile.losses(loss, normalised=normalised)
    return {str(layer): list(row) for layer, row in zip(sorted(profile.layers), rows, strict=True)}


def _average(allocation: Allocation) -> str:
    return f"{allocation.budget / len(allocation.top_k):.2f}"


def _table() -> Table:
    return Table(box=None, pad_edge=False, header_style="dim")


def _entitle(title: str, table: Table) -> Group:
    """rich would fold a title of the table's own at the table's width."""
    return Group(Text(title, style="bold"), table)
