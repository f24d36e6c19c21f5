"""An allocation: a top-k for every MoE layer, and its loss beside the optimum."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lexi_search.artifacts.codec import require, require_gate_exponent, require_loss, short
from lexi_search.artifacts.compensation import CompensationFile
from lexi_search.artifacts.identity import ModelIdentity


@dataclass(frozen=True)
class Allocation:
    """A top-k for every MoE layer, its sum (`budget`), its loss, and the smallest loss that the budget allows.

    `max_k` is the largest k that a layer may have, where that is above the model's own k. `compensation` names the file
    of corrections for layers with less than that.
    """

    model: ModelIdentity
    top_k: Mapping[int, int]
    budget: int
    loss: float
    optimal_loss: float
    made_by: Mapping[str, Any]
    gate_exponent: float | None = None
    max_k: int | None = None
    compensation: CompensationFile | None = None

    def __post_init__(self) -> None:
        missing = sorted(set(self.model.moe_layers) - set(self.top_k))
        extra = sorted(set(self.top_k) - set(self.model.moe_layers))
        require(not missing, f"top_k lacks layers {short(missing)}")
        require(not extra, f"top_k has layers {short(extra)}, which are not among the model's moe_layers")
        most, whose = (self.model.top_k, "the model's own") if self.max_k is None else (self.max_k, "max_k =")
        require(
            self.model.top_k <= most <= self.model.num_experts,
            f"max_k is {most}, expected between the model's own {self.model.top_k} and num_experts = "
            f"{self.model.num_experts}",
        )
        for layer, k in sorted(self.top_k.items()):
            require(1 <= k <= most, f"top_k of layer {layer} is {k}, expected between 1 and {whose} {most}")
        total = sum(self.top_k.values())
        require(self.budget == total, f"budget is {self.budget}, but top_k sums to {total}")
        require_loss(self.loss, "loss")
        require_loss(self.optimal_loss, "optimal_loss")
        if self.gate_exponent is not None:
            require_gate_exponent(self.gate_exponent)
        require(self.compensation is None or self.gate_exponent is not None, "compensation without a gate_exponent")

    def __repr__(self) -> str:
        top_k = " ".join(str(k) for _, k in sorted(self.top_k.items()))
        return f"<Allocation for {self.model.model_type}: budget {self.budget}, loss {self.loss:.4g}, k = {top_k}>"

    @property
    def corrected(self) -> tuple[tuple[int, int], ...]:
        """The (layer, k) with fewer experts than the model's own, which corrections are for."""
        return tuple((layer, k) for layer, k in sorted(self.top_k.items()) if k < self.model.top_k)

    @property
    def gap(self) -> float | None:
        """The excess of the loss over the optimum, relative to it; None if the optimum is zero and the loss is not."""
        if self.loss == self.optimal_loss:
            return 0.0
        return self.loss / self.optimal_loss - 1 if self.optimal_loss else None
