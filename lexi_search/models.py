"""One checkpoint described: its family, numbers, routing rule, and which tensors make up each MoE layer."""

import hashlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from lexi_search.architectures import ARCHITECTURES, Architecture, Routing, Selection
from lexi_search.artifacts import DTYPES, ModelIdentity
from lexi_search.checkpoint import Checkpoint
from lexi_search.errors import InputError

# Names of an expert's (gate, up, down) matrices where each expert has its own, and (gate_up, down) where all share two.
PER_EXPERT = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
FUSED = ("gate_up_proj", "down_proj")
WEIGHT_DTYPES = ("float32", "float16", "bfloat16", "float64")


class ExpertTensors(NamedTuple):
    """Names of one layer's expert tensors, in one of two layouts.

    `separate` has one (gate, up, down) per expert, each stored [out, in]. `fused` is (gate_up, down) with a leading
    expert axis, gate before up, stored [out, in] or, if `transposed`, [in, out].
    """

    separate: tuple[tuple[str, str, str], ...] = ()
    fused: tuple[str, str] | None = None
    transposed: bool = False


class LayerTensors(NamedTuple):
    """Names of one MoE layer's tensors: router [E, H], bias of the selection [E] or None, experts."""

    router: str
    bias: str | None
    experts: ExpertTensors


class Model(NamedTuple):
    """Everything that profiling needs to know of a checkpoint besides the weights themselves."""

    identity: ModelIdentity
    hidden_size: int
    activation: str
    routing: Routing
    tensors: Mapping[int, LayerTensors]  # decoder-layer index -> tensors, ascending

    @property
    def layers(self) -> tuple[int, ...]:
        """Decoder-layer indices of the MoE layers, ascending."""
        return self.identity.moe_layers


class _Config(NamedTuple):
    """The part of `config.json` that speaks of the language model, and how to name its keys in messages."""

    values: Mapping[str, Any]
    place: str  # file and, where nested, the key of that part

    def find_key(self, aliases: tuple[str, ...]) -> str:
        key = next((key for key in aliases if self.values.get(key) is not None), None)
        if key is None:
            raise InputError(f"{self.place}: {' or '.join(aliases)} is missing; is this a mixture-of-experts model?")
        return key

    def read_count(self, *aliases: str) -> int:
        key = self.find_key(aliases)
        value = self.values[key]
        if type(value) is not int or value < 1:
            raise InputError(f"{self.place}: {key} is {value!r}, expected a whole number of at least 1")
        return value

    def resolve(self, value: Any, default: Any) -> Any:
        """A string in an `Architecture` names a key; anything else is the value itself."""
        return self.values.get(value, default) if isinstance(value, str) else value

    def read_choice(self, key: str, known: Mapping[str, Any] | tuple[str, ...], default: str) -> str:
        value = self.values.get(key) or default
        if value not in known:
            raise InputError(f"{self.place}: {key} {value!r} is not known; known are {', '.join(known)}")
        return value


def describe(checkpoint: Checkpoint) -> Model:
    """Describe a checkpoint from its config and headers; of the data only the routers are read, to hash them.

    MoE layers are those that have a router tensor and an index below `num_hidden_layers`: checkpoints may carry extra
    prediction layers past it.

    Raises:
        InputError: unknown family, missing config key, k = 1, quantised weights, tensors missing or of wrong shape.
    """
    architecture = _find_architecture(checkpoint)
    config = _open_config(checkpoint, architecture)
    num_experts, top_k_key = config.read_count(*architecture.num_experts), config.find_key(architecture.top_k)
    top_k, num_layers = config.read_count(top_k_key), config.read_count("num_hidden_layers")
    hidden_size = config.read_count("hidden_size")
    if top_k == 1:
        raise InputError(f"{config.place}: {top_k_key} is 1: each token runs one expert, none can be saved")
    if top_k > num_experts:
        raise InputError(f"{config.place}: {top_k_key} is {top_k}, but there are only {num_experts} experts")
    selection = architecture.selections[config.read_choice("topk_method", architecture.selections, "greedy")]
    routing = _read_routing(config, architecture, selection, num_experts, top_k)
    pattern, layers = _find_routers(checkpoint, architecture, num_layers)
    tensors = {
        layer: _locate_tensors(checkpoint, pattern.format(layer), num_experts, hidden_size, selection.bias)
        for layer in layers
    }
    identity = ModelIdentity(
        model_type=architecture.model_type,
        num_hidden_layers=num_layers,
        num_experts=num_experts,
        top_k=top_k,
        moe_layers=layers,
        router=pattern,
        top_k_key=".".join(filter(None, (architecture.text_config, top_k_key))),
        router_sha256=_hash_routers(checkpoint, pattern, layers),
    )
    return Model(identity, hidden_size, str(config.values.get("hidden_act", "silu")), routing, tensors)


def find_dtype(checkpoint: Checkpoint, model: Model) -> str:
    """The element type of the experts as stored; float32 for one that a profile cannot be measured in (float64)."""
    experts = next(iter(model.tensors.values())).experts
    name = experts.fused[0] if experts.fused else experts.separate[0][0]
    stored = checkpoint.entries[name].dtype.name
    return stored if stored in DTYPES else "float32"


def _find_architecture(checkpoint: Checkpoint) -> Architecture:
    model_type = checkpoint.config.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        place, known = checkpoint.folder / "config.json", ", ".join(sorted(ARCHITECTURES))
        raise InputError(f"{place}: model_type {model_type!r} is not known; known are {known}")
    return ARCHITECTURES[model_type]


def _open_config(checkpoint: Checkpoint, architecture: Architecture) -> _Config:
    place, key = str(checkpoint.folder / "config.json"), architecture.text_config
    values = checkpoint.config.get(key) if key else checkpoint.config
    if not isinstance(values, dict):
        raise InputError(f"{place}: {key} is missing or not an object")
    if "quantization_config" in checkpoint.config or "quantization_config" in values:
        raise InputError(f"{place}: the weights are quantised; give the checkpoint in bf16, fp16 or fp32")
    return _Config(values, f"{place}, {key}" if key else place)


def _read_routing(
    config: _Config, architecture: Architecture, selection: Selection, num_experts: int, top_k: int
) -> Routing:
    routing = Routing(
        scoring=config.read_choice("scoring_func", ("softmax", "sigmoid"), "softmax"),
        renormalize=bool(config.resolve(architecture.renormalize, False)),
        scale=float(config.resolve(architecture.scale, 1.0)),
    )
    if selection.group_score is None:
        return routing
    num_groups, topk_groups = config.read_count("n_group"), config.read_count("topk_group")
    if num_experts % num_groups or topk_groups > num_groups:
        raise InputError(f"{config.place}: n_group {num_groups}, topk_group {topk_groups} do not part {num_experts}")
    if topk_groups * (num_experts // num_groups) < top_k:
        raise InputError(f"{config.place}: topk_group {topk_groups} leaves fewer than {top_k} experts to choose from")
    return routing._replace(num_groups=num_groups, topk_groups=topk_groups, group_score=selection.group_score)


def _find_routers(checkpoint: Checkpoint, architecture: Architecture, num_layers: int) -> tuple[str, tuple[int, ...]]:
    """The name pattern of the routers, and the indices of the layers that have one."""
    modules = "|".join(re.escape(module) for module in architecture.routers)
    router_name = re.compile(rf"(|.*\.)layers\.(\d+)\.({modules})\.weight")
    found: dict[str, set[int]] = {}
    for match in filter(None, map(router_name.fullmatch, checkpoint)):
        prefix, layer, module = match.groups()
        if int(layer) < num_layers:
            found.setdefault(f"{prefix}layers.{{}}.{module}.weight", set()).add(int(layer))
    if not found:
        wanted = " or ".join(f"layers.N.{module}.weight" for module in architecture.routers)
        raise InputError(f"{checkpoint.folder}: no router tensor ({wanted}) in any layer; is this model dense?")
    if len(found) > 1:
        raise InputError(f"{checkpoint.folder}: routers under several names: {', '.join(sorted(found))}")
    [(pattern, layers)] = found.items()
    return pattern, tuple(sorted(layers))


def _locate_tensors(
    checkpoint: Checkpoint, router: str, num_experts: int, hidden_size: int, has_bias: bool
) -> LayerTensors:
    _require_shape(checkpoint, router, (num_experts, hidden_size))
    bias = router.removesuffix("weight") + "e_score_correction_bias" if has_bias else None
    if bias:
        _require_shape(checkpoint, bias, (num_experts,))
    stem = router.removesuffix("gate.weight") + "experts."
    fused = (stem + FUSED[0], stem + FUSED[1])
    if fused[0] in checkpoint or fused[1] in checkpoint:
        return LayerTensors(router, bias, _check_fused(checkpoint, fused, num_experts, hidden_size))
    names = next((names for names in PER_EXPERT if f"{stem}0.{names[0]}.weight" in checkpoint), PER_EXPERT[0])
    gate, up, down = names
    separate = tuple(
        (f"{stem}{e}.{gate}.weight", f"{stem}{e}.{up}.weight", f"{stem}{e}.{down}.weight") for e in range(num_experts)
    )
    width = _require_shape(checkpoint, separate[0][0], (None, hidden_size))[0]
    for expert in separate:
        for name, shape in zip(expert, ((width, hidden_size), (width, hidden_size), (hidden_size, width)), strict=True):
            _require_shape(checkpoint, name, shape)
    return LayerTensors(router, bias, ExpertTensors(separate=separate))


def _check_fused(checkpoint: Checkpoint, names: tuple[str, str], num_experts: int, hidden_size: int) -> ExpertTensors:
    """Tell the orientation from both shapes: one alone is ambiguous where gate and up are as wide as the model."""
    gate_up, down = (_require_shape(checkpoint, name, (num_experts, None, None))[1:] for name in names)
    for transposed in (False, True):
        (double, inner), (outer, width) = (gate_up[::-1], down[::-1]) if transposed else (gate_up, down)
        if inner == outer == hidden_size and double == 2 * width:
            return ExpertTensors(fused=names, transposed=transposed)
    shapes = f"{names[0]} {list(gate_up)} and {names[1]} {list(down)}"
    raise InputError(f"{checkpoint.entries[names[0]].file}: {shapes} per expert do not fit hidden_size {hidden_size}")


def _require_shape(checkpoint: Checkpoint, name: str, shape: tuple[int | None, ...]) -> tuple[int, ...]:
    """Check that a tensor is there, of a plain float type, and of this shape (None: any extent); return its shape."""
    entry = checkpoint.entries.get(name)
    if entry is None:
        raise InputError(f"{checkpoint.folder}: tensor {name} is missing; is the download complete?")
    if entry.dtype.name not in WEIGHT_DTYPES:
        raise InputError(f"{entry.file}: tensor {name} is {entry.dtype.name}; known are {', '.join(WEIGHT_DTYPES)}")
    fits = len(entry.shape) == len(shape) and all(b in (None, a) for a, b in zip(entry.shape, shape, strict=True))
    if not fits or 0 in entry.shape:
        wanted = ", ".join("any" if extent is None else str(extent) for extent in shape)
        raise InputError(f"{entry.file}: tensor {name} has shape {list(entry.shape)}, expected [{wanted}]")
    return entry.shape


def _hash_routers(checkpoint: Checkpoint, pattern: str, layers: tuple[int, ...]) -> str:
    digest = hashlib.sha256()
    for layer in layers:
        digest.update(checkpoint[pattern.format(layer)].tobytes())
    return digest.hexdigest()
