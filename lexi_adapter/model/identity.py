"""The identity of the checkpoint in a folder, whatever its family, for the files that are made from it.

It comes from config.json and the tensors' headers, and is what lexi_search finds. No table of families is needed: a
router is a tensor with a router's name and a row for every expert.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lexi_adapter.allocation import ModelIdentity
from lexi_adapter.errors import AdapterError
from lexi_adapter.model.folder import explain_absence, find_choices, find_text_configs, read_config, read_tensors
from lexi_adapter.model.tensors import Tensor, hash_tensors

# Endings of a router weight's name. The module that has the weight, or one of the two around it, holds the top-k.
ROUTER_WEIGHTS = tuple(
    f".{router}.weight"
    for router in ("gate", "router", "gate.wg", "router.gate", "router.layer", "router.proj", "router.classifier")
)
PACKED_ROUTER = re.compile(r"(.*\.)?(gate|router)(\.(wg|gate|layer|proj|classifier))?\.(qweight|weight_packed)")

# Keys of a language model's config, in order of preference.
TOP_K = ("moe_topk", "moe_k", "top_k_experts", "num_experts_per_token", "num_experts_per_tok", "moe_top_k")
NUM_EXPERTS = ("n_routed_experts", "moe_num_experts", "num_experts", "num_local_experts")
NUM_LAYERS = ("num_hidden_layers", "layers_block_type")  # the second has an entry for every layer
LAYER = re.compile(r"((?:.*\.)?layers)\.(0|[1-9][0-9]{0,8})\.(.+)")
LEFT_OUT = re.compile(r"(?:.*\.)?(?:mtp|talker)\.")  # parts with decoder layers of their own
# Names below `layers.N.` of tensors that only a MoE layer has, and of tensors one of which a dense layer has.
EXPERTS = re.compile(r"(.*\.)?(experts|switch_mlp|block_sparse_moe|moe)\.")
MLP = re.compile(r"(.*\.)?(mlp|feed_forward|shared_mlp|mixer)\.")


def describe_checkpoint(folder: Path) -> ModelIdentity:
    """The model in a folder with config.json and safetensors files.

    Raises:
        AdapterError: the folder cannot be read, or holds no mixture-of-experts model, or one whose k is 1, where there
            is nothing to save.
    """
    config = read_config(folder)
    place = f"{folder}/config.json"
    path, text = next(find_text_configs(config), ("", config))
    top_k_key, top_k = _read_count(text, TOP_K, place)
    _, num_experts = _read_count(text, NUM_EXPERTS, place)
    _, num_layers = _read_count(text, NUM_LAYERS, place)
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise AdapterError(f"{place}: model_type is {model_type!r}, a name expected; fetch it again")
    if top_k == 1:
        raise AdapterError(f"{place}: {top_k_key} is 1: each token runs one expert, none can be saved")
    pattern, routers = _find_routers(folder, num_experts, num_layers)
    return ModelIdentity(
        model_type=model_type,
        num_hidden_layers=num_layers,
        num_experts=num_experts,
        top_k=top_k,
        moe_layers=tuple(sorted(routers)),
        router=pattern,
        top_k_key=f"{path}.{top_k_key}" if path else top_k_key,
        router_sha256=hash_tensors(routers[layer] for layer in sorted(routers)),
    )


def _read_count(text: Mapping[str, Any], keys: tuple[str, ...], place: str) -> tuple[str, int]:
    key = next((key for key in keys if text.get(key) is not None), None)
    if key is None:
        raise AdapterError(f"{place} has no {' or '.join(keys)}; name a mixture-of-experts model")
    value = text[key]
    if key == "layers_block_type" and isinstance(value, list):
        value = len(value)
    elif isinstance(value, list) and value and all(item == value[0] for item in value):
        value = value[0]
    if type(value) is not int or value < 1:
        raise AdapterError(f"{place}: {key} is {value!r}, expected one number of at least 1 for all layers")
    return key, value


def _find_routers(folder: Path, num_experts: int, num_layers: int) -> tuple[str, dict[int, Tensor]]:
    """The name pattern of the routers, with {} for the layer, and decoder-layer index -> router."""
    by_pattern: dict[str, dict[int, Tensor]] = {}
    fixed: set[int] = set()
    tensors = read_tensors(folder)
    matches = [match for match in map(LAYER.fullmatch, tensors) if match and not LEFT_OUT.match(match[0])]
    for match in matches:
        tensor = tensors[match[0]]
        is_router = match[0].endswith(ROUTER_WEIGHTS) and tensor.shape[:1] == (num_experts,)
        if is_router and find_choices(match[0]) in tensors:
            fixed.add(int(match[2]))
        elif is_router and int(match[2]) < num_layers:
            by_pattern.setdefault(f"{match[1]}.{{}}.{match[3]}", {})[int(match[2])] = tensor
    if not tensors:
        raise AdapterError(f"{folder}: the safetensors files hold no tensors; save or fetch the weights again")
    packed = next((match[0] for match in matches if PACKED_ROUTER.fullmatch(match[3])), None)
    if packed and not by_pattern:
        raise AdapterError(f"{folder}: router {packed} is quantised; only plain routers are supported")
    if len(by_pattern) != 1:
        what = f"tensors of {len(by_pattern)} kinds ({', '.join(by_pattern)})" if by_pattern else "no tensor"
        raise AdapterError(f"{folder}: {what} with a router's name and {num_experts} rows: unknown family")
    [(pattern, routers)] = by_pattern.items()
    stem = pattern.partition(".{}.")[0]
    names: dict[int, list[str]] = {}
    for match in matches:
        if match[1] == stem:
            names.setdefault(int(match[2]), []).append(match[3])
    _check_dense_layers(folder, names, pattern, set(range(min(num_layers, max(names) + 2))) - fixed)
    return pattern, routers


def _check_dense_layers(folder: Path, names: Mapping[int, list[str]], pattern: str, layers: set[int]) -> None:
    """Raise AdapterError for one of `layers` without a router that is no dense layer, as a missing shard leaves it.

    `names` are those of each layer's tensors, below `layers.N.`.
    """
    module = pattern.partition(".{}.")[2]
    for layer in sorted(layers):
        here, router = names.get(layer, []), pattern.replace("{}", str(layer))
        if module in here or (any(map(MLP.match, here)) and not any(map(EXPERTS.match, here))):
            continue
        thing = f"layer {layer} has no router {router}, and is no dense layer"
        raise AdapterError(f"{folder}: {thing}; {explain_absence(folder)}")
