"""Every way to make a table beside uniform k, and the default against its floor and its aim."""

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from gaps import LEAST_GAIN, MEASURES
from views import HALF, View, list_cells
from wording import average, change, count, draw_table, percent, share

ABOVE = 0.05  # how far above uniform an allocation may be where there is little to gain
FLOOR, AIM = 0.5, 0.8  # of the gap


def judge_default(views: Sequence[View], default: str) -> list[str]:
    """The floor and the aim of the default, each with what was found, in both measures."""
    if not list(list_cells(views, default)):
        return [f"No model has a table {default}: its profile is among what is left out.", ""]
    columns = [check_floor([replace(view, measure=name) for view in views], default) for name in MEASURES]
    rows = [(name, *(column[name] for column in columns)) for name in columns[0]]
    lines = draw_table((f"default: {default}", *(f"by {name}" for name in MEASURES)), rows)
    return [*lines, describe_noise(views, default), ""]


def describe_noise(views: Sequence[View], default: str) -> str:
    """How many tokens stand behind the floors, what noise is to be expected of so many, and how much more was found."""
    cells = list(list_cells(views, default))
    judged = f"Judged on {show_tokens(cells)} tokens."
    rows = [
        (found["divergence"]["mean"], found["stderr"], view.tokens)
        for view in {view.name: view for view, _ in cells}.values()
        for found in view.reduced
    ]
    rows = [row for row in rows if row[0] > 0]
    if not rows:
        return judged
    least, _, tokens = min(rows)
    ratio = median(error / expect_noise(divergence, count) for divergence, error, count in rows)
    return (
        f"{judged} Over N tokens the increase of the cross-entropy is expected to have a standard error of sqrt(2 d / "
        f"N), d being the divergence, or sqrt(2 / (d N)) of it: {percent(expect_noise(least, tokens) / least)} for the "
        f"uniform k that diverges least, by {least:.4f} nats, with N = {tokens:,}. Those found for uniform k are "
        f"{ratio:.1f} times as large in the median."
    )


def expect_noise(divergence: float, tokens: int) -> float:
    """Standard error of an increase of the cross-entropy over so many tokens, in nats, from the divergence.

    The log-ratio of two predictions that differ little has a variance of twice their divergence.
    """
    return math.sqrt(2 * divergence / tokens)


def show_tokens(cells: Sequence[tuple[View, int]]) -> str:
    """How many tokens cells were judged on."""
    return " or ".join(f"{count:,}" for count in sorted({view.tokens for view, _ in cells}))


def check_floor(views: Sequence[View], default: str) -> dict[str, str]:
    """What is asked of the default -> what was found."""
    cells = list(list_cells(views, default))
    wide, narrow = split(cells)
    closed = [view.closed(default, budget) for view, budget in wide]
    gain = percent(LEAST_GAIN)
    return {
        f"cells where the oracle gains {gain} or more": f"{len(wide)} of {len(cells)}",
        "there below uniform (floor: all)": count(view.above(default, budget) < 0 for view, budget in wide),
        f"there gap closed, mean (floor: {percent(FLOOR)})": share(average(closed)),
        f"there at least {percent(AIM)} closed (aim: all)": count(value >= AIM for value in closed),
        f"elsewhere at most {percent(ABOVE)} above uniform (floor: all)": count(
            view.above(default, budget) <= ABOVE for view, budget in narrow
        ),
        "anywhere above uniform (aim: none)": count(view.above(default, budget) > 0 for view, budget in cells),
        f"with gate exponent {HALF} below plain uniform (floor: all)": count(
            view.above(default, budget, exponent=HALF) < 0 for view, budget in cells
        ),
        "loss against uniform, mean": change(average(view.above(default, budget) for view, budget in cells)),
    }


def split(cells: Sequence[tuple[View, int]]) -> tuple[list[tuple[View, int]], list[tuple[View, int]]]:
    """Cells where the oracle gains enough, and the others."""
    wide = [cell for cell in cells if cell[0].is_wide(cell[1])]
    return wide, [cell for cell in cells if cell not in wide]


def list_doubtful(views: Sequence[View], default: str) -> list[str]:
    """The cells in which the default loses more than uniform, or closes less of the gap than it aims at."""
    rows = []
    for view, budget in list_cells(views, default):
        closed, above = view.closed(default, budget), view.above(default, budget)
        if above <= 0 and (closed is None or closed >= AIM):
            continue
        other = replace(view, measure="divergence")
        rows.append(
            (
                view.name,
                budget,
                change(-view.gain(budget)),
                change(above),
                percent(view.error(default, budget)),
                show_difference(view.difference(default, budget)),
                share(closed),
                change(other.above(default, budget)),
                show_difference(other.difference(default, budget)),
                share(other.closed(default, budget)),
            )
        )
    if not rows:
        return ["None.", ""]
    headers = ("model", "budget", "oracle against uniform", "increase against uniform", "standard error of its own")
    headers += ("paired difference", "gap closed", "divergence against uniform", "paired difference", "gap closed")
    return draw_table(headers, rows)


def show_difference(found: tuple[float, float] | None) -> str:
    return "not recorded" if found is None else f"{100 * found[0]:+.1f} ± {100 * found[1]:.1f} %"


def compare_methods(views: Sequence[View]) -> list[str]:
    """Each method over all models and budgets that have it."""
    rows = []
    for method in dict.fromkeys(name for view in views for name in view.methods):
        cells = list(list_cells(views, method))
        wide, narrow = split(cells)
        above = [view.above(method, budget) for view, budget in cells]
        over = [cell for cell, far in zip(cells, above, strict=True) if far > 0]
        beyond = [view.is_beyond_noise(method, budget) for view, budget in over]
        closed = [view.closed(method, budget) for view, budget in wide]
        rows.append(
            (
                method,
                show_tokens(cells),
                change(average(above)),
                change(max(above)),
                f"{len(over)} of {len(cells)}",
                count(value for value in beyond if value is not None),
                share(average(closed)),
                share(median(closed) if closed else None),
                count(view.above(method, budget) > ABOVE for view, budget in narrow),
                change(average_half(cells, method)),
            )
        )
    headers = ("allocation from", "tokens", "against uniform, mean", "worst cell", "cells above uniform")
    headers += ("of these beyond noise", "gap closed, mean", "median")
    headers += (f"above by more than {percent(ABOVE)} where the oracle gains little",)
    return draw_table((*headers, f"against plain uniform with exponent {HALF}, mean"), rows)


def average_half(cells: Sequence[tuple[View, int]], method: str) -> float | None:
    """Mean of the losses with the gate exponent `HALF`, relative to plain uniform; None for what brings its own."""
    return average(view.above(method, budget, exponent=HALF) for view, budget in cells if view.find_own(method) is None)


def compare_budgets(views: Sequence[View], default: str) -> list[str]:
    """Budgets that one k in every layer meets, and those between, where uniform is interpolated."""
    rows = []
    for name, is_between in (("one k in every layer", False), ("between two k", True)):
        cells = [(view, b) for view, b in list_cells(views, default) if (b % view.layers > 0) == is_between]
        oracle = average(view.above(view.oracle, budget) for view, budget in cells)
        rows.append((name, len(cells), change(oracle), change(average(view.above(default, b) for view, b in cells))))
    return draw_table(("budget", "cells", "oracle against uniform, mean", f"{default} against uniform, mean"), rows)
