"""The decoder layers of a loaded transformers model: what each gave, and the model run on from one of them.

The model's own forward does everything: embeddings, masks, positions, the order of the layers, the output layer. A
layer that need not be computed again gives what it gave before, so what a family passes between layers is right.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lexi_adapter.allocation import ModelIdentity
from lexi_adapter.errors import AllocationError
from lexi_adapter.serving.transformers_patch import find_routers


@dataclass(frozen=True)
class Decoder:
    """`layers` are all of the model's decoder layers, `blocks` the mixture-of-experts blocks in them by layer."""

    model: torch.nn.Module
    layers: Sequence[torch.nn.Module]
    blocks: Mapping[int, torch.nn.Module]


def find_decoder(model: torch.nn.Module, identity: ModelIdentity) -> Decoder:
    """The decoder of a model whose routers are found as `transformers_patch` finds them.

    Raises:
        AllocationError: the layers have no block that holds both router and experts.
    """
    blocks, prefixes = {}, set()
    for layer, name in find_routers(model, identity).items():
        parts = name.split(".")
        index = parts.index(str(layer))
        if len(parts) < index + 4:  # layer, block, router, weight
            raise AllocationError(f"{name} stands outside of a block with its experts: unknown family")
        prefixes.add(".".join(parts[:index]))
        blocks[layer] = model.get_submodule(".".join(parts[: index + 2]))
    if len(prefixes) != 1:
        raise AllocationError(f"{type(model).__name__} has routers in {len(prefixes)} stacks of layers: unknown family")
    return Decoder(model, list(model.get_submodule(prefixes.pop())), blocks)


@contextmanager
def replaced(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within it, the module computes `forward`."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def run(decoder: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    """The logits [sequences, length, vocabulary] of tokens [sequences, length]."""
    return decoder.model(tokens, use_cache=False).logits


def run_recorded(
    decoder: Decoder, tokens: torch.Tensor, wrappers: Mapping[int, Callable[..., Any]]
) -> tuple[torch.Tensor, list[Any]]:
    """The logits and what every layer gave; a layer in `wrappers` is computed by that, given its own forward first."""
    outputs: list[Any] = [None] * len(decoder.layers)

    def record(index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        outputs[index] = forward(*args, **kwargs)
        return outputs[index]

    with ExitStack() as stack:
        for index, layer in enumerate(decoder.layers):
            forward = partial(wrappers[index], layer.forward) if index in wrappers else layer.forward
            stack.enter_context(replaced(layer, partial(record, index, forward)))
        return run(decoder, tokens), outputs


def run_from(decoder: Decoder, first: int, tokens: torch.Tensor, outputs: Sequence[Any]) -> torch.Tensor:
    """The logits where the layers before `first` give `outputs`, recorded on the same tokens, and compute nothing."""
    with ExitStack() as stack:
        for layer, output in zip(decoder.layers[:first], outputs, strict=False):
            stack.enter_context(replaced(layer, lambda *_, _output=output, **__: _output))
        return run(decoder, tokens)


@torch.inference_mode()
def check_replays(decoder: Decoder, tokens: torch.Tensor) -> None:
    """Raise AllocationError where running on from a layer is not what the whole model computes, but for rounding.

    A family whose layers told each other something behind their results would be measured wrong.
    """
    logits, outputs = run_recorded(decoder, tokens, {})
    tolerance = torch.finfo(logits.dtype).eps ** 0.5 * logits.abs().max()
    for layer in decoder.blocks:
        difference = (run_from(decoder, layer, tokens, outputs) - logits).abs().max()
        if not difference <= tolerance:
            raise AllocationError(
                f"{type(decoder.model).__name__} run on from layer {layer} is not what it is from the start (logits "
                f"differ by {difference:.3g}): unknown family"
            )
