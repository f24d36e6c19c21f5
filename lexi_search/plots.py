"""The heatmap of LExI's figure 3: how far each layer's output moves at each k; allocations drawn over it as steps."""

import io
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import matplotlib
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lexi_search.artifacts import Allocation, Profile
from lexi_search.errors import InputError

FORMATS = ("png", "svg")
STEP_COLOURS = ("#ffffff", "#ff7f11", "#ff4d9d", "#7fd8ff", "#ff2c2c", "#d0b3ff")


def draw_heatmap(
    profile: Profile,
    allocations: Mapping[str, Allocation] = MappingProxyType({}),
    *,
    loss: str = "frobenius",
    normalised: bool = True,
) -> Figure:
    """Layers on x, k on y, colour the loss; the k per layer of `allocations`, by the names to call them, as steps.

    Raises InputError for an allocation made for another model.
    """
    for name, allocation in allocations.items():
        if allocation.model != profile.model:
            raise InputError(f"allocation {name} is for another model than the profile")
    rows = profile.losses(loss, normalised=normalised)
    layers, top_k = sorted(profile.layers), profile.model.top_k
    figure = Figure(figsize=(2.6 + 0.2 * max(len(layers), 18), 1.6 + 0.3 * max(top_k, 6)), layout="constrained")
    axes = figure.add_subplot()
    extent = (-0.5, len(layers) - 0.5, 0.5, top_k + 0.5)
    image = axes.imshow(
        list(zip(*rows, strict=True)), origin="lower", aspect="auto", extent=extent, cmap="viridis", vmin=0
    )
    figure.colorbar(image, label=_label(loss, normalised), pad=0.01)
    axes.set_title(f"{profile.model.model_type}: loss of each layer at each k", loc="left")
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("experts per token, k")
    step = -(-len(layers) // 32)  # at most 32 labels: more would run into each other
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.yaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    _draw_steps(axes, allocations, layers)
    return figure


def render(figure: Figure, file_format: str) -> bytes:
    """The figure as a PNG or SVG file, the same bytes each time it is made with the same matplotlib.

    Raises InputError for another format.
    """
    if file_format not in FORMATS:
        raise InputError(f"cannot draw {file_format or 'a file without a suffix'!r}; name a file in .png or .svg")
    metadata = {"Date": None, "Creator": None} if file_format == "svg" else {"Software": None}
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "lexi"}):
        figure.savefig(buffer, format=file_format, dpi=160, metadata=metadata)
    return buffer.getvalue()


def _label(loss: str, normalised: bool) -> str:
    name = {
        "frobenius": r"mean $\|Y_k - Y_\mathrm{base}\|_F$",
        "rms": r"rms of $\|y_k - y_\mathrm{base}\|$ over tokens",
        "squared": r"mean $\|y_k - y_\mathrm{base}\|^2$ over tokens",
    }[loss]
    return f"{name},\nrelative to the largest" if normalised else name


def _draw_steps(axes: Axes, allocations: Mapping[str, Allocation], layers: Sequence[int]) -> None:
    """Lines apart by a little, so that allocations that agree on a layer stay visible."""
    for index, (name, allocation) in enumerate(allocations.items()):
        shift = (index - (len(allocations) - 1) / 2) * min(0.12, 0.6 / len(allocations))
        axes.stairs(
            [allocation.top_k[layer] + shift for layer in layers],
            [x - 0.5 for x in range(len(layers) + 1)],
            baseline=None,
            color=STEP_COLOURS[index % len(STEP_COLOURS)],
            linewidth=1.8,
            label=f"{name}, B = {allocation.budget}",
            path_effects=[patheffects.withStroke(linewidth=3.2, foreground="#00000099")],
        )
    if allocations:
        legend = axes.figure.legend(loc="outside lower center", ncols=max(1, len(layers) // 7), labelcolor="white")
        legend.get_frame().set(facecolor="#404040", edgecolor="none")
