"""What is compared: one model as it is, with fewer active experts, and with experts dropped or narrowed.

A variant is data: a folder, what changes in its config, and the k of its layers. Dropping experts (inter-pruning) and
narrowing them (intra-pruning) by config alone is for random weights (`--load-format dummy`); for real ones write a
pruned checkpoint and name its folder.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lexi_adapter.allocation import KEY, Allocation, ModelIdentity, read_allocation
from lexi_adapter.errors import AllocationError
from lexi_adapter.model.folder import read_config
from lexi_adapter.model.shapes import (
    RANDOM,
    TOP_K,
    check_allocation,
    check_count,
    describe_folder,
    find_family,
    nest,
)


@dataclass(frozen=True)
class Variant:
    """One thing to measure.

    `overrides` are vLLM's --hf-overrides; `allocation` goes in by --additional-config; `environment` is the process's.
    `kept` says of a pruned variant how much of "experts" or of "width" is left: kept, of.
    """

    name: str
    folder: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    allocation: Allocation | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    kept: Mapping[str, tuple[int, int]] = field(default_factory=dict)


def allocate(model: ModelIdentity, top_k: Mapping[int, int]) -> Allocation:
    """The k of `top_k` as an allocation that was made up, not searched: its losses are 0."""
    return Allocation(
        model=model,
        top_k=dict(top_k),
        budget=sum(top_k.values()),
        loss=0.0,
        optimal_loss=0.0,
        made_by={"made_up": True},
    )


def draw_top_k(model: ModelIdentity, budget: int, *, seed: int) -> dict[int, int]:
    """A k for every layer that sums to `budget`: drawn from 1..top_k alike, then moved by ones until the sum is right.

    As uneven as an allocation gets; what an engine's speed depends on is how many layers have which k.
    """
    if not len(model.moe_layers) <= budget <= len(model.moe_layers) * model.top_k:
        raise AllocationError(f"no k from 1 to {model.top_k} over {len(model.moe_layers)} layers sums to {budget}")
    generator = random.Random(seed)
    top_k = {layer: generator.randint(1, model.top_k) for layer in model.moe_layers}
    while (missing := budget - sum(top_k.values())) != 0:
        step = 1 if missing > 0 else -1
        top_k[generator.choice([layer for layer, k in top_k.items() if 1 <= k + step <= model.top_k])] += step
    return top_k


def share_of_budget(model: ModelIdentity, share: float) -> int:
    """The budget nearest to `share` of the model's own."""
    return round(share * model.top_k * len(model.moe_layers))


def find_uniform(model: ModelIdentity, budget: int) -> int | None:
    """The k that sums to `budget` if every layer has it, or None if there is none."""
    k, rest = divmod(budget, len(model.moe_layers))
    return k if rest == 0 else None


def drop_experts(name: str, folder: str, config: Mapping[str, Any], share: float) -> Variant:
    """Inter-pruning: a share of every layer's experts is gone, k stays."""
    family, text = find_family(config)
    kept = round(text[family.num_experts] * (1 - share))
    if kept < text[TOP_K]:
        raise AllocationError(f"dropping {share:.3g} of the experts leaves {kept}, fewer than k = {text[TOP_K]}")
    overrides = nest(family, {family.num_experts: kept})
    return Variant(name, folder, overrides, kept={"experts": (kept, text[family.num_experts])})


def narrow_experts(name: str, folder: str, config: Mapping[str, Any], share: float) -> Variant:
    """Intra-pruning: a share of every routed expert's inner width is gone.

    Where shared experts have the routed ones' width, their number grows in the config so that together they stay as
    wide, or by less than one expert wider.
    """
    family, text = find_family(config)
    width = round(text[family.width] * (1 - share))
    if width < 1:
        raise AllocationError(f"narrowing experts of width {text[family.width]} by {share:.3g} leaves nothing of them")
    overrides = {family.width: width}
    shared = text.get(family.shared) if family.shared else None
    if shared is not None:
        check_count(config["model_type"], family.shared, shared, 0)
        overrides[family.shared] = math.ceil(shared * text[family.width] / width)
    return Variant(name, folder, nest(family, overrides), kept={"width": (width, text[family.width])})


def make_variants(
    folder: str,
    *,
    load_format: str,
    allocations: Mapping[str, Allocation],
    shares: Sequence[float] = (),
    dropped: Sequence[float] = (),
    narrowed: Sequence[float] = (),
    folders: Sequence[str] = (),
    seed: int = 0,
) -> tuple[Variant, ...]:
    """The base first; then allocations, for every share of its budget a mixed and a uniform k, and pruned models.

    A share that no uniform k has, or whose only allocation is uniform, gives one variant.

    Raises:
        AllocationError: an allocation for another model, a share that cannot be had, a config that does not tell what
            is pruned, or two variants of one name.
    """
    for allocation in allocations.values():
        check_allocation(allocation, folder, load_format)
    variants = [Variant("base", folder)]
    variants += [Variant(name, folder, allocation=allocation) for name, allocation in allocations.items()]
    if (dropped or narrowed) and load_format != RANDOM:
        raise AllocationError(
            f"a config alone prunes random weights only: add --load-format {RANDOM}, or name a folder"
        )
    config = read_config(Path(folder))
    model = describe_folder(folder, load_format) if shares else None
    for share in shares:
        budget = share_of_budget(model, share)
        k, percent = find_uniform(model, budget), f"{100 * share:g} %"
        if k != 1:
            mixed = draw_top_k(model, budget, seed=seed)
            variants.append(Variant(f"mixed k, {percent}", folder, allocation=allocate(model, mixed)))
        if k is not None:
            uniform = dict.fromkeys(model.moe_layers, k)
            variants.append(Variant(f"uniform k = {k}, {percent}", folder, allocation=allocate(model, uniform)))
    variants += [drop_experts(f"inter-pruned {100 * share:g} %", folder, config, share) for share in dropped]
    variants += [narrow_experts(f"intra-pruned {100 * share:g} %", folder, config, share) for share in narrowed]
    variants += [Variant(name, name) for name in folders]
    check_names(variants)
    return tuple(variants)


def check_names(variants: Sequence[Variant]) -> None:
    """Raise AllocationError for two variants of one name, whose results could not be told apart."""
    names = [variant.name for variant in variants]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise AllocationError(f"two variants are called {double!r}; name each once, by another path if need be")


def find_allocation(variant: Variant) -> Any:
    """The variant's allocation, or the one that its folder was exported with: transformers applies neither itself.

    Raises:
        AllocationError: both are there and ask for different things.
    """
    document = read_config(Path(variant.folder)).get(KEY)
    own = None if document is None else read_allocation(document)
    if own is not None and variant.allocation is not None and not own.asks_the_same_as(variant.allocation):
        raise AllocationError(
            f"{variant.folder} was exported with another allocation than {variant.name}; name its origin"
        )
    return variant.allocation or own
