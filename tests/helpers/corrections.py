"""Files of corrections, random and by hand, as `lexi_search` writes them; plain NumPy, for tests of both packages."""

import hashlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save

from lexi_search.artifacts.compensation import Correction


def draw_correction(rng: np.random.Generator, *, num_experts: int, hidden: int, rank: int, scale: float = 0.1):
    """A, B and c of one layer at one k, with their stored types."""
    A, B = rng.normal(0, scale, (rank, 3 * num_experts)), rng.normal(0, 1, (hidden, rank))
    c = rng.normal(0, scale, hidden)
    return {"A": A.astype(ml_dtypes.bfloat16), "B": B.astype(ml_dtypes.bfloat16), "c": c.astype(np.float32)}


def draw_tensors(model, pairs, *, hidden: int, rank: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
    """Name -> tensor for every (layer, k) of `pairs`; `model` is a ModelIdentity of either package."""
    rng, tensors = np.random.default_rng(seed), {}
    for layer, k in pairs:
        drawn = draw_correction(rng, num_experts=model.num_experts, hidden=hidden, rank=rank)
        tensors |= {f"layers.{layer}.top_k.{k}.{name}": value for name, value in drawn.items()}
    return tensors


def draw_maps(model, pairs, *, hidden: int, rank: int = 4, seed: int = 0) -> dict[tuple[int, int], Correction]:
    """The same as `lexi_search` has it in memory."""
    tensors = draw_tensors(model, pairs, hidden=hidden, rank=rank, seed=seed)
    parts = Correction._fields
    return {
        (layer, k): Correction(*(tensors[f"layers.{layer}.top_k.{k}.{part}"] for part in parts)) for layer, k in pairs
    }


def describe(model, rank: int) -> dict[str, str]:
    """The metadata of a file of corrections for `model`."""
    values = {"format": "lexi-compensation", "version": "1", "rank": str(rank)}
    return values | {"model_type": model.model_type, "router_sha256": model.router_sha256}


def write_corrections(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> dict[str, Any]:
    """Write a file of corrections; returns the object under "compensation" of an allocation that names it."""
    data = save(tensors, metadata=metadata)
    path.write_bytes(data)
    return {"file": path.name, "rank": int(metadata["rank"]), "sha256": hashlib.sha256(data).hexdigest()}


def compensate(document: dict[str, Any], model, folder: Path, *, hidden: int, rank: int = 4, **options: Any):
    """An allocation's document with a random file of corrections in `folder`, a gate exponent of 0.5 by default."""
    top_k = {int(layer): k for layer, k in document["top_k"].items()}
    pairs = [(layer, k) for layer, k in top_k.items() if k < model.top_k]
    tensors = draw_tensors(model, pairs, hidden=hidden, rank=rank, **options)
    named = write_corrections(folder / "corrections.safetensors", tensors, describe(model, rank))
    return {"gate_exponent": 0.5} | document | {"compensation": named}
