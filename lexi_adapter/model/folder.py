"""A model folder's config.json and safetensors headers, and the checks of an allocation against them.

Standard library only, so that it runs before an engine starts and on machines without one.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lexi_adapter.allocation import ModelIdentity
from lexi_adapter.errors import AdapterError, AllocationError

# Dotted paths under which the config of a multimodal model may hold its language model's.
TEXT_CONFIGS = ("text_config", "language_config", "llm_config", "thinker_config.text_config")
# Load formats of vLLM that do not read the folder's safetensors as a checkpoint.
WEIGHTS_ELSEWHERE = ("dummy", "runai_streamer_sharded", "sharded_state", "tensorizer")

REMEDY = "profile and search this model with lexi-search to get one that fits"


@dataclass(frozen=True)
class Tensor:
    """One tensor in a safetensors file: `size` bytes from `offset` of `path`."""

    path: Path
    shape: tuple[int, ...]
    offset: int
    size: int


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
        part: Any = config
        for key in path.split("."):
            part = part.get(key) if isinstance(part, Mapping) else None
        if isinstance(part, Mapping):
            yield path, part


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
    text: Any = config
    for parent in parents:
        text = text.get(parent) if isinstance(text, Mapping) else None
    if not isinstance(text, Mapping):
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
    """Whether the folder holds safetensors files."""
    return any(folder.glob("*.safetensors"))


def find_lm_head(folder: Path) -> str | None:
    """The name of the LM head's tensor, or None where it is tied to the embeddings."""
    return next((name for name, _ in read_tensors(folder) if name.endswith("lm_head.weight")), None)


def find_routers(model: ModelIdentity, folder: Path) -> dict[int, Tensor]:
    """Decoder-layer index -> router tensor, below `num_hidden_layers` (prediction layers past it do not count)."""
    before, after = map(re.escape, model.router.split("{}"))
    name_of_router = re.compile(f"{before}([0-9]+){after}")
    matches = ((name_of_router.fullmatch(name), tensor) for name, tensor in read_tensors(folder))
    routers = {int(match[1]): tensor for match, tensor in matches if match}
    return {layer: tensor for layer, tensor in routers.items() if layer < model.num_hidden_layers}


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and place of every tensor in the folder's safetensors files, from their headers alone."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        document = _read_json(index)
        weight_map = document.get("weight_map") if isinstance(document, dict) else None
        if not isinstance(weight_map, dict):
            raise AdapterError(f"{index} has no weight_map; fetch the checkpoint again")
        shards = sorted({folder / str(name) for name in weight_map.values()})
    else:
        shards = sorted(folder.glob("*.safetensors"))
    for shard in shards:
        yield from _read_header(shard)


def _read_header(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a safetensors file: eight bytes of header length (little endian), JSON, data."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise AdapterError(f"{path} is not a whole safetensors file; fetch it again")
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                if not 0 <= begin <= end <= size - 8 - length:
                    raise AdapterError(f"{path} ends before tensor {name}; fetch it again")
                yield name, Tensor(path, tuple(entry["shape"]), 8 + length + begin, end - begin)
    except OSError as error:
        raise AdapterError(f"cannot read {path}: {error.strerror}; fetch the checkpoint again") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise AdapterError(f"{path} has no safetensors header ({error}); fetch it again") from error


def hash_tensors(tensors: Iterable[Tensor]) -> str:
    """Hex SHA-256 over the stored bytes of one tensor after the other."""
    digest = hashlib.sha256()
    for tensor in tensors:
        with tensor.path.open("rb") as file:
            file.seek(tensor.offset)
            digest.update(file.read(tensor.size))
    return digest.hexdigest()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise AdapterError(f"cannot read {path}: {error.strerror}; name a model folder") from error
    except ValueError as error:
        raise AdapterError(f"{path} is not JSON ({error}); fetch it again") from error
