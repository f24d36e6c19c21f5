"""A profile: the loss of every MoE layer at every k, with standard errors, and how it was measured.

Parts of a profile, measured separately, are merged into one: the same bytes as if one run had measured it all.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from lexi_search.artifacts.codec import require, require_gate_exponent, require_loss, short
from lexi_search.artifacts.compensation import CompensationFile
from lexi_search.artifacts.files import json_bytes
from lexi_search.artifacts.identity import ModelIdentity
from lexi_search.errors import InputError

DTYPES = ("float32", "bfloat16", "float16")
LARGEST = 1e15  # of losses: sums of their squares over layers are finite in float32
# The kinds of loss that a search may minimise, and the field of `LayerLoss` that each is computed from.
LOSS_KINDS = {
    "frobenius": "frobenius",
    "rms": "rms",
    "squared": "rms",
    "relative": "relative",
    "divergence": "divergence",
    "increase": "increase",
}


@dataclass(frozen=True)
class ProfileSettings:
    """The settings of a measurement: `batch` sequences of `length` tokens per iteration, drawn as `input` says.

    Iterations stop when every relative standard error is at most `relative_error`, or at `max_samples` tokens. The
    reference of all losses is the output at `max_k`; where it is None, as in most files, at the model's own k. With a
    `control_variate` of n, n times as many tokens went through the router alone, to correct the means. With a
    `gate_exponent`, kept experts took over a part of the dropped ones' gate mass, as under allocations of the profile,
    and with a `compensation_rank` outputs were corrected by maps of that rank. With a `background_k` all other layers
    were at that k while the divergence of one was measured.
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
    compensation_rank: int | None = None
    background_k: int | None = None

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
        for name in ("compensation_rank", "background_k"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} is {value}, at least 1 expected")


def _require_losses(name: str, values: tuple[float, ...], count: int, *, signed: bool = False) -> None:
    require(len(values) == count >= 1, f"{name} has {len(values)} entries, frobenius has {count}")
    for k, value in enumerate(values, 1):
        require_loss(abs(value) if signed else value, f"{name} at k = {k}")
        require(abs(value) <= LARGEST, f"{name} at k = {k} is {value}, expected at most {LARGEST:g}; profile again")
    require(values[-1] == 0, f"{name} at the last k is {values[-1]}, 0 expected")


@dataclass(frozen=True)
class LayerLoss:
    """The losses of one layer at every k, as tuples whose entry j is for k = j + 1; the last is 0.

    The last k is the model's own, or the profile's `max_k`.

    `frobenius` is the paper's number (section 3.1, Algorithm 1): the mean over iterations of ||Y_k - Y_base||_F for X
    of shape [batch, length, hidden]. `rms` is the root mean square over tokens of ||y_k - y_base||, which does not
    depend on batch and length. Both in units of the layer's output.

    The others need the model's own hidden states as input, or stand-ins for them. `relative` is the mean over tokens of
    ||y_k - y_base||^2 / ||h||^2, with h the residual stream that the layer's output was added to. With this layer alone
    at k, `divergence` is the Kullback-Leibler divergence of the model's next-token distribution from the unreduced
    model's, and `increase` is the increase of its cross-entropy on a text, both in nats per token; an increase may be
    negative. With all others at a `background_k`, `divergence` is that at k less that at the layer's own, or 0 if
    that is more. Each has its standard error.
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

    def __repr__(self) -> str:
        held = [name for name in dict.fromkeys(LOSS_KINDS.values()) if getattr(self, name) is not None]
        ends = ", ".join(f"{name} {getattr(self, name)[0]:.3g} at k = 1" for name in held)
        return f"<LayerLoss at {len(self.frobenius)} values of k on {self.samples} tokens: {ends}>"

    def __post_init__(self) -> None:
        require(self.iterations >= 1, f"iterations is {self.iterations}, at least 1 expected")
        for name in dict.fromkeys(LOSS_KINDS.values()):
            values, errors = getattr(self, name), getattr(self, f"{name}_stderr")
            require((values is None) == (errors is None), f"one of {name} and {name}_stderr is missing")
            if values is not None:
                _require_losses(name, values, len(self.frobenius), signed=name == "increase")
                _require_losses(f"{name}_stderr", errors, len(self.frobenius))


@dataclass(frozen=True)
class Profile:
    """The loss of every profiled layer at every k. `layers` may cover a part of `model.moe_layers`.

    `compensation` names the file of the corrections with which the losses were measured, at every k below the last.
    """

    model: ModelIdentity
    settings: ProfileSettings
    layers: Mapping[int, LayerLoss]
    made_by: Mapping[str, Any]
    compensation: CompensationFile | None = None

    def __post_init__(self) -> None:
        if self.compensation is not None:
            ranks = self.compensation.rank, self.settings.compensation_rank
            require(self.settings.gate_exponent is not None, "compensation without a gate_exponent in settings")
            require(ranks[0] == ranks[1], f"compensation rank is {ranks[0]}, settings.compensation_rank {ranks[1]}")
        require(self.layers, "the profile has no layers")
        extra = sorted(set(self.layers) - set(self.model.moe_layers))
        require(not extra, f"layers {short(extra)} are not among the model's moe_layers")
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

    def __repr__(self) -> str:
        held = ", ".join(self.loss_kinds)
        where = f"{len(self.layers)} of {len(self.model.moe_layers)} MoE layers, k from 1 to {self.max_k}"
        return f"<Profile of {self.model.model_type}: {where}, input {self.settings.input!r}, losses {held}>"

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
    def text(self) -> str:
        """The text that it was measured on, if somebody gave one, in words; else empty."""
        if self.settings.input != "text":
            return ""
        name = self.made_by.get("text_sha256", self.made_by.get("tokens_sha256", ""))
        return (
            f"on {min(loss.samples for loss in self.layers.values())} tokens of a given text, SHA-256 {str(name)[:12]}"
        )

    @property
    def default_loss(self) -> str:
        """The kind that a search minimises by default: the divergence of the whole model if that was measured, else
        the paper's norm."""
        return "divergence" if "divergence" in self.loss_kinds else "frobenius"

    def losses(self, kind: str, *, normalised: bool = False) -> tuple[tuple[float, ...], ...]:
        """The loss table of a search, [layers, top_k], layers ascending; column j is k = j + 1.

        `kind` is a loss of `LayerLoss` ("frobenius" is the paper's norm) or "squared", the square of `rms`, which is
        convex in k. An increase below zero counts as zero. If `normalised`, losses are divided by the largest in the
        table. InputError if the profile does not hold that kind.
        """
        rows = self._read(kind, "")
        if kind == "squared":
            rows = tuple(tuple(value * value for value in row) for row in rows)
        rows = tuple(tuple(max(value, 0.0) for value in row) for row in rows)
        largest = max(map(max, rows))
        return tuple(tuple(value / largest for value in row) for row in rows) if normalised and largest else rows

    def errors(self, kind: str) -> tuple[tuple[float, ...], ...]:
        """The standard error of each entry of `losses(kind)`; for squares by the delta method."""
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


class Header(NamedTuple):
    """Everything in a profile but its layers; equal in all parts of one profile."""

    model: ModelIdentity
    settings: ProfileSettings
    made_by: Mapping[str, Any]

    def to_document(self) -> dict[str, dict[str, Any]]:
        """The header as a JSON object, as another process would read it."""
        parts = asdict(self.model), asdict(self.settings), dict(self.made_by)
        return json.loads(json_bytes(dict(zip(self._fields, parts, strict=True))))


def read_header(profile: Profile) -> Header:
    return Header(profile.model, profile.settings, profile.made_by)


def merge(parts: Mapping[str, Profile]) -> Profile:
    """One profile with the layers of all `parts` (name, such as that of a file -> profile).

    It names no corrections: those of the parts are in files of their own.

    Raises:
        InputError: parts of different models, settings or makers; a layer that two parts have with different losses.
    """
    (first, whole), *others = parts.items()
    owners = dict.fromkeys(whole.layers, first)
    layers = dict(whole.layers)
    for name, part in others:
        if difference := find_difference(read_header(part).to_document(), read_header(whole).to_document()):
            raise InputError(f"{name}: {difference} in {first}; only parts of one profile can be merged")
        for layer, loss in part.layers.items():
            if layers.setdefault(layer, loss) != loss:
                raise InputError(f"{name}: layer {layer} differs from that in {owners[layer]}; leave one of them out")
            owners.setdefault(layer, name)
    return replace(whole, layers=dict(sorted(layers.items())), compensation=None)


def find_difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """The first difference between two headers, such as "settings.seed is 1, not 0 as"; None where they are equal."""
    left, right = _flatten(ours), _flatten(theirs)
    for name in left | right:
        if left.get(name) != right.get(name):
            return f"{name} is {_short(left.get(name))}, not {_short(right.get(name))} as"
    return None


def find_missing(profile: Profile) -> tuple[int, ...]:
    """The model's MoE layers that the profile lacks, ascending."""
    return tuple(layer for layer in profile.model.moe_layers if layer not in profile.layers)


def format_layers(layers: Sequence[int]) -> str:
    """Ascending layer indices in the form of `--layers`: (0, 1, 2, 5) is "0:2,5"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1][1:] = [layer]
        else:
            runs.append([layer])
    return ",".join(":".join(map(str, run)) for run in runs)


def _flatten(header: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{part}.{key}": value for part in Header._fields for key, value in sorted(header[part].items())}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
