"""A live vLLM worker: change its MoE layers' k and experts, leave the layers out, count the tokens of each expert.

For measuring only; an allocation that is served goes in by the plugin, before the model is built. Every function takes
a worker first and is sent there by `LLM.collective_rpc`. On CUDA a MoE layer is opaque to torch.compile and reads its k
and its weights when it is called, so new ones need new CUDA graphs and nothing else. The graphs of each state are kept,
so going back to it costs nothing.
"""

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any

from lexi_adapter.errors import AdapterError, AllocationError
from lexi_adapter.serving.vllm_build import find_holders, read_top_k
from lexi_adapter.serving.vllm_correction import COMPUTE

# The method that computes a layer, in every supported version; replaced to leave the layer out.
FORWARD = "_forward_impl"
# A layer's weights, [experts, ., .], with the axis of the experts' width; and the attributes with their number.
WEIGHTS: Mapping[str, int] = {"w13_weight": 1, "w2_weight": 2}
NUMBERS = ("global_num_experts", "local_num_experts")
# Attributes that hold captured graphs: of every graph wrapper, and of the newer model runner's manager.
WRAPPER_GRAPHS, MANAGER, MANAGER_GRAPHS = "concrete_cudagraph_entries", "cudagraph_manager", "graphs"


def attempt(worker: Any, function: Callable[..., Any], args: Sequence[Any]) -> tuple[str | None, Any]:
    """The reason why `function(worker, *args)` is refused, or None; and its result.

    An AdapterError is returned as text: vLLM wraps exceptions on their way back, and leaves no type and no message.
    """
    try:
        return None, function(worker, *args)
    except AdapterError as error:
        return str(error), None


def switch(
    worker: Any,
    top_k: Mapping[int, int] | None,
    kept: Mapping[str, tuple[int, int]],
    compensated: bool | None = None,
) -> dict[int, int]:
    """Give this worker's MoE layers the k of `top_k`, or with None leave the layers out; returns their k now.

    A layer that is left out returns zeros, so that the time of everything else remains. `kept` says how many experts
    remain ("experts": kept, of) and how much of their width ("width": kept, of). Pruned layers use a part of the same
    memory in the smaller shape: for random weights only, any part of which is as good as another. `compensated` says of
    layers that were built with a gate exponent whether they have it, and their correction, or route as the engine does.

    Raises:
        AllocationError: `top_k` lacks one of this model's layers, or is not what compensated layers were built for.
        AdapterError: the layers cannot change while the engine runs.
    """
    layers = _find_layers(worker)
    hooks = {layer: _find_hooks(module) for layer, module in layers.items()}
    _check_switchable(worker, layers, compensated is None and [layer for layer, found in hooks.items() if found])
    missing = [layer for layer in layers if top_k is not None and layer not in top_k]
    if missing:
        raise AllocationError(f"there is no k for MoE layers {missing} of this model, only for {sorted(top_k)}")
    running = read_top_k(worker.get_model())
    built = vars(worker).setdefault("lexi_built", running)
    if compensated and (kept or any((top_k or {}).get(layer) != k for layer, k in built.items())):
        raise AllocationError(f"compensated layers keep the k that they were built for, {built}, and all experts")
    before = vars(worker).get("lexi_state") or _make_state(running, {}, compensated is not None)
    for layer, module in layers.items():
        _set_hooks(hooks[layer], there=bool(compensated))
        vars(module).pop(FORWARD, None)
        if top_k is None:
            setattr(module, FORWARD, _return_zeros)
        else:
            _set_top_k(module, top_k[layer])
        if kept or vars(module).get("lexi_unpruned"):
            _prune(module, kept)
    now = vars(worker)["lexi_state"] = _make_state(top_k, kept, bool(compensated))
    _use_graphs(worker, before, now)
    return read_top_k(worker.get_model())


def _make_state(
    top_k: Mapping[int, int] | None, kept: Mapping[str, tuple[int, int]], compensated: bool
) -> tuple[Any, ...]:
    parts = tuple(sorted((name, tuple(part)) for name, part in kept.items()))
    return top_k and tuple(sorted(top_k.items())), parts, compensated


def _find_layers(worker: Any) -> dict[int, Any]:
    model = worker.get_model()
    modules = (module for module in model.modules() if find_holders(module))
    return dict(zip(read_top_k(model), modules, strict=True))


def _find_hooks(module: Any) -> list[tuple[Any, str, Any]]:
    """The functions by which a layer weighs or corrects: owner, name, function. They are looked up once."""
    if "lexi_hooks" not in vars(module):
        places = [(getattr(module, "router", module), "_compute_routing"), (module, COMPUTE), (module, "forward")]
        there = [(owner, name, vars(owner).get(name)) for owner, name in places]
        vars(module)["lexi_hooks"] = [
            hook for hook in there if hasattr(hook[2], "gate_exponent") or hasattr(hook[2], "corrects")
        ]
    return vars(module)["lexi_hooks"]


def _set_hooks(hooks: Sequence[tuple[Any, str, Any]], *, there: bool) -> None:
    for owner, name, function in hooks:
        if there:
            setattr(owner, name, function)
        else:
            vars(owner).pop(name, None)


def _check_switchable(worker: Any, layers: Mapping[int, Any], exponents: Sequence[int] | bool = ()) -> None:
    from vllm.config import CompilationMode
    from vllm.platforms import current_platform

    if exponents:
        raise AdapterError(
            f"layer {exponents[0]} was built with a gate exponent and keeps its k; start an engine for it"
        )
    compiled = worker.vllm_config.compilation_config.mode != CompilationMode.NONE
    opaque = current_platform.is_cuda_alike() and all(hasattr(layer, FORWARD) for layer in layers.values())
    if compiled and not opaque:
        kind = type(next(iter(layers.values()))).__name__
        raise AdapterError(
            f"torch.compile fixed the k of every {kind} here: start an engine for each k, or compile nothing with "
            "--engine '{\"enforce_eager\": true}'"
        )


def _set_top_k(module: Any, top_k: int) -> None:
    for holder in find_holders(module):
        parents, _, name = holder.rpartition(".")
        setattr(attrgetter(parents)(module) if parents else module, name, top_k)


def _prune(module: Any, kept: Mapping[str, tuple[int, int]]) -> None:
    import torch

    experts = module.routed_experts
    if experts.expert_map is not None:
        raise AdapterError("experts that are spread over several cards are not pruned in place; start engines for it")
    unpruned = vars(module).setdefault("lexi_unpruned", {name: getattr(experts, name) for name in (*WEIGHTS, *NUMBERS)})
    (left, of), (narrow, wide) = kept.get("experts", (1, 1)), kept.get("width", (1, 1))
    number = unpruned["global_num_experts"] * left // of
    for name, axis in WEIGHTS.items():
        shape = list(unpruned[name].shape)
        shape[0], shape[axis] = number, shape[axis] * narrow // wide
        part = unpruned[name].data.flatten()[: math.prod(shape)].view(shape)
        setattr(experts, name, torch.nn.Parameter(part, requires_grad=False))
    for name in NUMBERS:
        setattr(experts, name, number)
    _set_routing(module.router, number=number if left != of else None)


def _set_routing(router: Any, **changes: Any) -> None:
    """Have a router choose among the first `number` experts, without those `dropped`; what is not named stays."""
    routing = vars(router).setdefault("lexi_routing", {})
    routing.update(changes)
    vars(router).pop("_compute_routing", None)
    if routing.get("number"):
        router._compute_routing = _route_among_first(router._compute_routing, routing["number"])
    if routing.get("dropped"):
        router._compute_routing = _route_without(router._compute_routing, routing["dropped"])


def _route_among_first(route: Any, number: int) -> Any:
    # As many logits as there are experts left, by a view: copying the right ones would take time that pruning saves.
    def routing(hidden_states: Any, router_logits: Any, *args: Any, **kwargs: Any) -> Any:
        tokens = router_logits.shape[0]
        return route(hidden_states, router_logits.flatten()[: tokens * number].view(tokens, number), *args, **kwargs)

    return routing


def _return_zeros(hidden_states: Any, router_logits: Any, shared_experts_input: Any, *_: Any, **__: Any) -> Any:
    import torch

    routed = torch.zeros_like(hidden_states)
    return routed if shared_experts_input is None else (torch.zeros_like(shared_experts_input), routed)


def _use_graphs(worker: Any, before: Any, now: Any) -> None:
    """Store the graphs of the state `before`, and restore or capture those of the state `now`."""
    state = vars(worker)
    owners = state.setdefault("lexi_graph_owners", _find_graph_owners(worker))
    kept = state.setdefault("lexi_graphs", {})
    kept[before] = [getattr(owner, name) for owner, name in owners]
    for (owner, name), graphs in zip(owners, kept.get(now) or [{} for _ in owners], strict=True):
        setattr(owner, name, graphs)
    if owners and now not in kept:
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(worker.vllm_config):
            worker.model_runner.capture_model()


def _find_graph_owners(worker: Any) -> list[tuple[Any, str]]:
    from vllm.compilation.cuda_graph import CUDAGraphWrapper

    if worker.vllm_config.model_config.enforce_eager:
        return []
    manager = getattr(worker.model_runner, MANAGER, None)
    wrappers = [(wrapper, WRAPPER_GRAPHS) for wrapper in CUDAGraphWrapper._all_instances]
    return wrappers + ([(manager, MANAGER_GRAPHS)] if manager is not None else [])


def draw_weights(worker: Any, seed: int) -> None:
    """Draw random weights whose experts matter: normal, scaled by fan-in; norms 1, biases 0. The same in every engine.

    vLLM's own are within 0.001, where experts add nothing and every k gives the same answer. Experts get twice the
    fan-in scale, so that their outputs outweigh the residual stream.
    """
    import torch

    for name, value in sorted(worker.get_model().named_parameters()):
        if value.ndim < 2:
            value.data.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            generator = torch.Generator(value.device).manual_seed(seed + zlib.crc32(name.encode()))
            scale = 2.0 if value.ndim == 3 else 1.0  # experts' weights are stacked
            value.data.normal_(0.0, scale * value.shape[-1] ** -0.5, generator=generator)


def watch(worker: Any, dropped: Mapping[int, list[int]]) -> None:
    """Count from now on how many tokens go to each expert, without the experts of `dropped[layer]`.

    Raises:
        AdapterError: a layer has no router, or the engine runs CUDA graphs, which bypass the Python router.
    """
    import torch

    if not worker.vllm_config.model_config.enforce_eager:
        raise AdapterError("CUDA graphs bypass the router that counts tokens; start the engine with enforce_eager")
    state = vars(worker)["lexi_counts"] = {}
    for layer, module in _find_layers(worker).items():
        if not hasattr(module, "router"):
            raise AdapterError(f"layer {layer} is a {type(module).__name__}, which routes by itself: not supported")
        counts: list[Any] = []
        state[layer] = counts
        router, experts = module.router, module.moe_config.num_experts
        router.set_capture_fn(
            lambda ids, counts=counts, experts=experts: counts.append(
                torch.bincount(ids.flatten().long(), minlength=experts)
            )
        )
        _set_routing(router, dropped=dropped.get(layer))


def _route_without(route: Any, experts: list[int]) -> Any:
    def routing(hidden_states: Any, router_logits: Any, *args: Any, **kwargs: Any) -> Any:
        logits = router_logits.clone()
        logits[:, experts] = float("-inf")
        return route(hidden_states, logits, *args, **kwargs)

    return routing


def read_counts(worker: Any) -> dict[int, list[list[int]]]:
    """Decoder layer -> [step][expert], the number of tokens in every engine step since `watch`."""
    return {layer: [count.tolist() for count in counts] for layer, counts in vars(worker)["lexi_counts"].items()}


def describe(worker: Any) -> dict[str, Any]:
    """The card, and the engine settings that decide its speed."""
    import torch
    from vllm.platforms import current_platform

    config = worker.vllm_config
    return {
        "device": torch.cuda.get_device_name() if current_platform.is_cuda_alike() else "cpu",
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "compilation": config.compilation_config.mode.name,
        "cuda_graphs": config.compilation_config.cudagraph_mode.name,
        "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
        "weights_gib": sum(value.nbytes for value in worker.get_model().parameters()) / 2**30,
        "top_k": read_top_k(worker.get_model()),
    }
