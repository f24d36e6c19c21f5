"""Tables and numbers as the report shows them."""

from collections.abc import Iterable, Sequence
from statistics import fmean


def draw_table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = [headers, ["---"] * len(headers), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines] + [""]


def percent(value: float | None) -> str:
    return "-" if value is None else f"{round(100 * value)} %"


def change(value: float | None) -> str:
    """A relative difference, its sign shown."""
    return "-" if value is None else f"{round(100 * value):+d} %"


def share(value: float | None) -> str:
    """A share of a gap; how far it is below -100 % says nothing."""
    return "< -100 %" if value is not None and value < -1 else percent(value)


def number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def count(hits: Iterable[bool]) -> str:
    """How many of how many; a dash of none."""
    hits = list(hits)
    return f"{sum(hits)} of {len(hits)}" if hits else "-"


def average(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
