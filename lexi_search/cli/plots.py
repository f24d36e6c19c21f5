"""Figures: the heatmap of losses (LExI's figure 3), allocations over it as steps; the front; a search's history."""

import io
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lexi_search.artifacts.allocation import Allocation
from lexi_search.artifacts.profile import Profile
from lexi_search.cli.console import spell
from lexi_search.errors import InputError

if TYPE_CHECKING:  # a heatmap needs no JAX
    from lexi_search.allocation.tradeoff import Front, Point

FORMATS = ("png", "svg", "pdf")
# Losses that grow with the square of what a layer changes: on a linear scale all but a few cells would look alike.
LOGARITHMIC = ("squared", "relative", "divergence", "increase")
DECADES = 3  # that a logarithmic scale covers at most; smaller losses have the colour of its lower end
_STEP_COLOURS = ("#ffffff", "#ff7f11", "#ff4d9d", "#7fd8ff", "#ff2c2c", "#d0b3ff")


def draw_heatmap(
    profile: Profile | Mapping[str, Profile],
    allocations: Mapping[str, Allocation] = MappingProxyType({}),
    *,
    loss: str | None = None,
    normalised: bool = True,
) -> Figure:
    """The heatmap of a profile: layers on x, k on y, losses as colours; `allocations`, by name, as steps of their k.

    The colours of `LOGARITHMIC` losses are on a logarithmic scale.

    Several profiles of one model, by name, are drawn side by side, each with its own colour scale; without `loss` each
    shows its `default_loss`.

    Raises InputError for an allocation or a profile of another model than the first profile.
    """
    profiles = {"": profile} if isinstance(profile, Profile) else dict(profile)
    first = next(iter(profiles.values()))
    others = {f"profile {name}": other for name, other in profiles.items()}
    others |= {f"allocation {name}": allocation for name, allocation in allocations.items()}
    for name, other in others.items():
        if other.model != first.model:
            raise InputError(f"{name} is for another model than the {'first ' * (len(profiles) > 1)}profile")
    width, height = (max(count) for count in zip(*((len(p.layers), p.max_k) for p in profiles.values()), strict=True))
    size = (len(profiles) * (2.6 + 0.2 * max(width, 18)), 1.6 + 0.3 * max(height, 6))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(profiles), squeeze=False)[0]
    for axes, (name, each) in zip(panels, profiles.items(), strict=True):
        _draw_panel(axes, each, loss or each.default_loss, normalised)
        kind = loss or each.default_loss
        title = f"{kind} loss, input {each.settings.input}" + (f" ({spell(name)})" if name else "")
        axes.set_title(title, loc="left", parse_math=False, fontsize="medium")
        _draw_steps(axes, allocations, sorted(each.layers))
    figure.suptitle(
        spell(f"{describe_model(first)}: loss of each layer at each k"),
        x=0.01,
        ha="left",
        parse_math=False,
        fontsize="medium",
    )
    if allocations:
        columns = max(1, len(profiles) * width // 7)
        handles, labels = panels[0].get_legend_handles_labels()
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=columns, labelcolor="white")
        legend.get_frame().set(facecolor="#404040", edgecolor="none")
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure


def _draw_panel(axes: Axes, profile: Profile, loss: str, normalised: bool) -> None:
    rows = profile.losses(loss, normalised=normalised)
    layers, top_k = sorted(profile.layers), profile.max_k
    extent = (-0.5, len(layers) - 0.5, 0.5, top_k + 0.5)
    largest = max(map(max, rows))
    if loss in LOGARITHMIC and largest:
        smallest = min(value for row in rows for value in row if value)
        # A loss of zero is below the scale, too. Where all are equal, a scale still needs two ends.
        scale = {"norm": LogNorm(min(max(smallest, largest / 10**DECADES), largest / 2), largest, clip=True)}
    else:
        scale = {"vmin": 0}
    image = axes.imshow(
        list(zip(*rows, strict=True)), origin="lower", aspect="auto", extent=extent, cmap="viridis", **scale
    )
    axes.figure.colorbar(image, ax=axes, label=_label(loss, normalised), pad=0.01)
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("experts per token, k")
    step = -(-len(layers) // 32)  # at most 32 labels: more would run into each other
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.yaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def draw_front(front: "Front", chosen: "Point | None" = None, *, title: str, loss: str = "loss") -> Figure:
    """The plot of loss over cost (time, or the sum of k): a front's points, every uniform k, and the chosen point.

    `loss` names the loss and its unit.
    """
    timed = front.points[0].ms is not None
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()

    def list_coordinates(points: "Sequence[Point]") -> tuple[list[float], list[float]]:
        return [p.ms if timed else p.budget for p in points], [p.loss for p in points]

    axes.step(*list_coordinates(front.points), where="post", color="#3b528b", linewidth=1.4, label="front")
    axes.plot(*list_coordinates(front.uniform), "o", color="#5ec962", label="the same k in every layer")
    if chosen is not None:
        axes.plot(*list_coordinates([chosen]), "*", color="#ff7f11", markersize=13, label="chosen")
    axes.set_title(spell(title), loc="left", parse_math=False)
    axes.set_xlabel("milliseconds" if timed else "active experts per token, summed over layers")
    axes.set_ylabel(loss)
    axes.set_ylim(bottom=0)
    if timed:
        base = front.points[0].ms * front.points[0].speedup
        upper = axes.secondary_xaxis("top", functions=(lambda ms: _invert(base, ms), lambda s: _invert(base, s)))
        upper.set_xlabel("speed-up")
    axes.grid(alpha=0.25)
    for side in ("right", "top"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False)
    return figure


def draw_history(budgets: Mapping[str, Mapping[str, Sequence[float]]], *, title: str, loss: str) -> Figure:
    """The best fitness (lines) and the mean (dashed) of a search's population after each generation, by budget."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(budgets)))
    for colour, (budget, values) in zip(colours, sorted(budgets.items(), key=_order), strict=True):
        generations = range(1, len(values["best"]) + 1)
        axes.plot(generations, values["best"], color=colour, linewidth=1.4, label=f"B = {budget}")
        axes.plot(generations, values["mean"], color=colour, linewidth=0.9, linestyle="--")
    axes.set_title(
        spell(f"{title}: best loss (lines) and mean loss (dashed) of the population"), loc="left", parse_math=False
    )
    axes.set_xlabel("generation")
    axes.set_ylabel(f"{loss} loss")
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    for side in ("right", "top"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, ncols=1 + len(budgets) // 8)
    return figure


def _order(item: tuple[str, object]) -> tuple[float, str]:
    """Budgets by their number: 8 before 64, 1.2x before 1.3x."""
    number = item[0].rstrip("msx")
    return (float(number) if number.replace(".", "", 1).isdigit() else 0.0, item[0])


def describe_model(profile: Profile) -> str:
    """The model of a profile as a title names it: its type and shape, which is all that a profile knows."""
    model = profile.model
    return f"{model.model_type}, {len(model.moe_layers)} MoE layers of {model.num_experts} experts, k = {model.top_k}"


def _invert(base: float, values: np.ndarray) -> np.ndarray:
    return base / np.maximum(values, 1e-9)


def render(figure: Figure, file_format: str) -> bytes:
    """The bytes of the figure as a PNG, SVG or PDF file, always the same with the same version of matplotlib.

    Raises InputError for another format.
    """
    if file_format not in FORMATS:
        raise InputError(f"cannot draw {file_format or 'a file without a suffix'!r}; name a file in .png, .svg or .pdf")
    metadata = {
        "png": {"Software": None},
        "svg": {"Date": None, "Creator": None},
        "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    }[file_format]
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "lexi"}):
        figure.savefig(buffer, format=file_format, dpi=160, metadata=metadata)
    return buffer.getvalue()


def _label(loss: str, normalised: bool) -> str:
    name = {
        "frobenius": r"mean $\|Y_k - Y_\mathrm{base}\|_F$",
        "rms": r"rms of $\|y_k - y_\mathrm{base}\|$ over tokens",
        "squared": r"mean $\|y_k - y_\mathrm{base}\|^2$ over tokens",
        "relative": r"mean $\|y_k - y_\mathrm{base}\|^2 / \|h\|^2$ over tokens",
        "divergence": "divergence of predictions, nats per token",
        "increase": "increase of cross-entropy, nats per token",
    }[loss]
    return f"{name},\nrelative to the largest" if normalised else name


def _draw_steps(axes: Axes, allocations: Mapping[str, Allocation], layers: Sequence[int]) -> None:
    """Draw allocations as lines, shifted a little so that those with the same k stay visible."""
    for index, (name, allocation) in enumerate(allocations.items()):
        shift = (index - (len(allocations) - 1) / 2) * min(0.12, 0.6 / len(allocations))
        axes.stairs(
            [allocation.top_k[layer] + shift for layer in layers],
            [x - 0.5 for x in range(len(layers) + 1)],
            baseline=None,
            color=_STEP_COLOURS[index % len(_STEP_COLOURS)],
            linewidth=1.8,
            # Without "./" before it, matplotlib leaves out a name that starts with _.
            label=f"{'./' * name.startswith('_')}{spell(name)}, B = {allocation.budget}",
            path_effects=[patheffects.withStroke(linewidth=3.2, foreground="#00000099")],
        )
