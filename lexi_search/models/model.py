"""The description of one checkpoint: its family, sizes, routing rule, and the tensors of each MoE layer."""

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

from lexi_search.artifacts.codec import short
from lexi_search.artifacts.identity import ModelIdentity
from lexi_search.artifacts.profile import DTYPES
from lexi_search.checkpoint.config import Config, Key
from lexi_search.checkpoint.reader import Checkpoint
from lexi_search.errors import InputError
from lexi_search.layers.spec import Activation, Routing
from lexi_search.models.families.config import read_config
from lexi_search.models.families.moe import Architecture
from lexi_search.models.families.refused import REFUSED
from lexi_search.models.moe_families import ARCHITECTURES
from lexi_search.models.moe_tensors import LayerTensors, find_routers, locate_tensors


class Model(NamedTuple):
    """Everything that profiling needs to know about a checkpoint besides the weights."""

    identity: ModelIdentity
    hidden_size: int
    activation: Activation
    routing: Routing
    tensors: Mapping[int, LayerTensors]  # decoder-layer index -> tensors, ascending; also of layers without a k
    max_k: int | None = None  # the largest k to measure, where that is not the model's own

    @property
    def top_k(self) -> int:
        """The largest k that is measured; its output is the reference for all smaller k."""
        return self.max_k or self.identity.top_k

    @property
    def layers(self) -> tuple[int, ...]:
        """Decoder-layer indices of the MoE layers that have a k to choose, ascending."""
        return self.identity.moe_layers


def describe(checkpoint: Checkpoint, *, max_k: int | None = None, gate_exponent: float | None = None) -> Model:
    """The description of a checkpoint, from its config and headers; only the routers are read, to hash them.

    MoE layers are those that have a router tensor and an index below `num_hidden_layers`: checkpoints may carry extra
    prediction layers past it. `max_k` is the largest k to measure, where that is more than the model's own.
    `gate_exponent` says how layers with fewer experts weigh them (see `Routing`).

    Raises:
        InputError: unknown family, missing config key, k = 1 without `max_k`, `max_k` below the model's own k or above
            the number of experts to choose from, a gate exponent where it has no effect, an unknown format, tensors
            that are missing or of wrong shape.
    """
    architecture = _find_architecture(checkpoint)
    config = read_config(checkpoint)
    num_experts, top_k_key = config.read_count(*architecture.num_experts), config.find_key(architecture.top_k)
    top_k, num_layers = config.read_count(top_k_key), config.count_layers()
    hidden_size = config.read_count("hidden_size")
    if top_k > num_experts:
        raise InputError(f"{config.place}: {top_k_key} is {top_k}, but there are only {num_experts} experts")
    if max_k is None and top_k == 1:
        raise InputError(
            f"{config.place}: {top_k_key} is 1: each token runs one expert, none can be saved; "
            "--input paper --max-k 2 profiles the layers with more than their own"
        )
    if gate_exponent is not None and architecture.routing.scales_input:
        raise InputError(f"{config.place}: scores scale the experts' inputs, so a gate exponent has nothing to act on")
    if gate_exponent is not None and max_k is not None:
        raise InputError("a gate exponent redistributes the gate weights of the model's own k: leave max_k out")
    if max_k is not None and not max(top_k, 2) <= max_k <= num_experts:
        raise InputError(f"{config.place}: max_k {max_k} is not between {max(top_k, 2)} and {num_experts}, the experts")
    routing = _read_routing(config, architecture, num_experts, max_k or top_k)._replace(exponent=gate_exponent)
    stored = checkpoint.tensors
    pattern, layers, fixed = find_routers(stored, architecture, num_layers)
    tensors = {
        layer: locate_tensors(
            stored,
            pattern.format(layer),
            num_experts,
            hidden_size,
            has_bias=routing.bias is not None,
            interleaved=architecture.interleaved,
            scales=architecture.scales,
            latent_size=read_latent_size(config, architecture),
            fixed_k=top_k if layer in fixed else None,
        )._replace(limit=read_limit(config, architecture.limits, layer))
        for layer in layers
    }
    identity = ModelIdentity(
        model_type=architecture.model_type,
        num_hidden_layers=num_layers,
        num_experts=num_experts,
        top_k=top_k,
        moe_layers=tuple(layer for layer in layers if layer not in fixed),
        router=pattern,
        top_k_key=".".join(filter(None, (config.path, top_k_key))),
        router_sha256=hash_routers(checkpoint, pattern, tuple(layer for layer in layers if layer not in fixed)),
    )
    activation = Activation(*map(config.resolve, architecture.activation))
    return Model(identity, hidden_size, activation, routing, tensors, max_k)


def find_dtype(checkpoint: Checkpoint, model: Model) -> str:
    """The element type of the experts as stored; float32 for one that a profile cannot be measured in (float64)."""
    experts = next(iter(model.tensors.values())).experts
    name = experts.fused[0] if experts.fused else experts.separate[0][0]
    stored = checkpoint.tensors[name].dtype.name
    return stored if stored in DTYPES else "float32"


def _find_architecture(checkpoint: Checkpoint) -> Architecture:
    model_type = checkpoint.config.get("model_type")
    if isinstance(model_type, str) and model_type in REFUSED:
        thing = f"models of model_type {model_type} are refused: {REFUSED[model_type]}"
        raise InputError(f"{checkpoint.folder / 'config.json'}: {thing}")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        place, known = checkpoint.folder / "config.json", ", ".join(sorted(ARCHITECTURES))
        raise InputError(f"{place}: model_type {short(model_type)} is not known; known are {known}")
    return ARCHITECTURES[model_type]


def _read_routing(config: Config, architecture: Architecture, num_experts: int, top_k: int) -> Routing:
    chosen = {}
    for key, known in architecture.choices.items():
        chosen |= known[config.read_choice(key, known)]
    rule = architecture.routing._replace(**chosen)
    if callable(rule.scale):
        rule = rule._replace(scale=rule.scale(config))
    routing = Routing(*map(config.resolve, rule))
    num_groups, topk_groups = routing.num_groups, routing.topk_groups
    least = 2 if num_groups > 1 and routing.group_score == "top2" else 1  # experts that a group needs for its score
    if not 1 <= topk_groups <= num_groups or num_experts % num_groups or num_experts // num_groups < least:
        raise InputError(
            f"{config.place}: n_group {num_groups}, topk_group {topk_groups} do not fit {num_experts} experts"
        )
    if topk_groups * (num_experts // num_groups) < top_k:
        raise InputError(f"{config.place}: topk_group {topk_groups} leaves fewer than {top_k} experts to choose from")
    return routing


def read_latent_size(config: Config, architecture: Architecture) -> int | None:
    """The size of the space that the experts work in, where that is not the hidden size."""
    key = architecture.latent
    return None if key is None or config.values.get(key) is None else config.read_count(key)


def read_limit(config: Config, key: str | None, layer: int) -> float | None:
    """The limit of a layer's activation in the config's list under `key`; 0 and null are none."""
    limits = config.values.get(key) if key else None
    if limits is None:
        return None
    if not isinstance(limits, list) or layer >= len(limits):
        raise InputError(f"{config.place}: {key} is {short(limits)}, expected a number for each layer")
    return config._replace(values={key: limits[layer]}).resolve(Key(key, 0.0)) or None


def hash_routers(checkpoint: Checkpoint, pattern: str, layers: tuple[int, ...]) -> str:
    """Hex SHA-256 over the stored bytes of these layers' routers; InputError where one is missing."""
    digest = hashlib.sha256()
    for layer in layers:
        name = pattern.replace("{}", str(layer))
        if name not in checkpoint:
            raise InputError(f"{checkpoint.folder}: no router {name}; is this the model that was profiled?")
        digest.update(checkpoint[name].tobytes())
    return digest.hexdigest()
