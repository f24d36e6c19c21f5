"""What the results say, read in the terms of the report. Nothing is computed here but differences and means."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gaps import LEAST_GAIN, find_closed, find_gain, interpolate_uniform

ORACLE = "oracle/increase"
PLAIN = "plain"
ORDER = ("oracle", "calibrated", "generated", "weights", "weights+b", "paper")


@dataclass(frozen=True)
class View:
    """One model of the study."""

    name: str
    found: Mapping[str, Any]

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

    def uniform(self, budget: int, *, exponent: str = PLAIN, domain: str = "mean") -> float:
        """Loss increase of uniform k, between two k interpolated."""
        rows = self.found["uniform"][exponent]
        return interpolate_uniform([row["increase"][domain] for row in rows], budget, self.layers)

    def increase(self, method: str, budget: int, *, exponent: str | None = None, domain: str = "mean") -> float:
        """Loss increase of a table's allocation: with the gate exponent of the profile's own if it has one, or the
        given one."""
        exponent = exponent or (PLAIN if self.find_own(method) is None else "own")
        return self.found["cells"][method][str(budget)][exponent]["increase"][domain]

    def find_own(self, method: str) -> float | None:
        """The gate exponent of the profile that a table is from."""
        return next(iter(self.found["cells"][method].values()))["exponent"]

    def closed(self, method: str, budget: int) -> float | None:
        """Share of the way from uniform to the oracle."""
        return find_closed(self.increase(method, budget), self.uniform(budget), self.increase(ORACLE, budget))

    def gain(self, budget: int) -> float:
        """How much less the oracle loses than uniform, relative to it."""
        return find_gain(self.uniform(budget), self.increase(ORACLE, budget))

    def above(self, method: str, budget: int) -> float:
        """How far a table's allocation is above uniform, relative to it; negative below."""
        return -find_gain(self.uniform(budget), self.increase(method, budget))


def read_views(files: Iterable[Path]) -> list[View]:
    """The models that were judged; one that is in several files as in the last of them."""
    models = {name: found for file in files for name, found in json.loads(file.read_text())["models"].items()}
    return [
        View(name, found)
        for name, found in models.items()
        if {"base", "uniform"} <= found.keys() and ORACLE in found.get("cells", {})
    ]


def list_cells(views: list[View]) -> Iterator[tuple[View, int]]:
    """Every model at every budget."""
    return ((view, budget) for view in views for budget in view.budgets.values())


def is_wide(view: View, budget: int) -> bool:
    """Whether the oracle gains enough over uniform for a share of that gain to say something."""
    return view.gain(budget) >= LEAST_GAIN
