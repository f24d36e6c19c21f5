"""Compensation in transformers: routers with a gate exponent, and blocks that add a correction to their output.

A router of transformers 5 is a module, or a method of its block. It returns a tuple that holds, beside other things,
the ids and the weights of the chosen experts, both [tokens, k]. The block around it has the experts, too, and returns
the hidden states, alone or first of a tuple.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear

from lexi_adapter.errors import AllocationError
from lexi_adapter.model.compensation import Correction
from lexi_adapter.serving.kernels.correction import correct, find_features
from lexi_adapter.serving.kernels.gates import pick

# Model types whose weights are not the gate scores up to one factor a token.
UNPROPORTIONAL = frozenset({"gemma4", "gemma4_text", "inkling", "inkling_text", "phimoe"})
# Model types whose block does more with the experts' output than to scale it and to add that of shared experts.
UNCORRECTABLE = frozenset({"axk1"})
# Names of the method that chooses experts, of the module that holds the top-k. accelerate uses the second one.
ROUTING_METHODS = ("route_tokens_to_experts", "_old_forward", "forward")


@dataclass
class BlockCorrection:
    """A forward hook of a block: adds the correction for what its router has chosen in the same call.

    `linear` holds the router's weight, and `scale` is that of the block's routed experts after their weights. The
    tensors follow the router's input to other devices, and stay of their own types.
    """

    linear: torch.nn.Module
    scale: float
    correction: Correction
    features: torch.Tensor | None = None

    def look(self, hidden: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, kept: torch.Tensor) -> None:
        """Take the features of the router's input [..., hidden] and of its choices [tokens, K] and [tokens, k]."""
        bias = getattr(self.linear, "bias", None)
        hidden = hidden.reshape(-1, hidden.shape[-1]).float()
        logits = linear(hidden, self.linear.weight.float(), None if bias is None else bias.float())
        self.features = find_features(logits, weights.float() * self.scale, ids, kept)

    def __call__(self, block: torch.nn.Module, args: Any, result: Any) -> Any:
        features, self.features = self.features, None
        if features is None:
            raise AllocationError(f"{type(block).__name__} runs without its router: no compensation possible")
        output = result[0] if isinstance(result, tuple) else result
        if self.correction.c.device != features.device:
            self.correction = Correction(*(tensor.to(features.device) for tensor in self.correction))
        corrected = correct(output.reshape(len(features), -1), features, *self.correction).view(output.shape)
        return (corrected, *result[1:]) if isinstance(result, tuple) else corrected


@dataclass
class Compensated:
    """A stand-in for a router's own method: the router's k experts, with the weights of k of the model's own K.

    `narrow` routes at k, `wide` at K. Both are copies that share the parameters of the router they stand for, so they
    follow it to other devices, through training and through `copy.deepcopy`. `block` is told of every choice.
    """

    method: str
    narrow: torch.nn.Module
    wide: torch.nn.Module
    exponent: float
    block: BlockCorrection | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        choose = getattr(type(self.narrow), self.method)
        chosen = choose(self.narrow, *args, **kwargs)
        weights, ids = _find_weights(chosen, type(self.narrow).__name__)
        base = choose(self.wide, *args, **kwargs)
        if self.block is not None:
            self.block.look(args[0] if args else kwargs["hidden_states"], base[weights], base[ids], chosen[ids])
        compensated = pick(base[weights], base[ids], chosen[ids], self.exponent).to(chosen[weights].dtype)
        return (*chosen[:weights], compensated, *chosen[weights + 1 :])


def check_compensable(model_type: str) -> None:
    """Raise AllocationError if no gate exponent can be applied to models of this type."""
    if model_type in UNPROPORTIONAL:
        raise AllocationError(f"no gate exponent can be applied in {model_type}; search without one")


def check_correctable(model_type: str) -> None:
    """Raise AllocationError if no correction can be applied to models of this type."""
    if model_type in UNCORRECTABLE:
        raise AllocationError(f"no correction can be applied in {model_type}; profile with --compensation exponent")


def find_block(modules: list[torch.nn.Module], router: str) -> torch.nn.Module:
    """The module among those around a router's weight, innermost first, that has the experts.

    Raises:
        AllocationError: none has.
    """
    block = next((module for module in modules if isinstance(getattr(module, "experts", None), torch.nn.Module)), None)
    if block is None:
        raise AllocationError(f"no block with experts around {router}: no compensation possible; search without one")
    return block


def correct_block(block: torch.nn.Module, weight_holder: torch.nn.Module, correction: Correction) -> BlockCorrection:
    """Have a block add the correction to its output, in place; returns what its router has to tell its choices to."""
    hook = BlockCorrection(weight_holder, _find_scale(block), correction)
    block.register_forward_hook(hook)
    return hook


def _find_scale(block: torch.nn.Module) -> float:
    """The factor of the experts' output in a block that applies one itself, not its router.

    Blocks hold the routed scaling factor in that case only. Cohere's may take the mean of routed and shared experts.
    """
    if getattr(block, "shared_expert_combination_strategy", None) == "average" and block.num_shared_experts > 0:
        return 0.5
    return float(getattr(block, "routed_scaling_factor", 1.0))


def restore_block(block: torch.nn.Module) -> None:
    """Undo `correct_block`."""
    for key, hook in list(block._forward_hooks.items()):
        if isinstance(hook, BlockCorrection):
            del block._forward_hooks[key]


def compensate_router(
    router: torch.nn.Module, top_k_name: str, own_top_k: int, exponent: float, block: BlockCorrection | None = None
) -> None:
    """Apply the gate exponent, in place, to the module that chooses experts and holds k as `top_k_name`.

    `block` is told of its choices.
    """
    name = next(name for name in ROUTING_METHODS if hasattr(router, name))
    narrow, wide = copy.copy(router), copy.copy(router)
    setattr(wide, top_k_name, own_top_k)
    method = "forward" if name == "_old_forward" else name
    setattr(router, name, Compensated(method, narrow, wide, exponent, block))


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
