"""The heatmap and the front as SVG for inside a page: colours of text and lines are the page's, light or dark."""

import math
from collections.abc import Sequence
from html import escape

from matplotlib import colormaps

from lexi_search.allocation.auto import Outcome
from lexi_search.allocation.baselines import PAPER
from lexi_search.cli.report.statements import find_unit

_COLOURS = colormaps["viridis"]
_WIDTH = 760  # of a drawing, in its own units; the page scales it
_DARK_UP_TO = 0.45  # of the scale's colours, those on which white is read better than black
_VALUES_UP_TO = 12  # layers with room for a value in every cell


def draw_heatmap(outcome: Outcome) -> str:
    """Losses of every layer (x) at every k (y), colours by their logarithm, and the chosen k as a line over it."""
    profile, chosen = outcome.profile, outcome.contenders[0].top_k
    layers, rows = profile.model.moe_layers, profile.losses(profile.default_loss)
    left, top, height, ks = 34, 6, 30, profile.max_k
    width = (_WIDTH - left - 6) / len(layers)
    bottom = top + ks * height
    low, high = _find_ends(rows)
    parts = []
    for column, (layer, row) in enumerate(zip(layers, rows, strict=True)):
        x = left + column * width
        for k, loss in enumerate(row, 1):
            y, share = bottom - k * height, _scale(loss, low, high)
            parts.append(
                f'<rect x="{x:.2f}" y="{y:g}" width="{width + 0.3:.2f}" height="{height + 0.3:g}" '
                f'fill="{_colour(share)}"><title>layer {layer}, k = {k}: {loss:.3g}</title></rect>'
            )
            if len(layers) <= _VALUES_UP_TO:
                ink = "#fff" if share < _DARK_UP_TO else "#111"
                parts.append(
                    f'<text x="{x + width / 2:.2f}" y="{y + height / 2 + 4:g}" class="cell" fill="{ink}">{_short(loss)}'
                    "</text>"
                )
        if column % -(-len(layers) // 16) == 0:
            parts.append(f'<text x="{x + width / 2:.2f}" y="{bottom + 19}" class="tick middle">{layer}</text>')
    for k in range(1, ks + 1):
        if ks <= 12 or k % 2 == 0:
            parts.append(
                f'<text x="{left - 8}" y="{bottom - k * height + height / 2 + 4:g}" class="tick end">{k}</text>'
            )
    path = f"M{left} {bottom - chosen[0] * height}"
    for column, k in enumerate(chosen):
        path += f"V{bottom - k * height}H{left + (column + 1) * width:.2f}"
    parts += [f'<path d="{path}" class="halo"/>', f'<path d="{path}" class="chosen"/>']
    parts.append(
        f'<text x="{left + (_WIDTH - left) / 2:g}" y="{bottom + 42}" class="label middle">decoder layer</text>'
    )
    parts.append(f'<text x="{left - 8}" y="{bottom + 19}" class="label end">k</text>')
    return _wrap(parts, bottom + 50, f"Loss of each layer at each k, from {low:.2g} to {high:.2g}, with the chosen k")


def draw_scale(outcome: Outcome) -> tuple[str, str, str]:
    """The heatmap's scale of colours: a CSS gradient, and the losses at its two ends."""
    low, high = _find_ends(outcome.profile.losses(outcome.profile.default_loss))
    stops = ", ".join(_colour(_scale(low * (high / low) ** (index / 8), low, high)) for index in range(9))
    return f"linear-gradient(90deg, {stops})", _short(low), _short(high)


def draw_front(outcome: Outcome) -> str:
    """The least loss at every budget as a line, every uniform k as a dot, what was chosen and what the paper would."""
    front, layers = outcome.front, len(outcome.contenders[0].top_k)
    left, right, top, bottom = 64, _WIDTH - 14, 12, 300
    most = max(point.loss for point in (*front.points, *front.uniform)) or 1.0
    step = _find_step(most)
    most = step * math.ceil(most / step - 1e-9)
    last_k = outcome.profile.max_k

    def place(budget: float, loss: float) -> tuple[float, float]:
        x = left + (budget / layers - 1) / (last_k - 1) * (right - left)
        return x, bottom - min(loss, most) / most * (bottom - top)

    parts = []
    for index in range(round(most / step) + 1):
        y = place(layers, index * step)[1]
        parts.append(f'<path d="M{left} {y:.2f}H{right}" class="grid"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.2f}" class="tick end">{index * step:g}</text>')
    for k in range(1, last_k + 1):
        if last_k <= 16 or k % 2 == 0:
            parts.append(f'<text x="{place(k * layers, 0)[0]:.2f}" y="{bottom + 20}" class="tick middle">{k}</text>')
    line = " ".join("{:.2f},{:.2f}".format(*place(point.budget, point.loss)) for point in front.points)
    parts.append(f'<polyline points="{line}" class="front"/>')
    for point in front.uniform:
        x, y = place(point.budget, point.loss)
        parts.append(
            f'<circle cx="{x:.2f}" cy="{y:.2f}" r="5" class="uniform"><title>k = {point.top_k[0]} in every layer: '
            f"{point.loss:.3g}</title></circle>"
        )
    for one in outcome.contenders:
        if one.name == PAPER and one.loss is not None:
            x, y = place(sum(one.top_k), one.loss)
            parts.append(
                f'<path d="M{x:.2f} {y - 8:.2f}l8 8l-8 8l-8 -8z" class="paper"><title>{escape(PAPER)}: {one.loss:.3g}'
                "</title></path>"
            )
    ours = outcome.contenders[0]
    x, y = place(sum(ours.top_k), ours.loss)
    parts.append(f'<path d="{_star(x, y, 11)}" class="ours"><title>this allocation: {ours.loss:.3g}</title></path>')
    middle = (left + right) / 2
    parts.append(
        f'<text x="{middle:g}" y="{bottom + 44}" class="label middle">experts a token, layers\' average k</text>'
    )
    parts.append(
        f'<text class="label middle" transform="translate(14 {(top + bottom) / 2:g}) rotate(-90)">loss, '
        f"{find_unit(outcome)}</text>"
    )
    return _wrap(parts, bottom + 52, "Loss over budget: the front, every uniform k, and this allocation")


def _wrap(parts: Sequence[str], height: float, title: str) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height:g}" role="img" aria-label="{title}">{"".join(parts)}</svg>'


def _find_ends(rows: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The least and the largest loss above zero; of a profile without any, two numbers that will do."""
    positive = [loss for row in rows for loss in row if loss > 0] or [1.0]
    return min(positive), max(positive)


def _scale(loss: float, low: float, high: float) -> float:
    """The place of a loss between the ends, by its logarithm, from 0.06 to 1; no loss is 0."""
    if loss <= 0:
        return 0.0
    return 0.06 + 0.94 * (math.log(loss / low) / math.log(high / low) if high > low else 1.0)


def _colour(share: float) -> str:
    return "#{:02x}{:02x}{:02x}".format(*(round(255 * part) for part in _COLOURS(share)[:3]))


def _short(value: float) -> str:
    """Two digits of a number, in few characters."""
    if value == 0:
        return "0"
    text = f"{value:.2g}" if 1e-3 <= value < 1e4 else f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return text.removeprefix("0") if text.startswith("0.") else text


def _find_step(most: float) -> float:
    """A round distance of grid lines, about five of them up to `most`."""
    power = 10 ** math.floor(math.log10(most / 5))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor * 5 >= most)


def _star(x: float, y: float, size: float) -> str:
    points = []
    for corner in range(10):
        radius, angle = size if corner % 2 == 0 else size * 0.45, math.pi * (corner / 5 - 0.5)
        points.append(f"{x + radius * math.cos(angle):.2f} {y + radius * math.sin(angle):.2f}")
    return f"M{'L'.join(points)}z"
