"""The cost of an allocation in milliseconds: a measured cost table, weighted by the engine steps that a user runs.

Time is concave in k at small batches, where few experts are used by several tokens, and linear at large ones: equal
budgets of experts do not mean equal speed.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int

from lexi_search.artifacts.cost_table import CostTable
from lexi_search.artifacts.identity import ModelIdentity, ModelShape
from lexi_search.artifacts.serialisation import sha256
from lexi_search.errors import InputError
from lexi_search.solvers.problem import sum_over_layers


class Cost(NamedTuple):
    """Milliseconds of a mix of engine steps: of each MoE layer at k = 1, 2, ..., and of everything else.

    `mix` maps tokens in a step to the number of such steps; `table_sha256` identifies the cost table, and `estimated`
    says that its times are not measured (`speed_estimate`). `errors` are the standard errors of `ms`, None where the
    table has none; those of all layers at one k are one error.
    """

    ms: Float64[np.ndarray, "layers ks"]
    other_ms: float
    mix: Mapping[int, float]
    table_sha256: str
    estimated: bool = False
    errors: Float64[np.ndarray, "layers ks"] | None = None

    def __repr__(self) -> str:
        layers, ks = self.ms.shape
        return f"<Cost of {layers} MoE layers at k from 1 to {ks}: {self.base_ms:.4g} ms at most, mix {self.mix}>"

    @property
    def base_ms(self) -> float:
        """The time with the model's own k in every layer."""
        return float(self.time(np.full(len(self.ms), self.ms.shape[1])))

    def time(self, top_k: Int[np.ndarray, "*batch layers"]) -> Float64[np.ndarray, "*batch"] | np.float64:
        """The time under each allocation."""
        return self.other_ms + sum_over_layers(self.ms, top_k)

    def list_falls(self) -> list[int]:
        """Each k at which some layer takes less time than at k - 1, which a measurement alone makes so."""
        return (np.flatnonzero((np.diff(self.ms, axis=1) < 0).any(axis=0)) + 2).tolist()

    def describe(self) -> dict[str, Any]:
        """The description of this cost for files that depend on it."""
        mix = {str(tokens): count for tokens, count in self.mix.items()}
        return {"table_sha256": self.table_sha256, "mix": mix} | ({"estimated": True} if self.estimated else {})


def weigh(table: CostTable, model: ModelIdentity | ModelShape, *, mix: Mapping[int, float] | None = None) -> Cost:
    """The cost of `mix`, which maps tokens in a step to how many such steps there are.

    Without a mix, the table's only step. Raises InputError for a table of another model, a step that the table lacks,
    and a missing mix where there is a choice.
    """
    for name in ("model_type", "num_hidden_layers", "num_experts", "top_k", "moe_layers"):
        actual, expected = getattr(table.model, name), getattr(model, name)
        if actual != expected:
            raise InputError(f"the cost table has {name} {actual!r}, the profile {expected!r}: not the same model")
    known = ", ".join(map(str, sorted(table.steps)))
    if mix is None:
        if len(table.steps) > 1:
            raise InputError(f"the cost table has steps of {known} tokens; say by --mix which and how many you run")
        mix = {next(iter(table.steps)): 1.0}
    if missing := sorted(set(mix) - set(table.steps)):
        raise InputError(f"the cost table has no step of {missing[0]} tokens; it has {known}")
    if not mix or not all(np.isfinite(count) and count >= 0 for count in mix.values()) or not any(mix.values()):
        raise InputError("a mix needs a positive number of steps")
    with np.errstate(over="ignore"):
        ms = sum(
            count * np.array([times for _, times in sorted(table.steps[tokens].layers.items())], np.float64)
            for tokens, count in sorted(mix.items())
        )
        other = sum(count * table.steps[tokens].other_ms for tokens, count in sorted(mix.items()))
        longest = other + ms.max(axis=1).sum()
    if not np.isfinite(longest):
        raise InputError("the times of this mix do not add up to a finite number; measure the cost table again")
    return Cost(
        ms=ms,
        other_ms=float(other),
        mix=dict(sorted(mix.items())),
        table_sha256=sha256(table),
        estimated="estimate" in table.made_by,
        errors=_weigh_errors(table, mix),
    )


def _weigh_errors(table: CostTable, mix: Mapping[int, float]) -> Float64[np.ndarray, "layers ks"] | None:
    """The standard errors of the mix: those of its steps are independent. None where a step has none."""
    steps = [(count, table.steps[tokens].layers_stderr) for tokens, count in sorted(mix.items())]
    if any(errors is None for _, errors in steps):
        return None
    rows = (count * np.array([row for _, row in sorted(errors.items())], np.float64) for count, errors in steps)
    return np.sqrt(sum(each**2 for each in rows))
