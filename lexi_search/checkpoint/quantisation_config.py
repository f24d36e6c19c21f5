"""A config's `quantization_config` as data: the format of the weights, their bits and their groups.

`quantisation_methods` reads the settings of each tool; `quantisation_formats` has the tensors and shapes of each.
"""

import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lexi_search.artifacts.files import read_json_object
from lexi_search.checkpoint.config import find_text_config
from lexi_search.checkpoint.quantisation_methods import LAYERS, METHODS, MIXED, SPELLINGS, Settings, Storage
from lexi_search.errors import InputError

IGNORE_KEYS = ("ignore", "ignored_layers", "modules_to_not_convert", "modules_not_to_convert", "exclude_modules") + (
    "exclude",
)
WILDCARDS = re.compile(r"[*?\[]")
SIDE_FILE = "hf_quant_config.json"  # where ModelOpt up to 0.29 leaves its settings


class Quantisation(NamedTuple):
    """A checkpoint's `quantization_config`: its place for messages, its `Storage`s, and the modules it leaves plain.

    `named` has the storage of each module, or of all in it, where the config lists them one by one. If `first`, the
    first storage that names a module counts, else a module with two is refused.
    """

    place: str
    dtype: str  # of the values, once dequantised
    storages: tuple[Storage, ...]
    ignored: tuple[str, ...]
    named: Mapping[str, Storage] | None = None
    first: bool = False

    def is_ignored(self, module: str) -> bool:
        return any(_matches(pattern, module) for pattern in self.ignored)

    def find_storages(self, module: str) -> tuple[Storage, ...]:
        """The storages that name `module`, or else those that name none; a plain module may have any or none."""
        if self.named is not None:
            names = (name for spelling in _spell(module) for name in _list_owners(spelling))
            return next(((self.named[name],) for name in names if name in self.named), ())
        named = tuple(s for s in self.storages if any(_matches(target, module) for target in s.targets))
        return (named[:1] if self.first else named) or tuple(s for s in self.storages if not s.targets)


def read_quantisation(config: Mapping[str, Any], folder: Path) -> Quantisation | None:
    """The quantisation that the config of a checkpoint in `folder` declares, there or in a file beside it; or None.

    Raises:
        InputError: a method, format, number of bits or setting that is not supported, or not well formed.
    """
    parts = [config]
    for key in find_text_config(config):
        parts.append(parts[-1][key])
    settings = _find_settings(parts, folder)
    if settings is None:
        return None
    method = _read_method(settings)
    settings = settings._replace(place=f"{settings.place} ({method})")
    if method == "fp8" and config.get("model_type") == "deepseek_v4":  # as vLLM tells them apart
        method = "deepseek-v4-fp8"
        settings = settings._replace(values={**settings.values, "expert_dtype": config.get("expert_dtype")})
    if "quantization" in settings.values:  # ModelOpt's older form
        settings = settings.read_object("quantization")
    if method == "modelopt" and settings.values.get("quant_algo") == MIXED and not settings.values.get(LAYERS):
        settings = _read_side_file(folder) or settings
    storages = METHODS[method](settings)
    ignored = tuple(name for key in IGNORE_KEYS for name in settings.read_names(key))
    named = dict(storages) if isinstance(storages, dict) else None
    every = tuple(set(named.values()) if named is not None else storages)
    first = method in ("gptq", "auto-round")
    return Quantisation(settings.place, _read_dtype(parts, folder), every, ignored, named, first)


def _read_dtype(parts: Sequence[Mapping[str, Any]], folder: Path) -> str:
    """The config's element type, the language model's before that of the whole; bfloat16 where there is none."""
    named = (part.get(key) for part in reversed(parts) for key in ("dtype", "torch_dtype"))
    dtype = next((value for value in named if value is not None), "bfloat16")
    if dtype not in ("bfloat16", "float16", "float32"):
        raise InputError(f"{folder / 'config.json'}: dtype {dtype!r}: weights cannot be dequantised to that type")
    return dtype


def _find_settings(parts: Sequence[Mapping[str, Any]], folder: Path) -> Settings | None:
    """The settings in the config or a part of it, else in ModelOpt's file beside it, else under the older key."""
    place = str(folder / "config.json")
    for key in ("quantization_config", SIDE_FILE, "compression_config"):
        if key == SIDE_FILE:
            if side := _read_side_file(folder):
                return side
        elif (owner := next((part for part in parts if part.get(key) is not None), None)) is not None:
            settings = Settings(owner, place).read_object(key)
            inner = settings.read_object("quantization_config")  # in an older compression_config
            return inner._replace(values={**settings.values, **inner.values}) if inner.values else settings
    return None


def _read_side_file(folder: Path) -> Settings | None:
    if not (folder / SIDE_FILE).is_file():
        return None
    settings = Settings(read_json_object(folder / SIDE_FILE), str(folder / SIDE_FILE))
    return settings.read_object("quantization")._replace(place=settings.place)


def _read_method(settings: Settings) -> str:
    """The key of `METHODS`; ModelOpt is known by its own keys as well."""
    values = settings.values
    method = values.get("quant_method")
    if method is None and ("quantization" in values or "quant_algo" in values):
        return "modelopt"
    if method is None and "config_groups" in values:
        return "compressed-tensors"
    if method is None and {"group_size", "bits"} <= values.keys():
        raise InputError(
            f"{settings.place}: no quant_method, as in MLX's checkpoints, which are not read; take the checkpoint that "
            "this was converted from"
        )
    if isinstance(method, str):
        method = method.lower().replace("_", "-").removeprefix("intel/")
        method = "modelopt" if method.startswith("modelopt") else SPELLINGS.get(method, method)
        if method in METHODS:
            return method
    return settings.read_choice("quant_method", tuple(METHODS))


def _spell(module: str) -> Iterator[str]:
    """A module's name, and how tools may write it where the language model is a part of a larger one."""
    yield module
    for prefix in ("model.language_model.", "language_model.model."):
        if module.startswith(prefix):
            rest = module.removeprefix(prefix)
            yield from (f"model.language_model.{rest}", f"language_model.model.{rest}", f"model.{rest}")


def _list_owners(module: str) -> Iterator[str]:
    """The module, those around it, innermost first, and for an expert's matrix its name without the expert's."""
    parts = module.split(".")
    for count in range(len(parts), 0, -1):
        yield ".".join(parts[:count])
    if "experts" in parts:
        yield ".".join((*parts[: parts.index("experts")], parts[-1]))


def _matches(pattern: str, module: str) -> bool:
    """Whether a config's pattern matches `module`: `re:` and an expression, or a dotted name that is part of its name.

    Components are compared whole, `*` standing for any letters: `gate` is the router, and not `gate_proj`.
    """
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    if not WILDCARDS.search(pattern):  # the rule, at the speed that a list of every module needs
        return f".{pattern}." in f".{module}."
    wanted, path = pattern.split("."), module.split(".")
    return any(
        all(fnmatch.fnmatchcase(name, want) for name, want in zip(path[start:], wanted, strict=False))
        for start in range(len(path) - len(wanted) + 1)
    )
