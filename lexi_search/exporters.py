"""An allocation in the forms that serving teams use: plain lists, config overlays, a `vllm serve` command, a folder.

transformers has a convention for layers that differ from the config, `per_layer_config`, and vLLM's `--hf-overrides`
passes it through. vLLM's own models read the global k only, so whatever is made for vLLM also names an architecture
that nobody but the LExI plugin registers: without the plugin vLLM refuses to start instead of serving the full k.
"""

import json
import os
import re
import secrets
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lexi_search.artifacts import Allocation, ModelIdentity, to_document
from lexi_search.errors import InputError
from lexi_search.files import read_json_object

ALIAS = "Lexi"
# The hub's DeepSeek-VL2 configs name no architecture; vLLM is told this one.
DEFAULT_ARCHITECTURES = {"deepseek_vl_v2": "DeepseekVLV2ForCausalLM"}
# Families whose configuration class exists only in the model's own folder.
NEED_REMOTE_CODE = frozenset({"minicpm"})
# vLLM would read this one, in Mistral's own format, rather than the changed config.json.
UNLINKED = frozenset({"config.json", "params.json"})


def list_top_k(allocation: Allocation) -> dict[str, int]:
    """Decoder-layer index -> k, as flat as JSON can have it."""
    return {str(layer): k for layer, k in sorted(allocation.top_k.items())}


def format_csv(allocation: Allocation) -> str:
    """Two columns, `layer` and `top_k`, layers ascending."""
    return "".join(["layer,top_k\n", *(f"{layer},{k}\n" for layer, k in sorted(allocation.top_k.items()))])


def make_overlay(allocation: Allocation) -> dict[str, Any]:
    """What to lay over config.json for transformers 5: `per_layer_config` at the level where the model's own k is.

    Raises InputError for an allocation with a gate exponent, which no config can express.
    """
    if allocation.gate_exponent is not None:
        raise InputError("transformers cannot apply a gate exponent from a config; use lexi_adapter.apply(model, ...)")
    return _overlay(allocation)


def make_vllm_overrides(allocation: Allocation, config: Mapping[str, Any]) -> dict[str, Any]:
    """What to give vLLM as `--hf-overrides`: the overlay, the allocation itself, and the plugin's architecture names.

    Raises InputError if `config` is of another model or has been changed before.
    """
    check_config(allocation.model, config)
    default = DEFAULT_ARCHITECTURES.get(allocation.model.model_type)
    names = config.get("architectures") or ([default] if default else [])
    if not names:
        raise InputError("config.json names no architectures, and without them nothing can be served")
    return {
        **_overlay(allocation),
        "architectures": [ALIAS + name for name in names],
        "lexi_allocation": to_document(allocation),
    }


def format_vllm_command(model: str, model_type: str, overrides: Mapping[str, Any] | None = None) -> str:
    """The shell command that serves `model`: an exported folder as it is, any other one with `overrides`."""
    words = ["vllm", "serve", model]
    if model_type in NEED_REMOTE_CODE:
        words.append("--trust-remote-code")
    if overrides is not None:
        words += ["--hf-overrides", json.dumps(overrides, sort_keys=True, separators=(",", ":"))]
    return shlex.join(words)


def check_config(model: ModelIdentity, config: Mapping[str, Any]) -> None:
    """Raise InputError unless `config`, a parsed config.json, can be that of `model`, unchanged."""
    *path, top_k = model.top_k_key.split(".")
    section: Any = config
    for key in path:
        section = section.get(key, {}) if isinstance(section, Mapping) else {}
    for name, place, expected in (
        ("model_type", config, model.model_type),
        ("num_hidden_layers", section, model.num_hidden_layers),
        (top_k, section, model.top_k),
    ):
        found = place.get(name) if isinstance(place, Mapping) else None
        if found != expected:
            raise InputError(f"the allocation is for {name} {expected!r}, the config has {found!r}: not the same model")
    if "lexi_allocation" in config or "per_layer_config" in section:
        raise InputError("the config already has values per layer; export from the model's original folder")


def read_config(model: str) -> dict[str, Any]:
    """The parsed config.json of a folder or, if no such path exists, of a hub id (fetched through the hub's cache)."""
    if not Path(model).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        from huggingface_hub import hf_hub_download

        try:
            return read_json_object(hf_hub_download(model, "config.json"))
        except InputError:
            raise
        except Exception as error:  # the hub client raises its own, its HTTP library's and the system's errors
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise InputError(f"{model}: no such folder here, and not to be had from the hub ({reason})") from error
    return read_json_object(Path(model) / "config.json")


def write_folder(folder: str, model: str, overrides: Mapping[str, Any], *, force: bool = False) -> None:
    """Make `folder` the model folder `model` with `overrides` in its config.json: whole or not at all.

    All other entries become absolute links to `model`'s, which may be links themselves; hidden ones are left out. With
    `force` an earlier export is replaced; any other folder that is not empty is never touched.

    Raises InputError where `folder` cannot be written or holds something else.
    """
    source, target = Path(os.path.abspath(model)), Path(os.path.realpath(folder))
    changed = merge(read_json_object(source / "config.json"), overrides)
    _check_target(target, Path(os.path.realpath(model)), force)
    building = target.parent / f".lexi-{secrets.token_hex(8)}.tmp"
    try:
        building.mkdir()
        for entry in sorted(source.iterdir()):
            if entry.name not in UNLINKED and not entry.name.startswith("."):
                (building / entry.name).symlink_to(entry)
        (building / "config.json").write_text(json.dumps(changed, indent=2) + "\n")
        _move_into_place(building, target)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror} ({target.parent})") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it, object by object; keys keep their order, new ones come last."""
    result = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merge(result[key], value) if both else value
    return result


def _overlay(allocation: Allocation) -> dict[str, Any]:
    *path, top_k = allocation.model.top_k_key.split(".")
    overlay: dict[str, Any] = {
        "per_layer_config": {layer: {top_k: k} for layer, k in list_top_k(allocation).items()},
        # Code that reads the global k, to size buffers for all layers, would otherwise stop.
        "allow_global_per_layer_attribute_access": True,
    }
    for key in reversed(path):
        overlay = {key: overlay}
    return overlay


def _check_target(target: Path, source: Path, force: bool) -> None:
    if target == source or target in source.parents or source in target.parents:
        raise InputError(f"cannot write {target}: it overlaps the model folder {source}; choose another place")
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(f"cannot write {target}: not a folder; choose another name")
    if not any(target.iterdir()):
        return
    if not _is_export(target):
        raise InputError(f"cannot write {target}: not empty and no earlier export; choose another name or remove it")
    if not force:
        raise InputError(f"cannot write {target}: an earlier export is there; --force replaces it")


def _is_export(folder: Path) -> bool:
    try:
        return "lexi_allocation" in read_json_object(folder / "config.json")
    except InputError:
        return False


def _move_into_place(building: Path, target: Path) -> None:
    earlier = building.with_suffix(".old")
    if target.exists():
        target.rename(earlier)
    try:
        building.rename(target)
    except BaseException:
        if earlier.exists():
            earlier.rename(target)
        raise
    shutil.rmtree(earlier, ignore_errors=True)
