"""The files of LExI, a profile, an allocation and a cost table: what they hold, how they are checked, read, written.

All are JSON whose fields are those of the dataclasses below, plus "format" and "version". The bytes are canonical
(keys sorted as strings, indent 1, one trailing newline), so equal content is an equal file and an equal hash. An
object that exists is valid: every constructor checks its values, and reading also checks types and keys.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lexi_search import __version__
from lexi_search.documents import decode, encode, require, require_loss, short
from lexi_search.errors import InputError
from lexi_search.files import json_bytes, read_json_object, write_atomically

VERSION = 1
MAX_GATE_EXPONENT = 2.0  # at 1 all of the dropped mass is handed on; with far more, weights overflow
DTYPES = ("float32", "bfloat16", "float16")
# What a search may minimise, and the field of `LayerLoss` that it is read from.
LOSS_KINDS = {
    "frobenius": "frobenius",
    "rms": "rms",
    "squared": "rms",
    "relative": "relative",
    "divergence": "divergence",
    "increase": "increase",
}


@dataclass(frozen=True)
class ModelIdentity:
    """Which model a file speaks of. Profiles and allocations carry it, and whoever applies an allocation compares it.

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
        require(self.model_type, "model_type is empty")
        require(self.top_k_key, "top_k_key is empty")
        require(self.num_hidden_layers >= 1, f"num_hidden_layers is {self.num_hidden_layers}, at least 1 expected")
        require(
            1 <= self.top_k <= self.num_experts,
            f"top_k is {self.top_k}, expected between 1 and num_experts = {self.num_experts}",
        )
        require(self.moe_layers, "moe_layers is empty")
        ascending = all(a < b for a, b in zip(self.moe_layers, self.moe_layers[1:], strict=False))
        require(
            ascending and 0 <= self.moe_layers[0] and self.moe_layers[-1] < self.num_hidden_layers,
            f"moe_layers {list(self.moe_layers)} must ascend within 0..{self.num_hidden_layers - 1}",
        )
        require(self.router.count("{}") == 1, f"router {self.router!r} must hold exactly one {{}}")
        is_sha256 = len(self.router_sha256) == 64 and set(self.router_sha256) <= set("0123456789abcdef")
        require(is_sha256, f"router_sha256 {self.router_sha256!r} is not 64 lower-case hex digits")


@dataclass(frozen=True)
class ProfileSettings:
    """How a profile was measured: `batch` sequences of `length` tokens per iteration, drawn as `input` says.

    Iterations stop when every relative standard error is at most `relative_error`, or at `max_samples` tokens. Losses
    are relative to the output at `max_k`; where it is None, as in most files, at the model's own k. With
    `control_variate`, so many times as many tokens went through the router alone, to correct the means. With a
    `gate_exponent`, kept experts took over a part of the others' gate mass, as under allocations of the profile.
    """

    input: str
    seed: int
    batch: int
    length: int
    dtype: str
    relative_error: float
    max_samples: int
    max_k: int | None = None
    control_variate: int | None = None
    gate_exponent: float | None = None

    def __post_init__(self) -> None:
        require(self.input, "input is empty")
        require(self.dtype in DTYPES, f"dtype is {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        require(self.seed >= 0, f"seed is {self.seed}, at least 0 expected")
        for name in ("batch", "length", "max_samples"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}, at least 1 expected")
        require_loss(self.relative_error, "relative_error")
        if self.control_variate is not None:
            require(self.control_variate >= 1, f"control_variate is {self.control_variate}, at least 1 expected")
        if self.gate_exponent is not None:
            require_gate_exponent(self.gate_exponent)


@dataclass(frozen=True)
class LayerLoss:
    """How far one layer's output moves when it keeps k experts; entry j of each tuple is k = j + 1, the last is 0.

    The last k is the model's own, or the profile's `max_k`.

    `frobenius` is the paper's number (section 3.1, Algorithm 1): the mean over iterations of ||Y_k - Y_base||_F for X
    of shape [batch, length, hidden]. `rms` is the root mean square over tokens of ||y_k - y_base||, which does not
    depend on batch and length. Both in units of the layer's output.

    Where the model's own hidden states were the input, or stand-ins for them, there may be more. `relative` is the mean
    over tokens of ||y_k - y_base||^2 / ||h||^2, with h the residual stream that the layer's output was added to. Of the
    whole model's output with this layer alone at k, `divergence` is the Kullback-Leibler divergence from the model's
    own next-token distribution and `increase` that of the cross-entropy on a text, both in nats per token; an increase
    may be negative. Each has its standard error.
    """

    iterations: int
    samples: int
    frobenius: tuple[float, ...]
    frobenius_stderr: tuple[float, ...]
    rms: tuple[float, ...]
    rms_stderr: tuple[float, ...]
    relative: tuple[float, ...] | None = None
    relative_stderr: tuple[float, ...] | None = None
    divergence: tuple[float, ...] | None = None
    divergence_stderr: tuple[float, ...] | None = None
    increase: tuple[float, ...] | None = None
    increase_stderr: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        require(self.iterations >= 1, f"iterations is {self.iterations}, at least 1 expected")
        for name in dict.fromkeys(LOSS_KINDS.values()):
            values, errors = getattr(self, name), getattr(self, f"{name}_stderr")
            require((values is None) == (errors is None), f"one of {name} and {name}_stderr is missing")
            if values is not None:
                _require_losses(name, values, len(self.frobenius), signed=name == "increase")
                _require_losses(f"{name}_stderr", errors, len(self.frobenius))


def require_gate_exponent(value: float) -> None:
    """Raise InputError unless `value` is between 0 and `MAX_GATE_EXPONENT`."""
    require_loss(value, "gate_exponent")
    require(
        value <= MAX_GATE_EXPONENT,
        f"gate_exponent is {value}, expected between 0 and {MAX_GATE_EXPONENT:g}; 1 hands all of the dropped mass on",
    )


def _require_losses(name: str, values: tuple[float, ...], count: int, *, signed: bool = False) -> None:
    require(len(values) == count >= 1, f"{name} has {len(values)} entries, frobenius has {count}")
    for k, value in enumerate(values, 1):
        require_loss(abs(value) if signed else value, f"{name} at k = {k}")
    require(values[-1] == 0, f"{name} at the last k is {values[-1]}, 0 expected")


@dataclass(frozen=True)
class Profile:
    """The loss of every profiled layer at every k. `layers` may cover a part of `model.moe_layers`."""

    model: ModelIdentity
    settings: ProfileSettings
    layers: Mapping[int, LayerLoss]
    made_by: Mapping[str, Any]

    def __post_init__(self) -> None:
        require(self.layers, "the profile has no layers")
        extra = sorted(set(self.layers) - set(self.model.moe_layers))
        require(not extra, f"layers {extra} are not among the model's moe_layers")
        require(
            self.model.top_k <= self.max_k <= self.model.num_experts,
            f"max_k is {self.max_k}, expected between the model's own {self.model.top_k} and num_experts = "
            f"{self.model.num_experts}",
        )
        per_iteration = self.settings.batch * self.settings.length
        for layer, loss in self.layers.items():
            require(
                len(loss.frobenius) == self.max_k,
                f"layer {layer} has losses for {len(loss.frobenius)} values of k, {self.max_k} expected",
            )
            require(
                loss.samples == loss.iterations * per_iteration,
                f"layer {layer} has {loss.samples} samples, not iterations * batch * length = "
                f"{loss.iterations * per_iteration}",
            )

    @property
    def max_k(self) -> int:
        """The largest k that was measured, whose output is the reference of the losses."""
        return self.model.top_k if self.settings.max_k is None else self.settings.max_k

    @property
    def loss_kinds(self) -> tuple[str, ...]:
        """The kinds of loss that every layer has."""
        layers = self.layers.values()
        return tuple(kind for kind, name in LOSS_KINDS.items() if all(getattr(loss, name) for loss in layers))

    @property
    def default_loss(self) -> str:
        """The kind that a search minimises unless it is told: what the whole model loses if that is known, else the
        paper's norm."""
        return "divergence" if "divergence" in self.loss_kinds else "frobenius"

    def losses(self, kind: str, *, normalised: bool = False) -> tuple[tuple[float, ...], ...]:
        """The table that a search minimises over, [layers, top_k], layers ascending; column j is k = j + 1.

        A field of `LayerLoss` ("frobenius" is the paper's norm), or "squared", the square of `rms`, convex in k. An
        increase below zero counts as zero. If `normalised`, relative to the largest of the table. InputError if the
        profile does not hold that kind.
        """
        rows = self._read(kind, "")
        if kind == "squared":
            rows = tuple(tuple(value * value for value in row) for row in rows)
        rows = tuple(tuple(max(value, 0.0) for value in row) for row in rows)
        largest = max(map(max, rows))
        return tuple(tuple(value / largest for value in row) for row in rows) if normalised and largest else rows

    def errors(self, kind: str) -> tuple[tuple[float, ...], ...]:
        """The standard error of each entry of `losses(kind)`; of a square by the delta method."""
        errors = self._read(kind, "_stderr")
        if kind != "squared":
            return errors
        return tuple(
            tuple(2 * rms * error for rms, error in zip(*rows, strict=True))
            for rows in zip(self._read("rms", ""), errors, strict=True)
        )

    def _read(self, kind: str, suffix: str) -> tuple[tuple[float, ...], ...]:
        require(kind in LOSS_KINDS, f"loss kind {kind!r} is unknown, expected one of {', '.join(LOSS_KINDS)}")
        held, source = self.loss_kinds, self.settings.input
        require(kind in held, f"the profile, made with input {source!r}, holds {', '.join(held)}, no {kind}")
        return tuple(getattr(loss, LOSS_KINDS[kind] + suffix) for _, loss in sorted(self.layers.items()))


@dataclass(frozen=True)
class Allocation:
    """A top-k for every MoE layer, its sum (`budget`), its loss, and the smallest loss that the budget allows.

    Where layers may have more experts than the model's own k, `max_k` says how many at most.
    """

    model: ModelIdentity
    top_k: Mapping[int, int]
    budget: int
    loss: float
    optimal_loss: float
    made_by: Mapping[str, Any]
    gate_exponent: float | None = None
    max_k: int | None = None

    def __post_init__(self) -> None:
        missing = sorted(set(self.model.moe_layers) - set(self.top_k))
        extra = sorted(set(self.top_k) - set(self.model.moe_layers))
        require(not missing, f"top_k lacks layers {missing}")
        require(not extra, f"top_k has layers {extra}, which are not among the model's moe_layers")
        most, whose = (self.model.top_k, "the model's own") if self.max_k is None else (self.max_k, "max_k =")
        require(
            self.model.top_k <= most <= self.model.num_experts,
            f"max_k is {most}, expected between the model's own {self.model.top_k} and num_experts = "
            f"{self.model.num_experts}",
        )
        for layer, k in sorted(self.top_k.items()):
            require(1 <= k <= most, f"top_k of layer {layer} is {k}, expected between 1 and {whose} {most}")
        total = sum(self.top_k.values())
        require(self.budget == total, f"budget is {self.budget}, but top_k sums to {total}")
        require_loss(self.loss, "loss")
        require_loss(self.optimal_loss, "optimal_loss")
        if self.gate_exponent is not None:
            require_gate_exponent(self.gate_exponent)

    @property
    def gap(self) -> float | None:
        """How far the loss is above the optimum, relative to it; None where the optimum is zero and the loss is not."""
        if self.loss == self.optimal_loss:
            return 0.0
        return self.loss / self.optimal_loss - 1 if self.optimal_loss else None


@dataclass(frozen=True)
class ModelShape:
    """What a cost table knows of its model: times depend on shapes, not on weights."""

    model_type: str
    num_hidden_layers: int
    num_experts: int
    top_k: int
    moe_layers: tuple[int, ...]


@dataclass(frozen=True)
class StepTime:
    """Milliseconds of one engine step: outside the MoE layers, and of each MoE layer at k = 1, 2, ..."""

    other_ms: float
    layers: Mapping[int, tuple[float, ...]]

    def __post_init__(self) -> None:
        require_loss(self.other_ms, "other_ms")
        for layer, times in self.layers.items():
            for k, time in enumerate(times, 1):
                require_loss(time, f"the time of layer {layer} at k = {k}")
                require(time > 0, f"the time of layer {layer} at k = {k} is 0; a time that was measured is above 0")


@dataclass(frozen=True)
class CostTable:
    """What each k costs on one device, as `lexi-adapter latency` measures it; `steps` by the tokens in a step."""

    model: ModelShape
    device: str
    steps: Mapping[int, StepTime]
    made_by: Mapping[str, Any]

    def __post_init__(self) -> None:
        require(self.steps, "the cost table has no steps")
        for tokens, step in self.steps.items():
            require(
                sorted(step.layers) == sorted(self.model.moe_layers),
                f"the step of {tokens} tokens has layers {sorted(step.layers)}, not the model's moe_layers",
            )
            for layer, times in step.layers.items():
                require(
                    len(times) == self.model.top_k,
                    f"the step of {tokens} tokens has {len(times)} times for layer {layer}, the model's k is "
                    f"{self.model.top_k}",
                )


Artifact = Profile | Allocation | CostTable

_FORMATS = {"lexi-profile": Profile, "lexi-allocation": Allocation, "lexi-cost": CostTable}
_FORMAT_OF = {cls: name for name, cls in _FORMATS.items()}


def to_document(artifact: Artifact) -> dict[str, Any]:
    """The artifact as the JSON object that its file holds."""
    return {"format": _FORMAT_OF[type(artifact)], "version": VERSION, **encode(artifact)}


def to_bytes(artifact: Artifact) -> bytes:
    """The exact bytes of the artifact's file."""
    return json_bytes(to_document(artifact))


def sha256(artifact: Artifact) -> str:
    """Hex SHA-256 of the artifact's file."""
    return hashlib.sha256(to_bytes(artifact)).hexdigest()


def read_profile(path: str | os.PathLike[str]) -> Profile:
    """Read and check a profile file; InputError names the file and what is wrong with it."""
    return _read(path, "lexi-profile")


def read_allocation(path: str | os.PathLike[str]) -> Allocation:
    """Read and check an allocation file; InputError names the file and what is wrong with it."""
    return _read(path, "lexi-allocation")


def read_cost_table(path: str | os.PathLike[str]) -> CostTable:
    """Read and check a cost table file; InputError names the file and what is wrong with it."""
    return _read(path, "lexi-cost")


def read_artifact(path: str | os.PathLike[str]) -> Profile | Allocation:
    """Read and check a profile or an allocation, told apart by its "format"."""
    return _read(path, "lexi-profile", "lexi-allocation")


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
        require(found in formats, f"its format is {short(found)}, expected {' or '.join(map(repr, formats))}")
        version = document.pop("version", None)
        require(
            type(version) is int and version == VERSION,
            f"its format version is {short(version)}, lexi-search {__version__} reads {VERSION}; make the file again",
        )
        return decode(_FORMATS[found], document, "")
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
