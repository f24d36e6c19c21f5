"""Pruned checkpoints, from the weights alone: without some experts (inter-pruning) or channels of all (intra-pruning).

Every MoE layer loses the same number, the least important first (`importance`); the others keep their order. Layers for
multi-token prediction have the same config and are pruned alike. Shared experts stay as they are: where the config
gives them the width of the others, they are padded with zeros to a whole multiple of it, which changes no output.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from math import floor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from lexi_search import __version__
from lexi_search.artifacts.codec import encode
from lexi_search.artifacts.files import json_bytes
from lexi_search.artifacts.identity import ModelIdentity
from lexi_search.checkpoint.folder import UNLINKED, build_folder
from lexi_search.checkpoint.reader import Checkpoint, open_checkpoint
from lexi_search.checkpoint.writer import Output, write_shards
from lexi_search.errors import InputError
from lexi_search.models.loading.streaming import stream_layers
from lexi_search.models.model import Model, describe, find_dtype
from lexi_search.models.moe_tensors import BIASES, FIXED_CHOICES, LayerTensors, find_block
from lexi_search.profiling.divergence import open_run
from lexi_search.profiling.forward.layer import MoEOutputs
from lexi_search.profiling.forward.passes import forward
from lexi_search.profiling.forward.sampling import draw_tokens
from lexi_search.pruning.importance import Batches, draw_batches, score_channels, score_experts
from lexi_search.pruning.sizes import (
    Sizes,
    change_config,
    check_width,
    find_blocks,
    find_sizes,
    has_differing_layers,
    is_single,
    pad_shared,
)
from lexi_search.pruning.slicing import ExpertBlock, Kept, find_unit, slice_experts, slice_rows

FORMAT, VERSION = "lexi-pruning", 1
RECORD = "lexi-pruning.json"
_LENGTH = 512  # tokens of one sample text
_WEIGHT_FILES = ("*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack")


@dataclass(frozen=True)
class Pruning:
    """The record of a pruning: the model before; sizes before and after; the kept experts; the settings.

    `num_experts` is per layer, `width` the channels of an expert, `shared_experts` their number in the config, `size`
    that of all tensors in bytes. `kept_experts` maps the module name of each block of experts to their old numbers, in
    their new order.
    """

    model: ModelIdentity
    num_experts: tuple[int, int]
    width: tuple[int, int]
    shared_experts: tuple[int, int]
    size: tuple[int, int]
    kept_experts: Mapping[str, tuple[int, ...]]
    input: str
    samples: int
    seed: int
    made_by: Mapping[str, Any]


class _Source(NamedTuple):
    """A checkpoint to prune: its blocks of experts by module name, and the sizes before and after."""

    checkpoint: Checkpoint
    model: Model
    blocks: Mapping[str, LayerTensors]
    experts: Mapping[str, ExpertBlock]  # of the same blocks
    before: Sizes
    after: Sizes
    unit: int  # neighbouring channels that are kept or dropped together


def prune(
    weights: str,
    folder: str,
    *,
    experts: Fraction = Fraction(0),
    width: Fraction = Fraction(0),
    input: str = "paper",
    samples: int = 4096,
    seed: int = 0,
    report: Callable[[float], None] = lambda share: None,
) -> Pruning:
    """Write the checkpoint in the folder `weights`, without these shares of experts and channels, to `folder`.

    Memory holds one layer at a time, then one tensor. `folder` appears complete or not at all; files without weights
    are linked. Importance is measured on `samples` tokens, sampled with `seed`: N(0, 1) for `paper` input, text that
    the model generates itself for `weights`. `report` is called with the share that is done.

    Raises:
        InputError: a checkpoint that cannot be read or pruned like this, or a folder that cannot be written.
    """
    with build_folder(folder, weights, unlinked=(*UNLINKED, *_WEIGHT_FILES)) as building:
        source = _open_source(weights, experts, width)
        checkpoint = source.checkpoint
        kept = {}
        for name, remaining in _choose_kept(source, _sample_inputs(source, input, samples, seed)):
            kept[name] = remaining
            report(len(kept) / len(source.blocks) / 2)
        changes = _plan_changes(source, kept)
        sizes = write_shards(building, checkpoint, changes, report=lambda share: report((1 + share) / 2))
        config = change_config(checkpoint.config, source.before, source.after)
        (building / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        pruning = Pruning(
            model=source.model.identity,
            num_experts=(source.before.num_experts, source.after.num_experts),
            width=(source.before.width, source.after.width),
            shared_experts=(source.before.shared_experts, source.after.shared_experts),
            size=sizes,
            kept_experts={name: remaining.experts for name, remaining in kept.items()},
            input=input,
            samples=samples,
            seed=seed,
            made_by={"lexi_search": __version__},
        )
        (building / RECORD).write_bytes(json_bytes({"format": FORMAT, "version": VERSION} | encode(pruning)))
        _require_readable(building, weights)
    return pruning


def count_left(total: int, share: Fraction) -> int:
    """The number left of `total` without `share` of them: rounded to the nearest, halves up."""
    return floor(total * (1 - share) + Fraction(1, 2))


def select(scores: Float[np.ndarray, " scores"], count: int, *, num_groups: int = 1) -> tuple[int, ...]:
    """Ascending indices of the `count` largest scores, as many in each of `num_groups` runs; of ties, the first."""
    grouped = np.asarray(scores, np.float64).reshape(num_groups, -1)
    best = np.argsort(-grouped, axis=1, kind="stable")[:, : count // num_groups]
    starts = np.arange(num_groups)[:, None] * grouped.shape[1]
    return tuple(np.sort((best + starts).reshape(-1)).tolist())


def _open_source(weights: str, experts: Fraction, width: Fraction) -> _Source:
    checkpoint = open_checkpoint(weights)
    if (checkpoint.folder / RECORD).exists():
        raise InputError(f"{weights}: already pruned, says {RECORD} there; prune the model that it was made from")
    layered = {"lexi_allocation", *(() if has_differing_layers(checkpoint.config) else ("per_layer_config",))}
    if any(layered & part.keys() for part in _list_parts(checkpoint.config)):
        raise InputError(f"{weights}: the config has values per layer; prune the model's original folder")
    model = _describe(checkpoint)
    tensors = checkpoint.tensors
    if fixed := next((name for name in tensors if name.endswith(f".{FIXED_CHOICES}")), None):
        raise InputError(f"{weights}: {fixed} names the experts of every token; such a model cannot be pruned")
    before, blocks = find_sizes(tensors, checkpoint, model), find_blocks(tensors, checkpoint, model)
    experts_of = {
        name: ExpertBlock(
            checkpoint=checkpoint,
            tensors=tensors,
            experts=block.experts,
            stem=find_block(block.router, in_layer=block.scales is not None) + "experts.",
            width=before.width,
        )
        for name, block in blocks.items()
    }
    unit = 1
    if width:
        check_width(checkpoint, before)
        unit = int(np.lcm.reduce([find_unit(block) for block in experts_of.values()]))
    after = before.shrink(
        num_experts=_count_experts(checkpoint, model, experts), width=unit * count_left(before.width // unit, width)
    )
    if not after.width:
        raise InputError(f"{weights}: no channel is left of {before.width}, which come {unit} at a time; prune less")
    return _Source(
        checkpoint=checkpoint,
        model=model,
        blocks=blocks,
        experts={name: block._replace(unit=unit) for name, block in experts_of.items()},
        before=before,
        after=after,
        unit=unit,
    )


def _list_parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The config and all objects inside it."""
    yield config
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _list_parts(value)


def _describe(checkpoint: Checkpoint) -> Model:
    return describe(checkpoint, max_k=2 if is_single(checkpoint.config) else None)


def _count_experts(checkpoint: Checkpoint, model: Model, share: Fraction) -> int:
    """The experts left in each layer: the same number in every group; InputError for too few for the model's own k."""
    before, top_k, routing = model.identity.num_experts, model.identity.top_k, model.routing
    groups = routing.num_groups
    if not share:
        return before
    left = groups * count_left(before // groups, share)
    least = max(-(-top_k // routing.topk_groups), 2 if groups > 1 and routing.group_score == "top2" else 1) * groups
    if left < least:
        kind = f"{least}, {least // groups} in each of {groups} groups" if groups > 1 else str(least)
        raise InputError(f"{checkpoint.folder}: {left} of {before} experts would be left; k = {top_k} needs {kind}")
    if left < before and (named := re.search(r"experts\\*\.\d+", json.dumps(checkpoint.config))):
        raise InputError(
            f"{checkpoint.folder / 'config.json'}: names {named[0]} by its number; prune width, not experts"
        )
    return left


def _sample_inputs(source: _Source, input: str, samples: int, seed: int) -> Callable[[int], Batches]:
    """Number of a block of experts -> the inputs on which its importance is measured.

    Blocks for multi-token prediction are not run on text: their inputs are random for any `input`.
    """
    checkpoint, model = source.checkpoint, source.model
    dtype = find_dtype(checkpoint, model)
    random = partial(draw_batches, model.hidden_size, tokens=samples, seed=seed, dtype=dtype)
    if input == "paper" or source.before == source.after:
        return random
    run = open_run(checkpoint, model, dtype)
    length = min(_LENGTH, samples)
    tokens = draw_tokens(run, sequences=samples // length, length=length, seed=seed)
    found: dict[str, dict[int, jax.Array]] = {model.identity.router.format(layer): {} for layer in model.layers}

    def observe(first: int, moe: MoEOutputs) -> None:
        found[model.identity.router.format(moe.layer)][first] = jax.device_put(moe.x, jax.local_devices()[0])

    forward(run, tokens, observe=observe)
    inputs = {router: [own[first] for first in sorted(own)] for router, own in found.items()}
    routers = [block.router for block in source.blocks.values()]
    return lambda number: inputs[routers[number]] if routers[number] in inputs else random(number)


def _choose_kept(source: _Source, inputs: Callable[[int], Batches]) -> Iterator[tuple[str, Kept]]:
    """Yield (module name, what is kept) for each block of experts."""
    model, before, after = source.model, source.before, source.after
    all_experts = tuple(range(before.num_experts))
    if before == after:
        yield from ((name, Kept(all_experts)) for name in source.blocks)
        return
    numbered = model._replace(tensors=dict(enumerate(source.blocks.values())))
    with closing(stream_layers(source.checkpoint, numbered, range(len(source.blocks)))) as streamed:
        for name, (number, weights) in zip(source.blocks, streamed, strict=True):
            experts = all_experts
            if after.num_experts < before.num_experts:
                scores = score_experts(model, weights, inputs(number))
                experts = select(scores, after.num_experts, num_groups=model.routing.num_groups)
            units = None
            if after.width < before.width:
                channels = score_channels(model, weights, experts, inputs(number))
                summed = [np.square(scores).reshape(-1, source.unit).sum(axis=1) for scores in channels]
                units = tuple(select(scores, after.width // source.unit) for scores in summed)
            yield name, Kept(experts, units)


def _plan_changes(source: _Source, kept: Mapping[str, Kept]) -> dict[str, Output | None]:
    """Stored name -> what is written instead, or None; tensors that are not named stay as they are."""
    checkpoint, before = source.checkpoint, source.before
    changes: dict[str, Output | None] = {}
    for name, block in source.blocks.items():
        per_expert = [part for part in checkpoint.entries if part.startswith(block.router.removesuffix("weight"))]
        per_expert += [f"{name}.{bias}" for bias in BIASES if f"{name}.{bias}" in checkpoint.entries]
        per_expert += [block.scales.outputs] if block.scales else []
        for part in per_expert:
            changes[part] = slice_rows(checkpoint, part, kept[name].experts, before.num_experts)
        changes |= slice_experts(source.experts[name], kept[name])
        changes |= pad_shared(checkpoint, name, before, source.after)
    experts = (part for part in checkpoint.entries if ".experts." in part and "talker." not in part)
    if unknown := next((part for part in experts if part not in changes), None):
        raise InputError(f"{checkpoint.entries[unknown].file}: how to prune tensor {unknown} is not known")
    return changes


def _require_readable(building: Path, weights: str) -> None:
    """Raise InputError unless the folder that was written can be described as a checkpoint."""
    try:
        _describe(open_checkpoint(building))
    except InputError as error:
        reason = str(error).replace(str(building), "pruned")
        raise InputError(f"{weights}: cannot be pruned so: {reason}") from error
