"""A cost table: measured milliseconds of every layer at every k, by the number of tokens in a step."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lexi_search.artifacts.codec import require, require_loss
from lexi_search.artifacts.identity import ModelShape


@dataclass(frozen=True)
class StepTime:
    """Milliseconds of one engine step: all but the MoE layers, and each MoE layer at k = 1, 2, ...

    `layers_stderr` are the standard errors of `layers`, if they were measured. One measurement stands behind all layers
    at a k, so that the errors of layers at the same k are one error.
    """

    other_ms: float
    layers: Mapping[int, tuple[float, ...]]
    layers_stderr: Mapping[int, tuple[float, ...]] | None = None

    def __repr__(self) -> str:
        return f"<StepTime: {self.other_ms:.4g} ms beside {len(self.layers)} MoE layers>"

    def __post_init__(self) -> None:
        require_loss(self.other_ms, "other_ms")
        for layer, times in self.layers.items():
            for k, time in enumerate(times, 1):
                require_loss(time, f"the time of layer {layer} at k = {k}")
                require(time > 0, f"the time of layer {layer} at k = {k} is 0; a time that was measured is above 0")
        if self.layers_stderr is not None:
            shapes = [{layer: len(row) for layer, row in rows.items()} for rows in (self.layers, self.layers_stderr)]
            require(shapes[0] == shapes[1], "layers_stderr has other layers or values of k than layers")
            for layer, errors in self.layers_stderr.items():
                for k, error in enumerate(errors, 1):
                    require_loss(error, f"the standard error of layer {layer} at k = {k}")


@dataclass(frozen=True)
class CostTable:
    """Step times on one device, as `lexi-adapter latency` measures them; `steps` is by the tokens in a step."""

    model: ModelShape
    device: str
    steps: Mapping[int, StepTime]
    made_by: Mapping[str, Any]

    def __repr__(self) -> str:
        steps = ", ".join(map(str, sorted(self.steps)))
        return f"<CostTable of {self.model.model_type} on {self.device}: steps of {steps} tokens>"

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
