"""The profile of a model from what was measured on real tokens: a file that a search reads like any other.

It holds what profiles from weights alone predict, so it is their reference, and the better choice for who has data.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from math import sqrt
from statistics import fmean, stdev
from typing import Any

import torch

from lexi_adapter.allocation import ModelIdentity
from lexi_adapter.sensitivity.ablation import Movements

FORMAT, VERSION = "lexi-profile", 1


def make_settings(
    source: str, *, sequences: int, length: int, dtype: str, seed: int, gate_exponent: float | None
) -> dict[str, Any]:
    """The settings of a profile on `source`: an iteration is a sequence, and all are measured, whatever the error."""
    settings = {
        "input": source,
        "seed": seed,
        "batch": 1,
        "length": length,
        "dtype": dtype,
        "relative_error": 0.0,
        "max_samples": sequences * length,
    }
    return settings if gate_exponent is None else settings | {"gate_exponent": gate_exponent}


def describe_run(model: torch.nn.Module, windows: torch.Tensor, batch: int) -> dict[str, Any]:
    """What made a profile, as far as its numbers depend on it; no date, so that the same run gives the same bytes."""
    device = model.device
    return {
        "lexi_adapter": metadata.version("lexi-moe"),
        "transformers": metadata.version("transformers"),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "sequences_per_pass": batch,
        "tokens_sha256": hashlib.sha256(windows.cpu().numpy().astype("<i8").tobytes()).hexdigest(),
    }


def make_document(
    model: ModelIdentity,
    settings: Mapping[str, Any],
    parts: Mapping[tuple[int, int], Movements],
    made_by: Mapping[str, Any],
    *,
    kinds: Sequence[str],
) -> dict[str, Any]:
    """The JSON object of a profile from its parts by batch and layer; `kinds` are the losses of the whole model."""
    layers = {layer: [part for (_, own), part in sorted(parts.items()) if own == layer] for layer in model.moe_layers}
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": asdict(model),
        "settings": dict(settings),
        "layers": {str(layer): summarise(found, settings["length"], kinds) for layer, found in layers.items()},
        "made_by": dict(made_by),
    }


def summarise(parts: Sequence[Movements], length: int, kinds: Iterable[str]) -> dict[str, Any]:
    """The losses of one layer, for k = 1 to the model's own, with standard errors over sequences.

    Tokens of one sequence depend on each other, sequences hardly do. `frobenius` is the mean over them of
    ||Y_k - Y_base||_F for one sequence, `rms` the root mean square over tokens of ||y_k - y_base||, whose error is that
    of the mean square by the delta method.
    """
    squares = _join(parts, "squares")
    means = [_estimate([value / length for value in column]) for column in squares]
    losses = {
        "frobenius": [_estimate([sqrt(value) for value in column]) for column in squares],
        "rms": [(sqrt(mean), error / (2 * sqrt(mean)) if mean else 0.0) for mean, error in means],
    }
    losses |= {kind: [_estimate(column) for column in _join(parts, kind)] for kind in ("relative", *kinds)}
    sequences = len(squares[0])
    found: dict[str, Any] = {"iterations": sequences, "samples": sequences * length}
    for kind, estimates in losses.items():
        found[kind] = [mean for mean, _ in estimates] + [0.0]
        found[f"{kind}_stderr"] = [error for _, error in estimates] + [0.0]
    return found


def _join(parts: Sequence[Movements], kind: str) -> list[tuple[float, ...]]:
    """The values of all sequences for each k: [k - 1][sequence]."""
    return list(zip(*(row for part in parts for row in getattr(part, kind)), strict=True))


def _estimate(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error."""
    return fmean(values), stdev(values) / sqrt(len(values))
