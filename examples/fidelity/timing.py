"""How long a forward pass of whole models takes, in transformers."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pieces
import torch
from judging import Loaded, load

from lexi_adapter.model.variants import allocate
from lexi_adapter.serving.transformers_patch import apply

ROUNDS = 5


def time_passes(study: pieces.Study) -> pieces.Result:
    """Milliseconds of a forward pass without the output layer: uniform k, the oracle's allocations and pruned models.

    They take turns, and the least of several rounds counts; bfloat16 on a GPU, as models are served. `alone`: nothing
    that this study knows of used the GPU meanwhile.
    """
    identity, tokens = study.loaded.identity, study.measuring.tokens.to(study.loaded.model.device)
    whole = load_to_time(study, study.folder)
    chosen = {f"uniform {k}": (k,) * study.layers for k in range(1, study.top_k + 1)}
    chosen |= {f"oracle {budget}": cell["top_k"] for budget, cell in study.get("cells", "oracle/increase").items()}
    passes: dict[str, Callable[[], float]] = {}
    for name, top_k in chosen.items():
        allocation = allocate(identity, dict(zip(identity.moe_layers, top_k, strict=True)))
        prepare = partial(apply, whole.model, allocation, check_weights=False)
        passes[name] = partial(time_pass, whole.model, tokens, prepare)
    for name, file in pieces.find_pruned(study):
        if isinstance(file, Path):
            passes[name] = partial(time_pass, load_to_time(study, file).model, tokens)
    rounds = [{name: run() for name, run in passes.items()} for _ in range(ROUNDS + 1)]
    found = {name: min(times[name] for times in rounds[1:]) for name in passes}  # the first warms up
    return {"tokens": tokens.numel(), "dtype": str(whole.model.dtype), "alone": True, "ms": found}


def load_to_time(study: pieces.Study, folder: Path) -> Loaded:
    device = study.loaded.model.device.type
    return load(folder, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)


@torch.inference_mode()
def time_pass(model: torch.nn.Module, tokens: torch.Tensor, prepare: Callable[[], None] = lambda: None) -> float:
    """Milliseconds of one pass over tokens [sequences, length] without the output layer."""
    prepare()
    started = time.perf_counter()
    model.model(tokens, use_cache=False)
    if tokens.is_cuda:
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - started)
