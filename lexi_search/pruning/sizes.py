"""The number and width of a checkpoint's experts: config keys that hold them and tensors that depend on them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import getitem
from typing import Any

from lexi_search.artifacts.codec import short
from lexi_search.checkpoint.config import COUNT_KEYS, find_text_config
from lexi_search.checkpoint.reader import Checkpoint
from lexi_search.checkpoint.tensors import Tensors
from lexi_search.checkpoint.writer import Output
from lexi_search.errors import InputError
from lexi_search.models.families.config import read_config
from lexi_search.models.families.moe import Architecture
from lexi_search.models.model import Model, read_latent_size
from lexi_search.models.moe_families import ARCHITECTURES
from lexi_search.models.moe_tensors import LayerTensors, locate_tensors
from lexi_search.pruning.slicing import pad

_DOWN = ("down_proj", "w2")  # matrices of shared experts whose inputs are the channels


@dataclass(frozen=True)
class Sizes:
    """The experts of each layer, the channels of each, and the shared experts of that width in the config, or 0."""

    architecture: Architecture
    num_experts: int
    width: int
    shared_experts: int

    def shrink(self, *, num_experts: int, width: int) -> "Sizes":
        """The sizes with fewer or narrower experts, and enough shared ones to be together as wide as before."""
        shared = -(-self.shared_experts * self.width // width) if width else 0
        return replace(self, num_experts=num_experts, width=width, shared_experts=shared)


def _find_architecture(config: Mapping[str, Any]) -> Architecture | None:
    model_type = config.get("model_type")
    return ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None


def has_differing_layers(config: Mapping[str, Any]) -> bool:
    """Whether the config's `per_layer_config` is about the sizes of attention."""
    architecture = _find_architecture(config)
    return architecture is not None and architecture.differing


def is_single(config: Mapping[str, Any]) -> bool:
    """Whether each token runs one expert of the model that `config` describes."""
    architecture = _find_architecture(config)
    return bool(architecture) and any(_find_section(config).get(key) == 1 for key in architecture.top_k)


def find_sizes(tensors: Tensors, checkpoint: Checkpoint, model: Model) -> Sizes:
    """The sizes of a checkpoint, as stored."""
    architecture = ARCHITECTURES[model.identity.model_type]
    experts = model.tensors[model.layers[0]].experts
    down = tensors[experts.down].shape
    values = read_config(checkpoint).values
    counts = (values.get(key) for key in architecture.shared_experts)
    shared = next((count for count in counts if count is not None), 0)
    if type(shared) is not int:
        raise InputError(f"{checkpoint.folder / 'config.json'}: {architecture.shared_experts[0]} is {short(shared)}")
    width = down[1] if experts.fused and experts.transposed else down[-1]
    return Sizes(architecture, model.identity.num_experts, width, shared)


def find_blocks(tensors: Tensors, checkpoint: Checkpoint, model: Model) -> dict[str, LayerTensors]:
    """Module name -> tensors of every block of experts with this config: of the layers, and of multi-token prediction.

    Raises:
        InputError: a block of multi-token prediction whose experts differ from the layers'.
    """
    architecture = ARCHITECTURES[model.identity.model_type]
    modules = "|".join(map(re.escape, architecture.routers))
    named = re.compile(rf"(?!.*talker\.)(.*\.)?layers\.\d+\.({modules})\.weight")
    blocks = {block.router: block for block in model.tensors.values()}
    for router in tensors:
        if named.fullmatch(router) and router not in blocks:
            blocks[router] = locate_tensors(
                tensors,
                router,
                model.identity.num_experts,
                model.hidden_size,
                has_bias=model.routing.bias is not None,
                interleaved=architecture.interleaved,
                scales=architecture.scales,
                latent_size=read_latent_size(read_config(checkpoint), architecture),
            )
    return {re.match(r"(.*\.)?layers\.\d+\.[^.]+", router)[0]: block for router, block in blocks.items()}


def check_width(checkpoint: Checkpoint, sizes: Sizes) -> None:
    """Raise InputError unless the config has the experts' width, and no other tensor takes its width from there."""
    architecture, place = sizes.architecture, checkpoint.folder / "config.json"
    section = _find_section(checkpoint.config)
    values = {key: section[key] for key in architecture.width if section.get(key) is not None}
    if not values:
        raise InputError(f"{place}: {' or '.join(architecture.width)} is missing")
    for key, value in values.items():
        if any(item != sizes.width for item in (value if isinstance(value, list) else [value])):
            raise InputError(f"{place}: {key} is {short(value)}, but the experts are {sizes.width} wide; prune experts")
    bound = re.compile(rf".*layers\.\d+\.({'|'.join(map(re.escape, architecture.bound)) or '(?!)'})\..*")
    for name, entry in checkpoint.entries.items():
        if bound.fullmatch(name) and sizes.width in entry.shape:
            raise InputError(f"{entry.file}: {name} is as wide as the experts, by one key ({key}); prune experts")


def change_config(config: Mapping[str, Any], before: Sizes, after: Sizes) -> dict[str, Any]:
    """The config with the sizes `after` in every key that holds those of `before`."""
    architecture = before.architecture
    changed = dict(_find_section(config))
    groups = (
        ({*architecture.num_experts, *COUNT_KEYS}, before.num_experts, after.num_experts),
        (architecture.width, before.width, after.width),
        (architecture.shared_experts, before.shared_experts, after.shared_experts),
    )
    if after.shared_experts != before.shared_experts and not any(key in changed for key in architecture.shared_experts):
        changed[architecture.shared_experts[0]] = before.shared_experts  # the default of the model's class
    for keys, old, new in groups:
        for key in keys:
            value = changed.get(key)
            if isinstance(value, list):
                changed[key] = [new if item == old else item for item in value]
            elif value == old and old != new:
                changed[key] = new
    return _replace(config, find_text_config(config), changed)


def pad_shared(checkpoint: Checkpoint, block: str, before: Sizes, after: Sizes) -> dict[str, Output]:
    """The tensors of a block's shared experts, padded with channels of zeros to the width that follows from the config.

    Raises:
        InputError: quantised shared experts.
    """
    old, new = (sizes.shared_experts * sizes.width for sizes in (before, after))
    if old == new:
        return {}
    outputs, shared = {}, re.compile(re.escape(block) + r"\.shared_\w+\.(\w+)\.(.*)")
    for name, entry in checkpoint.entries.items():
        if not (match := shared.fullmatch(name)):
            continue
        axis = int(match[1] in _DOWN)
        if match[2] != "weight" or len(entry.shape) != 2 or entry.shape[axis] != old or entry.dtype.itemsize == 1:
            raise InputError(f"{entry.file}: {name} cannot be widened from {old} to {new}; choose another --width")
        outputs[name] = pad(checkpoint, name, axis, new)
    return outputs


def _find_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of the config."""
    return reduce(getitem, find_text_config(config), config)


def _replace(config: Mapping[str, Any], path: Sequence[str], section: dict[str, Any]) -> dict[str, Any]:
    if not path:
        return section
    return {**config, path[0]: _replace(config[path[0]], path[1:], section)}
