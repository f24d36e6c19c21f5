"""What the routers of a model say, read off the modules themselves: not every family's model returns it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn import functional as F

NAMES = ("gate", "router", "router.layer")  # of a router, in its block; of the families here


def find_routers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The router modules, in the order of their layers: those of these names that have a weight."""
    named = ((f".{name}", module) for name, module in model.named_modules())
    ends = tuple(f".{name}" for name in NAMES)
    return [module for name, module in named if name.endswith(ends) and hasattr(module, "weight")]


def find_biases(model: torch.nn.Module) -> list[torch.Tensor]:
    """The routers' selection biases, in the order of their layers; none where the family has no such bias."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return [tensor for name, tensor in tensors if name.rpartition(".")[2] == "e_score_correction_bias"]


@contextmanager
def record_logits(model: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Fills a list with each router's logits, float32 [tokens, experts], as the model runs; clear it between runs."""
    logits: list[torch.Tensor] = []

    def record(router: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        hidden = inputs[0].flatten(0, -2)
        bias = getattr(router, "bias", None)
        logits.append(F.linear(hidden.float(), router.weight.float(), None if bias is None else bias.float()))

    hooks = [router.register_forward_pre_hook(record) for router in find_routers(model)]
    try:
        yield logits
    finally:
        for hook in hooks:
            hook.remove()
