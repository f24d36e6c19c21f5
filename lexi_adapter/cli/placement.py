"""Where labels go beside their points, so that none lies on another, on a point, or outside the axes."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

RADII = (4, 10, 18, 28, 40, 56, 76, 100, 130, 170, 220, 280)  # between a point and its label; the nearest comes first
ANGLES = (45, 135, -45, -135, 0, 180, 90, -90, 22, 158, -22, -158, 67, 113, -67, -113)  # degrees


class Box(NamedTuple):
    """A rectangle with sides along the axes, in any unit of length."""

    left: float
    bottom: float
    right: float
    top: float

    def meets(self, other: "Box") -> bool:
        """Whether the two have more than an edge in common."""
        apart = self.right <= other.left or other.right <= self.left
        return not (apart or self.top <= other.bottom or other.top <= self.bottom)

    def lies_in(self, other: "Box") -> bool:
        inside = self.left >= other.left and self.right <= other.right
        return inside and self.bottom >= other.bottom and self.top <= other.top


def place(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    *,
    obstacles: Sequence[Box],
    lines: Sequence[Box],
    within: Box,
) -> list[Box | None]:
    """The place of each point's label, of width and height `sizes`: the first one around it that is free.

    Labels are placed in their order, each at the nearest of a few distances where some direction is free. A label lies
    on `lines` only where all else is taken, and on `obstacles` never: None, where that leaves no place. The same
    arguments give the same places.
    """
    taken, places = list(obstacles), []
    for point, size in zip(points, sizes, strict=True):
        inside = (box for box in _list_places(point, size) if box.lies_in(within))
        free = [box for box in inside if not any(map(box.meets, taken))]
        clear = (box for box in free if not any(map(box.meets, lines)))
        places.append(found := next(clear, free[0] if free else None))
        taken += [] if found is None else [found]
    return places


def trace(path: Sequence[tuple[float, float]], *, step: float) -> Iterator[Box]:
    """Small boxes, no wider than `step`, that cover the line through the points of `path`."""
    for (x, y), (end_x, end_y) in itertools.pairwise(path):
        pieces = math.ceil(math.hypot(end_x - x, end_y - y) / step) or 1
        ends = [(x + (end_x - x) * part / pieces, y + (end_y - y) * part / pieces) for part in range(pieces + 1)]
        for (left, bottom), (right, top) in itertools.pairwise(ends):
            low, high = (min(left, right), min(bottom, top)), (max(left, right), max(bottom, top))
            yield Box(low[0] - 1, low[1] - 1, high[0] + 1, high[1] + 1)


def _list_places(point: tuple[float, float], size: tuple[float, float]) -> Iterator[Box]:
    (x, y), (width, height) = point, size
    for radius in RADII:
        for angle in ANGLES:
            across, up = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            left = x + radius * across + width * (across - 1) / 2
            bottom = y + radius * up + height * (up - 1) / 2
            yield Box(left, bottom, left + width, bottom + height)
