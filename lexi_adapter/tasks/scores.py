"""Scores of a model on a task, one value an item, with standard errors, and their paired differences.

Models that are compared answer the same items, so a difference is taken item by item: the difficulty of an item
cancels, and the standard error of the mean difference is far below that of either mean.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from lexi_adapter.errors import AdapterError

LARGEST = 1e100  # of scores: squares of larger ones overflow
Z = statistics.NormalDist().inv_cdf(0.975)  # of 95 % confidence


@dataclass(frozen=True)
class Score:
    """The `value` of one metric and its standard error, None for a single item or where another program gives none.

    `values` are those of the items that the value is the mean of, in the items' order; empty where it is not a mean.
    `interval` is the 95 % confidence interval of a share of right answers, or of a difference of two. Where all items
    are right or all wrong it says what a standard error, None then, cannot.
    """

    value: float
    stderr: float | None = None
    values: tuple[float, ...] = ()
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Outcome:
    """The results of one task for one model: metric -> score, and `details`, JSON that is only reported."""

    scores: Mapping[str, Score]
    details: Mapping[str, Any] = field(default_factory=dict)


class Model(Protocol):
    """A loaded model, in either backend."""

    def score(self, windows: Sequence[Sequence[int]]) -> list[list[float]]:
        """For every window of token ids, the log-probabilities (natural) of its second to last token, each given all
        tokens before it."""

    def generate(self, prompts: Sequence[Any], max_new_tokens: int, max_length: int | None = None) -> list[str]:
        """The greedy continuation of every prompt, a text or a list of token ids, up to the end-of-text token.

        AdapterError for a prompt that with its answer may take more than `max_length` tokens.
        """

    def run_harness(self, *arguments: Any) -> Outcome:
        """`harness.run` with this model."""


@dataclass(frozen=True)
class Task:
    """A benchmark that can be run on any model.

    `settings` is JSON with everything that the outcome depends on besides the model; `longest` is the number of tokens
    of the longest prompt with its answer. Tasks with the same `group` are averaged under its name.
    """

    name: str
    settings: Mapping[str, Any]
    longest: int
    evaluate: Callable[[Model], Outcome]
    group: str | None = None


def average(values: Sequence[float]) -> Score:
    """The mean of one or more values with its standard error, from their sample standard deviation.

    AdapterError for a value that is not finite, or too large to be added up.
    """
    strange = [place for place, value in enumerate(values) if not abs(value) <= LARGEST]
    if strange:
        raise AdapterError(f"value {strange[0]} of {len(values)} is {values[strange[0]]}: not finite, or too large")
    interval = find_interval(values)
    stderr = None if interval and len(set(values)) == 1 else _find_stderr(values)
    return Score(statistics.fmean(values), stderr, tuple(values), interval)


def _find_stderr(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def find_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Wilson's 95 % interval of the mean of values that are all 0 or 1; None for any others."""
    if not values or not set(values) <= {0, 1}:
        return None
    number, share = len(values), statistics.fmean(values)
    middle = (share + Z**2 / (2 * number)) / (1 + Z**2 / number)
    half = Z / (1 + Z**2 / number) * math.sqrt(share * (1 - share) / number + Z**2 / (4 * number**2))
    return (0.0 if share == 0 else middle - half), (1.0 if share == 1 else middle + half)


def find_difference_interval(differences: Sequence[float]) -> tuple[float, float]:
    """Agresti and Min's 95 % interval of the difference of two shares, from paired differences that are -1, 0 or 1.

    Wald's, with half an item more in each of the four cells (Statistics in Medicine 24, 2005, p. 729).
    """
    number = len(differences) + 2
    better, worse = differences.count(1) + 0.5, differences.count(-1) + 0.5
    middle = (better - worse) / number
    half = Z * math.sqrt((better + worse) - (better - worse) ** 2 / number) / number
    return max(-1.0, middle - half), min(1.0, middle + half)


def compare(score: Score, base: Score) -> Score:
    """The score minus the base's: paired item by item where both have items, otherwise without a standard error."""
    if not score.values or len(score.values) != len(base.values):
        return Score(score.value - base.value)
    differences = tuple(value - other for value, other in zip(score.values, base.values, strict=True))
    shares = score.interval is not None and base.interval is not None
    stderr = None if shares and len(set(differences)) == 1 else _find_stderr(differences)
    interval = find_difference_interval(differences) if shares else None
    return Score(statistics.fmean(differences), stderr, differences, interval)


def combine(scores: Sequence[Score], *, paired: bool = False) -> Score:
    """The unweighted mean over tasks, which share no items: their standard errors add in squares.

    `paired`: the scores are differences. Shares of as many items each have the interval of all items together.
    """
    errors = [score.stderr for score in scores]
    stderr = None if None in errors else math.sqrt(sum(error**2 for error in errors)) / len(scores)
    alike = len({len(score.values) for score in scores}) == 1 and all(score.interval for score in scores)
    items = [value for score in scores for value in score.values] if alike else []
    interval = (find_difference_interval if paired else find_interval)(items) if items else None
    return Score(statistics.fmean(score.value for score in scores), stderr, interval=interval)
