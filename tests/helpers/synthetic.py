"""Profiles, allocations and cost tables without a model, for tests of everything that follows profiling."""

import math
import random
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

from lexi_search.artifacts.allocation import Allocation
from lexi_search.artifacts.compensation import Correction, Maps
from lexi_search.artifacts.cost_table import CostTable, StepTime
from lexi_search.artifacts.identity import ModelIdentity, ModelShape
from lexi_search.artifacts.profile import LayerLoss, Profile, ProfileSettings

SETTINGS = ProfileSettings(
    input="paper", seed=0, batch=2, length=8, dtype="float32", relative_error=0.01, max_samples=1000
)


def make_identity(layers: int = 4, top_k: int = 4, **changes: Any) -> ModelIdentity:
    values = dict(
        model_type="olmoe",
        num_hidden_layers=layers,
        num_experts=2 * top_k,
        top_k=top_k,
        moe_layers=tuple(range(layers)),
        router="model.layers.{}.mlp.gate.weight",
        top_k_key="num_experts_per_tok",
        router_sha256="0123456789abcdef" * 4,
    )
    return ModelIdentity(**(values | changes))


def make_profile(layers: int = 4, top_k: int = 4, *, seed: int = 0, **changes: Any) -> Profile:
    """A profile whose losses fall with k, at a different scale in every layer."""
    identity, draw = make_identity(layers, top_k, **changes), random.Random(seed)
    measured = {}
    for layer in identity.moe_layers:
        scale = draw.uniform(0.5, 2)
        rms = tuple(scale * (1 - k / top_k) for k in range(1, top_k + 1))
        stderr = tuple(value / 200 for value in rms)
        frobenius = tuple(4 * value for value in rms)
        measured[layer] = LayerLoss(3, 48, frobenius, tuple(4 * value for value in stderr), rms, stderr)
    return Profile(identity, SETTINGS, measured, {"lexi_search": "0.1.0"})


def add_model_losses(profile: Profile) -> Profile:
    """The profile with the losses of a run of the whole model too, one of them an increase below zero."""
    added = {}
    for layer, loss in profile.layers.items():
        relative, divergence = (tuple(value**power for value in loss.rms) for power in (2, 3))
        increase = (*(value - 0.3 for value in divergence[:-1]), 0.0)
        stderr = tuple(value / 100 for value in divergence)
        values = {"relative": relative, "divergence": divergence, "increase": increase}
        errors = {f"{name}_stderr": stderr for name in values}
        added[layer] = replace(loss, **values, **errors)
    return replace(profile, layers=added)


def make_maps(model: ModelIdentity, *, rank: int = 2, hidden: int = 6, seed: int = 0) -> Maps:
    """A correction of every MoE layer at every k below the model's own."""
    draw = np.random.default_rng(seed).standard_normal
    return {
        (layer, k): Correction(
            draw((rank, 3 * model.num_experts)).astype(ml_dtypes.bfloat16),
            draw((hidden, rank)).astype(ml_dtypes.bfloat16),
            draw(hidden).astype(np.float32),
        )
        for layer in model.moe_layers
        for k in range(1, model.top_k)
    }


def make_allocation(
    layers: int = 4, top_k: int = 4, *, gate_exponent: float | None = None, **changes: Any
) -> Allocation:
    """An allocation with k = 1, 2, .., top_k, 1, 2, ... over the layers."""
    identity = make_identity(layers, top_k, **changes)
    chosen = {layer: 1 + index % top_k for index, layer in enumerate(identity.moe_layers)}
    return Allocation(identity, chosen, sum(chosen.values()), 1.5, 1.25, {"lexi_search": "0.1.0"}, gate_exponent)


def make_cost_table(
    layers: int = 4, top_k: int = 4, *, sizes: tuple[int, int] = (16, 4096), **changes: Any
) -> CostTable:
    """A cost table with steps of few tokens, concave in k, and of many, linear, `sizes`; layers differ a little."""
    identity, draw = make_identity(layers, top_k, **changes), random.Random(1)
    names = ("model_type", "num_hidden_layers", "num_experts", "top_k", "moe_layers")
    steps = {}
    for tokens, power in zip(sizes, (0.5, 1.0), strict=True):
        factors = {layer: draw.uniform(0.9, 1.1) for layer in identity.moe_layers}
        times = {
            layer: tuple(tokens**0.5 * factor * k**power for k in range(1, top_k + 1))
            for layer, factor in factors.items()
        }
        steps[tokens] = StepTime(float(tokens) ** 0.5, times)
    shape = ModelShape(**{name: getattr(identity, name) for name in names})
    return CostTable(shape, "a device", steps, {"lexi_adapter": "0.1.0"})


def make_corrected_profile(layers: int = 12, top_k: int = 8, *, spread: float, error: float, seed: int = 0) -> Profile:
    """A profile whose losses are with corrections, as divergences that fall as squares; without the file of those.

    Layers differ by a factor of about e to the `spread`; each entry is off by a relative standard error of `error`.
    """
    plain, draw = make_profile(layers, top_k), random.Random(seed)
    measured = {}
    for layer, loss in plain.layers.items():
        scale = 0.01 * math.exp(spread * draw.gauss(0, 1))
        values = [scale * (top_k - k) ** 2 * (1 + error * draw.gauss(0, 1)) for k in range(1, top_k + 1)]
        divergence = tuple(max(value, 0.0) for value in values)
        stderr = tuple(error * value for value in divergence)
        measured[layer] = replace(loss, divergence=divergence, divergence_stderr=stderr)
    settings = replace(SETTINGS, input="weights", gate_exponent=0.5, compensation_rank=4)
    return replace(plain, settings=settings, layers=measured)
