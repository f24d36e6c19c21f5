"""A model folder's config.json and safetensors headers, and the checks of an allocation against them.

Standard library only, so that it runs before an engine starts and on machines without one.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lexi_adapter.allocation import ModelIdentity
from lexi_adapter.errors import AdapterError, AllocationError
from lexi_adapter.files import read_json
from lexi_adapter.model.tensors import Tensor, hash_tensors, read_header

# Dotted paths under which the config of a multimodal model may hold its language model's.
TEXT_CONFIGS = ("text_config", "language_config", "llm_config", "thinker_config.text_config")
# Load formats of vLLM under which it reads a model's safetensors as they are stored. Under others, which anybody may
# add, it reads other files, or none ("dummy").
READ_AS_STORED = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer")
# Beside a router: the experts of every token of the vocabulary. Such a layer keeps its own k.
FIXED_CHOICES = "tid2eid"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
LM_HEAD = re.compile(r"(.*\.)?lm_head\.q?weight(_packed)?")
NUMBERED = re.compile(r"(.+)-\d+-of-(\d{1,6})\.safetensors")
NO_SHARDS = ("adapter_", "lexi_")  # the beginnings of the names of files of LoRA weights, and of ours
REMEDY = "profile and search this model with lexi-search to get one that fits"


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder."""
    config = _read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise AdapterError(f"{folder}/config.json is not a JSON object; fetch it again")
    return config


def find_text_configs(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The language model's parts of a multimodal model's config, each after its dotted path; mostly one or none.

    A model of text alone has none: its config is the language model's.
    """
    for path in TEXT_CONFIGS:
        if (part := find_part(config, path.split("."))) is not None:
            yield path, part


def find_part(part: Any, path: Sequence[str]) -> Mapping[str, Any] | None:
    """The object of a config below the keys of `path`; None where there is none."""
    for key in path:
        part = part.get(key) if isinstance(part, Mapping) else None
    return part if isinstance(part, Mapping) else None


def find_limit(config: Mapping[str, Any]) -> int | None:
    """The number of positions that a model knows, by its config.json; None if that does not say."""
    return _find_count(config, "max_position_embeddings")


def find_vocabulary(config: Mapping[str, Any]) -> int | None:
    """The number of tokens that a model knows, by its config.json; None if that does not say."""
    return _find_count(config, "vocab_size")


def _find_count(config: Mapping[str, Any], key: str) -> int | None:
    parts = (config, *(part for _, part in find_text_configs(config)))
    value = next((part[key] for part in parts if part.get(key)), None)
    if value is not None:
        check_count("config.json", key, value, 1)
    return value


def check_count(place: str, key: str, value: Any, least: int) -> None:
    """Raise AdapterError unless `value`, which `place` has under `key`, is an integer of at least `least`."""
    if type(value) is not int or value < least:
        raise AdapterError(f"{place}: {key} is {value!r}, an integer of at least {least} expected; fetch it again")


def check_folder(model: ModelIdentity, folder: Path) -> None:
    """Check config.json and, where there are safetensors files, the layers, shapes and bytes of the routers.

    Raises:
        AllocationError: the folder holds another model than `model` describes.
        AdapterError: the folder cannot be read.
    """
    check_config(model, read_config(folder), f"{folder}/config.json")
    if has_weights(folder):
        check_routers(model, folder)


def check_config(model: ModelIdentity, config: Mapping[str, Any], place: str) -> None:
    """Check model type, layer count and k of a configuration as config.json has it.

    A key that config.json leaves to the model code's default is not compared; the routers' shapes and the built model
    still are.
    """
    *parents, key = model.top_k_key.split(".")
    text = find_part(config, parents)
    if text is None:
        raise AllocationError(
            f"{place} has no {'.'.join(parents)}, where the allocation's model keeps its top-k; {REMEDY}"
        )
    compare("model_type", config.get("model_type"), model.model_type, place)
    for name, expected in (("num_hidden_layers", model.num_hidden_layers), (key, model.top_k)):
        compare(name, text.get(name, expected), expected, place)


def compare(what: str, found: Any, expected: Any, place: str) -> None:
    """Raise AllocationError unless `found`, which `place` says of `what`, is what the allocation expects."""
    if found != expected:
        raise AllocationError(f"{place}: {what} is {found!r}, the allocation was made for {expected!r}; {REMEDY}")


def check_routers(model: ModelIdentity, folder: Path) -> None:
    """Check that the folder has exactly the allocation's routers, with its number of experts and its bytes."""
    routers = find_routers(model, folder)
    check_layers(set(routers), model, f"{folder}: router tensors {model.router!r}")
    for layer, tensor in sorted(routers.items()):
        if len(tensor.shape) != 2 or tensor.shape[0] != model.num_experts:
            raise AllocationError(
                f"{folder}: the router of layer {layer} has shape {list(tensor.shape)}, "
                f"the allocation was made for {model.num_experts} experts; {REMEDY}"
            )
    if hash_tensors(routers[layer] for layer in model.moe_layers) != model.router_sha256:
        raise AllocationError(
            f"{folder} holds other router weights than the allocation was made for (SHA-256 differs); {REMEDY}"
        )


def check_layers(layers: set[int], model: ModelIdentity, place: str) -> None:
    """Check that `layers`, which have a router at `place`, are the MoE layers of the allocation."""
    missing, extra = sorted(set(model.moe_layers) - layers), sorted(layers - set(model.moe_layers))
    if missing:
        raise AllocationError(f"{place}: none for layers {missing} of the allocation; {REMEDY}")
    if extra:
        raise AllocationError(f"{place}: layers {extra} have one, the allocation has no top-k for them; {REMEDY}")


def has_weights(folder: Path) -> bool:
    """Whether the folder holds safetensors files that are shards of a model."""
    return any(not file.name.startswith(NO_SHARDS) for file in folder.glob("*.safetensors"))


def find_lm_head(folder: Path) -> str | None:
    """The name of the LM head's tensor, or of a part of it if it is quantised; None where it is tied to the embeddings.

    A bias alone is no LM head.
    """
    return next(filter(LM_HEAD.fullmatch, read_tensors(folder)), None)


def find_routers(model: ModelIdentity, folder: Path) -> dict[int, Tensor]:
    """Decoder-layer index -> router tensor, below `num_hidden_layers` (prediction layers past it do not count).

    Routers that look experts up by token are left out.
    """
    before, after = map(re.escape, model.router.split("{}"))
    name_of_router = re.compile(f"{before}(0|[1-9][0-9]{{0,8}}){after}")
    tensors = read_tensors(folder)
    matches = filter(None, map(name_of_router.fullmatch, tensors))
    routers = {int(match[1]): tensors[match[0]] for match in matches if find_choices(match[0]) not in tensors}
    return {layer: tensor for layer, tensor in routers.items() if layer < model.num_hidden_layers}


def find_choices(router: str) -> str:
    """The name of the tensor with the experts of every token, if the layer whose router is called so has one."""
    return router.removesuffix("weight") + FIXED_CHOICES


def find_hidden(model: ModelIdentity, folder: Path) -> int | None:
    """The model's hidden size, from its routers; None without weights."""
    routers = find_routers(model, folder) if has_weights(folder) else {}
    return next((router.shape[1] for router in routers.values()), None)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Name -> tensor of the folder's checkpoint, from headers alone, as `lexi_search` reads it.

    That is all of the shards that the index names, or without one `model.safetensors`, or else all shards. Of the index
    only the names of files count, as for vLLM.

    Raises:
        AdapterError: no shards, a damaged or missing one, or a tensor that is in two of them with different values:
            engines differ in which they take.
    """
    weight_map = _read_weight_map(folder)
    if weight_map is not None:
        shards = [_find_shard(folder, shard) for shard in sorted(set(weight_map.values()))]
    else:
        shards = [folder / SINGLE] if (folder / SINGLE).exists() else _list_shards(folder)
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        header = read_header(shard)
        for name in sorted(tensors.keys() & header.keys()):
            if not _are_same(tensors[name], header[name]):
                thing = f"tensor {name} is also in {tensors[name].path.name}, with other values"
                raise AdapterError(f"{shard}: {thing}, and engines differ in which they take; keep one of them")
        tensors |= header
    return tensors


def _are_same(one: Tensor, other: Tensor) -> bool:
    """Whether two stored tensors are of one type and shape, byte for byte."""
    return (one.dtype, one.shape) == (other.dtype, other.shape) and hash_tensors([one]) == hash_tensors([other])


def _list_shards(folder: Path) -> list[Path]:
    """The folder's safetensors files that are neither an adapter's nor ours."""
    shards = [file for file in sorted(folder.glob("*.safetensors")) if not file.name.startswith(NO_SHARDS)]
    if not shards:
        others = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for file in folder.glob(pattern))
        there = f"the weights are in {others[0]}" if others else "no safetensors shards"
        raise AdapterError(f"{folder}: {there}; convert the checkpoint to safetensors first")
    return shards


def _read_weight_map(folder: Path) -> dict[str, str] | None:
    if not (folder / INDEX).exists():
        return None
    index = _read_json(folder / INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise AdapterError(f"{folder / INDEX} has no weight_map from tensors to shards; fetch the checkpoint again")
    return weight_map


def _find_shard(folder: Path, shard: str) -> Path:
    if Path(shard).name != shard:
        raise AdapterError(f"{folder / INDEX}: shard {shard[:80]!r} is not a plain file name; fetch it again")
    return folder / shard


def explain_absence(folder: Path) -> str:
    """The likely reason why a folder lacks tensors: shards that it lacks by the others' names, or that are not read."""
    names = {file.name for file in folder.glob("*.safetensors")}
    weight_map = _read_weight_map(folder)
    unread = () if weight_map is None else names - set(weight_map.values())
    if unnamed := sorted(name for name in unread if not name.startswith(NO_SHARDS)):
        return f"{unnamed[0]} is there, but not named in {INDEX}, so it is not read"
    for stem, total in sorted({(match[1], match[2]) for match in map(NUMBERED.fullmatch, names) if match}):
        for number in range(1, int(total) + 1):
            name = f"{stem}-{number:0{len(total)}}-of-{total}.safetensors"
            if name not in names:
                return f"{name} is not there, so the download is incomplete"
    return "is the download complete?"


def _read_json(path: Path) -> Any:
    try:
        return read_json(path, finite=path.name != "config.json")  # Nemotron-H's has an Infinity
    except OSError as error:
        raise AdapterError(f"cannot read {path}: {error.strerror}; name a model folder") from error
    except ValueError as error:
        raise AdapterError(f"{path} is not JSON ({error}); fetch it again") from error
