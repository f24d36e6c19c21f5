"""One loaded model, and the real loss of whole allocations on its held-out windows."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gaps import MEASURES, interpolate_uniform
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from windows import Windows

from lexi_adapter.allocation import ModelIdentity
from lexi_adapter.model.identity import describe_checkpoint
from lexi_adapter.model.variants import allocate
from lexi_adapter.sensitivity.divergence import judge_allocations

DIGITS = 7


class Choice(NamedTuple):
    """A k for every MoE layer, in their order, and the gate exponent; None lets the family do as it does."""

    top_k: tuple[int, ...]
    exponent: float | None = None


class Loaded(NamedTuple):
    """A checkpoint in memory and what it is."""

    model: torch.nn.Module
    identity: ModelIdentity


def load(folder: Path, *, device: str, dtype: torch.dtype = torch.float32) -> Loaded:
    """The checkpoint, ready to evaluate; float32 is not rounded to TF32."""
    torch.set_float32_matmul_precision("highest")
    experts = choose_experts(device, dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation=experts)
    return Loaded(model.eval().to(device), describe_checkpoint(folder))


def choose_experts(device: str, dtype: torch.dtype) -> str:
    """transformers' way to run experts: as one grouped product where PyTorch has it, exact for the device and type."""
    rows = torch.full((32, 16), 1 + 2**-12, device=device, dtype=dtype)  # what TF32 rounds to 1
    weights = torch.eye(16, device=device, dtype=dtype).repeat(2, 1, 1)
    ends = torch.tensor([16, 32], device=device, dtype=torch.int32)
    try:
        exact = torch.equal(F.grouped_mm(rows, weights, offs=ends), rows)
    except (AttributeError, RuntimeError):
        exact = False
    return "grouped_mm" if exact else "eager"


@torch.inference_mode()
def find_losses(model: torch.nn.Module, tokens: torch.Tensor, *, batch: int) -> np.ndarray:
    """Mean cross-entropy in nats per predicted token of each window: [sequences]."""
    losses = []
    for part in tokens.split(batch):
        part = part.to(model.device)
        logits = model(part, use_cache=False).logits[:, :-1].float()
        each = F.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none")
        losses.append(each.mean(-1).double().cpu())
    return torch.cat(losses).numpy()


class Judge:
    """Judges allocations of one model on the same windows, each once however often it is asked for."""

    def __init__(self, loaded: Loaded, windows: Windows, *, batch: int) -> None:
        self.loaded, self.windows, self.batch = loaded, windows, batch
        self._known: dict[Choice, dict[str, np.ndarray]] = {}

    @property
    def count(self) -> int:
        """How many allocations have been run."""
        return len(self._known)

    def judge(self, choices: Iterable[Choice]) -> list[dict[str, Any]]:
        """For each choice: `increase` of the cross-entropy by domain and on average, its `stderr` over windows, and
        `divergence` (nats per token) likewise."""
        choices = list(choices)
        self._run(dict.fromkeys(choices))
        return [self._summarise(choice) for choice in choices]

    def compare(self, choices: Iterable[Choice]) -> list[dict[str, Any]]:
        """As `judge`, and under `against_uniform` the `mean` and `stderr` of the differences, window by window, to
        plain uniform k at the same budget, in `increase` and in `divergence`."""
        choices = list(choices)
        budgets = {choice: sum(choice.top_k) for choice in choices}
        near = {k for budget in budgets.values() for k in (budget // self.layers, -(-budget // self.layers))}
        uniform = {k: Choice((k,) * self.layers) for k in sorted(near)}
        self._run(dict.fromkeys([*choices, *uniform.values()]))
        known = {k: self._known[choice] for k, choice in uniform.items()}
        found = []
        for choice in choices:
            ours, theirs = self._known[choice], self._interpolate(known, budgets[choice])
            against = {
                name: {"mean": round_off(self.windows.average(ours[name] - theirs[name])["mean"])}
                | {"stderr": round_off(self.windows.find_error(ours[name] - theirs[name]))}
                for name in MEASURES
            }
            found.append(self._summarise(choice) | {"against_uniform": against})
        return found

    @property
    def layers(self) -> int:
        return len(self.loaded.identity.moe_layers)

    def _interpolate(self, known: Mapping[int, Mapping[str, np.ndarray]], budget: int) -> dict[str, np.ndarray]:
        rows = {name: {k: values[name] for k, values in known.items()} for name in MEASURES}
        return {name: interpolate_uniform(each, budget, self.layers) for name, each in rows.items()}

    def _run(self, choices: Iterable[Choice]) -> None:
        missing = [choice for choice in choices if choice not in self._known]
        if not missing:
            return
        identity = self.loaded.identity
        allocations = [
            replace(allocate(identity, dict(zip(identity.moe_layers, top_k, strict=True))), gate_exponent=exponent)
            for top_k, exponent in missing
        ]
        found = judge_allocations(
            self.loaded.model, self.windows.tokens, allocations, batch=self.batch, check_weights=False
        )
        for choice, *values in zip(missing, *(getattr(found, name).numpy() for name in MEASURES), strict=True):
            self._known[choice] = dict(zip(MEASURES, values, strict=True))

    def _summarise(self, choice: Choice) -> dict[str, Any]:
        means = {name: to_floats(self.windows.average(values)) for name, values in self._known[choice].items()}
        return means | {"stderr": round_off(self.windows.find_error(self._known[choice]["increase"]))}


def to_floats(values: dict[str, np.ndarray]) -> dict[str, float]:
    """Plain numbers, for JSON."""
    return {name: round_off(value) for name, value in values.items()}


def round_off(value: float) -> float:
    """As many digits as can mean something."""
    return float(f"{value:.{DIGITS}g}")
