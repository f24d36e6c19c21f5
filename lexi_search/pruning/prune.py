"""Smaller checkpoints from weights alone: whole experts go (inter-pruning), or channels of all experts (intra-pruning).

The same number goes in every MoE layer, the least important first (`importance`); what stays keeps its order. Layers
that predict further tokens have the same config and are pruned alike. Shared experts stay as they are: where the config
gives them the width of the others, zeros are added until a whole number of them is as wide, which changes no output.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from math import floor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lexi_search import __version__
from lexi_search.artifacts.codec import encode
from lexi_search.artifacts.files import json_bytes
from lexi_search.artifacts.identity import ModelIdentity
from lexi_search.checkpoint.folder import UNLINKED, build_folder
from lexi_search.checkpoint.reader import Checkpoint, open_checkpoint
from lexi_search.checkpoint.writer import Output, write_shards
from lexi_search.errors import InputError
from lexi_search.models.decoder_stack import describe_decoder
from lexi_search.models.loading import stream_layers
from lexi_search.models.model import Model, describe, find_dtype
from lexi_search.models.moe_tensors import BIASES, LayerTensors
from lexi_search.profiling.forward import Run, forward
from lexi_search.profiling.sampling import draw_tokens
from lexi_search.pruning.importance import Batches, draw_batches, score_channels, score_experts
from lexi_search.pruning.sizes import Sizes, change_config, check_width, find_blocks, find_sizes, is_single, pad_shared
from lexi_search.pruning.slicing import Kept, find_unit, slice_experts, slice_rows

FORMAT, VERSION = "lexi-pruning", 1
NOTE = "lexi-pruning.json"
LENGTH = 512  # tokens of one text
WEIGHT_FILES = ("*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack")


@dataclass(frozen=True)
class Pruning:
    """What was pruned: the model before; experts a layer and channels an expert, before and after; what was chosen how.

    `kept_experts` has for each block of experts, by the name of its module, their old numbers in their new order.
    `shared_experts` is how many the config says there are, before and after. `size` is that of all tensors in bytes.
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
    """A checkpoint to prune: every block of experts by the name of its module, and the sizes before and after."""

    checkpoint: Checkpoint
    model: Model
    blocks: Mapping[str, LayerTensors]
    before: Sizes
    after: Sizes
    unit: int  # neighbouring channels that stay or go together


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
    """Write the checkpoint in the folder `weights`, less these shares of experts and of channels, as `folder`.

    One layer at a time is in memory, then one tensor. `folder` appears whole or not at all; what holds no weights is
    linked. `samples` tokens, drawn by `seed`, tell what is important: N(0, 1) for `paper` input, text that the model
    writes itself for `weights`. `report` is told how much is done.

    Raises:
        InputError: a checkpoint that cannot be read or be pruned so, or a place that cannot be written to.
    """
    with build_folder(folder, weights, unlinked=(*UNLINKED, *WEIGHT_FILES)) as building:
        source = _open_source(weights, experts, width)
        checkpoint = source.checkpoint
        kept = {}
        for name, chosen in _choose(source, _draw_inputs(source, input, samples, seed)):
            kept[name] = chosen
            report(len(kept) / len(source.blocks) / 2)
        changes = _plan(source, kept)
        sizes = write_shards(building, checkpoint, changes, report=lambda share: report((1 + share) / 2))
        config = change_config(checkpoint.config, source.before, source.after)
        (building / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        pruning = Pruning(
            model=source.model.identity,
            num_experts=(source.before.num_experts, source.after.num_experts),
            width=(source.before.width, source.after.width),
            shared_experts=(source.before.shared_experts, source.after.shared_experts),
            size=sizes,
            kept_experts={name: chosen.experts for name, chosen in kept.items()},
            input=input,
            samples=samples,
            seed=seed,
            made_by={"lexi_search": __version__},
        )
        (building / NOTE).write_bytes(json_bytes({"format": FORMAT, "version": VERSION} | encode(pruning)))
        _check(building, weights)
    return pruning


def count_left(total: int, share: Fraction) -> int:
    """How many of `total` are left without `share` of them: the nearest whole number, a half rounded up."""
    return floor(total * (1 - share) + Fraction(1, 2))


def select(scores: Sequence[float], count: int, *, num_groups: int = 1) -> tuple[int, ...]:
    """Places of the `count` largest scores, ascending, as many in each of `num_groups` runs; of equals the first."""
    grouped = np.asarray(scores, np.float64).reshape(num_groups, -1)
    chosen = np.argsort(-grouped, axis=1, kind="stable")[:, : count // num_groups]
    starts = np.arange(num_groups)[:, None] * grouped.shape[1]
    return tuple(np.sort((chosen + starts).reshape(-1)).tolist())


def _open_source(weights: str, experts: Fraction, width: Fraction) -> _Source:
    checkpoint = open_checkpoint(weights)
    if (checkpoint.folder / NOTE).exists():
        raise InputError(f"{weights}: already pruned, says {NOTE} there; prune the model that it was made from")
    if any("lexi_allocation" in part or "per_layer_config" in part for part in _list_parts(checkpoint.config)):
        raise InputError(f"{weights}: the config has values per layer; prune the model's original folder")
    model = _describe(checkpoint)
    tensors = checkpoint.tensors
    before, blocks = find_sizes(tensors, checkpoint, model), find_blocks(tensors, checkpoint, model)
    unit = 1
    if width:
        check_width(checkpoint, before)
        unit = int(np.lcm.reduce([find_unit(tensors, checkpoint, b.experts, before.width) for b in blocks.values()]))
    after = before.shrink(
        num_experts=_count_experts(checkpoint, model, experts), width=unit * count_left(before.width // unit, width)
    )
    if not after.width:
        raise InputError(f"{weights}: no channel is left of {before.width}, which come {unit} at a time; prune less")
    return _Source(checkpoint, model, blocks, before, after, unit)


def _list_parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The config and all objects within."""
    yield config
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _list_parts(value)


def _describe(checkpoint: Checkpoint) -> Model:
    return describe(checkpoint, max_k=2 if is_single(checkpoint.config) else None)


def _count_experts(checkpoint: Checkpoint, model: Model, share: Fraction) -> int:
    """The experts left in each layer: as many in every group, and as many as the model's own k needs."""
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


def _draw_inputs(source: _Source, input: str, samples: int, seed: int) -> Callable[[int], Batches]:
    """What each block of experts, by its number, is to be judged on.

    Blocks that predict further tokens see no text here: theirs are random on any input.
    """
    checkpoint, model = source.checkpoint, source.model
    dtype = find_dtype(checkpoint, model)
    random = partial(draw_batches, model.hidden_size, tokens=samples, seed=seed, dtype=dtype)
    if input == "paper" or source.before == source.after:
        return random
    run = Run(checkpoint, model, describe_decoder(checkpoint, model), dtype)
    length = min(LENGTH, samples)
    tokens = draw_tokens(run, sequences=samples // length, length=length, seed=seed)
    seen: dict[str, list[np.ndarray]] = {model.identity.router.format(layer): [] for layer in model.layers}
    forward(run, tokens, observe=lambda moe: seen[model.identity.router.format(moe.layer)].append(moe.x))
    routers = [block.router for block in source.blocks.values()]
    return lambda number: seen[routers[number]] if routers[number] in seen else random(number)


def _choose(source: _Source, inputs: Callable[[int], Batches]) -> Iterator[tuple[str, Kept]]:
    """What stays in each block, in turn."""
    model, before, after = source.model, source.before, source.after
    everything = tuple(range(before.num_experts))
    if before == after:
        yield from ((name, Kept(everything)) for name in source.blocks)
        return
    numbered = model._replace(tensors=dict(enumerate(source.blocks.values())))
    with closing(stream_layers(source.checkpoint, numbered, range(len(source.blocks)))) as streamed:
        for name, (number, weights) in zip(source.blocks, streamed, strict=True):
            kept = everything
            if after.num_experts < before.num_experts:
                scores = score_experts(model, weights, inputs(number))
                kept = select(scores, after.num_experts, num_groups=model.routing.num_groups)
            units = None
            if after.width < before.width:
                channels = score_channels(model, weights, kept, inputs(number))
                whole = [np.square(scores).reshape(-1, source.unit).sum(axis=1) for scores in channels]
                units = tuple(select(scores, after.width // source.unit) for scores in whole)
            yield name, Kept(kept, units)


def _plan(source: _Source, kept: Mapping[str, Kept]) -> dict[str, Output | None]:
    """Stored name -> what is written instead, or None; tensors that are not named stay as they are."""
    checkpoint, before = source.checkpoint, source.before
    tensors, changes = checkpoint.tensors, {}
    for name, found in source.blocks.items():
        sized = [part for part in checkpoint.entries if part.startswith(found.router.removesuffix("weight"))]
        sized += [f"{name}.{bias}" for bias in BIASES if f"{name}.{bias}" in checkpoint.entries]
        for part in sized:
            changes[part] = slice_rows(checkpoint, part, kept[name].experts, before.num_experts)
        stem = f"{name}.experts."
        changes |= slice_experts(tensors, checkpoint, found.experts, stem, kept[name], before.width, source.unit)
        changes |= pad_shared(checkpoint, name, source.before, source.after)
    experts = (part for part in checkpoint.entries if ".experts." in part and "talker." not in part)
    if unknown := next((part for part in experts if part not in changes), None):
        raise InputError(f"{checkpoint.entries[unknown].file}: how to prune tensor {unknown} is not known")
    return changes


def _check(building: Path, weights: str) -> None:
    """What was written must be a checkpoint, or nothing becomes of it."""
    try:
        _describe(open_checkpoint(building))
    except InputError as error:
        reason = str(error).replace(str(building), "pruned")
        raise InputError(f"{weights}: cannot be pruned so: {reason}") from error
