"""One checkpoint described: its family, numbers, routing rule, and which tensors make up each MoE layer."""

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from lexi_search.architectures import ARCHITECTURES, Activation, Architecture, Routing, Selection
from lexi_search.artifacts import DTYPES, ModelIdentity
from lexi_search.checkpoint import Checkpoint
from lexi_search.errors import InputError
from lexi_search.formats import Tensors
from lexi_search.layouts import LayerTensors, find_routers, locate_tensors


class Model(NamedTuple):
    """Everything that profiling needs to know of a checkpoint besides the weights themselves."""

    identity: ModelIdentity
    hidden_size: int
    activation: Activation
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
    stored = Tensors(checkpoint)
    pattern, layers = find_routers(stored, architecture, num_layers)
    tensors = {
        layer: locate_tensors(stored, pattern.format(layer), num_experts, hidden_size, selection.bias)
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
    activation = Activation(str(config.values.get("hidden_act", "silu")))
    return Model(identity, hidden_size, activation, routing, tensors)


def find_dtype(checkpoint: Checkpoint, model: Model) -> str:
    """The element type of the experts as stored; float32 for one that a profile cannot be measured in (float64)."""
    experts = next(iter(model.tensors.values())).experts
    name = experts.fused[0] if experts.fused else experts.separate[0][0]
    stored = Tensors(checkpoint)[name].dtype.name
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


def _hash_routers(checkpoint: Checkpoint, pattern: str, layers: tuple[int, ...]) -> str:
    digest = hashlib.sha256()
    for layer in layers:
        digest.update(checkpoint[pattern.format(layer)].tobytes())
    return digest.hexdigest()
