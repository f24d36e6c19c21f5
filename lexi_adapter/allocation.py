"""The allocation as the serving side reads it: a number of active experts for every MoE layer of one model.

Standard library only. The file is JSON with "format": "lexi-allocation"; an `Allocation` that exists is valid.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lexi_adapter.errors import AllocationError
from lexi_adapter.files import check_levels, read_json

FORMAT = "lexi-allocation"
KEY = "lexi_allocation"  # of the document in config.json, --hf-overrides and --additional-config
VERSION = 1
MAX_GATE_EXPONENT = 2.0  # at 1 all of the dropped mass is handed on; with far more, weights overflow
FIXED_TOP_K = {"phimoe": 2}  # model types whose routing function, vLLM's and transformers', knows one top-k


@dataclass(frozen=True)
class ModelIdentity:
    """The model that an allocation was made for.

    `moe_layers` are the decoder-layer indices that have a router, ascending; `top_k` is the model's own k, found in
    config.json under the dotted path `top_k_key`. `router` is the name pattern of the router tensors, with one {} for
    the layer, and `router_sha256` the SHA-256 over their stored bytes in the order of `moe_layers`.
    """

    model_type: str
    num_hidden_layers: int
    num_experts: int
    top_k: int
    moe_layers: tuple[int, ...]
    router: str
    top_k_key: str
    router_sha256: str


@dataclass(frozen=True)
class CompensationFile:
    """The file that holds the corrections of the layers whose k is smaller than the model's own.

    `file` is its name in the folder of the JSON that names it, `rank` that of its maps, `sha256` over all its bytes.
    """

    file: str
    rank: int
    sha256: str


@dataclass(frozen=True)
class Allocation:
    """`top_k[layer]` active experts for every layer of `model.moe_layers`; `budget` is their sum.

    `gate_exponent`, from 0 to `MAX_GATE_EXPONENT`, says how much of the dropped experts' gate weights the kept ones
    take over (see `serving.kernels.gates`); None: as the engine routes. `compensation` comes with a gate exponent, and
    `folder`, which no file states, is the absolute path under which its file lies; None: not known.
    """

    model: ModelIdentity
    top_k: Mapping[int, int]
    budget: int
    loss: float
    optimal_loss: float
    made_by: Mapping[str, Any]
    gate_exponent: float | None = None
    compensation: CompensationFile | None = None
    folder: str | None = field(default=None, compare=False)

    def asks_the_same_as(self, other: "Allocation") -> bool:
        """Whether a model runs the same under both; how they were found, and where files lie, does not matter."""
        return self._list_what_runs() == other._list_what_runs()

    def _list_what_runs(self) -> tuple[Any, ...]:
        return self.model, self.top_k, self.gate_exponent, self.compensation and self.compensation.sha256


def read_allocation(
    source: str | os.PathLike[str] | Mapping[str, Any] | Allocation, *, folder: str | os.PathLike[str] | None = None
) -> Allocation:
    """The allocation in a file or in a document (the file's JSON object); an `Allocation` is returned as it is.

    Args:
        source: the file, the document or the allocation.
        folder: of the file that a document was taken out of, where it was: there lies what it names. A document
            without one may be `located` (see `to_document`).

    Raises:
        AllocationError: no such file, not JSON, another format or version, or values that contradict each other.
    """
    if isinstance(source, Allocation):
        return source
    if isinstance(source, Mapping):
        try:
            check_levels(source)
        except ValueError as error:
            raise AllocationError(f"the allocation is {error}; write it again") from error
        return _parse(source, "the allocation", folder)
    if isinstance(source, str | os.PathLike):
        return _parse(_load(Path(source)), f"{os.fspath(source)}", os.path.dirname(source))
    raise AllocationError(f"an allocation is a path or a JSON object, not {_short(source)}")


def to_document(allocation: Allocation, *, located: bool = False) -> dict[str, Any]:
    """The JSON object that the allocation's file holds.

    One that is `located` names the folder of the compensation's file, too. It is for other processes, not for files.
    """
    body = {name: value for name, value in asdict(allocation).items() if value is not None}
    folder = body.pop("folder", None)
    if located and folder is not None and allocation.compensation is not None:
        body["compensation"]["folder"] = folder
    body["top_k"] = {str(layer): k for layer, k in sorted(allocation.top_k.items())}
    body["model"]["moe_layers"] = list(allocation.model.moe_layers)
    return {"format": FORMAT, "version": VERSION, **body}


def hash_allocation(allocation: Allocation) -> str:
    """A short name of exactly this allocation: the first 12 hex digits of the SHA-256 of its file.

    That is of the file as lexi_search writes it, wherever the allocation was read from: `sha256sum` agrees.
    """
    document = json.dumps(to_document(allocation), sort_keys=True, indent=1, allow_nan=False) + "\n"
    return hashlib.sha256(document.encode()).hexdigest()[:12]


def check_reducible(allocation: Allocation) -> None:
    """Raise AllocationError for a top-k that the model type's routing function does not know."""
    only = FIXED_TOP_K.get(allocation.model.model_type)
    if only is not None and set(allocation.top_k.values()) != {only}:
        raise AllocationError(
            f"the routing of {allocation.model.model_type} knows top-k {only} only; run the model as it is"
        )


def describe_run(allocation: Allocation, top_k: Mapping[int, int]) -> str:
    """One line for logs and messages: the active experts of a model under the allocation, against the model's own.

    `top_k` is the whole allocation's, or that of the MoE layers that one process holds.
    """
    shift = "" if allocation.gate_exponent is None else f", gate exponent {allocation.gate_exponent:g}"
    if allocation.compensation is not None:
        shift += f", compensation of rank {allocation.compensation.rank} ({allocation.compensation.sha256[:12]})"
    each = " ".join(f"{layer}:{k}" for layer, k in sorted(top_k.items()))
    return (
        f"{sum(top_k.values())} of {len(top_k) * allocation.model.top_k} active experts per token "
        f"over {len(top_k)} MoE layers{shift}, sha256 {hash_allocation(allocation)}; top-k of each: {each}"
    )


def _load(path: Path) -> Any:
    try:
        return read_json(path)
    except OSError as error:
        raise AllocationError(f"cannot read the allocation {path}: {error.strerror}; name an existing file") from error
    except ValueError as error:  # a path that holds a null character is one, too
        raise AllocationError(f"{path} is not JSON ({error}); write the allocation again") from error


def _parse(document: Any, place: str, folder: str | os.PathLike[str] | None) -> Allocation:
    try:
        return _build(document, None if folder is None else os.path.abspath(folder))
    except _Unfit as error:
        raise AllocationError(f"{place}: {error}") from None


class _Unfit(Exception):
    """The reason why a document is no allocation, without its place."""


def _build(document: Any, folder: str | None) -> Allocation:
    _require(isinstance(document, Mapping), f"not a JSON object but {_short(document)}")
    file_format, version = document.get("format"), document.get("version")
    _require(file_format == FORMAT, f'its "format" is {_short(file_format)}, expected "{FORMAT}"')
    _require(
        type(version) is int and version == VERSION,
        f"its format version is {_short(version)}, this lexi_adapter reads {VERSION}; use the release that wrote it",
    )
    body = {key: value for key, value in document.items() if key not in ("format", "version")}
    _require_keys(body, Allocation, "")
    _require(isinstance(body["model"], Mapping), f"model is not an object: {_short(body['model'])}")
    _require_keys(body["model"], ModelIdentity, "model.")
    model = _build_model(body["model"])
    top_k = _build_top_k(body["top_k"], model)
    budget = _integer(body["budget"], "budget", 1)
    _require(budget == sum(top_k.values()), f"budget is {budget}, but top_k sums to {sum(top_k.values())}")
    _require(isinstance(body["made_by"], Mapping), f"made_by is not an object: {_short(body['made_by'])}")
    compensation, stated = None, None
    if "compensation" in body:
        compensation, stated = _build_compensation(body["compensation"], may_state=folder is None)
        _require("gate_exponent" in body, "compensation comes without a gate_exponent; write the allocation again")
    return Allocation(
        model=model,
        top_k=top_k,
        budget=budget,
        loss=_number(body["loss"], "loss"),
        optimal_loss=_number(body["optimal_loss"], "optimal_loss"),
        made_by=dict(body["made_by"]),
        gate_exponent=_build_exponent(body["gate_exponent"]) if "gate_exponent" in body else None,
        compensation=compensation,
        folder=stated if folder is None else folder,
    )


def _build_model(model: Mapping[str, Any]) -> ModelIdentity:
    layers = _integer(model["num_hidden_layers"], "model.num_hidden_layers", 1)
    experts = _integer(model["num_experts"], "model.num_experts", 1)
    top_k = _integer(model["top_k"], "model.top_k", 1)
    _require(top_k <= experts, f"model.top_k is {top_k}, more than the {experts} experts")
    moe_layers = model["moe_layers"]
    _require(isinstance(moe_layers, list | tuple) and moe_layers, f"model.moe_layers is {_short(moe_layers)}")
    moe_layers = tuple(_integer(layer, "a layer of model.moe_layers", 0) for layer in moe_layers)
    _require(
        list(moe_layers) == sorted(set(moe_layers)) and moe_layers[-1] < layers,
        f"model.moe_layers {_short(list(moe_layers))} must ascend within 0..{layers - 1}",
    )
    text_names = ("model_type", "router", "top_k_key", "router_sha256")
    texts = {name: _text(model[name], f"model.{name}") for name in text_names}
    _require(texts["router"].count("{}") == 1, f"model.router {texts['router']!r} must hold exactly one {{}}")
    _sha256(texts["router_sha256"], "model.router_sha256")
    return ModelIdentity(num_hidden_layers=layers, num_experts=experts, top_k=top_k, moe_layers=moe_layers, **texts)


def _build_top_k(value: Any, model: ModelIdentity) -> dict[int, int]:
    _require(isinstance(value, Mapping), f"top_k is not an object: {_short(value)}")
    keys = {str(key): key for key in value}
    for key in keys:
        canonical = key.isascii() and key.isdecimal() and len(key) < 10 and key == str(int(key))
        _require(canonical, f"key {_short(key)} of top_k is not a layer index")
    top_k = {int(key): _integer(value[keys[key]], f"top_k of layer {key}", 1) for key in sorted(keys, key=int)}
    missing = sorted(set(model.moe_layers) - set(top_k))
    extra = sorted(set(top_k) - set(model.moe_layers))
    _require(not missing, f"top_k lacks layers {_short(missing)} of model.moe_layers")
    _require(not extra, f"top_k has layers {_short(extra)}, which are not in model.moe_layers")
    for layer, k in top_k.items():
        _require(k <= model.top_k, f"top_k of layer {layer} is {k}, more than the model's own {model.top_k}")
    return top_k


def _build_exponent(value: Any) -> float:
    exponent = _number(value, "gate_exponent")
    expected = f"expected between 0 and {MAX_GATE_EXPONENT:g}; 1 hands all of the dropped mass on"
    _require(exponent <= MAX_GATE_EXPONENT, f"gate_exponent is {exponent}, {expected}")
    return exponent


def _build_compensation(value: Any, *, may_state: bool) -> tuple[CompensationFile, str | None]:
    """The compensation's file and, where the document may state it, its folder."""
    _require(isinstance(value, Mapping), f"compensation is not an object: {_short(value)}")
    folder = value.get("folder") if may_state else None
    if folder is not None:
        _require(isinstance(folder, str) and os.path.isabs(folder), f"compensation.folder {_short(folder)} has no root")
        value = {key: item for key, item in value.items() if key != "folder"}
    _require_keys(value, CompensationFile, "compensation.")
    file = _text(value["file"], "compensation.file")
    is_bare = file.isprintable() and not set(file) & set("/\\") and not file.startswith(".")
    _require(
        is_bare and file.endswith(".safetensors"),
        f"compensation.file is {_short(file)}, the name of a .safetensors file beside the allocation's expected",
    )
    rank = _integer(value["rank"], "compensation.rank", 1)
    return CompensationFile(file, rank, _sha256(value["sha256"], "compensation.sha256")), folder


def _require_keys(value: Mapping[str, Any], cls: type, prefix: str) -> None:
    known = {field.name for field in fields(cls)} - {"folder"}
    optional = {"gate_exponent", "compensation"}
    missing, extra = sorted(known - optional - set(value)), sorted(set(value) - known)
    _require(not missing, f"missing {', '.join(prefix + name for name in missing)}")
    _require(
        not extra, f"unknown {', '.join(prefix + str(name) for name in extra)[:200]}; it may need a newer lexi_adapter"
    )


def _integer(value: Any, what: str, least: int) -> int:
    valid = type(value) is int and value >= least
    _require(valid, f"{what} is {_short(value)}, an integer of at least {least} expected")
    return value


def _number(value: Any, what: str) -> float:
    exact = type(value) is int and value < 2**53
    valid = (exact or type(value) is float) and math.isfinite(value) and value >= 0
    _require(valid, f"{what} is {_short(value)}, a finite number of at least 0 expected")
    return float(value)


def _sha256(value: Any, what: str) -> str:
    valid = isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value)
    _require(valid, f"{what} {_short(value)} is not 64 lower-case hex digits")
    return value


def _text(value: Any, what: str) -> str:
    _require(isinstance(value, str) and value, f"{what} is {_short(value)}, a text expected")
    return value


def _short(value: Any) -> str:
    return repr(value)[:60]


def _require(condition: Any, message: str) -> None:
    if not condition:
        raise _Unfit(message)
