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


@dataclass(frozen=True)
class Score:
    """The `value` of one metric and its standard error, None for a single item or where another program gives none.

    `values` are those of the items that the value is the mean of, in the items' order; empty where it is not a mean.
    """

    value: float
    stderr: float | None = None
    values: tuple[float, ...] = ()


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
    stderr = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Score(statistics.fmean(values), stderr, tuple(values))


def compare(score: Score, base: Score) -> Score:
    """The score minus the base's: paired item by item where both have items, otherwise without a standard error."""
    if score.values and len(score.values) == len(base.values):
        return average([value - other for value, other in zip(score.values, base.values, strict=True)])
    return Score(score.value - base.value)


def combine(scores: Sequence[Score]) -> Score:
    """The unweighted mean over tasks, which share no items: their standard errors add in squares."""
    errors = [score.stderr for score in scores]
    stderr = None if None in errors else math.sqrt(sum(error**2 for error in errors)) / len(scores)
    return Score(statistics.fmean(score.value for score in scores), stderr)
