"""The identity of a model of a known family from its config.json alone: MoE layers, number of experts, top-k.

Weights are read only for the routers' hash, and for families that are not in the table here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lexi_adapter.allocation import Allocation, ModelIdentity
from lexi_adapter.errors import AdapterError
from lexi_adapter.model.compensation import check_compensation
from lexi_adapter.model.folder import (
    READ_AS_STORED,
    check_config,
    check_count,
    check_folder,
    check_layers,
    compare,
    find_hidden,
    find_routers,
    has_weights,
    read_config,
)
from lexi_adapter.model.identity import describe_checkpoint
from lexi_adapter.model.tensors import hash_tensors

UNCHECKED = "0" * 64  # router_sha256 of an allocation for random weights: there are no bytes to compare
RANDOM = "dummy"  # vLLM's load format of random weights


@dataclass(frozen=True)
class Family:
    """A family's config keys of the numbers that pruning changes, and the name pattern of its router tensors.

    Under `shared` is the number of shared experts, if they have the routed ones' width; under `text_config` the
    language model's part of a multimodal config.
    """

    num_experts: str
    width: str
    router: str = "model.layers.{}.mlp.gate.weight"
    shared: str | None = None
    text_config: str | None = None

    def nest(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """`overrides` of the language model's config as overrides of the whole one."""
        return {self.text_config: dict(overrides)} if self.text_config else dict(overrides)


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
RENAMED = "num_local_experts"  # transformers 5 writes it where public configs of some families have `num_experts`


def describe(config: Mapping[str, Any]) -> ModelIdentity:
    """The model that config.json describes, of random weights: `router_sha256` is `UNCHECKED`.

    Raises:
        AdapterError: a family that is not in `FAMILIES`, or a config without the family's keys.
    """
    family, text = find_family(config)
    layers = text["num_hidden_layers"]
    moe_layers = tuple(_find_moe_layers(config["model_type"], text))
    if not moe_layers:
        raise AdapterError(f"config.json of {config['model_type']} leaves no MoE layer; name another model")
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
        AdapterError: as `describe`, except that the folder's weights may tell of other families.
        AllocationError: the routers in the folder are not those that its config.json says.
    """
    config = read_config(Path(folder))
    if config.get("model_type") not in list(FAMILIES) and has_weights(Path(folder)):
        model = describe_checkpoint(Path(folder))
        return replace(model, router_sha256=UNCHECKED) if load_format == RANDOM else model
    model = describe(config)
    if load_format == RANDOM or not has_weights(Path(folder)):
        return model
    routers = find_routers(model, Path(folder))
    check_layers(set(routers), model, f"{folder}: router tensors {model.router!r}")
    return replace(model, router_sha256=hash_tensors(routers[layer] for layer in model.moe_layers))


def check_allocation(allocation: Allocation, folder: str, load_format: str) -> None:
    """Check that an allocation was made for the model in a folder, by config.json and the weights that are loaded.

    The file of its compensation is checked, too.

    Raises:
        AllocationError: it was made for another model, or its compensation is not whole; the message says how.
        AdapterError: the folder cannot be read.
    """
    model, place = allocation.model, f"{folder}/config.json"
    if load_format in READ_AS_STORED and has_weights(Path(folder)):
        check_folder(model, Path(folder))
        check_compensation(allocation, hidden=find_hidden(model, Path(folder)))
        return
    check_compensation(allocation)
    config = read_config(Path(folder))
    check_config(model, config, place)
    if config["model_type"] in FAMILIES or has_weights(Path(folder)):
        described = describe_folder(folder, RANDOM)
        compare("the number of experts", described.num_experts, model.num_experts, place)
        compare("the list of MoE layers", list(described.moe_layers), list(model.moe_layers), place)


def find_family(config: Mapping[str, Any]) -> tuple[Family, Mapping[str, Any]]:
    """The family of a config, and the language model's part of it, whose keys that `Family` names are checked.

    Raises:
        AdapterError: as `describe`.
    """
    name = config.get("model_type")
    if name not in list(FAMILIES):  # a list, because what a config holds need not be hashable
        raise AdapterError(
            f"model_type {name!r} is not one of {', '.join(FAMILIES)}, of which config.json alone tells enough; name a "
            "folder with its weights, or, where there are such options, an --allocation by lexi-search or a --folder"
        )
    family = FAMILIES[name]
    text = config.get(family.text_config) if family.text_config else config
    if not isinstance(text, Mapping):
        raise AdapterError(f"config.json of {name} has no object {family.text_config}; fetch it again")
    if family.num_experts not in text and RENAMED in text:
        family = replace(family, num_experts=RENAMED)
    keys = (family.num_experts, family.width, TOP_K, "num_hidden_layers")
    missing = [key for key in keys if key not in text]
    if missing:
        raise AdapterError(f"config.json of {name} has no {', '.join(missing)}; name them there")
    for key in keys:
        check_count(f"config.json of {name}", key, text[key], 1)
    if text[TOP_K] > text[family.num_experts]:
        raise AdapterError(
            f"config.json of {name}: {TOP_K} is {text[TOP_K]}, more than the {text[family.num_experts]} experts; fetch "
            "it again"
        )
    return family, text


def _find_moe_layers(name: str, text: Mapping[str, Any]) -> Iterator[int]:
    first, frequency = text.get("first_k_dense_replace") or 0, text.get("moe_layer_freq") or 1
    step, dense = text.get("decoder_sparse_step") or 1, text.get("mlp_only_layers") or []
    counts = (("first_k_dense_replace", first, 0), ("moe_layer_freq", frequency, 1), ("decoder_sparse_step", step, 1))
    for key, value, least in counts:
        check_count(f"config.json of {name}", key, value, least)
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise AdapterError(
            f"config.json of {name}: mlp_only_layers is {dense!r}, a list of layers expected; fetch it again"
        )
    for layer in range(text["num_hidden_layers"]):
        if layer >= first and layer % frequency == 0 and (layer + 1) % step == 0 and layer not in dense:
            yield layer
