"""Apply an allocation to a loaded transformers model: set the top-k that each MoE layer's router holds.

transformers 5 has a convention for layers that differ, `per_layer_config`, but the models of most families build every
layer from the global value, so a model loaded from an exported folder still runs the full k until `apply`.
"""

import copy
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lexi_adapter.allocation import Allocation, ModelIdentity, check_reducible, read_allocation
from lexi_adapter.errors import AdapterError, AllocationError
from lexi_adapter.model.compensation import locate, locate_on_hub, read_corrections
from lexi_adapter.model.folder import FIXED_CHOICES, REMEDY, check_layers, check_routers, compare, has_weights
from lexi_adapter.model.identity import ROUTER_WEIGHTS
from lexi_adapter.serving.transformers_gates import (
    check_compensable,
    check_correctable,
    compensate_router,
    correct_block,
    find_block,
    restore_block,
    restore_router,
)

TOP_K_NAMES = ("top_k", "num_experts_per_tok")
TOP_K_OF_CONFIG = "top_k_experts"  # routers of Gemma 4 hold no top-k: they read the config at each call


def apply(
    model: torch.nn.Module,
    allocation: str | os.PathLike[str] | Mapping[str, Any] | Allocation,
    *,
    check_weights: bool = True,
) -> torch.nn.Module:
    """Give every MoE layer of a transformers model the allocation's top-k, in place; returns the model.

    Everything is checked before anything changes. Applying another allocation later replaces this one. The model's
    config stays as it is, so `save_pretrained` does not keep the allocation: export a folder with lexi-search for that.

    Args:
        model: a causal language model of a mixture-of-experts family, or any module around one.
        allocation: the path of an allocation file, its JSON object, or an `Allocation`. The file of corrections that a
            JSON object names is looked for where the model was loaded from.
        check_weights: compare the routers' bytes with those the allocation was made from. Turn it off for weights that
            were meant to change (fine-tuned, cast to fewer bits).

    Raises:
        AllocationError: the allocation is not valid, or not for this model.
        AdapterError: the family routes in an unknown way.
    """
    allocation = _locate(read_allocation(allocation), model.config)
    check_reducible(allocation)
    identity, place = allocation.model, type(model).__name__
    _check_config(identity, model.config, place)
    routers = find_routers(model, identity)
    check_layers(set(routers), identity, f"{place}: routers")
    around = {layer: _find_modules_around(model, name) for layer, name in routers.items()}
    holders = {layer: _find_holders(around[layer], name) for layer, name in routers.items()}
    if allocation.gate_exponent is not None:
        check_compensable(identity.model_type)
    if check_weights:
        _check_weights(identity, model, routers)
    corrections, blocks = {}, {}
    if allocation.compensation is not None:
        check_correctable(identity.model_type)
        blocks = {layer: find_block(around[layer], name) for layer, name in routers.items()}
        hidden = model.get_parameter(routers[identity.moe_layers[0]]).shape[1]
        corrections = read_corrections(allocation, hidden=hidden)
    for layer, attributes in holders.items():
        top_k, (router, name) = allocation.top_k[layer], attributes[0]
        restore_router(router)
        for module in around[layer]:
            restore_block(module)
        for module, attribute in attributes:
            _set_top_k(module, attribute, top_k)
        if allocation.gate_exponent is not None and top_k < identity.top_k:
            corrected = None
            if layer in corrections:
                corrected = correct_block(blocks[layer], around[layer][0], corrections[layer])
            compensate_router(router, name, identity.top_k, allocation.gate_exponent, corrected)
    return model


def _locate(allocation: Allocation, config: Any) -> Allocation:
    """The allocation with the folder of its compensation's file: the model's, where nothing else says so."""
    source = str(getattr(config, "_name_or_path", ""))
    if allocation.compensation is None or allocation.folder is not None or not source or os.path.isdir(source):
        return locate(allocation, source)
    try:
        return locate_on_hub(allocation, source, revision=getattr(config, "_commit_hash", None))
    except OSError:
        return allocation


def _check_config(identity: ModelIdentity, config: Any, place: str) -> None:
    # A language model taken out of a larger one has the inner configuration's type; its layers are compared below.
    *parents, key = identity.top_k_key.split(".")
    if not parents or config.model_type == identity.model_type:
        compare("model_type", config.model_type, identity.model_type, place)
    text_config = config.get_text_config()
    for name, expected in (("num_hidden_layers", identity.num_hidden_layers), (key, identity.top_k)):
        compare(name, _read(text_config, name), expected, place)


def _read(config: Any, name: str) -> Any:
    # Reading a per-layer value from the config itself is an error, or a warning, in transformers 5.
    name = getattr(config, "attribute_map", {}).get(name, name)
    default = getattr(type(config), name, None)
    return getattr(config, name) if isinstance(default, property) else vars(config).get(name, default)


def find_routers(model: torch.nn.Module, identity: ModelIdentity) -> dict[int, str]:
    """Decoder-layer index -> name of the router's weight, whose shape is [num_experts, hidden].

    Routers that look experts up by token are left out: their layers keep their own top-k.
    """
    routers: dict[int, str] = {}
    for name, weight in model.named_parameters():
        indices = [int(part) for part in name.split(".") if part.isdecimal()]
        is_router = f".{name}".endswith(ROUTER_WEIGHTS) and len(indices) == 1
        if not is_router or weight.ndim != 2 or indices[0] >= identity.num_hidden_layers:
            continue
        if hasattr(model.get_submodule(name.rpartition(".")[0]), FIXED_CHOICES):
            continue
        compare(f"number of rows of {name}", weight.shape[0], identity.num_experts, type(model).__name__)
        layer = indices[0]
        if layer in routers:
            raise AdapterError(f"layer {layer} has two routers, {routers[layer]} and {name}: unknown family")
        routers[layer] = name
    return routers


def _find_modules_around(model: torch.nn.Module, weight: str) -> list[torch.nn.Module]:
    """The module that holds a router's weight, and up to two around it; not the decoder layer, nor what is around."""
    names = weight.split(".")
    ends = [end for end in (-1, -2, -3) if not any(name.isdecimal() for name in names[end:])]
    return [model.get_submodule(".".join(names[:end])) for end in ends if not names[end - 1].isdecimal()]


def _find_holders(modules: list[torch.nn.Module], weight: str) -> list[tuple[torch.nn.Module, str]]:
    """The attributes (module, name) that hold a layer's top-k: the router's first, then those of the block around."""
    router = weight.rpartition(".")[0]
    holders = [(module, name) for module in modules for name in TOP_K_NAMES if type(vars(module).get(name)) is int]
    holders = holders or [(module, TOP_K_OF_CONFIG) for module in modules[1:2] if _reads_config(module)]
    if not holders:
        raise AdapterError(f"{router} and its block hold no {' or '.join(TOP_K_NAMES)}: unknown family")
    return holders


def _reads_config(module: torch.nn.Module) -> bool:
    return type(getattr(getattr(module, "config", None), TOP_K_OF_CONFIG, None)) is int


def _set_top_k(module: torch.nn.Module, attribute: str, top_k: int) -> None:
    if attribute != TOP_K_OF_CONFIG:
        setattr(module, attribute, top_k)
        return
    module.config = copy.copy(module.config)  # the router's own; all layers have one config together
    setattr(module.config, attribute, top_k)


def _check_weights(identity: ModelIdentity, model: torch.nn.Module, routers: Mapping[int, str]) -> None:
    weights = [model.get_parameter(routers[layer]) for layer in identity.moe_layers]
    if all(not weight.is_meta for weight in weights) and any(
        _hash(weights, dtype) == identity.router_sha256 for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ):
        return
    folder = Path(str(getattr(model.config, "_name_or_path", "")))
    if not has_weights(folder):
        raise AllocationError(
            f"{type(model).__name__} has other router weights than the allocation was made for (SHA-256 differs); "
            f"{REMEDY}, or pass check_weights=False if they were meant to change"
        )
    check_routers(identity, folder)


def _hash(weights: list[torch.Tensor], dtype: torch.dtype) -> str:
    # A load into a wider type is exact, so casting back gives the stored bytes.
    digest = hashlib.sha256()
    for weight in weights:
        digest.update(weight.detach().to("cpu", dtype).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
