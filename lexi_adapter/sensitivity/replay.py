"""Decoder layers run again from kept hidden states: each layer's output recorded, and the model resumed from a layer.

The model's own forward does everything: embedding, masks, positions, the order of the layers, the LM head. A layer that
need not be computed again returns its recorded output, so whatever a family passes between layers is right.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lexi_adapter.allocation import ModelIdentity
from lexi_adapter.errors import AdapterError
from lexi_adapter.serving.transformers_patch import find_routers


@dataclass(frozen=True)
class Decoder:
    """A model, all of its decoder layers, and their mixture-of-experts blocks by layer index."""

    model: torch.nn.Module
    layers: Sequence[torch.nn.Module]
    blocks: Mapping[int, torch.nn.Module]


def find_decoder(model: torch.nn.Module, identity: ModelIdentity) -> Decoder:
    """The decoder of a model, by the names of its routers.

    Raises:
        AdapterError: a router without a block that holds it and its experts, or routers in several stacks of layers.
    """
    blocks, prefixes = {}, set()
    for layer, name in find_routers(model, identity).items():
        parts = name.split(".")
        index = parts.index(str(layer))
        blocks[layer] = model.get_submodule(".".join(parts[: index + 2]))
        if len(parts) < index + 4 or not hasattr(blocks[layer], "experts"):  # layer, block, router, weight
            raise AdapterError(f"{name} is not in a block with its experts: unknown family")
        prefixes.add(".".join(parts[:index]))
    if len(prefixes) != 1:
        raise AdapterError(f"{type(model).__name__} has routers in {len(prefixes)} stacks of layers: unknown family")
    return Decoder(model, list(model.get_submodule(prefixes.pop())), blocks)


@contextmanager
def replace_forward(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """A context in which the module computes `forward`."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def run(decoder: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    """The logits [sequences, length, vocabulary] of tokens [sequences, length]."""
    return decoder.model(tokens, use_cache=False).logits


def run_recorded(
    decoder: Decoder, tokens: torch.Tensor, wrappers: Mapping[int, Callable[..., Any]]
) -> tuple[torch.Tensor, list[Any]]:
    """The logits and the output of every layer; a wrapper is called instead of a layer, with its forward first."""
    outputs: list[Any] = [None] * len(decoder.layers)

    def record(index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        outputs[index] = forward(*args, **kwargs)
        return outputs[index]

    with ExitStack() as stack:
        for index, layer in enumerate(decoder.layers):
            forward = partial(wrappers[index], layer.forward) if index in wrappers else layer.forward
            stack.enter_context(replace_forward(layer, partial(record, index, forward)))
        return run(decoder, tokens), outputs


def run_from(decoder: Decoder, first: int, tokens: torch.Tensor, outputs: Sequence[Any]) -> torch.Tensor:
    """The logits with the layers before `first` not computed: they return `outputs`, recorded on the same tokens."""
    with ExitStack() as stack:
        for layer, output in zip(decoder.layers[:first], outputs, strict=False):
            stack.enter_context(replace_forward(layer, lambda *_, _output=output, **__: _output))
        return run(decoder, tokens)


@torch.inference_mode()
def check_replays(decoder: Decoder, tokens: torch.Tensor) -> None:
    """Raise AdapterError where resuming from a layer gives other logits than the whole pass, beyond rounding.

    A family whose layers pass each other something beside their outputs would be measured wrong.
    """
    logits, outputs = run_recorded(decoder, tokens, {})
    tolerance = torch.finfo(logits.dtype).eps ** 0.5 * logits.abs().max()
    for layer in decoder.blocks:
        difference = (run_from(decoder, layer, tokens, outputs) - logits).abs().max()
        if not difference <= tolerance:
            raise AdapterError(
                f"{type(decoder.model).__name__} resumed from layer {layer} differs from the whole pass (logits by "
                f"{difference:.3g}): unknown family"
            )
