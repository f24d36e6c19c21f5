"""The correction in vLLM: a built layer adds B A phi + c to its routed experts' output, once for every token.

Everything happens in the one call in which a layer routes and computes its experts: the choice is made before that call
and goes in where it takes the router's logits, so nothing is kept between calls. On CUDA, A phi comes from the kernel
that weighs the experts, and the rest is added where the outputs of a token's experts are summed, in the place of that
sum, or where they are copied out of the workspace, in the place of that copy; elsewhere, in one more kernel.
"""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

from lexi_adapter.errors import AdapterError, AllocationError
from lexi_adapter.model.compensation import Correction
from lexi_adapter.serving.vllm_gates import check_layer, compensate_layer, find_order, fuse, widen
from lexi_adapter.serving.vllm_names import LARGEST, LOCAL_FINALIZE, SCORED_BY_SOFTMAX

REMEDY = "search in a profile made with --compensation exponent"
COMPUTE = "_apply_quant_method"  # the method that routes and computes the experts, in every supported version
LEAST_RANK = 16  # of the kernels; maps of lower rank are filled up with zeros
PARTS = ("A", "B", "c")  # held as buffers, so that vLLM keeps them when it sleeps and loads nothing into them


class Routed(NamedTuple):
    """A choice of experts on its way through vLLM's code, in the place of the logits that it was made from."""

    weights: Any
    ids: Any


@dataclass
class Pending:
    """What is to be added to the output of the experts that are being computed; `done` when it has been."""

    add: Callable[..., None]
    sums: Any
    B: Any
    c: Any
    done: bool = False

    def write(self, source: Any, output: Any) -> None:
        """Write the sum of `source` and what is to be added into `output`."""
        self.add(source, self.sums, self.B, self.c, output)
        self.done = True


# Of the call under way in this thread: each microbatch that vLLM overlaps with others runs in a thread of its own.
_pending: ContextVar[Pending | None] = ContextVar("lexi_pending", default=None)


def correct_layer(
    layer: Any,
    name: str,
    top_k: int,
    own_top_k: int,
    exponent: float,
    correction: Correction,
    *,
    source: str,
    device: Any,
) -> None:
    """Apply the gate exponent and the correction to one built MoE layer, in place. `source` says where it came from.

    Raises:
        AllocationError: its router, or the way that its output goes, takes none.
        AdapterError: its experts' kernel routes by itself, or its class is not known.
    """
    if not hasattr(layer, "router"):  # of OWN_BLOCKS, which hold their top-k themselves
        compensate_layer(layer, name, top_k, own_top_k, exponent)
        hold(layer, correction, scale=1.0, dtype=layer.params_dtype, device=device)
        _correct_block(layer, top_k, own_top_k, source)
        return
    if not hasattr(layer, COMPUTE):
        raise AdapterError(f"{name}: {type(layer).__name__} has no {COMPUTE}: unknown vLLM; {REMEDY}")
    if layer.routed_output_transform is not None:
        raise AllocationError(f"{name}: its experts' output is projected, which takes no compensation; {REMEDY}")
    check_layer(layer, name)
    choose = _make_choice(layer, top_k, own_top_k, exponent)
    compensate_layer(layer, name, top_k, own_top_k, exponent)
    hold(layer, correction, scale=layer.routed_scaling_factor, dtype=layer.moe_config.in_dtype, device=device)
    _pass_choices(layer.router)
    _correct_runner(layer, name, choose, source)


def hold(layer: Any, correction: Correction, *, scale: float, dtype: Any, device: Any) -> None:
    """Give a layer the buffers `lexi_A` [3 * experts, rank], `lexi_B` [rank, hidden] and `lexi_c` [hidden].

    `scale` is the factor by which the layer multiplies its output later: weights are smaller by it already.
    """
    import torch

    A, B, c = (part.float() for part in correction)
    rank = max(LEAST_RANK, 1 << (A.shape[0] - 1).bit_length())
    # With type and device, as vLLM's defaults are the model's here.
    filled = [torch.zeros(shape, dtype=A.dtype, device=A.device) for shape in ((A.shape[1], rank), (rank, B.shape[0]))]
    filled[0][:, : A.shape[0]], filled[1][: A.shape[0]] = A.T, B.T
    filled[0][: A.shape[1] // 3] /= scale
    kept = filled[0].to(device, dtype), filled[1].to(device, dtype), (c / scale).to(device)
    for part, value in zip(PARTS, kept, strict=True):
        layer.register_buffer(f"lexi_{part}", value, persistent=False)


def read_source(layer: Any) -> str | None:
    """The source of the correction that a built MoE layer adds; None: it adds none."""
    return getattr(vars(layer).get(COMPUTE, vars(layer).get("forward")), "corrects", None)


def _make_choice(layer: Any, top_k: int, own_top_k: int, exponent: float) -> Callable[..., tuple[Any, Any, Any]]:
    """A function of (hidden_states, logits, type of ids, **others) -> weights, ids, A phi."""
    router = layer.router
    route, wide, order = router._compute_routing, widen(router, own_top_k), find_order(router)
    if order is None:
        from lexi_adapter.serving.kernels.gates import pick

        weigh, project = fuse(pick), fuse(_project)

        def choosing(hidden_states: Any, logits: Any, indices_type: Any, **others: Any) -> tuple[Any, Any, Any]:
            weights, ids = wide._compute_routing(hidden_states, logits, indices_type, **others)
            _, kept = route(hidden_states, logits, indices_type, **others)
            return weigh(weights, ids, kept, exponent), kept, project(logits, weights, ids, kept, layer.lexi_A)

        return choosing
    from lexi_adapter.serving.kernels.triton_correction import MOST_ROUTED, narrow

    if layer.moe_config.num_logical_experts <= MOST_ROUTED and _scores_by_softmax(router):
        return _make_fused_choice(layer, top_k, own_top_k, exponent)

    def choosing(hidden_states: Any, logits: Any, indices_type: Any, **others: Any) -> tuple[Any, Any, Any]:
        weights, ids = wide._compute_routing(hidden_states, logits, indices_type, **others)
        options = {"top_k": top_k, "exponent": exponent, "ranked": order == LARGEST}
        return narrow(logits, weights, ids, layer.lexi_A, **options)

    return choosing


def _make_fused_choice(layer: Any, top_k: int, own_top_k: int, exponent: float) -> Callable[..., tuple[Any, Any, Any]]:
    import torch
    from vllm.model_executor.layers.fused_moe.router import fused_topk_router

    from lexi_adapter.serving.kernels.triton_correction import route

    # Newer versions leave out rows of padding where they route, older ones later.
    find_padding = getattr(fused_topk_router, "_get_padding_mask", lambda tokens: None)
    rule = {"renormalize": layer.router.renormalize, "scale": getattr(layer.router, "routed_scaling_factor", 1.0)}
    held = layer._buffers

    def choosing(hidden_states: Any, logits: Any, indices_type: Any, **_: Any) -> tuple[Any, Any, Any]:
        return route(
            logits,
            held["lexi_A"],
            top_k=top_k,
            own_top_k=own_top_k,
            exponent=exponent,
            ids_dtype=indices_type or torch.int32,
            padding=find_padding(logits.shape[0]),
            **rule,
        )

    return choosing


def _scores_by_softmax(router: Any) -> bool:
    """Whether a router's scores are a softmax over all experts, of which the largest are chosen."""
    attributes = SCORED_BY_SOFTMAX.get(type(router).__name__)
    return attributes is not None and all(getattr(router, name) in values for name, values in attributes.items())


def _project(logits: Any, weights: Any, ids: Any, kept: Any, A: Any) -> Any:
    from lexi_adapter.serving.kernels.correction import find_features, project

    return project(find_features(logits, weights, ids, kept), A)


def _pass_choices(router: Any) -> None:
    compensating = router._compute_routing

    def passing(hidden_states: Any, router_logits: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if isinstance(router_logits, Routed):
            return router_logits.weights, router_logits.ids
        return compensating(hidden_states, router_logits, *args, **kwargs)

    passing.gate_exponent = compensating.gate_exponent
    router._compute_routing = passing


def _correct_runner(layer: Any, name: str, choose: Callable[..., tuple[Any, Any, Any]], source: str) -> None:
    compute, adds, add = getattr(layer, COMPUTE), _find_share(layer), _find_sum()
    # Where no CUDA graph covers a step, the host's time counts: attributes of a torch module take a microsecond each.
    held = layer._buffers

    def correcting(hidden_states: Any, router_logits: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        experts = layer.routed_experts
        indices_type = experts.quant_method.topk_indices_dtype
        weights, ids, sums = choose(hidden_states, router_logits, indices_type, input_ids=kwargs.get("input_ids"))
        routed = Routed(weights, ids)  # by all workers, as they have to choose alike, equal logits included
        if not adds():
            return compute(hidden_states, routed, *args, **kwargs)
        if add is None:
            shared, output = compute(hidden_states, routed, *args, **kwargs)
            return shared, _add(_require_sum(output, name), sums, held["lexi_B"], held["lexi_c"])
        pending = Pending(add, sums, held["lexi_B"], held["lexi_c"])
        token = _pending.set(pending if _finishes_locally(experts) else None)
        try:
            shared, output = compute(hidden_states, routed, *args, **kwargs)
        finally:
            _pending.reset(token)
        if not pending.done:
            flat = _require_sum(output, name).view(-1, output.shape[-1])
            pending.write(flat, flat)
        return shared, output

    correcting.corrects = source
    setattr(layer, COMPUTE, correcting)


def _find_share(layer: Any) -> Callable[[], bool]:
    """Whether this worker is to add the correction to what it computes.

    It is added by one of the workers whose outputs are summed later: over all of the experts' group where vLLM itself
    gathered the tokens before, over the tensor-parallel group elsewhere; by all where outputs are complete.
    """
    from vllm.distributed import get_ep_group, get_tensor_model_parallel_rank

    config, first = layer.moe_config, get_tensor_model_parallel_rank() == 0
    first_of_all = get_ep_group().rank_in_group == 0

    def adds() -> bool:
        gathered_context = config.pcp_size > 1 and not config.moe_parallel_config.use_all2all_kernels
        if layer.do_naive_dispatch_combine or gathered_context:
            return first_of_all
        return config.is_sequence_parallel or layer._fused_output_is_reduced or first

    return adds


def _find_sum() -> Callable[..., None] | None:
    """The kernel that adds in place; None where layers are compiled, or where there is none."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return None
    from lexi_adapter.serving.kernels.triton_correction import add

    return add


def _add(output: Any, sums: Any, B: Any, c: Any) -> Any:
    import torch

    from lexi_adapter.serving.kernels.correction import expand

    change = expand(sums, B, c).to(output.dtype)
    return output + torch.nn.functional.pad(change, (0, output.shape[-1] - change.shape[-1])).view_as(output)


def _require_sum(output: Any, name: str) -> Any:
    import torch

    if not isinstance(output, torch.Tensor):
        raise AdapterError(
            f"{name}: its kernel leaves the sum over experts to a later one, which takes no compensation; take another "
            f"with --moe-backend triton, or {REMEDY}"
        )
    return output


def _finishes_locally(experts: Any) -> bool:
    """Whether the kernel's output has the tokens that it was given, in their order, and is copied at the end."""
    kernel = experts.quant_method.moe_kernel
    return kernel is not None and type(kernel.prepare_finalize).__name__ == LOCAL_FINALIZE


def adding(apply: Callable) -> Callable:
    """vLLM's copy of the experts' output out of the workspace, which adds what is pending on the way."""

    def copying(self: Any, output: Any, fused_expert_output: Any, *args: Any, **kwargs: Any) -> Any:
        pending = _pending.get()
        if pending is None or pending.done or output is None or fused_expert_output.shape != output.shape:
            return apply(self, output, fused_expert_output, *args, **kwargs)
        pending.write(fused_expert_output, output)
        return output

    return copying


def summing(moe_sum: Callable) -> Callable:
    """vLLM's sum over the outputs of a token's experts, to which what is pending is added."""

    def summing_up(self: Any, input: Any, output: Any, topk_ids: Any = None, expert_map: Any = None) -> None:
        pending = _pending.get()
        # With a map, newer versions leave out experts of other workers, whose outputs hold anything.
        others = () if topk_ids is None and expert_map is None else (topk_ids, expert_map)
        whole = input.dim() == 3 and input.is_contiguous() and len(input) == len(output)
        if pending is None or expert_map is not None or not whole or len(output) != len(pending.sums):
            return moe_sum(self, input, output, *others)
        pending.write(input, output)

    return summing_up


def _correct_block(block: Any, top_k: int, own_top_k: int, source: str) -> None:
    compensating = block.forward

    def correcting(hidden_states: Any) -> Any:
        logits, _ = block.gate(hidden_states)
        weights, ids = logits.float().softmax(-1).topk(own_top_k)
        sums = _project(logits, weights / weights.sum(-1, keepdim=True), ids, ids[:, :top_k], block.lexi_A)
        return _add(compensating(hidden_states), sums, block.lexi_B, block.lexi_c)

    correcting.gate_exponent, correcting.corrects = compensating.gate_exponent, source
    block.forward = correcting
