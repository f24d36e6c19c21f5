"""The statements of the report, in words and figures: the same for every form of it."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from lexi_search.allocation.auto import Outcome
from lexi_search.allocation.baselines import COMPENSATED, Contender
from lexi_search.allocation.tradeoff import thin
from lexi_search.cli.report.statements import (
    Step,
    clean,
    explain,
    find_name,
    find_unit,
    list_origin,
    list_steps,
    state_certainty,
)

FRONT_ROWS = 9


class Tile(NamedTuple):
    """One figure at the top of the page, with the words around it."""

    label: str
    figure: str
    note: str
    error: str = ""


class Layer(NamedTuple):
    """A MoE layer's k, and how often it would be the same with another sample of the profile."""

    index: int
    top_k: int
    sure: float


class Facts(NamedTuple):
    """All that a report says. `rows` are the cells of the comparison, `front_rows` those of the front."""

    title: str
    decision: str
    verdict: str
    tiles: tuple[Tile, ...]
    layers: tuple[Layer, ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    front_columns: tuple[str, ...]
    front_rows: tuple[tuple[str, ...], ...]
    certainty: tuple[str, ...]
    steps: tuple[Step, ...]
    meaning: tuple[str, ...]
    origin: tuple[tuple[str, str], ...]


def gather(outcome: Outcome) -> Facts:
    """The facts of a run, in words."""
    ours, even = outcome.contenders[0], _find_even(outcome)
    columns, rows = _compare(outcome)
    full, layers = outcome.job.model.top_k, len(ours.top_k)
    budget = sum(ours.top_k)
    speed = f"{'an estimated ' if outcome.job.cost.estimated else ''}{ours.speedup:.2f} times as fast"
    loss, other = _lose(ours), _lose(even)
    return Facts(
        title=find_name(outcome),
        decision=(
            f"{budget} of {layers * full} experts a token, {budget / layers:.2f} instead of {full} a layer: {speed}; "
            f"it loses {loss:.3g} {find_unit(outcome)}, {even.name} would lose {other:.3g}."
        ),
        verdict=_judge(outcome),
        tiles=_list_tiles(outcome),
        layers=tuple(map(Layer, outcome.job.model.layers, ours.top_k, outcome.result.share)),
        columns=columns,
        rows=rows,
        front_columns=("experts", "average k", "loss, layers summed", "k in every layer loses", _name_speed(outcome)),
        front_rows=tuple(_list_front(outcome)),
        certainty=tuple(state_certainty(outcome)),
        steps=list_steps(outcome),
        meaning=tuple(explain(outcome)),
        origin=tuple(list_origin(outcome)),
    )


def state(value: float, stderr: float) -> str:
    """A number with its standard error, to two digits of the error."""
    digits = 1 - math.floor(math.log10(stderr)) if stderr > 0 else 4
    return f"{value:.{max(digits, 0)}f} ± {stderr:.{max(digits, 0)}f}"


def _find_even(outcome: Outcome) -> Contender:
    """The k that are most alike, as the model runs them; by the profile alone as that was measured, compensated."""
    ours, even, *others = outcome.contenders
    alike = [one for one in others if one.compensated]
    return alike[0] if alike and ours.judged is None else even


def _lose(contender: Contender) -> float:
    """The loss to state: of the whole model where it was judged, else the sum over layers."""
    return contender.loss if contender.judged is None else contender.judged.divergence


def _put_beside(ours: float, theirs: float) -> str:
    """How much less or more `ours` is than `theirs`, in words."""
    if not theirs:
        return "no loss to compare with"
    share = 100 * (1 - ours / theirs)
    return f"{abs(share):.0f} % {'less' if share >= 0 else 'more'}"


def _name_speed(outcome: Outcome) -> str:
    return f"times as fast{' (estimate)' if outcome.job.cost.estimated else ''}"


def _judge(outcome: Outcome) -> str:
    """Whether the allocation beats the k of the same budget that are most alike."""
    ours, even = outcome.contenders[0], _find_even(outcome)
    if ours.judged is None:
        return (
            f"By the profile it loses {_put_beside(ours.loss, even.loss)} than {even.name}. That is the sum of what "
            "each layer loses alone; the whole model was not measured."
        )
    excess, stderr = even.excess
    much = _put_beside(ours.judged.divergence, even.judged.divergence)
    measured = f"Measured on text of its own, the whole model loses {much} than under {even.name}"
    for alike in (one for one in outcome.contenders[2:] if one.compensated):
        share = _put_beside(ours.judged.divergence, alike.judged.divergence)
        measured += f" ({share} than under that {COMPENSATED})"
    if (ours.top_k, ours.compensated) == (even.top_k, even.compensated):
        return f"The best allocation of this budget is {even.name}."
    if excess < -2 * stderr:
        return f"{measured}, and the difference is {-excess / stderr:.1f} standard errors."
    if excess <= 2 * stderr:
        return f"{measured}, but that is within two standard errors: this text cannot tell them apart."
    return f"{measured}: do not serve it before you have measured it on a task of yours."


def _list_tiles(outcome: Outcome) -> tuple[Tile, ...]:
    ours, even = outcome.contenders[0], _find_even(outcome)
    full, layers, sure = outcome.job.model.top_k, len(ours.top_k), outcome.result.share
    average = sum(ours.top_k) / layers
    least, most = min(ours.top_k), max(ours.top_k)
    error = f" ± {ours.judged.stderr:.1g}" if ours.judged else ""
    return (
        Tile(
            "Experts a token",
            f"{sum(ours.top_k)} of {layers * full}",
            f"{average:.2f} a layer instead of {full}; {'the same in all' if least == most else f'{least} to {most}'}",
        ),
        Tile(
            "Speed-up (estimate)" if outcome.job.cost.estimated else "Speed-up",
            f"{ours.speedup:.2f}×",
            clean(outcome.job.table.device),
        ),
        Tile("Loss", f"{_lose(ours):.3g}", f"{find_unit(outcome)}; {even.name}: {_lose(even):.3g}", error),
        Tile("Sure", f"{100 * sum(sure) / len(sure):.0f} %", "of the layers' k, had the profile drawn another sample"),
    )


def _compare(outcome: Outcome) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """The columns and rows that set the allocation beside others."""
    judged = outcome.contenders[0].judged is not None
    columns = ("", "experts", _name_speed(outcome), "loss, layers summed")
    if judged:
        columns += ("loss, whole model", "this allocation loses")
    rows = []
    for index, one in enumerate(outcome.contenders):
        summed = "" if one.loss is None else f"{one.loss:.4g}"
        row = (one.name, str(sum(one.top_k)), f"{one.speedup:.3f}", summed)
        if judged:
            more, stderr = one.excess
            row += (
                state(*one.judged) if one.judged.stderr else "0",
                f"{state(abs(more), stderr)} {'more' if more > 0 else 'less'}" if index else "",
            )
        rows.append(row)
    return columns, tuple(rows)


def _list_front(outcome: Outcome) -> Iterator[tuple[str, ...]]:
    """Rows of the front where there is a uniform k to compare with."""
    cost, uniform = outcome.job.cost, {point.budget: point for point in outcome.front.uniform}
    for point in thin([point for point in outcome.front.points if point.budget in uniform], FRONT_ROWS):
        yield (
            str(point.budget),
            f"{point.budget / len(point.top_k):.2f}",
            f"{point.loss:.4g}",
            f"{uniform[point.budget].loss:.4g}",
            f"{cost.base_ms / float(cost.time(np.array(point.top_k))):.3f}",
        )
