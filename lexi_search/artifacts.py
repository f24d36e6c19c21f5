"""The two files of LExI, a profile and an allocation: what they hold, how they are checked, read and written.

Both are JSON whose fields are those of the dataclasses below, plus "format" and "version". The bytes are canonical
(keys sorted as strings, indent 1, one trailing newline), so equal content is an equal file and an equal hash. An
object that exists is valid: every constructor checks its values, and reading also checks types and keys.
"""

import dataclasses
import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from lexi_search import __version__
from lexi_search.errors import InputError
from lexi_search.files import json_bytes, read_json_object, write_atomically

VERSION = 1
DTYPES = ("float32", "bfloat16", "float16")
LOSS_KINDS = ("frobenius", "rms", "squared")


@dataclass(frozen=True)
class ModelIdentity:
    """Which model a file speaks of. Both files carry it, and whoever applies an allocation compares it.

    `moe_layers` are the decoder-layer indices that have a router, ascending. `top_k` is the model's own k. `router` is
    the name pattern of the router tensors with one {} for the layer, `top_k_key` the dotted path of k in config.json,
    `router_sha256` the SHA-256 over the stored bytes of the router tensors in the order of `moe_layers`.
    """

    model_type: str
    num_hidden_layers: int
    num_experts: int
    top_k: int
    moe_layers: tuple[int, ...]
    router: str
    top_k_key: str
    router_sha256: str

    def __post_init__(self) -> None:
        _require(self.model_type, "model_type is empty")
        _require(self.top_k_key, "top_k_key is empty")
        _require(self.num_hidden_layers >= 1, f"num_hidden_layers is {self.num_hidden_layers}, at least 1 expected")
        _require(
            1 <= self.top_k <= self.num_experts,
            f"top_k is {self.top_k}, expected between 1 and num_experts = {self.num_experts}",
        )
        _require(self.moe_layers, "moe_layers is empty")
        ascending = all(a < b for a, b in zip(self.moe_layers, self.moe_layers[1:], strict=False))
        _require(
            ascending and 0 <= self.moe_layers[0] and self.moe_layers[-1] < self.num_hidden_layers,
            f"moe_layers {list(self.moe_layers)} must ascend within 0..{self.num_hidden_layers - 1}",
        )
        _require(self.router.count("{}") == 1, f"router {self.router!r} must hold exactly one {{}}")
        is_sha256 = len(self.router_sha256) == 64 and set(self.router_sha256) <= set("0123456789abcdef")
        _require(is_sha256, f"router_sha256 {self.router_sha256!r} is not 64 lower-case hex digits")


@dataclass(frozen=True)
class ProfileSettings:
    """How a profile was measured: `batch` sequences of `length` tokens per iteration, drawn as `input` says.

    Iterations stop when every relative standard error is at most `relative_error`, or at `max_samples` tokens.
    """

    input: str
    seed: int
    batch: int
    length: int
    dtype: str
    relative_error: float
    max_samples: int

    def __post_init__(self) -> None:
        _require(self.input, "input is empty")
        _require(self.dtype in DTYPES, f"dtype is {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        _require(self.seed >= 0, f"seed is {self.seed}, at least 0 expected")
        for name in ("batch", "length", "max_samples"):
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}, at least 1 expected")
        _require_loss(self.relative_error, "relative_error")


@dataclass(frozen=True)
class LayerLoss:
    """How far one layer's output moves when it keeps k experts; entry j of each tuple is k = j + 1, the last is 0.

    `frobenius` is the paper's number (section 3.1, Algorithm 1): the mean over iterations of ||Y_k - Y_base||_F for X
    of shape [batch, length, hidden]. `rms` is the root mean square over tokens of ||y_k - y_base||, which does not
    depend on batch and length. Both in units of the layer's output, each with its standard error.
    """

    iterations: int
    samples: int
    frobenius: tuple[float, ...]
    frobenius_stderr: tuple[float, ...]
    rms: tuple[float, ...]
    rms_stderr: tuple[float, ...]

    def __post_init__(self) -> None:
        _require(self.iterations >= 1, f"iterations is {self.iterations}, at least 1 expected")
        for name in ("frobenius", "frobenius_stderr", "rms", "rms_stderr"):
            values = getattr(self, name)
            _require(
                len(values) == len(self.frobenius) >= 1,
                f"{name} has {len(values)} entries, frobenius has {len(self.frobenius)}",
            )
            for k, value in enumerate(values, 1):
                _require_loss(value, f"{name} at k = {k}")
            _require(values[-1] == 0, f"{name} at the model's own k is {values[-1]}, 0 expected")


@dataclass(frozen=True)
class Profile:
    """The loss of every profiled layer at every k. `layers` may cover a part of `model.moe_layers`."""

    model: ModelIdentity
    settings: ProfileSettings
    layers: Mapping[int, LayerLoss]
    made_by: Mapping[str, Any]

    def __post_init__(self) -> None:
        _require(self.layers, "the profile has no layers")
        extra = sorted(set(self.layers) - set(self.model.moe_layers))
        _require(not extra, f"layers {extra} are not among the model's moe_layers")
        per_iteration = self.settings.batch * self.settings.length
        for layer, loss in self.layers.items():
            _require(
                len(loss.frobenius) == self.model.top_k,
                f"layer {layer} has losses for {len(loss.frobenius)} values of k, the model has {self.model.top_k}",
            )
            _require(
                loss.samples == loss.iterations * per_iteration,
                f"layer {layer} has {loss.samples} samples, not iterations * batch * length = "
                f"{loss.iterations * per_iteration}",
            )

    def losses(self, kind: str, *, normalised: bool = False) -> tuple[tuple[float, ...], ...]:
        """The table that a search minimises over, [layers, top_k], layers ascending; column j is k = j + 1.

        "frobenius" is the paper's norm, "rms" the root mean square per token, "squared" its square, convex in k. If
        `normalised`, relative to the largest of the table.
        """
        if kind not in LOSS_KINDS:
            raise InputError(f"loss kind {kind!r} is unknown, expected one of {', '.join(LOSS_KINDS)}")
        losses = [loss for _, loss in sorted(self.layers.items())]
        if kind == "squared":
            rows = tuple(tuple(value * value for value in loss.rms) for loss in losses)
        else:
            rows = tuple(getattr(loss, kind) for loss in losses)
        largest = max(map(max, rows))
        return tuple(tuple(value / largest for value in row) for row in rows) if normalised and largest else rows


@dataclass(frozen=True)
class Allocation:
    """A top-k for every MoE layer, its sum (`budget`), its loss, and the smallest loss that the budget allows."""

    model: ModelIdentity
    top_k: Mapping[int, int]
    budget: int
    loss: float
    optimal_loss: float
    made_by: Mapping[str, Any]
    gate_exponent: float | None = None

    def __post_init__(self) -> None:
        missing = sorted(set(self.model.moe_layers) - set(self.top_k))
        extra = sorted(set(self.top_k) - set(self.model.moe_layers))
        _require(not missing, f"top_k lacks layers {missing}")
        _require(not extra, f"top_k has layers {extra}, which are not among the model's moe_layers")
        for layer, k in sorted(self.top_k.items()):
            _require(
                1 <= k <= self.model.top_k,
                f"top_k of layer {layer} is {k}, expected between 1 and the model's own {self.model.top_k}",
            )
        total = sum(self.top_k.values())
        _require(self.budget == total, f"budget is {self.budget}, but top_k sums to {total}")
        _require_loss(self.loss, "loss")
        _require_loss(self.optimal_loss, "optimal_loss")
        if self.gate_exponent is not None:
            _require_loss(self.gate_exponent, "gate_exponent")

    @property
    def gap(self) -> float | None:
        """How far the loss is above the optimum, relative to it; None where the optimum is zero and the loss is not."""
        if self.loss == self.optimal_loss:
            return 0.0
        return self.loss / self.optimal_loss - 1 if self.optimal_loss else None


_FORMATS = {"lexi-profile": Profile, "lexi-allocation": Allocation}
_FORMAT_OF = {cls: name for name, cls in _FORMATS.items()}


def to_document(artifact: Profile | Allocation) -> dict[str, Any]:
    """The artifact as the JSON object that its file holds."""
    return {"format": _FORMAT_OF[type(artifact)], "version": VERSION, **_encode(artifact)}


def to_bytes(artifact: Profile | Allocation) -> bytes:
    """The exact bytes of the artifact's file."""
    return json_bytes(to_document(artifact))


def sha256(artifact: Profile | Allocation) -> str:
    """Hex SHA-256 of the artifact's file."""
    return hashlib.sha256(to_bytes(artifact)).hexdigest()


def read_profile(path: str | os.PathLike[str]) -> Profile:
    """Read and check a profile file; InputError names the file and what is wrong with it."""
    return _read(path, "lexi-profile")


def read_allocation(path: str | os.PathLike[str]) -> Allocation:
    """Read and check an allocation file; InputError names the file and what is wrong with it."""
    return _read(path, "lexi-allocation")


def read_artifact(path: str | os.PathLike[str]) -> Profile | Allocation:
    """Read and check either file, told apart by its "format"."""
    return _read(path, *_FORMATS)


def write_profile(path: str | os.PathLike[str], profile: Profile) -> None:
    """Write a profile file, whole or not at all; InputError where it cannot be written."""
    write_atomically(path, to_bytes(profile))


def write_allocation(path: str | os.PathLike[str], allocation: Allocation) -> None:
    """Write an allocation file, whole or not at all; InputError where it cannot be written."""
    write_atomically(path, to_bytes(allocation))


def _read(path: str | os.PathLike[str], *formats: str) -> Any:
    document = read_json_object(path)
    try:
        found = document.pop("format", None)
        _require(found in formats, f"its format is {_short(found)}, expected {' or '.join(map(repr, formats))}")
        version = document.pop("version", None)
        _require(
            type(version) is int and version == VERSION,
            f"its format version is {_short(version)}, lexi-search {__version__} reads {VERSION}; make the file again",
        )
        return _decode(_FORMATS[found], document, "")
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        pairs = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {name: _encode(item) for name, item in pairs if item is not None}
    if isinstance(value, Mapping):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_encode(item) for item in value]
    return value


def _decode(hint: Any, value: Any, where: str) -> Any:
    """`value`, as JSON has it, in the type `hint` says; InputError naming the place (`where`) if it is not that."""
    if dataclasses.is_dataclass(hint):
        return _decode_fields(hint, value, where)
    if get_origin(hint) is UnionType:
        return _decode(get_args(hint)[0], value, where)
    if get_origin(hint) is tuple:
        _require_type(value, list, where)
        return tuple(_decode(get_args(hint)[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if get_origin(hint) is Mapping:
        _require_type(value, dict, where)
        key_hint, item_hint = get_args(hint)
        if key_hint is str:
            return value
        return {_layer(key, where): _decode(item_hint, item, f"{where}.{key}") for key, item in value.items()}
    if hint is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    _require_type(value, hint, where)
    return value


def _decode_fields(cls: type, value: Any, where: str) -> Any:
    _require_type(value, dict, where or "the file")
    dotted = f"{where}." if where else ""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    optional = {name for name, field in fields.items() if field.default is not dataclasses.MISSING}
    missing = sorted(set(fields) - optional - set(value))
    extra = sorted(set(value) - set(fields))
    _require(not missing, f"missing {', '.join(dotted + name for name in missing)}")
    _require(not extra, f"unknown {', '.join(dotted + name for name in extra)}")
    hints = get_type_hints(cls)
    values = {name: _decode(hints[name], item, dotted + name) for name, item in value.items()}
    try:
        return cls(**values)
    except InputError as error:
        raise InputError(f"{where}: {error}" if where else str(error)) from error


def _layer(key: str, where: str) -> int:
    canonical = key.isascii() and key.isdecimal() and len(key) < 10 and str(int(key)) == key
    _require(canonical, f"key {_short(key)} of {where} is not a layer index")
    return int(key)


def _short(value: Any) -> str:
    return repr(value)[:40]


def _require_type(value: Any, expected: type, where: str) -> None:
    names = {int: "an integer", float: "a number", str: "a string", list: "a list", dict: "an object"}
    _require(type(value) is expected, f"{where} is not {names[expected]}: {_short(value)}")


def _require_loss(value: float, what: str) -> None:
    _require(math.isfinite(value) and value >= 0, f"{what} is {value}, a finite number of at least 0 expected")


def _require(condition: Any, message: str) -> None:
    if not condition:
        raise InputError(message)
