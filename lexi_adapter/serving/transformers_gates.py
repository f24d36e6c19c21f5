"""The gate exponent in transformers: routers whose weights of k experts are those that the allocation asks for.

A router of transformers 5 is a module, or a method of its block. It returns a tuple that holds, beside other things,
the ids and the weights of the chosen experts, both [tokens, k].
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch

from lexi_adapter.errors import AllocationError
from lexi_adapter.serving.kernels.gates import pick

# Model types whose weights are not the gate scores up to one factor a token.
UNPROPORTIONAL = frozenset({"gemma4", "gemma4_text", "inkling", "inkling_text", "phimoe"})
# Names of the method that chooses experts, of the module that holds the top-k. accelerate uses the second one.
ROUTING_METHODS = ("route_tokens_to_experts", "_old_forward", "forward")


@dataclass
class Compensated:
    """A stand-in for a router's own method: the router's k experts, with the weights of k of the model's own K.

    `narrow` routes at k, `wide` at K. Both are copies that share the parameters of the router they stand for, so they
    follow it to other devices, through training and through `copy.deepcopy`.
    """

    method: str
    narrow: torch.nn.Module
    wide: torch.nn.Module
    exponent: float

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        choose = getattr(type(self.narrow), self.method)
        chosen = choose(self.narrow, *args, **kwargs)
        weights, ids = _find_weights(chosen, type(self.narrow).__name__)
        base = choose(self.wide, *args, **kwargs)
        compensated = pick(base[weights], base[ids], chosen[ids], self.exponent).to(chosen[weights].dtype)
        return (*chosen[:weights], compensated, *chosen[weights + 1 :])


def check_compensable(model_type: str) -> None:
    """Raise AllocationError if no gate exponent can be applied to models of this type."""
    if model_type in UNPROPORTIONAL:
        raise AllocationError(f"no gate exponent can be applied in {model_type}; search without one")


def compensate_router(router: torch.nn.Module, top_k_name: str, own_top_k: int, exponent: float) -> None:
    """Apply the gate exponent, in place, to the module that chooses experts and holds k as `top_k_name`."""
    name = next(name for name in ROUTING_METHODS if hasattr(router, name))
    narrow, wide = copy.copy(router), copy.copy(router)
    setattr(wide, top_k_name, own_top_k)
    method = "forward" if name == "_old_forward" else name
    setattr(router, name, Compensated(method, narrow, wide, exponent))


def restore_router(router: torch.nn.Module) -> None:
    """Undo `compensate_router`."""
    for name in ROUTING_METHODS:
        if isinstance(vars(router).get(name), Compensated):
            compensated = vars(router).pop(name)
            if name == "_old_forward":
                setattr(router, name, getattr(type(router), compensated.method).__get__(router))


def _find_weights(chosen: Any, name: str) -> tuple[int, int]:
    """The indices of the weights and of the ids in a router's result."""
    parts = list(enumerate(chosen)) if isinstance(chosen, tuple) else []
    ids = [index for index, part in parts if torch.is_tensor(part) and not part.is_floating_point()]
    weights = [index for index, part in parts if ids and part.shape == chosen[ids[0]].shape and index != ids[0]]
    if len(ids) != 1 or len(weights) != 1:
        raise AllocationError(f"{name} does not return the ids and weights of its experts: no gate exponent possible")
    return weights[0], ids[0]
