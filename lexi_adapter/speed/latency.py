"""How long an engine step takes at each k, on this card, through vLLM's own kernels: the cost table of a search.

A step is timed whole, as it runs in serving: with CUDA graphs, the scheduler and the sampler around it. From the same
engine come steps with every layer at k = 1, 2, ..., and steps with the MoE layers left out. What is left out is the
rest's time; what a k adds to it, over the number of layers, is a layer's time at that k. Layers of one model have one
shape, so their share is the mean over all of them, as they run one after the other: not a kernel alone on an idle card.

A workload of batch b and i input tokens has two kinds of step: one of b * i tokens that reads the prompts, and then
one of b tokens for every further output token. So its seconds under an allocation are predicted by two entries.
"""

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lexi_adapter.allocation import ModelIdentity
from lexi_adapter.engines.measuring import describe_engine, measure_engines, switch_layers, time_run
from lexi_adapter.engines.options import make_options
from lexi_adapter.engines.process import Engine
from lexi_adapter.engines.workload import Workload
from lexi_adapter.errors import AllocationError
from lexi_adapter.model.variants import Variant, draw_top_k

FORMAT, VERSION = "lexi-cost", 1
FIRST_STEPS = 3  # runs of the prompts alone, which take little time and vary more than whole runs do


@dataclass(frozen=True)
class Step:
    """Milliseconds of one engine step: outside the MoE layers, and of one MoE layer at k = 1, 2, ..."""

    tokens: int
    other_ms: float
    layer_ms: tuple[float, ...]


@dataclass(frozen=True)
class Check:
    """An allocation run end to end: seconds as predicted from the steps, and as measured, both over the base's."""

    workload: str
    top_k: Mapping[int, int]
    predicted_speedup: float
    measured_speedup: float

    @property
    def error(self) -> float:
        return self.predicted_speedup / self.measured_speedup - 1


def measure(
    folder: str,
    model: ModelIdentity,
    workloads: Sequence[Workload],
    *,
    rounds: int,
    checks: int,
    engine: Mapping[str, Any],
    progress: Callable[[str], None],
    locks: Sequence[str] = (),
) -> tuple[list[Step], list[Check], dict[str, Any]]:
    """Steps of every workload, `checks` random allocations run against what they predict, and what measured it.

    Raises:
        AllocationError: as `check_workloads`, before an engine starts.
    """
    check_workloads(workloads)
    top_k = range(1, model.top_k + 1)
    states = [None, *(dict.fromkeys(model.moe_layers, k) for k in top_k)]
    budgets = range(len(model.moe_layers), len(model.moe_layers) * model.top_k + 1)
    drawn = [draw_top_k(model, budgets[(2 * i + 1) * len(budgets) // (2 * checks)], seed=i) for i in range(checks)]
    base = Variant("base", folder)
    wanted = [("base", make_options(base, workloads, **engine), {})]
    with measure_engines(wanted, load_format=engine["load_format"], locks=locks) as (running,):
        facts = running.call(describe_engine)
        seconds = _time(running, [*states, *drawn], workloads, rounds, progress)
    steps = [step for workload in workloads for step in _divide(workload, seconds, len(states), len(model.moe_layers))]
    return steps, _compare(model, workloads, steps, seconds, len(states), drawn), facts


def check_workloads(workloads: Sequence[Workload]) -> None:
    """Refuse what cannot be divided into steps, or gives two times for one size of step.

    Raises:
        AllocationError: an input or output of one token, or two workloads with steps of the same number of tokens.
    """
    known: dict[int, Workload] = {}
    for workload in workloads:
        for what, length in (("input", workload.input_length), ("output", workload.output_length)):
            if length < 2:
                raise AllocationError(f"workload {workload} has 1 {what} token; it needs at least 2")
        for size in (workload.batch, workload.batch * workload.input_length):
            if size in known:
                raise AllocationError(
                    f"workloads {known[size]} and {workload} both have steps of {size} tokens; give one of them "
                    "another BATCH or INPUT"
                )
            known[size] = workload


# (state, workload) -> seconds to the first token of all requests, and to the last.
Seconds = Mapping[tuple[int, Workload], tuple[float, float]]


def _time(
    engine: Engine, states: Sequence[Any], workloads: Sequence[Workload], rounds: int, progress: Callable[[str], None]
) -> Seconds:
    found: dict[tuple[int, Workload], list[tuple[float, float]]] = {}
    for turn, (index, state) in itertools.product(range(rounds + 1), enumerate(states)):
        engine.call(switch_layers, state)
        for workload in workloads:
            first = [engine.call(time_run, replace(workload, output_length=1), turn + i) for i in range(FIRST_STEPS)]
            if turn == 0:  # unmeasured: kernels compile on their first call
                engine.call(time_run, replace(workload, output_length=2), turn)
                continue
            last = engine.call(time_run, workload, turn)
            found.setdefault((index, workload), []).append((statistics.median(first), last))
        progress(f"round {turn} of {rounds}, state {index + 1} of {len(states)}")
    return {
        key: (statistics.median(first for first, _ in pairs), statistics.median(last for _, last in pairs))
        for key, pairs in found.items()
    }


def _divide(workload: Workload, seconds: Seconds, states: int, layers: int) -> tuple[Step, Step]:
    """The steps that read the workload's prompts and that write its answers, from whole runs at each k."""
    pairs = [seconds[index, workload] for index in range(states)]
    reading = [1e3 * first for first, _ in pairs]
    writing = [1e3 * (last - first) / (workload.output_length - 1) for first, last in pairs]
    sizes = (workload.batch * workload.input_length, workload.batch)
    steps = tuple(
        Step(size, without, tuple((at_k - without) / layers for at_k in at_all))
        for size, (without, *at_all) in zip(sizes, (reading, writing), strict=True)
    )
    for step in steps:
        if min(step.other_ms, *step.layer_ms) <= 0:
            raise AllocationError(f"a step of {step.tokens} tokens got no slower with MoE layers; measure more rounds")
    return steps


def predict(steps: Sequence[Step], workload: Workload, top_k: Mapping[int, int]) -> float:
    """Seconds of a workload, end to end, with the k of `top_k` in its layers."""
    reading, writing = (
        next(step.other_ms + sum(step.layer_ms[k - 1] for k in top_k.values()) for step in steps if step.tokens == size)
        for size in (workload.batch * workload.input_length, workload.batch)
    )
    return 1e-3 * (reading + (workload.output_length - 1) * writing)


def _compare(
    model: ModelIdentity,
    workloads: Sequence[Workload],
    steps: Sequence[Step],
    seconds: Seconds,
    states: int,
    drawn: Sequence[Mapping[int, int]],
) -> list[Check]:
    own = dict.fromkeys(model.moe_layers, model.top_k)
    return [
        Check(
            str(workload),
            top_k,
            predict(steps, workload, own) / predict(steps, workload, top_k),
            seconds[states - 1, workload][1] / seconds[states + index, workload][1],
        )
        for workload in workloads
        for index, top_k in enumerate(drawn)
    ]


def make_document(
    model: ModelIdentity,
    steps: Sequence[Step],
    checks: Sequence[Check],
    facts: Mapping[str, Any],
    made_by: Mapping[str, Any],
) -> dict[str, Any]:
    """The cost table: for every size of step, the time outside the MoE layers and each layer's at each k."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": {
            "model_type": model.model_type,
            "num_hidden_layers": model.num_hidden_layers,
            "num_experts": model.num_experts,
            "top_k": model.top_k,
            "moe_layers": list(model.moe_layers),
        },
        "device": facts["device"],
        "steps": {
            str(step.tokens): {
                "other_ms": step.other_ms,
                "layers": {str(layer): list(step.layer_ms) for layer in model.moe_layers},
            }
            for step in steps
        },
        "made_by": {
            **made_by,
            "engine": {key: value for key, value in facts.items() if key != "top_k"},
            "checks": [
                {
                    "workload": check.workload,
                    "top_k": {str(layer): k for layer, k in check.top_k.items()},
                    "predicted_speedup": check.predicted_speedup,
                    "measured_speedup": check.measured_speedup,
                    "error": check.error,
                }
                for check in checks
            ],
        },
    }
