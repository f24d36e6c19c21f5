"""What is compared: one model as it is, with fewer active experts, and with experts dropped or narrowed.

A variant is data: a folder, what changes in its config, and the k of its layers. Dropping experts (inter-pruning) and
narrowing them (intra-pruning) by config alone is for random weights (`--load-format dummy`); for real ones write a
pruned checkpoint and name its folder.
"""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lexi_adapter.allocation import Allocation, AllocationError, ModelIdentity
from lexi_adapter.checkpoint import (
    check_config,
    check_folder,
    check_layers,
    compare,
    find_routers,
    has_weights,
    hash_tensors,
    read_config,
)
from lexi_adapter.vllm_plugin import WEIGHTS_ELSEWHERE

UNCHECKED = "0" * 64  # router_sha256 of an allocation for random weights: there are no bytes to compare
RANDOM = "dummy"  # vLLM's load format without weights


@dataclass(frozen=True)
class Family:
    """Where a family's config keeps what pruning changes; `shared` counts shared experts of the experts' own width."""

    num_experts: str
    width: str
    router: str = "model.layers.{}.mlp.gate.weight"
    shared: str | None = None
    text_config: str | None = None


FAMILIES: Mapping[str, Family] = {
    "olmoe": Family("num_experts", "intermediate_size"),
    "mixtral": Family("num_local_experts", "intermediate_size", "model.layers.{}.block_sparse_moe.gate.weight"),
    "minicpm": Family("num_experts", "intermediate_size"),
    "qwen2_moe": Family("num_experts", "moe_intermediate_size"),
    "qwen3_moe": Family("num_experts", "moe_intermediate_size"),
    "deepseek": Family("n_routed_experts", "moe_intermediate_size", shared="n_shared_experts"),
    "deepseek_v2": Family("n_routed_experts", "moe_intermediate_size", shared="n_shared_experts"),
    "deepseek_vl_v2": Family(
        "n_routed_experts",
        "moe_intermediate_size",
        "language.model.layers.{}.mlp.gate.weight",
        shared="n_shared_experts",
        text_config="language_config",
    ),
}
TOP_K = "num_experts_per_tok"
RENAMED = "num_local_experts"  # what transformers 5 writes where some families' public configs have `num_experts`


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


def describe(config: Mapping[str, Any]) -> ModelIdentity:
    """The model that config.json describes, of random weights: `router_sha256` is `UNCHECKED`.

    Raises:
        AllocationError: a family that is not in `FAMILIES`, or a config without the family's keys.
    """
    family, text = _find_family(config)
    layers = text["num_hidden_layers"]
    moe_layers = tuple(_find_moe_layers(config["model_type"], text))
    if not moe_layers:
        raise AllocationError(f"config.json of {config['model_type']} leaves no MoE layer; name another model")
    prefix = f"{family.text_config}." if family.text_config else ""
    return ModelIdentity(
        model_type=config["model_type"],
        num_hidden_layers=layers,
        num_experts=text[family.num_experts],
        top_k=text[TOP_K],
        moe_layers=moe_layers,
        router=family.router,
        top_k_key=prefix + TOP_K,
        router_sha256=UNCHECKED,
    )


def describe_folder(folder: str, load_format: str) -> ModelIdentity:
    """The model in a folder, with its routers' hash if its own weights are loaded.

    Raises:
        AllocationError: as `describe`, but for families that the folder's weights tell of; or the folder's files are
            not what its config.json says.
    """
    config = read_config(Path(folder))
    if config.get("model_type") not in list(FAMILIES) and has_weights(Path(folder)):
        from lexi_adapter.identity import describe_checkpoint  # late: it imports torch

        model = describe_checkpoint(Path(folder))
        return replace(model, router_sha256=UNCHECKED) if load_format == RANDOM else model
    model = describe(config)
    if load_format == RANDOM or not has_weights(Path(folder)):
        return model
    routers = find_routers(model, Path(folder))
    check_layers(set(routers), model, f"{folder}: router tensors {model.router!r}")
    return replace(model, router_sha256=hash_tensors(routers[layer] for layer in model.moe_layers))


def check_allocation(allocation: Allocation, folder: str, load_format: str) -> None:
    """Check that an allocation was made for the model in a folder, as far as config.json and weights that are read say.

    Raises:
        AllocationError: it was made for another model; the message names what differs.
    """
    model, place = allocation.model, f"{folder}/config.json"
    if load_format not in WEIGHTS_ELSEWHERE and has_weights(Path(folder)):
        check_folder(model, Path(folder))
        return
    config = read_config(Path(folder))
    check_config(model, config, place)
    if config["model_type"] in FAMILIES or has_weights(Path(folder)):
        found = describe_folder(folder, RANDOM)
        compare("the number of experts", found.num_experts, model.num_experts, place)
        compare("the list of MoE layers", list(found.moe_layers), list(model.moe_layers), place)


def _find_family(config: Mapping[str, Any]) -> tuple[Family, Mapping[str, Any]]:
    name = config.get("model_type")
    if name not in list(FAMILIES):  # a list, because what a config holds need not be hashable
        raise AllocationError(
            f"model_type {name!r} is not one of {', '.join(FAMILIES)}, of which config.json alone tells enough; name a "
            "folder with its weights, or, where there are such options, an --allocation by lexi-search or a --folder"
        )
    family = FAMILIES[name]
    text = config.get(family.text_config) if family.text_config else config
    if not isinstance(text, Mapping):
        raise AllocationError(f"config.json of {name} has no object {family.text_config}; fetch it again")
    if family.num_experts not in text and RENAMED in text:
        family = replace(family, num_experts=RENAMED)
    keys = (family.num_experts, family.width, TOP_K, "num_hidden_layers")
    missing = [key for key in keys if key not in text]
    if missing:
        raise AllocationError(f"config.json of {name} has no {', '.join(missing)}; name them there")
    for key in keys:
        _check_count(name, key, text[key], 1)
    if text[TOP_K] > text[family.num_experts]:
        raise AllocationError(
            f"config.json of {name}: {TOP_K} is {text[TOP_K]}, more than the {text[family.num_experts]} experts; fetch "
            "it again"
        )
    return family, text


def _check_count(name: str, key: str, value: Any, least: int) -> None:
    if type(value) is not int or value < least:
        raise AllocationError(
            f"config.json of {name}: {key} is {value!r}, an integer of at least {least} expected; fetch it again"
        )


def _find_moe_layers(name: str, text: Mapping[str, Any]) -> Iterator[int]:
    first, frequency = text.get("first_k_dense_replace") or 0, text.get("moe_layer_freq") or 1
    step, dense = text.get("decoder_sparse_step") or 1, text.get("mlp_only_layers") or []
    _check_count(name, "first_k_dense_replace", first, 0)
    _check_count(name, "moe_layer_freq", frequency, 1)
    _check_count(name, "decoder_sparse_step", step, 1)
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise AllocationError(
            f"config.json of {name}: mlp_only_layers is {dense!r}, a list of layers expected; fetch it again"
        )
    for layer in range(text["num_hidden_layers"]):
        if layer >= first and layer % frequency == 0 and (layer + 1) % step == 0 and layer not in dense:
            yield layer


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
    family, text = _find_family(config)
    kept = round(text[family.num_experts] * (1 - share))
    if kept < text[TOP_K]:
        raise AllocationError(f"dropping {share:.3g} of the experts leaves {kept}, fewer than k = {text[TOP_K]}")
    overrides = _nest(family, {family.num_experts: kept})
    return Variant(name, folder, overrides, kept={"experts": (kept, text[family.num_experts])})


def narrow_experts(name: str, folder: str, config: Mapping[str, Any], share: float) -> Variant:
    """Intra-pruning: a share of every routed expert's inner width is gone.

    Where shared experts have the routed ones' width, their number grows in the config so that together they stay as
    wide, or by less than one expert wider.
    """
    family, text = _find_family(config)
    width = round(text[family.width] * (1 - share))
    if width < 1:
        raise AllocationError(f"narrowing experts of width {text[family.width]} by {share:.3g} leaves nothing of them")
    overrides = {family.width: width}
    shared = text.get(family.shared) if family.shared else None
    if shared is not None:
        _check_count(config["model_type"], family.shared, shared, 0)
        overrides[family.shared] = math.ceil(shared * text[family.width] / width)
    return Variant(name, folder, _nest(family, overrides), kept={"width": (width, text[family.width])})


def _nest(family: Family, overrides: dict[str, Any]) -> dict[str, Any]:
    return {family.text_config: overrides} if family.text_config else overrides


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
