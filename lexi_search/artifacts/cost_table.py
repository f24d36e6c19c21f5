"""A cost table: measured milliseconds of every layer at every k, by the number of tokens in a step."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lexi_search.artifacts.codec import require, require_loss
from lexi_search.artifacts.identity import ModelShape


@dataclass(frozen=True)
class StepTime:
    """Milliseconds of one engine step: all but the MoE layers, and each MoE layer at k = 1, 2, ..."""

    other_ms: float
    layers: Mapping[int, tuple[float, ...]]

    def __post_init__(self) -> None:
        require_loss(self.other_ms, "other_ms")
        for layer, times in self.layers.items():
            for k, time in enumerate(times, 1):
                require_loss(time, f"the time of layer {layer} at k = {k}")
                require(time > 0, f"the time of layer {layer} at k = {k} is 0; a time that was measured is above 0")


@dataclass(frozen=True)
class CostTable:
    """Step times on one device, as `lexi-adapter latency` measures them; `steps` is by the tokens in a step."""

    model: ModelShape
    device: str
    steps: Mapping[int, StepTime]
    made_by: Mapping[str, Any]

    def __post_init__(self) -> None:
        require(self.steps, "the cost table has no steps")
        for tokens, step in self.steps.items():
            require(
                sorted(step.layers) == sorted(self.model.moe_layers),
                f"the step of {tokens} tokens has layers {sorted(step.layers)}, not the model's moe_layers",
            )
            for layer, times in step.layers.items():
                require(
                    len(times) == self.model.top_k,
                    f"the step of {tokens} tokens has {len(times)} times for layer {layer}, the model's k is "
                    f"{self.model.top_k}",
                )
