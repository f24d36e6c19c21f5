"""What the results say, read in the terms of the report. Nothing is computed here but differences and means."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gaps import MEASURES, find_closed, find_gain, interpolate_uniform, is_wide

PLAIN = "plain"
HALF = "0.5"  # the gate exponent that every allocation was judged with
ORDER = ("oracle", "calibrated", "generated", "weights", "weights+b", "paper")
ERRORS = 2  # standard errors that are taken for noise


@dataclass(frozen=True)
class View:
    """One model of the study, its losses as a measure of the judge's: `increase` or `divergence`."""

    name: str
    found: Mapping[str, Any]
    measure: str = "increase"

    def on(self, method: str) -> "View":
        """What was found on the windows that a method was judged on: more than the rest, if it is held to the floors.

        What it is compared with, uniform k and the oracles, is then of the same windows.
        """
        more = self.found.get("floors", {})
        needed = {method, *(f"oracle/{measure}" for measure in MEASURES)}
        there = "uniform" in more and needed <= more.get("cells", {}).keys()
        return replace(self, found={**self.found, **more}) if there else self

    @property
    def tokens(self) -> int:
        """How many tokens all was judged on."""
        return self.found.get("judged_tokens", self.found["base"]["judged_tokens"])

    @property
    def oracle(self) -> str:
        """The table of brute force in the same measure."""
        return f"oracle/{self.measure}"

    @property
    def layers(self) -> int:
        return self.found["base"]["layers"]

    @property
    def budgets(self) -> dict[str, int]:
        """Share of the model's own sum of k -> budget."""
        return self.found["base"]["budgets"]

    @property
    def methods(self) -> list[str]:
        """Tables that were judged, of all of the text, the references first."""
        names = [name for name in self.found["cells"] if "@" not in name]
        return sorted(names, key=lambda name: (ORDER.index(name.partition("/")[0]), name))

    @property
    def reduced(self) -> Sequence[Mapping[str, Any]]:
        """What was found of uniform k = 1, 2, ... below the model's own."""
        return self.found["uniform"][PLAIN][: self.found["base"]["top_k"] - 1]

    def uniform(self, budget: int, *, exponent: str = PLAIN, domain: str = "mean") -> float:
        """Loss of uniform k, between two k interpolated."""
        rows = enumerate(self.found["uniform"][exponent], 1)
        return interpolate_uniform({k: row[self.measure][domain] for k, row in rows}, budget, self.layers)

    def judged(self, method: str, budget: int, *, exponent: str | None = None) -> Mapping[str, Any]:
        """What was found of a table's allocation: with the gate exponent of the profile's own if it has one, or the
        given one."""
        exponent = exponent or (PLAIN if self.find_own(method) is None else "own")
        return self.found["cells"][method][str(budget)][exponent]

    def loss(self, method: str, budget: int, *, exponent: str | None = None, domain: str = "mean") -> float:
        """Loss of a table's allocation."""
        return self.judged(method, budget, exponent=exponent)[self.measure][domain]

    def find_own(self, method: str) -> float | None:
        """The gate exponent of the profile that a table is from."""
        return next(iter(self.found["cells"][method].values()))["exponent"]

    def closed(self, method: str, budget: int) -> float | None:
        """Share of the way from uniform to the oracle; None where that is too short to tell."""
        return find_closed(self.loss(method, budget), self.uniform(budget), self.loss(self.oracle, budget))

    def gain(self, budget: int) -> float:
        """How much less the oracle loses than uniform, relative to it."""
        return find_gain(self.uniform(budget), self.loss(self.oracle, budget))

    def above(self, method: str, budget: int, *, exponent: str | None = None) -> float:
        """How far a table's allocation is above plain uniform, relative to it; negative below."""
        return -find_gain(self.uniform(budget), self.loss(method, budget, exponent=exponent))

    def error(self, method: str, budget: int) -> float:
        """Standard error of a table's allocation's own loss increase, relative to uniform."""
        return self.judged(method, budget)["stderr"] / abs(self.uniform(budget))

    def difference(self, method: str, budget: int) -> tuple[float, float] | None:
        """Allocation less uniform, window by window, and its standard error, relative to uniform; None where older
        results do not hold it."""
        against = self.judged(method, budget).get("against_uniform")
        if against is None:
            return None
        return tuple(against[self.measure][name] / abs(self.uniform(budget)) for name in ("mean", "stderr"))

    def is_beyond_noise(self, method: str, budget: int) -> bool | None:
        """Whether an allocation is above uniform by more than noise; None where that is not known."""
        found = self.difference(method, budget)
        return None if found is None else found[0] > ERRORS * found[1]

    def is_wide(self, budget: int) -> bool:
        """Whether the oracle gains enough over uniform for a share of that gain to say something."""
        return is_wide(self.uniform(budget), self.loss(self.oracle, budget))


def read_views(files: Iterable[Path]) -> list[View]:
    """The models that were judged; one that is in several files as in the last of them."""
    models = {name: found for file in files for name, found in json.loads(file.read_text()).get("models", {}).items()}
    views = [View(name, found) for name, found in models.items()]
    return [
        view
        for view in views
        if {"base", "uniform"} <= view.found.keys() and view.oracle in view.found.get("cells", {})
    ]


def list_cells(views: Iterable[View], method: str | None = None) -> Iterator[tuple[View, int]]:
    """Every model at every budget; of a method, of those models that have it, on the windows that it was judged on."""
    return (
        (judged, budget)
        for view in views
        if method is None or method in view.found["cells"]
        for judged in [view if method is None else view.on(method)]
        for budget in view.budgets.values()
    )
