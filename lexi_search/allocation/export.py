"""Export of an allocation: plain lists, config overlays, a `vllm serve` command, a model folder.

transformers has a convention for layers that differ from the config, `per_layer_config`, and vLLM's `--hf-overrides`
passes it through. So far neither uses it: their models read the one global k, and lexi_adapter applies the k per layer.
Exports for vLLM therefore name an architecture that only the LExI plugin registers: without the plugin vLLM refuses to
start, instead of serving at full k.
"""

import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lexi_search.artifacts.allocation import Allocation
from lexi_search.artifacts.codec import short
from lexi_search.artifacts.compensation import EXPORTED, format_maps, name_maps
from lexi_search.artifacts.files import json_bytes, read_json_object
from lexi_search.artifacts.identity import ModelIdentity
from lexi_search.artifacts.serialisation import read_allocation_maps, to_document
from lexi_search.checkpoint.folder import build_folder, find_folder, is_export, require_folder, write_record
from lexi_search.checkpoint.reader import open_checkpoint
from lexi_search.errors import InputError
from lexi_search.models.model import hash_routers
from lexi_search.models.moe_families import ARCHITECTURES

ALIAS = "Lexi"
# The hub's DeepSeek-VL2 configs name no architecture; vLLM gets this one.
_DEFAULT_ARCHITECTURES = {"deepseek_vl_v2": "DeepseekVLV2ForCausalLM"}
# Families whose configuration class exists only in the model's own folder.
_NEED_REMOTE_CODE = frozenset({"minicpm"})


def list_top_k(allocation: Allocation) -> dict[str, int]:
    """Decoder-layer index -> k, as a flat JSON object."""
    return {str(layer): k for layer, k in sorted(allocation.top_k.items())}


def format_csv(allocation: Allocation) -> str:
    """Two columns, `layer` and `top_k`, layers ascending."""
    return "".join(["layer,top_k\n", *(f"{layer},{k}\n" for layer, k in sorted(allocation.top_k.items()))])


def format_text(allocation: Allocation, form: str) -> str:
    """The text of an export: "json" and "csv" list the k of each layer, "transformers" is the overlay.

    Raises InputError for an allocation with a gate exponent, which none of them can express.
    """
    if allocation.gate_exponent is not None and form in ("json", "csv"):
        raise InputError(
            f"the k alone would be another model: {form} cannot hold the allocation's gate exponent; "
            "take --to vllm, or the allocation itself"
        )
    if form == "csv":
        return format_csv(allocation)
    return json_bytes(list_top_k(allocation) if form == "json" else make_overlay(allocation)).decode()


def make_overlay(allocation: Allocation) -> dict[str, Any]:
    """The overlay for config.json by transformers 5's convention, at the level of the model's own k.

    Raises InputError for an allocation with a gate exponent, which the convention cannot express, or for a family whose
    layers differ in something else.
    """
    if allocation.gate_exponent is not None:
        raise InputError("a config cannot hold a gate exponent; apply the allocation itself, with lexi_adapter.apply")
    if _differs(allocation.model):
        thing = f"per_layer_config of {allocation.model.model_type} is of its attention and cannot hold the k"
        raise InputError(f"{thing}; apply the allocation itself, with lexi_adapter.apply")
    return _overlay(allocation)


def make_transformers_overrides(allocation: Allocation, *, place: str | None = None) -> dict[str, Any]:
    """The changes to config.json for a model folder that transformers loads: the overlay and the allocation itself.

    With `place`, the path of its file, that stands for an allocation with corrections, which lie beside it.
    """
    named = place if place is not None and allocation.compensation is not None else to_document(allocation)
    return {**_overlay(allocation), "lexi_allocation": named}


def make_vllm_overrides(
    allocation: Allocation, config: Mapping[str, Any], *, place: str | None = None
) -> dict[str, Any]:
    """The `--hf-overrides` for vLLM: those for transformers, and architecture names that only the plugin registers.

    Raises InputError for a config that names no architecture.
    """
    default = _DEFAULT_ARCHITECTURES.get(allocation.model.model_type)
    names = config.get("architectures") or ([default] if default else [])
    if not names:
        raise InputError("config.json names no architectures, and without them nothing can be served")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"config.json: architectures is {short(names)}, expected a list of names")
    return {**make_transformers_overrides(allocation, place=place), "architectures": [ALIAS + name for name in names]}


def format_vllm_command(model: str, model_type: str, overrides: Mapping[str, Any] | None = None) -> str:
    """The shell command that serves `model`: an exported folder without `overrides`, any other model with them."""
    words = ["vllm", "serve", model]
    if model_type in _NEED_REMOTE_CODE:
        words.append("--trust-remote-code")
    if overrides is not None:
        words += ["--hf-overrides", json.dumps(overrides, sort_keys=True, separators=(",", ":"))]
    return " ".join(map(_quote, words))


def _quote(word: str) -> str:
    """A word for a shell; bytes that a terminal would obey, or that are no text, as bash, ksh and zsh spell them."""
    if word.isprintable():
        return shlex.quote(word)
    plain = (chr(byte) if 32 <= byte < 127 and byte not in b"\\'" else f"\\x{byte:02x}" for byte in os.fsencode(word))
    return f"$'{''.join(plain)}'"


def format_transformers_call(folder: str, allocation: str) -> str:
    """The Python expression that loads an exported folder and applies the allocation (a file) to the model."""
    return f"lexi_adapter.apply(transformers.AutoModelForCausalLM.from_pretrained({folder!r}), {allocation!r})"


def check_config(model: ModelIdentity, config: Mapping[str, Any]) -> None:
    """Raise InputError unless `config`, a parsed config.json, fits `model` and has no values per layer.

    A top-k that it leaves out is not compared.
    """
    *path, top_k = model.top_k_key.split(".")
    section: Any = config
    for key in path:
        section = section.get(key) if isinstance(section, Mapping) else None
    section = section if isinstance(section, Mapping) else {}
    counts = ARCHITECTURES[model.model_type].num_experts if model.model_type in ARCHITECTURES else ()
    for name, values, expected in (
        ("model_type", config, model.model_type),
        ("num_hidden_layers", section, model.num_hidden_layers),
        *((name, section, model.num_experts) for name in counts if name in section),
        (top_k, section, model.top_k),
    ):
        actual = values.get(name)
        if isinstance(actual, list) and actual and all(item == actual[0] for item in actual):
            actual = actual[0]  # one for each layer, as Hunyuan's moe_topk
        counted_otherwise = name == "num_hidden_layers" and "layers_block_type" in values
        left_out = name == top_k and name not in values  # to the default of the model's class
        if actual != expected and not counted_otherwise and not left_out:
            raise InputError(
                f"the allocation is for {name} {expected!r}, the config has {short(actual)}: not the same model"
            )
    if "lexi_allocation" in config or ("per_layer_config" in section and not _differs(model)):
        raise InputError("the config already has values per layer; export from the model's original folder")


def read_config(model: str) -> dict[str, Any]:
    """The parsed config.json of a folder, or of a hub id, from which it is downloaded."""
    return read_json_object(find_folder(model, ["config.json"]) / "config.json", finite=False)


def check_weights(model: ModelIdentity, source: str, folder: Path) -> str | None:
    """Compare the routers in `folder`, which `find_folder` gave for `source`, with those of the allocation's model.

    Returns:
        Why they could not be compared, or None.

    Raises:
        InputError: they are others, or the shards of the folder are damaged.
    """
    if not any(folder.glob("*.safetensors")):
        return "no safetensors shards there"
    try:
        digest = hash_routers(open_checkpoint(folder), model.router, model.moe_layers)
    except InputError as error:
        if os.path.isdir(source):
            raise
        return f"not all shards are in the cache: {error}"
    if digest != model.router_sha256:
        raise InputError(f"{source}: other router weights than the allocation was made for (SHA-256): another model")
    return None


def carry(allocation: Allocation, path: str | os.PathLike[str]) -> tuple[Allocation, dict[str, bytes]]:
    """The allocation at `path` as an exported folder has it, and the files that go with it: name -> bytes.

    That is one with the corrections of its own k alone. InputError as from `read_maps`.
    """
    maps = read_allocation_maps(path, allocation)
    if not maps:
        return allocation, {}
    data = format_maps(maps, allocation.model)
    return replace(allocation, compensation=name_maps(EXPORTED, maps, data)), {EXPORTED: data}


def write_folder(
    folder: str,
    model: str,
    overrides: Mapping[str, Any],
    *,
    files: Mapping[str, bytes] = MappingProxyType({}),
    force: bool = False,
    copy: bool = False,
) -> None:
    """Write to `folder` the model folder `model` with `overrides` in its config.json: complete or not at all.

    `files` come beside it, by name. All other entries, except hidden ones, become links to those of `model`, which may
    be links themselves; or with `copy` copies. With `force` an earlier export is replaced, if its record says that
    nothing else is in it; any other folder that is not empty is never touched.

    Raises InputError where `folder` cannot be written, has no room for copies, or holds something else.
    """
    changed = _change_config(model, overrides)
    with build_folder(folder, model, force=force, copy=copy) as building:
        (building / "config.json").write_text(json.dumps(changed, indent=2) + "\n")
        for name, data in files.items():
            (building / name).write_bytes(data)
        if "lexi_allocation" in changed:
            write_record(building)


def holds_folder(
    folder: str, model: str, overrides: Mapping[str, Any], *, files: Mapping[str, bytes] = MappingProxyType({})
) -> bool:
    """Whether `folder` is what `write_folder` would make of it, and nothing else."""
    return is_export(folder, model, _change_config(model, overrides), files=files)


def _change_config(model: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    return merge(read_json_object(require_folder(model) / "config.json", finite=False), overrides)


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes` merged in, object by object; keys keep their order, new ones come last."""
    result = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merge(result[key], value) if both else value
    return result


def _differs(model: ModelIdentity) -> bool:
    return model.model_type in ARCHITECTURES and ARCHITECTURES[model.model_type].differing


def _overlay(allocation: Allocation) -> dict[str, Any]:
    if _differs(allocation.model):
        return {}  # the overlay would take the place of what the layers' attention is made of
    *path, top_k = allocation.model.top_k_key.split(".")
    overlay: dict[str, Any] = {
        "per_layer_config": {layer: {top_k: k} for layer, k in list_top_k(allocation).items()},
        # Code that reads the global k, to size buffers for all layers, would otherwise stop.
        "allow_global_per_layer_attribute_access": True,
    }
    for key in reversed(path):
        overlay = {key: overlay}
    return overlay
