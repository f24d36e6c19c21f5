"""The gate exponent in vLLM: a built layer's router gives its k experts the weights that the allocation asks for.

Applied only to layers whose k is smaller than the model's own, of an allocation with a gate exponent. Router, ids and
everything sized by top-k stay at k; only the weights change.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any, NoReturn

from lexi_adapter.errors import AdapterError, AllocationError
from lexi_adapter.serving.vllm_names import LARGEST, ORDERED_SCORES, ROUTERS, UNPROPORTIONAL_ROUTING

REMEDY = "search in a profile made with --compensation none"


def compensate_layer(layer: Any, name: str, top_k: int, own_top_k: int, exponent: float) -> None:
    """Apply the gate exponent to one built MoE layer, in place.

    Raises:
        AllocationError: no gate exponent can be applied to its router.
        AdapterError: its experts' kernel routes by itself.
    """
    if hasattr(layer, "router"):
        check_layer(layer, name)
        _compensate_router(layer.router, own_top_k, exponent)
    else:  # of OWN_BLOCKS, which hold their top-k themselves
        _compensate_block(layer, top_k, own_top_k, exponent)


def check_layer(layer: Any, name: str) -> None:
    """Raise AllocationError or AdapterError for a layer with a router, or with a kernel, that takes no exponent."""
    _check_router(layer.router, name)
    _check_kernel(layer.routed_experts, name)


def _check_router(router: Any, name: str) -> None:
    kind = type(router).__name__
    if kind not in ROUTERS:
        raise AllocationError(f"{name}: no gate exponent can be applied in a {kind}; {REMEDY}")
    custom = getattr(getattr(router, "custom_routing_function", None), "__qualname__", None)
    if custom in UNPROPORTIONAL_ROUTING:
        raise AllocationError(f"{name}: no gate exponent can be applied in {custom}; {REMEDY}")
    if getattr(router, "num_fused_shared_experts", 0):
        raise AllocationError(f"{name}: no gate exponent can be applied where shared experts are routed; {REMEDY}")


def _check_kernel(routed_experts: Any, name: str) -> None:
    # A monolithic kernel routes by itself and bypasses the router. Some methods become monolithic after loading only.
    def refuse(*_: Any, **__: Any) -> NoReturn:
        kind = type(routed_experts.quant_method).__name__
        raise AdapterError(
            f"{name}: the kernel of {kind} routes by itself and would ignore the gate exponent; "
            f"take another with --moe-backend triton, or {REMEDY}"
        )

    if routed_experts.quant_method.is_monolithic:
        refuse()
    routed_experts.forward_monolithic = refuse


def _compensate_router(router: Any, own_top_k: int, exponent: float) -> None:
    top_k, route, order = router.top_k, router._compute_routing, find_order(router)
    wide = widen(router, own_top_k)
    if order is None:
        from lexi_adapter.serving.kernels.gates import pick

        pick = fuse(pick)
    else:
        from lexi_adapter.serving.kernels.triton_gates import narrow

    def compensating(hidden_states: Any, router_logits: Any, indices_type: Any, **kwargs: Any) -> tuple[Any, Any]:
        weights, ids = wide._compute_routing(hidden_states, router_logits, indices_type, **kwargs)
        if order is not None:
            return narrow(weights, ids, top_k, exponent, ranked=order == LARGEST)
        _, kept = route(hidden_states, router_logits, indices_type, **kwargs)
        return pick(weights, ids, kept, exponent), kept

    compensating.gate_exponent = exponent
    router._compute_routing = compensating


def widen(router: Any, own_top_k: int) -> Any:
    """The router as the model has it, with its own k; it shares the selection bias, which is loaded later."""
    wide = copy.copy(router)
    wide.top_k = own_top_k
    return wide


def _compensate_block(block: Any, top_k: int, own_top_k: int, exponent: float) -> None:
    from lexi_adapter.serving.kernels.gates import rescale

    forward = block.forward

    def compensating(hidden_states: Any) -> Any:
        logits, _ = block.gate(hidden_states)
        return forward(hidden_states) * rescale(logits.float(), top_k, own_top_k, exponent).to(hidden_states.dtype)

    compensating.gate_exponent = exponent
    block.forward = compensating


def read_gate_exponent(layer: Any) -> float | None:
    """The gate exponent that a built MoE layer applies; None: it routes as the engine does."""
    routing = vars(layer.router).get("_compute_routing") if hasattr(layer, "router") else vars(layer).get("forward")
    return getattr(routing, "gate_exponent", None)


def find_order(router: Any) -> str | None:
    """Which of its own K experts the router would choose at top-k, as in `ROUTERS`; None where that is not certain."""
    from vllm.platforms import current_platform

    order = ROUTERS[type(router).__name__]
    if order is None or not current_platform.is_cuda() or router.scoring_func not in ORDERED_SCORES:
        return None
    return None if order == LARGEST and router.e_score_correction_bias is not None else order


@functools.cache
def fuse(function: Callable) -> Callable:
    """The function as one kernel on CUDA, where routers are opaque to vLLM's compiler; elsewhere itself."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return function
    import torch

    return torch.compile(function, dynamic=True, backend=current_platform.simple_compile_backend)
