"""The settings of each quantisation tool as `Storage` values: how the weights of which modules are stored.

`METHODS` has a reader for each `quant_method`. A format or setting that is not supported is refused by name.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lexi_search.errors import InputError

NO_QUANTISATION = 16  # bits of AutoRound's plain modules


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


class Settings(NamedTuple):
    """A JSON object of the config, and its place for messages."""

    values: Mapping[str, Any]
    place: str

    def read(self, key: str, kind: type, default: Any = None) -> Any:
        value = self.values.get(key)
        if value is not None and type(value) is not kind:
            raise InputError(f"{self.place}: {key} is {value!r}, expected {kind.__name__}")
        return default if value is None else value

    def read_object(self, key: str) -> "Settings":
        return Settings(self.read(key, dict, {}), f"{self.place}, {key}")

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


def _read_fp8(settings: Settings) -> list[Storage]:
    return [Storage("scaled", block=settings.read_block("weight_block_size"))]


def _read_deepseek_v4(settings: Settings) -> list[Storage]:
    """DeepSeek-V4's FP8, with experts in MXFP4 unless `expert_dtype` says otherwise."""
    blocks = Storage("scaled-beside", block=settings.read_block("weight_block_size"))
    experts = Storage("mxfp4-beside", 4, 32, targets=("experts",))
    return [blocks] if settings.read_choice("expert_dtype", (None, "fp4", "fp8")) == "fp8" else [experts, blocks]


def _read_gptq(settings: Settings) -> list[Storage]:
    """GPTQ: `gptq` files hold each zero point minus one, `gptq_v2` files the zero point itself."""
    format = settings.read_choice("checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    dynamic = settings.read_object("dynamic")
    storages = []
    for pattern in dynamic.values:  # GPTQModel's settings for some modules; the first pattern that matches counts
        if not pattern.startswith("-:"):
            own = dynamic.read_object(pattern)
            merged = own._replace(values={**settings.values, **own.values})
            storages.append(
                _make_gptq(merged, format)._replace(targets=(_compile("re:" + pattern.removeprefix("+:"), own),))
            )
    return [*storages, _make_gptq(settings, format)]


def _make_gptq(settings: Settings, format: str) -> Storage:
    needs = ("group",) if settings.read("desc_act", bool, False) else ()
    return Storage(format, settings.read_choice("bits", (4, 8)), settings.read_group_size(), needs=needs)


def _read_auto_round(settings: Settings) -> list[Storage]:
    """AutoRound, whose integers are stored as GPTQ's or as AWQ's; `extra_config` has settings for some modules."""
    format = settings.read_choice("packing_format", tuple(AUTO_ROUND_FORMATS), next(iter(AUTO_ROUND_FORMATS)))
    settings.read_choice("data_type", ("int",), "int")
    extra, storages = settings.read_object("extra_config"), []
    for name in extra.values:
        own = extra.read_object(name)
        merged = own._replace(values={**settings.values, **own.values})
        if merged.values.get("bits") != NO_QUANTISATION:
            target = f"re:.*{name}" if re.search(r"[*+?^$()\[\]{}|\\]", name) else name
            storages.append(_make_auto_round(merged, format)._replace(targets=(_compile(target, own),)))
    return [*storages, _make_auto_round(settings, format)]


def _make_auto_round(settings: Settings, format: str) -> Storage:
    stored = AUTO_ROUND_FORMATS[format]
    return Storage(
        stored, settings.read_choice("bits", (4, 8) if stored == "gptq" else (4,)), settings.read_group_size()
    )


def _compile(pattern: str, settings: Settings) -> str:
    """The pattern as it is, once it is known to be one."""
    [checked] = settings._replace(values={"pattern": [pattern]}).read_names("pattern")
    return checked


def _read_awq(settings: Settings) -> list[Storage]:
    settings.read_choice("version", ("gemm", "GEMM"), "gemm")
    settings.read_choice("backend", ("autoawq",), "autoawq")
    return [Storage("awq", settings.read_choice("bits", (4,)), settings.read_group_size())]


def _read_mxfp4(settings: Settings) -> list[Storage]:
    return [Storage("mxfp4", 4, 32)]


def _read_modelopt(settings: Settings) -> list[Storage] | dict[str, Storage]:
    """NVIDIA ModelOpt: one algorithm for all weights, or a list of the quantised modules with the algorithm of each."""
    algorithm = _read_algorithm(settings, (*ALGORITHMS, MIXED))
    if algorithm != MIXED:
        return [_make_modelopt(settings, algorithm)]
    layers = settings.read_object(LAYERS)
    if not layers.values:
        raise InputError(f"{settings.place}: quant_algo is {MIXED}, but there is no {LAYERS} with the modules' own")
    modules = {name: layers.read_object(name) for name in layers.values}
    return {name: _make_modelopt(own, _read_algorithm(own, tuple(ALGORITHMS))) for name, own in modules.items()}


def _read_algorithm(settings: Settings, known: Sequence[str]) -> str:
    found = settings.values.get("quant_algo")
    upper = found.upper() if isinstance(found, str) else found
    return settings._replace(values={"quant_algo": upper}).read_choice("quant_algo", known)


def _make_modelopt(settings: Settings, algorithm: str) -> Storage:
    storage, size = ALGORITHMS[algorithm], settings.read("group_size", int)
    if size is None or storage.format == "scaled":
        return storage
    return storage._replace(group_size=settings.read_group_size())


def _read_quark(settings: Settings) -> list[Storage]:
    """AMD Quark's FP8, which may name modules again for the scales of their caches."""
    named = settings.read_object("layer_quant_config")
    for group in (settings.read_object("global_quant_config"), *(named.read_object(name) for name in named.values)):
        group.read_object("weight").read_choice("dtype", ("fp8_e4m3",))
    return [Storage("scaled")]


def _read_mxfp8(settings: Settings) -> list[Storage]:
    return [ALGORITHMS["MXFP8"]]


def _read_compressed_tensors(settings: Settings) -> list[Storage]:
    settings.read_object("sparsity_config").read_choice("format", (None, "dense"))
    groups = settings.read_object("config_groups")
    storages = [_read_group(settings, groups.read_object(name)) for name in groups.values]
    if not storages:
        raise InputError(f"{settings.place}: config_groups is empty")
    return storages


def _read_group(settings: Settings, group: Settings) -> Storage:
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


METHODS: Mapping[str, Callable[[Settings], list[Storage] | dict[str, Storage]]] = {
    "auto-round": _read_auto_round,
    "awq": _read_awq,
    "compressed-tensors": _read_compressed_tensors,
    "deepseek-v4-fp8": _read_deepseek_v4,
    "fbgemm_fp8": _read_fp8,
    "fp8": _read_fp8,
    "gptq": _read_gptq,
    "modelopt": _read_modelopt,
    "mxfp4": _read_mxfp4,
    "mxfp8": _read_mxfp8,
    "quark": _read_quark,
}
SPELLINGS = {"fbgemm-fp8": "fbgemm_fp8", "inc": "auto-round", "gptq-marlin": "gptq", "awq-marlin": "awq"}
AUTO_ROUND_FORMATS = {"auto_round:auto_gptq": "gptq", "auto_round:auto_awq": "awq"}
MIXED, LAYERS = "MIXED_PRECISION", "quantized_layers"
ALGORITHMS = {
    "FP8": Storage("scaled"),
    "FP8_PER_CHANNEL_PER_TOKEN": Storage("scaled"),
    "FP8_PB_WO": Storage("scaled", block=(128, 128)),
    "FP8_BLOCK_SCALES": Storage("scaled", block=(128, 128)),  # an early name of the same
    "MXFP8": Storage("scaled", group_size=32),
    "NVFP4": Storage("nvfp4", 4, 16),
    "W4A16_NVFP4": Storage("nvfp4", 4, 16),
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
