"""What the routers of a model say, read off the modules themselves: not every family's model returns it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn import functional as F


def find_routers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The router modules, in the order of their layers."""
    return [module for name, module in model.named_modules() if name.rpartition(".")[2] == "gate"]


@contextmanager
def record_logits(model: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Fills a list with each router's logits, float32 [tokens, experts], as the model runs; clear it between runs."""
    logits: list[torch.Tensor] = []

    def record(router: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        hidden = inputs[0].flatten(0, -2)
        logits.append(F.linear(hidden.float(), router.weight.float()))

    hooks = [router.register_forward_pre_hook(record) for router in find_routers(model)]
    try:
        yield logits
    finally:
        for hook in hooks:
            hook.remove()
