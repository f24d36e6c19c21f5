"""Hooks where vLLM builds MoE layers, which give each layer its own top-k; used only where there is an allocation.

Differences between vLLM's versions and families are in `vllm_names`. Nothing here imports vLLM before it is called.
"""

import functools
import importlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

from lexi_adapter.allocation import KEY, Allocation, ModelIdentity, describe_run, read_allocation
from lexi_adapter.errors import AdapterError, AllocationError
from lexi_adapter.model.compensation import EXPORTED, read_corrections
from lexi_adapter.model.folder import READ_AS_STORED, check_routers, find_routers, has_weights
from lexi_adapter.serving.vllm_correction import adding, correct_layer, summing
from lexi_adapter.serving.vllm_gates import compensate_layer
from lexi_adapter.serving.vllm_names import (
    CUSTOM_ROUTING,
    FACTORY_MODULE,
    FACTORY_NAMES,
    FIXED_CHOICES,
    HOLDERS,
    OTHER_LOADERS,
    OWN_BLOCKS,
    ROUTING_AT_TOP_K,
    TABLE,
)

logger = logging.getLogger("vllm.lexi_adapter")  # a child of vLLM's logger, so that it prints as vLLM's do
SHORT = 12  # digits of a SHA-256 that name a compensation
UNCOMPARED = "LExI: the router weights of %s were not compared with the allocation's: %s"


@dataclass
class Build:
    """A model that is being built under an allocation, and its MoE layers made so far."""

    allocation: Allocation
    layers: dict[int, Any] = field(default_factory=dict)


_current: ContextVar[Build | None] = ContextVar("lexi_build", default=None)
_awaited: dict[str, ModelIdentity] = {}  # folder or hub id -> the model that an allocation expects of its weights


def hook(owner: Any, name: str, decorate: Callable[[Callable], Callable]) -> Callable:
    """Replace the function `owner.name` by `decorate(it)`, once; returns the function that is there now."""
    original = getattr(owner, name)
    if hasattr(original, "lexi_original"):
        return original
    replacement = functools.wraps(original)(decorate(original))
    replacement.lexi_original = original
    setattr(owner, name, replacement)
    return replacement


def hook_build() -> None:
    """Hook the MoE factory and the building of models in this process; calling it again changes nothing.

    Raises:
        AdapterError: this vLLM has no factory of a known name.
    """
    import vllm.model_executor.model_loader as loaders
    import vllm.model_executor.model_loader.utils as loader_module
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    factory_module = importlib.import_module(FACTORY_MODULE)
    name = next((name for name in FACTORY_NAMES if hasattr(factory_module, name)), None)
    if name is None:
        raise AdapterError(f"{FACTORY_MODULE} has none of {', '.join(FACTORY_NAMES)}: unknown vLLM")
    _replace_everywhere(hook(factory_module, name, _allocating))
    _replace_everywhere(hook(loader_module, "initialize_model", _verifying))
    hook(DefaultModelLoader, "_prepare_weights", _comparing)
    for other in OTHER_LOADERS:
        if hasattr(loaders, other):
            hook(getattr(loaders, other), "_prepare_weights", _leaving_out)


def _replace_everywhere(replacement: Any) -> None:
    # Models and loaders import these functions by name, some of them before the hook.
    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is replacement.lexi_original:
                setattr(module, name, replacement)


def _allocating(build_layer: Callable) -> Callable:
    """The factory (or a block's __init__), called with its layer's top-k while a model is being built."""
    signature = inspect.signature(build_layer)

    def allocating(*args: Any, **kwargs: Any) -> Any:
        build = _current.get()
        if build is None:
            return build_layer(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        layer = _find_layer(bound.arguments.get("prefix", ""))
        own = layer not in build.allocation.top_k and bound.arguments.get(FIXED_CHOICES) is not None
        if own or layer >= build.allocation.model.num_hidden_layers:  # a prediction layer past the decoder
            return build_layer(*args, **kwargs)
        bound.arguments["top_k"] = _choose_top_k(build, layer, bound.arguments)
        layer_made = build_layer(*bound.args, **bound.kwargs)
        build.layers[layer] = bound.arguments["self"] if "self" in bound.arguments else layer_made
        return layer_made

    return allocating


def _choose_top_k(build: Build, layer: int, arguments: Mapping[str, Any]) -> int:
    allocation, prefix = build.allocation, arguments["prefix"]
    if layer not in allocation.top_k:
        raise AllocationError(f"vLLM builds MoE layer {prefix}, but the allocation has no top-k for layer {layer}")
    if layer in build.layers:
        raise AdapterError(f"vLLM builds a second MoE layer with index {layer}, {prefix}: not supported")
    for name in ("top_k", "num_experts"):
        expected = getattr(allocation.model, name)
        if arguments[name] != expected:
            raise AllocationError(
                f"vLLM builds {prefix} with {name} = {arguments[name]}, but the allocation was made for {expected}"
            )
    top_k = allocation.top_k[layer]
    custom = [name for name in CUSTOM_ROUTING if arguments.get(name) is not None and not _keeps_top_k(arguments[name])]
    if custom and top_k != allocation.model.top_k:
        raise AdapterError(f"{prefix} routes by its own {custom[0]}: this adapter cannot give it top-k {top_k}")
    return top_k


def _keeps_top_k(routing: Any) -> bool:
    return getattr(routing, "__qualname__", None) in ROUTING_AT_TOP_K


def _verifying(initialize_model: Callable) -> Callable:
    """vLLM's `initialize_model`, which builds under the configuration's allocation and then checks every layer."""

    def verifying(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        model_config = kwargs.get("model_config") or vllm_config.model_config
        document = vllm_config.additional_config.get(KEY) if isinstance(vllm_config.additional_config, dict) else None
        # A draft model reuses the layer indices, and a language model inside another is part of its build.
        if document is None or model_config.runner_type == "draft" or _current.get() is not None:
            return initialize_model(vllm_config, *args, **kwargs)
        _hook_own_blocks(model_config)
        build = Build(read_allocation(document))
        token = _current.set(build)
        try:
            model = initialize_model(vllm_config, *args, **kwargs)
        finally:
            _current.reset(token)
        verify(build, model, _find_stage(vllm_config))
        _compensate(build, model, vllm_config.device_config.device)
        _awaited[model_config.model] = build.allocation.model
        if _is_first(vllm_config.parallel_config):
            logger.info("LExI allocation applied: %s", describe_run(build.allocation, read_top_k(model)))
            if reason := explain_uncompared(model_config.model, vllm_config.load_config.load_format):
                logger.warning(UNCOMPARED, model_config.model, reason)
        return model

    return verifying


def is_folder(model: str) -> bool:
    """Whether vLLM's `model` is a folder, whose weights can be compared before anything is built; else a hub id."""
    return Path(model).is_dir()


def explain_uncompared(model: str, load_format: str) -> str | None:
    """Why no router weights are compared with the allocation's; None where they are, or where all are random."""
    streamed = load_format == "runai_streamer" and not is_folder(model)  # by a loader of its own, from anywhere
    if load_format == "dummy" or (load_format in READ_AS_STORED and not streamed):
        return None
    return f"--load-format {load_format} reads what cannot be compared"


def _comparing(prepare_weights: Callable) -> Callable:
    """The default loader's search for its files, which fetches those of a hub id; then their routers are compared.

    It returns a tuple that begins with the folder and the files. A subfolder, or files by other patterns, are not the
    model's own checkpoint.
    """
    signature = inspect.signature(prepare_weights)

    def comparing(*args: Any, **kwargs: Any) -> Any:
        prepared = leave_out(prepare_weights(*args, **kwargs))
        asked = signature.bind(*args, **kwargs).arguments
        model = asked["model_name_or_path"]
        others = (asked.get("subfolder"), asked.get("allow_patterns_overrides"))
        if model in _awaited and others == (None, None):
            check_files(_awaited[model], Path(prepared[0]), prepared[1])
        return prepared

    return comparing


def _leaving_out(prepare_weights: Callable) -> Callable:
    return lambda *args, **kwargs: leave_out(prepare_weights(*args, **kwargs))


def leave_out(prepared: Any) -> Any:
    """What a loader's search found, a list of files or a tuple with one, without the compensation of an export."""
    if isinstance(prepared, tuple):
        return tuple(map(leave_out, prepared))
    return [file for file in prepared if Path(file).name != EXPORTED] if isinstance(prepared, list) else prepared


def check_files(model: ModelIdentity, folder: Path, files: Sequence[str]) -> None:
    """Check the routers in the files of a folder that vLLM is about to read.

    Raises:
        AllocationError: they are another model's, or vLLM leaves their files out for others.
    """
    if not has_weights(folder):
        logger.warning(UNCOMPARED, folder, "it holds no safetensors")
        return
    check_routers(model, folder)
    read = {Path(file).name for file in files}
    left_out = sorted({router.path.name for router in find_routers(model, folder).values()} - read)
    if left_out:
        raise AllocationError(
            f"{folder}: vLLM reads {', '.join(sorted(read)[:3])} and not {left_out[0]}, of which the allocation was "
            "made; serve with --load-format hf, or take the other files away"
        )


def _hook_own_blocks(model_config: Any) -> None:
    from vllm.model_executor.model_loader.utils import get_model_architecture

    get_model_architecture(model_config)  # imports the model's module
    for module, name in OWN_BLOCKS:
        if module in sys.modules:
            hook(getattr(sys.modules[module], name), "__init__", _allocating)


def _find_stage(vllm_config: Any) -> range:
    """The decoder layers of this worker's pipeline stage."""
    return range(*vllm_config.model_config.get_layers_start_end_indices(vllm_config.parallel_config))


def verify(build: Build, model: Any, stage: range) -> None:
    """Check that a built model's MoE layers in `stage` are the allocation's, and that each holds its top-k everywhere.

    Raises:
        AllocationError: layers of the allocation were not built.
        AdapterError: a layer was built without the allocation, or holds another top-k; the message names the first.
    """
    name = type(model).__name__
    missing = sorted(layer for layer in build.allocation.top_k if layer in stage and layer not in build.layers)
    if missing:
        raise AllocationError(
            f"{name}: vLLM builds no MoE layer that this adapter knows for layers {missing} of the allocation"
        )
    known = {id(layer_made) for layer_made in build.layers.values()}
    for path, module, _ in _find_moe_layers(model):
        if id(module) not in known and _find_layer(path) < build.allocation.model.num_hidden_layers:
            raise AdapterError(f"{name}: MoE layer {path} was built around the allocation; not supported")
    for layer, layer_made in build.layers.items():
        top_k, holders = build.allocation.top_k[layer], find_holders(layer_made)
        if not holders:
            raise AdapterError(f"{name}: layer {layer} is a {type(layer_made).__name__}: not supported")
        for holder in holders:
            held = attrgetter(holder)(layer_made)
            if held != top_k:
                raise AdapterError(f"{name}: layer {layer} has {holder} = {held}, not the allocation's {top_k}")


def _compensate(build: Build, model: Any, device: Any) -> None:
    allocation = build.allocation
    own_top_k, exponent = allocation.model.top_k, allocation.gate_exponent
    if exponent is None:
        return
    corrections = read_corrections(allocation)
    if corrections:
        _hook_output()
    for layer, layer_made in build.layers.items():
        if (top_k := allocation.top_k[layer]) < own_top_k:
            name = f"{type(model).__name__}: layer {layer}"
            if corrections:
                whence = {"source": allocation.compensation.sha256[:SHORT], "device": device}
                correct_layer(layer_made, name, top_k, own_top_k, exponent, corrections[layer], **whence)
            else:
                compensate_layer(layer_made, name, top_k, own_top_k, exponent)


def _hook_output() -> None:
    from vllm.platforms import current_platform

    if current_platform.is_cuda():  # where the experts are opaque to vLLM's compiler
        from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
        from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP

        hook(TopKWeightAndReduceNoOP, "apply", adding)
        hook(TritonExperts, "moe_sum", summing)


def read_top_k(model: Any) -> dict[int, int]:
    """Decoder-layer index -> top-k that a live vLLM model's MoE layers run, read from their modules."""
    return {_find_layer(path): attrgetter(holders[0])(module) for path, module, holders in _find_moe_layers(model)}


def _find_moe_layers(model: Any) -> Iterator[tuple[str, Any, tuple[str, ...]]]:
    for path, module in model.named_modules():
        if holders := find_holders(module):
            yield path, module, holders


def find_holders(module: Any) -> tuple[str, ...]:
    """The attributes, by dotted name, in which a vLLM module holds its top-k; none if it is no MoE layer.

    Nor if it looks its experts up by token.
    """
    if getattr(getattr(module, "router", None), TABLE, None) is not None:
        return ()
    return next((HOLDERS[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in HOLDERS), ())


def _find_layer(name: str) -> int:
    indices = [part for part in name.split(".") if part.isdecimal()]
    if len(indices) != 1:
        raise AdapterError(f"MoE layer {name!r} has no single layer index in its name: not supported")
    return int(indices[0])


def _is_first(parallel_config: Any) -> bool:
    """Whether this worker is the first of its pipeline stage and of all replicas."""
    return parallel_config.rank % parallel_config.tensor_parallel_size == 0 == parallel_config.data_parallel_rank
