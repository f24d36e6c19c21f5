"""A config's `quantization_config` as data: the format of the weights, their bits and their groups.

The configs of all tools become `Storage` values here; `quantisation_formats` has the tensors and shapes of each. A
method, format or setting that is not supported is refused by name.
"""

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lexi_search.checkpoint.config import find_text_config
from lexi_search.errors import InputError

IGNORE_KEYS = ("ignore", "ignored_layers", "modules_to_not_convert", "modules_not_to_convert", "exclude_modules")


class Storage(NamedTuple):
    """The storage of the weights of some modules: the format, a key of `quantisation_formats.FORMATS`, and settings.

    `group_size` inputs share a scale; -1: all inputs of a row do. `block` is (rows, columns) that share one; None:
    there are no blocks. `needs` are roles of parts that are optional in the format, but required here. `targets` are
    the modules, by name or pattern; none: all modules.
    """

    format: str
    bits: int = 8
    group_size: int = -1
    block: tuple[int, int] | None = None
    needs: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()


class Quantisation(NamedTuple):
    """A checkpoint's `quantization_config`: its place for messages, its `Storage`s, and the modules it leaves plain."""

    place: str
    dtype: str  # of the values, once dequantised
    storages: tuple[Storage, ...]
    ignored: tuple[str, ...]

    def is_ignored(self, module: str) -> bool:
        return any(_matches(pattern, module) for pattern in self.ignored)

    def find_storages(self, module: str) -> tuple[Storage, ...]:
        """The storages that name `module`, or else those that name none; a plain module may have any or none."""
        named = tuple(s for s in self.storages if any(_matches(target, module) for target in s.targets))
        return named or tuple(s for s in self.storages if not s.targets)


class _Settings(NamedTuple):
    """A JSON object of the config, and its place for messages."""

    values: Mapping[str, Any]
    place: str

    def read(self, key: str, kind: type, default: Any = None) -> Any:
        value = self.values.get(key)
        if value is not None and type(value) is not kind:
            raise InputError(f"{self.place}: {key} is {value!r}, expected {kind.__name__}")
        return default if value is None else value

    def read_object(self, key: str) -> "_Settings":
        return _Settings(self.read(key, dict, {}), f"{self.place}, {key}")

    def read_names(self, key: str) -> tuple[str, ...]:
        names = self.read(key, list, [])
        try:
            for name in names:
                re.compile(name.removeprefix("re:") if name.startswith("re:") else "")
        except (AttributeError, re.error) as error:
            raise InputError(f"{self.place}: {key} is not a list of names and patterns ({error})") from error
        return tuple(names)

    def read_choice(self, key: str, known: Sequence[Any], default: Any = None) -> Any:
        value = self.values.get(key, default)
        if isinstance(value, bool) or value not in known:
            choices = ", ".join(map(str, known))
            raise InputError(f"{self.place}: {key} {value!r} is not supported; supported are {choices}")
        return value

    def read_group_size(self) -> int:
        size = self.read("group_size", int, -1)
        if size != -1 and size < 1:
            raise InputError(f"{self.place}: group_size is {size}, expected a number of inputs or -1")
        return size

    def read_block(self, key: str) -> tuple[int, int] | None:
        block = self.read(key, list)
        if block is not None and not (len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
            raise InputError(f"{self.place}: {key} is {block!r}, expected two numbers")
        return tuple(block) if block else None


def read_quantisation(config: Mapping[str, Any], folder: Path) -> Quantisation | None:
    """The quantisation that the config of a checkpoint in `folder` declares; None if it declares none.

    Raises:
        InputError: a method, format, number of bits or setting that is not supported, or not well formed.
    """
    parts = [config]
    for key in find_text_config(config):
        parts.append(parts[-1][key])
    owner = next((part for part in parts if part.get("quantization_config") is not None), None)
    if owner is None:
        return None
    settings = _Settings(owner, str(folder / "config.json")).read_object("quantization_config")
    method = settings.read_choice("quant_method", tuple(METHODS))
    settings = settings._replace(place=f"{settings.place} ({method})")
    ignored = tuple(name for key in IGNORE_KEYS for name in settings.read_names(key))
    return Quantisation(settings.place, _read_dtype(parts, folder), tuple(METHODS[method](settings)), ignored)


def _read_dtype(parts: Sequence[Mapping[str, Any]], folder: Path) -> str:
    """The config's element type, the language model's before that of the whole; bfloat16 where there is none."""
    named = (part.get(key) for part in reversed(parts) for key in ("dtype", "torch_dtype"))
    dtype = next((value for value in named if value is not None), "bfloat16")
    if dtype not in ("bfloat16", "float16", "float32"):
        raise InputError(f"{folder / 'config.json'}: dtype {dtype!r}: weights cannot be dequantised to that type")
    return dtype


def _read_fp8(settings: _Settings) -> list[Storage]:
    return [Storage("scaled", block=settings.read_block("weight_block_size"))]


def _read_gptq(settings: _Settings) -> list[Storage]:
    """GPTQ: `gptq` files hold each zero point minus one, `gptq_v2` files the zero point itself."""
    format = settings.read_choice("checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    if any(not name.startswith("-:") for name in settings.read("dynamic", dict, {})):
        raise InputError(f"{settings.place}: dynamic gives modules settings of their own, which is not supported")
    needs = ("group",) if settings.read("desc_act", bool, False) else ()
    return [Storage(format, settings.read_choice("bits", (4, 8)), settings.read_group_size(), needs=needs)]


def _read_awq(settings: _Settings) -> list[Storage]:
    settings.read_choice("version", ("gemm", "GEMM"), "gemm")
    settings.read_choice("backend", ("autoawq",), "autoawq")
    return [Storage("awq", settings.read_choice("bits", (4,)), settings.read_group_size())]


def _read_mxfp4(settings: _Settings) -> list[Storage]:
    return [Storage("mxfp4", 4, 32)]


def _read_modelopt(settings: _Settings) -> list[Storage]:
    algorithm = settings.read_choice("quant_algo", ("FP8", "NVFP4"))
    return [Storage("scaled") if algorithm == "FP8" else Storage("nvfp4", 4, 16)]


def _read_compressed_tensors(settings: _Settings) -> list[Storage]:
    settings.read_object("sparsity_config").read_choice("format", (None, "dense"))
    groups = settings.read_object("config_groups")
    storages = [_read_group(settings, groups.read_object(name)) for name in groups.values]
    if not storages:
        raise InputError(f"{settings.place}: config_groups is empty")
    return storages


def _read_group(settings: _Settings, group: _Settings) -> Storage:
    """One of compressed-tensors' config_groups; a target that is a class, such as Linear, means all modules."""
    owner = group if group.values.get("format") is not None else settings
    format = owner.read_choice("format", tuple(COMPRESSED_FORMATS))
    weights = group.read_object("weights")
    bits = weights.read_choice("num_bits", COMPRESSED_BITS[COMPRESSED_FORMATS[format]])
    targets = tuple(name for name in group.read_names("targets") if not re.fullmatch("[A-Z][A-Za-z0-9]*", name))
    needs = ("zero",) if not weights.read("symmetric", bool, True) else ()
    order = weights.read_choice("actorder", (None, "weight", "static", "group", "dynamic"))
    needs += ("group",) if order in ("group", "dynamic") else ()
    block = weights.read_block("block_structure")
    return Storage(COMPRESSED_FORMATS[format], bits, weights.read_group_size(), block, needs, targets)


METHODS: Mapping[str, Callable[[_Settings], list[Storage]]] = {
    "awq": _read_awq,
    "compressed-tensors": _read_compressed_tensors,
    "fbgemm_fp8": _read_fp8,
    "fp8": _read_fp8,
    "gptq": _read_gptq,
    "modelopt": _read_modelopt,
    "mxfp4": _read_mxfp4,
}
COMPRESSED_FORMATS = {
    "float-quantized": "scaled",
    "int-quantized": "scaled",
    "naive-quantized": "scaled",
    "nvfp4-pack-quantized": "nvfp4-packed",
    "mxfp4-pack-quantized": "mxfp4-packed",
    "pack-quantized": "packed",
}
COMPRESSED_BITS = {"scaled": (8,), "packed": (4, 8), "nvfp4-packed": (4,), "mxfp4-packed": (4,)}


def _matches(pattern: str, module: str) -> bool:
    """Whether a config's pattern matches `module`: `re:` and an expression, or a dotted name that is part of its name.

    Components are compared whole, `*` standing for any letters: `gate` is the router, and not `gate_proj`.
    """
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    wanted, path = pattern.split("."), module.split(".")
    return any(
        all(fnmatch.fnmatchcase(name, want) for name, want in zip(path[start:], wanted, strict=False))
        for start in range(len(path) - len(wanted) + 1)
    )
