"""Tokens per expert: how evenly a model's tokens spread over its experts, with fewer active experts or fewer experts.

LExI (arXiv 2509.02753) says that uneven load is why dropping experts does not make a model faster. The loads are here,
the times in `throughput`.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lexi_adapter.allocation import Allocation
from lexi_adapter.engines.measuring import (
    describe_engine,
    measure_engines,
    read_expert_counts,
    read_prompts,
    switch_layers,
    watch_experts,
)
from lexi_adapter.engines.options import make_options
from lexi_adapter.engines.workload import Workload
from lexi_adapter.errors import AdapterError, AllocationError
from lexi_adapter.model.shapes import check_allocation
from lexi_adapter.model.variants import Variant, name_pruned

FORMAT, VERSION = "lexi-loads", 1

# Decoder layer -> [step][expert], tokens of each engine step.
Counts = Mapping[int, Sequence[Sequence[int]]]


@dataclass(frozen=True)
class Load:
    """The spread of one layer's tokens over the experts that are left.

    `max_over_mean` and `variation` (standard deviation over mean) are of the sums over all steps. `idle` is the share
    of experts without any token, and `active` the mean number of experts that a step used.
    """

    experts: int
    max_over_mean: float
    variation: float
    idle: float
    active: float


def summarise(counts: Sequence[Sequence[int]], dropped: Sequence[int] = ()) -> Load:
    """The load of one layer from its counts, [step][expert], without the experts that were dropped."""
    steps = [[count for expert, count in enumerate(step) if expert not in dropped] for step in counts]
    totals = [sum(column) for column in zip(*steps, strict=True)]
    mean = statistics.fmean(totals)
    if mean == 0:
        raise AdapterError("no token reached a layer that was watched; give it some")
    return Load(
        experts=len(totals),
        max_over_mean=max(totals) / mean,
        variation=statistics.pstdev(totals) / mean,
        idle=totals.count(0) / len(totals),
        active=statistics.fmean(sum(map(bool, step)) for step in steps),
    )


def find_least_used(counts: Counts, share: float, top_k: int) -> dict[int, list[int]]:
    """Layer -> the share of its experts with the fewest tokens, ascending; at least `top_k` experts stay."""
    dropped = {}
    for layer, steps in counts.items():
        totals = [sum(column) for column in zip(*steps, strict=True)]
        number = len(totals) - round(len(totals) * (1 - share))
        if len(totals) - number < top_k:
            raise AdapterError(f"dropping {share:.3g} of {len(totals)} experts leaves fewer than k = {top_k}")
        dropped[layer] = sorted(sorted(range(len(totals)), key=totals.__getitem__)[:number])
    return dropped


def measure(
    folder: str,
    prompts: Sequence[Sequence[int]],
    *,
    allocations: Mapping[str, Allocation],
    dropped: Sequence[float],
    engine: Mapping[str, Any],
    progress: Callable[[int, int, str], None] = lambda done, total, part: None,
) -> tuple[dict[str, dict[int, Load]], dict[str, Any]]:
    """Variant -> layer -> load over `prompts`, and the facts of the engine that measured it.

    Experts are dropped as inter-pruning does it: the least used of the same prompts can no longer be chosen.

    Raises:
        AllocationError: an allocation for another model, or with a gate exponent.
        AdapterError: a share of experts that leaves fewer than k.
    """
    for name, allocation in allocations.items():
        check_allocation(allocation, folder, engine["load_format"])
        if allocation.gate_exponent is not None:
            # Weights of one layer's experts decide what later layers route; here only k is changed.
            raise AllocationError(
                f"{name} has a gate exponent of {allocation.gate_exponent:g}, under which loads cannot be counted; "
                "profile with --compensation none"
            )
    batch = Workload(len(prompts), max(map(len, prompts)), 1)
    options = make_options(Variant("base", folder), [batch], **engine)
    options |= {"enforce_eager": True, "compilation_config": {}}  # CUDA graphs bypass the Python router
    prompts = [list(prompt) for prompt in prompts]
    loads: dict[str, dict[int, Load]] = {}
    total = 1 + len(allocations) + len(dropped)
    progress(0, total, "the engine starts")
    with measure_engines([("base", options, {})], load_format=engine["load_format"]) as (running,):
        facts = running.call(describe_engine)

        def count(top_k: Mapping[int, int], left_out: Mapping[int, list[int]]) -> Counts:
            running.call(switch_layers, dict(top_k))
            running.call(watch_experts, left_out)
            running.call(read_prompts, prompts)
            return running.call(read_expert_counts)

        base = count(facts["top_k"], {})
        loads["base"] = {layer: summarise(steps) for layer, steps in base.items()}
        progress(len(loads), total, "base")
        for name, allocation in allocations.items():
            counts = count(allocation.top_k, {})
            loads[name] = {layer: summarise(steps) for layer, steps in counts.items()}
            progress(len(loads), total, name)
        for share in dropped:
            least_used = find_least_used(base, share, max(facts["top_k"].values()))
            counts = count(facts["top_k"], least_used)
            name = name_pruned("inter", share)
            loads[name] = {layer: summarise(steps, least_used[layer]) for layer, steps in counts.items()}
            progress(len(loads), total, name)
    return loads, facts


def make_document(
    loads: Mapping[str, Mapping[int, Load]], facts: Mapping[str, Any], made_by: Mapping[str, Any]
) -> dict[str, Any]:
    """The JSON object with the `Load` of every variant and layer."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "device": facts["device"],
        "loads": {name: {str(layer): asdict(load) for layer, load in layers.items()} for name, layers in loads.items()},
        "made_by": dict(made_by),
    }
