"""Variants of one model to compare: as it is, with fewer active experts, and with experts dropped or narrowed.

A variant is data: a folder, what changes in its config, and the k of its layers. Dropping experts (inter-pruning) and
narrowing them (intra-pruning) by config alone is for random weights (`--load-format dummy`); for real ones write a
pruned checkpoint and name its folder.
"""

import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lexi_adapter.allocation import KEY, Allocation, ModelIdentity, read_allocation
from lexi_adapter.errors import AdapterError, AllocationError
from lexi_adapter.model.compensation import check_compensation, covers
from lexi_adapter.model.folder import check_count, find_vocabulary, read_config
from lexi_adapter.model.shapes import RANDOM, TOP_K, check_allocation, describe_folder, find_family

# Ends of names, where one of the allocations that are compared has a compensation.
COMPENSATED, UNCOMPENSATED = ", compensated", ", no compensation"


@dataclass(frozen=True)
class Variant:
    """One thing to measure.

    `overrides` are vLLM's --hf-overrides; `allocation` goes in by --additional-config; `environment` is the engine
    process's. `kept` says of a pruned variant how many "experts" or how much "width" is left: (kept, of).
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
    """A random k for every layer: uniform over 1..top_k, then changed by ones until the sum is `budget`.

    As uneven as an allocation gets; an engine's speed depends on how many layers have which k.
    """
    if not len(model.moe_layers) <= budget <= len(model.moe_layers) * model.top_k:
        raise AdapterError(f"no k from 1 to {model.top_k} over {len(model.moe_layers)} layers sums to {budget}")
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
    """Inter-pruning: a share of every layer's experts is dropped, k stays."""
    family, text = find_family(config)
    kept = round(text[family.num_experts] * (1 - share))
    if kept < text[TOP_K]:
        raise AdapterError(f"dropping {share:.3g} of the experts leaves {kept}, fewer than k = {text[TOP_K]}")
    overrides = family.nest({family.num_experts: kept})
    return Variant(name, folder, overrides, kept={"experts": (kept, text[family.num_experts])})


def narrow_experts(name: str, folder: str, config: Mapping[str, Any], share: float) -> Variant:
    """Intra-pruning: a share of every routed expert's inner width is dropped.

    Where shared experts have the routed ones' width, their number grows in the config so that together they stay as
    wide, or by less than one expert wider.
    """
    family, text = find_family(config)
    width = round(text[family.width] * (1 - share))
    if width < 1:
        raise AdapterError(f"narrowing experts of width {text[family.width]} by {share:.3g} leaves nothing of them")
    overrides = {family.width: width}
    shared = text.get(family.shared) if family.shared else None
    if shared is not None:
        check_count(f"config.json of {config['model_type']}", family.shared, shared, 0)
        overrides[family.shared] = math.ceil(shared * text[family.width] / width)
    return Variant(name, folder, family.nest(overrides), kept={"width": (width, text[family.width])})


def make_variants(
    folder: str,
    *,
    load_format: str,
    allocations: Mapping[str, Allocation],
    uniform: Sequence[int] = (),
    shares: Sequence[float] = (),
    dropped: Sequence[float] = (),
    narrowed: Sequence[float] = (),
    folders: Sequence[str] = (),
    seed: int = 0,
    each_k: bool = False,
    uncompensated: bool = False,
) -> tuple[Variant, ...]:
    """The base first; then allocations, uniform k, a mixed and a uniform k for every share, pruned models, folders.

    A share of the model's own budget that no uniform k has, or whose only allocation is uniform, gives one variant.
    Beside allocations with one compensation, uniform and mixed k have it where its file has their maps; names say so.

    Args:
        folder: the base.
        load_format: vLLM's load format of the base.
        allocations: name -> allocation, of the base's model.
        uniform: k for all layers.
        shares: of the budget.
        dropped: shares of every layer's experts to drop.
        narrowed: shares of every expert's width to drop.
        folders: other models, named by their folders.
        seed: of mixed k.
        each_k: pruned models at every k of `uniform` as well.
        uncompensated: every compensated variant once more as the model routes at the same k.

    Raises:
        AllocationError: an allocation for another model, or whose compensation is not whole.
        AdapterError: a k or a share that cannot be had, a config that does not tell enough, or two of one name.
    """
    config = read_config(Path(folder))
    for allocation in allocations.values():
        check_allocation(allocation, folder, load_format)
    if dropped or narrowed:
        _check_prunable(folder, load_format)
    variants = [Variant("base", folder)]
    variants += [Variant(name, folder, allocation=allocation) for name, allocation in allocations.items()]
    if uniform or shares:
        # An allocation knows its model in families whose config alone does not tell.
        known = next(iter(allocations.values()), None)
        model = known.model if known else describe_folder(folder, load_format)
        made_up = [_give_uniform(name_uniform(k), folder, model, k) for k in uniform]
        made_up += [variant for share in shares for variant in _spend_share(folder, model, share, seed)]
        variants += _compensate(made_up, allocations)
    if uncompensated:
        variants = _add_uncompensated(variants)
    pruned = [drop_experts(name_pruned("inter", share), folder, config, share) for share in dropped]
    pruned += [narrow_experts(name_pruned("intra", share), folder, config, share) for share in narrowed]
    variants += pruned
    if each_k:
        variants += [_give_each_k(variant, model, k) for variant in pruned for k in uniform if k != model.top_k]
    variants += [Variant(name, name) for name in folders]
    _check_names(variants)
    return tuple(variants)


def _check_prunable(folder: str, load_format: str) -> None:
    if load_format != RANDOM:
        raise AdapterError(
            f"a config alone prunes random weights only: add --load-format {RANDOM} where there is such an option, or "
            f"write pruned weights by lexi-search prune {folder} -o pruned/ and name them by --folder pruned/"
        )


def name_uniform(k: int) -> str:
    """The name of the variant with this k in every layer."""
    return f"uniform k = {k}"


def name_pruned(kind: str, share: float) -> str:
    """The name of an "inter" or "intra"-pruned variant; that of one at another k than the model's own goes on."""
    return f"{kind}-pruned {100 * share:g} %"


def name_share(share: float) -> str:
    """The end of the names of the variants at a share of the budget."""
    return f", {100 * share:g} %"


def is_one_of(
    name: str,
    *,
    allocations: Sequence[str] = (),
    uniform: Sequence[int] = (),
    shares: Sequence[float] = (),
    dropped: Sequence[float] = (),
    narrowed: Sequence[float] = (),
    folders: Sequence[str] = (),
) -> bool:
    """Whether `make_variants` gives this name to one of the variants that the arguments name, of any seed."""
    name = name.removesuffix(COMPENSATED).removesuffix(UNCOMPENSATED)
    pruned = [name_pruned("inter", share) for share in dropped] + [name_pruned("intra", share) for share in narrowed]
    at_share = re.match(r"mixed k, |uniform k = \d+, ", name) and name.endswith(tuple(map(name_share, shares)))
    known = {*allocations, *map(name_uniform, uniform), *pruned, *folders}
    return bool(at_share) or name.partition(", k = ")[0] in known


def _compensate(made_up: Sequence[Variant], allocations: Mapping[str, Allocation]) -> list[Variant]:
    """The variants that were made up with the one compensation of the allocations, where it has maps for their k."""
    compensated = [allocation for allocation in allocations.values() if allocation.compensation is not None]
    if not compensated:
        return list(made_up)
    first, *others = compensated
    how = (first.gate_exponent, first.compensation.sha256)
    one = all((other.gate_exponent, other.compensation.sha256) == how for other in others)
    named = []
    for variant in made_up:
        allocation = variant.allocation
        if one and covers(first, allocation.top_k):
            shared = {name: getattr(first, name) for name in ("gate_exponent", "compensation", "folder")}
            allocation = replace(allocation, **shared)
            check_compensation(allocation)
        end = UNCOMPENSATED if allocation.compensation is None else COMPENSATED
        named.append(replace(variant, name=variant.name + end, allocation=allocation))
    return named


def _add_uncompensated(variants: Sequence[Variant]) -> list[Variant]:
    """The variants and, after each that is compensated, the same k as the model routes by itself."""
    more = []
    for variant in variants:
        more.append(variant)
        if variant.allocation is not None and variant.allocation.compensation is not None:
            plain = allocate(variant.allocation.model, variant.allocation.top_k)
            more.append(replace(variant, name=variant.name.removesuffix(COMPENSATED) + UNCOMPENSATED, allocation=plain))
    return more


def _give_each_k(pruned: Variant, model: ModelIdentity, k: int) -> Variant:
    """A pruned variant at another k; its allocation is for the model with the experts that are left."""
    experts, _ = pruned.kept.get("experts", (model.num_experts, model.num_experts))
    uniform = _give_uniform(f"{pruned.name}, k = {k}", pruned.folder, replace(model, num_experts=experts), k)
    return replace(pruned, name=uniform.name, allocation=uniform.allocation)


def _give_uniform(name: str, folder: str, model: ModelIdentity, k: int) -> Variant:
    if not 1 <= k <= model.top_k:
        raise AdapterError(f"uniform k = {k} is not one of 1 to {model.top_k}, the k of {folder}")
    return Variant(name, folder, allocation=allocate(model, dict.fromkeys(model.moe_layers, k)))


def _spend_share(folder: str, model: ModelIdentity, share: float, seed: int) -> Iterator[Variant]:
    """A mixed and a uniform k that spend a share of the model's budget, where there are such."""
    budget = share_of_budget(model, share)
    k, end = find_uniform(model, budget), name_share(share)
    if k != 1:
        mixed = draw_top_k(model, budget, seed=seed)
        yield Variant(f"mixed k{end}", folder, allocation=allocate(model, mixed))
    if k is not None:
        yield _give_uniform(f"{name_uniform(k)}{end}", folder, model, k)


def _check_names(variants: Sequence[Variant]) -> None:
    """Raise AdapterError for two variants of one name, whose results could not be told apart."""
    names = [variant.name for variant in variants]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise AdapterError(f"two variants are called {double!r}; name each once, by another path if need be")


def check_comparable(variants: Sequence[Variant]) -> None:
    """Check that the quality of variants can be compared with the first's, the base's.

    Raises:
        AdapterError: a folder that is no model, or whose vocabulary is not the base's.
        AllocationError: as `find_allocation`, or a folder's compensation is not whole.
    """
    base = variants[0].folder
    vocabulary = find_vocabulary(read_config(Path(base)))
    for variant in variants:
        if find_vocabulary(read_config(Path(variant.folder))) != vocabulary:
            raise AdapterError(f"{variant.folder} has another vocabulary than {base}: they do not read the same tokens")
        if (allocation := find_allocation(variant)) is not None:
            check_compensation(allocation)


def find_allocation(variant: Variant) -> Allocation | None:
    """The variant's allocation, or the one that its folder was exported with: transformers applies neither itself.

    Raises:
        AllocationError: both are there and ask for different things.
    """
    document = read_config(Path(variant.folder)).get(KEY)
    exported = None if document is None else read_allocation(document, folder=variant.folder)
    if exported is not None and variant.allocation is not None and not exported.asks_the_same_as(variant.allocation):
        raise AllocationError(
            f"{variant.folder} was exported with another allocation than {variant.name}; name its origin"
        )
    return variant.allocation or exported
