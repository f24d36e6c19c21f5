"""One loaded model, and the real loss of whole allocations on its held-out windows."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from records import MEASURES, Row, find_neighbours, interpolate_uniform
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from windows import Windows

from lexi_adapter.allocation import CompensationFile, ModelIdentity
from lexi_adapter.model.identity import describe_checkpoint
from lexi_adapter.model.variants import allocate
from lexi_adapter.sensitivity.divergence import judge_allocations
from lexi_search.artifacts.serialisation import read_profile


class Choice(NamedTuple):
    """A k for every MoE layer, in their order, and the gate exponent; None lets the model do as it does.

    `profile` is the file of a profile whose corrections apply, or None.
    """

    top_k: tuple[int, ...]
    exponent: float | None = None
    profile: Path | None = None

    def spread(self, k: int) -> "Choice":
        """The same compensation with `k` in every layer."""
        return self._replace(top_k=(k,) * len(self.top_k))


class Loaded(NamedTuple):
    """A checkpoint in memory and what it is."""

    model: torch.nn.Module
    identity: ModelIdentity


def load(folder: Path, *, device: str) -> Loaded:
    """The checkpoint in float32, not rounded to TF32, ready to evaluate."""
    torch.set_float32_matmul_precision("highest")
    kind = choose_experts(device)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation=kind)
    return Loaded(model.eval().to(device), describe_checkpoint(folder))


def choose_experts(device: str) -> str:
    """transformers' way to run experts: as one grouped product where PyTorch has it and it is exact in float32."""
    rows = torch.full((32, 16), 1 + 2**-12, device=device)  # what TF32 rounds to 1
    weights = torch.eye(16, device=device).repeat(2, 1, 1)
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
        self._known: dict[Choice, dict[str, np.ndarray]] = {}  # measure -> its value for each window

    @property
    def layers(self) -> int:
        return len(self.loaded.identity.moe_layers)

    def judge(self, named: Sequence[tuple[str, Choice]]) -> list[Row]:
        """A row for each choice, by the name of the method that it is from; uniform k is run beside them."""
        near = find_neighbours((sum(choice.top_k) for _, choice in named), self.layers)
        uniform = {k: Choice((k,) * self.layers) for k in near}
        self._run([*(choice for _, choice in named), *uniform.values()])
        known = {name: {k: self._known[choice][name] for k, choice in uniform.items()} for name in MEASURES}
        rows, tokens = [], self.windows.tokens.numel()
        for name, choice in named:
            budget, found = sum(choice.top_k), []
            for measure, losses in self._known[choice].items():
                difference = losses - interpolate_uniform(known[measure], budget, self.layers)
                errors = (self.windows.find_error(losses), self.windows.find_error(difference))
                found += [float(self.windows.average(losses)["mean"]), *errors]
            rows.append(Row(name, choice.exponent, budget, tokens, *found, choice.top_k))
        return rows

    def subtract(self, name: str, choice: Choice) -> Row:
        """What a choice loses more than uniform k with its own compensation at the same budget, window by window."""
        budget, found = sum(choice.top_k), []
        near = {k: choice.spread(k) for k in find_neighbours([budget], self.layers)}
        self._run([choice, *near.values()])
        for measure, losses in self._known[choice].items():
            known = {k: self._known[each][measure] for k, each in near.items()}
            excess = losses - interpolate_uniform(known, budget, self.layers)
            error = self.windows.find_error(excess)
            found += [float(self.windows.average(excess)["mean"]), error, error]
        return Row(name, choice.exponent, budget, self.windows.tokens.numel(), *found, choice.top_k)

    def _run(self, choices: Iterable[Choice]) -> None:
        missing = [choice for choice in dict.fromkeys(choices) if choice not in self._known]
        if not missing:
            return
        model, identity = self.loaded
        allocations = [
            replace(
                allocate(identity, dict(zip(identity.moe_layers, choice.top_k, strict=True))),
                gate_exponent=choice.exponent,
                **_name_corrections(choice.profile),
            )
            for choice in missing
        ]
        found = judge_allocations(model, self.windows.tokens, allocations, batch=self.batch, check_weights=False)
        for choice, *values in zip(missing, *(getattr(found, name).numpy() for name in MEASURES), strict=True):
            self._known[choice] = dict(zip(MEASURES, values, strict=True))


@cache
def _name_corrections(profile: Path | None) -> dict[str, Any]:
    """The fields of an allocation that say where the corrections of a profile are."""
    named = None if profile is None else read_profile(profile).compensation
    if named is None:
        return {}
    return {"compensation": CompensationFile(**asdict(named)), "folder": str(profile.absolute().parent)}
