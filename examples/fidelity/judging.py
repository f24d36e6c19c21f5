"""One loaded model, and the real loss of whole allocations on its held-out windows."""

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from windows import Windows

from lexi_adapter.allocation import ModelIdentity
from lexi_adapter.divergences import judge_allocations
from lexi_adapter.identity import describe_checkpoint
from lexi_adapter.variants import allocate


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
        self._known: dict[Choice, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def count(self) -> int:
        """How many allocations have been run."""
        return len(self._known)

    def judge(self, choices: Iterable[Choice]) -> list[dict[str, dict[str, float]]]:
        """For each choice: `increase` of the cross-entropy by domain and on average, its `stderr` over windows, and
        `divergence` (nats per token) likewise."""
        choices = list(choices)
        self._run(dict.fromkeys(choices))
        return [self._summarise(*self._known[choice]) for choice in choices]

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
        pairs = zip(found.increase.numpy(), found.divergence.numpy(), strict=True)
        self._known.update(zip(missing, pairs, strict=True))

    def _summarise(self, increase: np.ndarray, divergence: np.ndarray) -> dict[str, dict[str, float]]:
        return {
            "increase": to_floats(self.windows.average(increase)),
            "divergence": to_floats(self.windows.average(divergence)),
            "stderr": float(increase.std(ddof=1) / math.sqrt(len(increase))),
        }


def to_floats(values: dict[str, np.ndarray]) -> dict[str, float]:
    """Plain numbers, for JSON."""
    return {name: float(value) for name, value in values.items()}
