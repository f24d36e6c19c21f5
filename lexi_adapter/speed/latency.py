"""Time of an engine step at each k, on this card, with vLLM's own kernels: the cost table of a search.

A step is timed whole, as it runs in serving: with CUDA graphs, the scheduler and the sampler around it. The same engine
runs steps with every layer at k = 1, 2, ..., and steps with the MoE layers left out. The latter give the time outside
the MoE layers. The time that a k adds to it, divided by the number of layers, is one layer's time at that k: the mean
over layers of one shape that run one after the other, not the time of a single kernel on an idle card.

A workload of batch b and i input tokens has two kinds of step: one of b * i tokens that reads the prompts, and then
one of b tokens for every further output token. So its seconds under an allocation are predicted by two entries.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lexi_adapter.allocation import ModelIdentity
from lexi_adapter.engines.measuring import describe_engine, measure_engines, switch_layers, time_run
from lexi_adapter.engines.options import check_switchable, make_options
from lexi_adapter.engines.process import Engine
from lexi_adapter.engines.workload import Workload
from lexi_adapter.errors import AdapterError, check_memory
from lexi_adapter.model.variants import Variant, draw_top_k

FORMAT, VERSION = "lexi-cost", 1
BYTES_OF_LAYER = 100  # of an entry in a dictionary of Python's
FIRST_STEPS = 3  # runs of the prompts alone, which take little time and vary more than whole runs do


@dataclass(frozen=True)
class Step:
    """Milliseconds of one engine step: outside the MoE layers, and of one MoE layer at k = 1, 2, ...

    The spreads are half the range over the rounds, in milliseconds, and `layer_stderr` the standard errors of their
    medians; empty for a single round.
    """

    tokens: int
    other_ms: float
    layer_ms: tuple[float, ...]
    other_spread: float | None = None
    layer_spread: tuple[float, ...] = ()
    layer_stderr: tuple[float, ...] = ()


@dataclass(frozen=True)
class Check:
    """One allocation, run end to end: its speedup over the base as predicted from the steps, and as measured."""

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
    progress: Callable[[int, int, str], None],
    locks: Sequence[str] = (),
) -> tuple[list[Step], list[Check], dict[str, Any]]:
    """The steps of every workload, `checks` random allocations that test them, and the facts of the engine.

    `progress` gets the states measured so far over all rounds, their total, and words for the last.

    Raises:
        AdapterError: as `check_workloads` and `check_switchable`, before an engine starts.
    """
    check_workloads(workloads)
    top_k = range(1, model.top_k + 1)
    states = [None, *(dict.fromkeys(model.moe_layers, k) for k in top_k)]
    budgets = range(len(model.moe_layers), len(model.moe_layers) * model.top_k + 1)
    check_memory(f"{checks} allocations", BYTES_OF_LAYER * checks * len(model.moe_layers), "lower --checks")
    check_switchable(engine)
    drawn = [draw_top_k(model, budgets[(2 * i + 1) * len(budgets) // (2 * checks)], seed=i) for i in range(checks)]
    base = Variant("base", folder)
    wanted = [("base", make_options(base, workloads, **engine), {})]
    with measure_engines(wanted, load_format=engine["load_format"], locks=locks) as (running,):
        facts = running.call(describe_engine)
        timed = _time(running, [*states, *drawn], workloads, rounds, progress)
    seconds = {key: (_median(pairs, 0), _median(pairs, 1)) for key, pairs in timed.items()}
    shape = len(states), len(model.moe_layers)
    steps = [step for workload in workloads for step in _divide(workload, seconds, *shape)]
    check_steps(steps)
    if rounds > 1:
        each = [{key: pairs[turn] for key, pairs in timed.items()} for turn in range(rounds)]
        alone = [[step for workload in workloads for step in _divide(workload, one, *shape)] for one in each]
        steps = [_add_spread(step, others) for step, *others in zip(steps, *alone, strict=True)]
    return steps, _compare(model, workloads, steps, seconds, len(states), drawn), facts


def check_workloads(workloads: Sequence[Workload]) -> None:
    """Refuse workloads that cannot be divided into steps, or give two times for one size of step.

    Raises:
        AdapterError: an input or output of one token, or two workloads with steps of the same number of tokens.
    """
    known: dict[int, Workload] = {}
    for workload in workloads:
        for what, length in (("input", workload.input_length), ("output", workload.output_length)):
            if length < 2:
                raise AdapterError(f"workload {workload} has 1 {what} token; it needs at least 2")
        for size in (workload.batch, workload.batch * workload.input_length):
            if size in known:
                raise AdapterError(
                    f"workloads {known[size]} and {workload} both have steps of {size} tokens; give one of them "
                    "another BATCH or INPUT"
                )
            known[size] = workload


# (index of a state, workload) -> seconds until all requests have their first token, and until they have their last.
Seconds = Mapping[tuple[int, Workload], tuple[float, float]]


def _time(
    engine: Engine,
    states: Sequence[Any],
    workloads: Sequence[Workload],
    rounds: int,
    progress: Callable[[int, int, str], None],
) -> dict[tuple[int, Workload], list[tuple[float, float]]]:
    """(index of a state, workload) -> as in `Seconds`, of every round."""
    measured: dict[tuple[int, Workload], list[tuple[float, float]]] = {}
    total = (rounds + 1) * len(states)
    progress(0, total, "the engine is up")
    for turn, (index, state) in itertools.product(range(rounds + 1), enumerate(states)):
        engine.call(switch_layers, state)
        for workload in workloads:
            first = [engine.call(time_run, replace(workload, output_length=1), turn + i) for i in range(FIRST_STEPS)]
            if turn == 0:  # unmeasured: kernels compile on their first call
                engine.call(time_run, replace(workload, output_length=2), turn)
                continue
            last = engine.call(time_run, workload, turn)
            measured.setdefault((index, workload), []).append((statistics.median(first), last))
        which = f"round {turn} of {rounds}" if turn else "warm-up"
        progress(turn * len(states) + index + 1, total, f"{which}, state {index + 1} of {len(states)}")
    return measured


def _median(pairs: Sequence[tuple[float, float]], place: int) -> float:
    return statistics.median(pair[place] for pair in pairs)


def _divide(workload: Workload, seconds: Seconds, states: int, layers: int) -> tuple[Step, Step]:
    """The step that reads the workload's prompts (prefill) and the one that writes answers (decode)."""
    pairs = [seconds[index, workload] for index in range(states)]
    reading = [1e3 * first for first, _ in pairs]
    writing = [1e3 * (last - first) / (workload.output_length - 1) for first, last in pairs]
    sizes = (workload.batch * workload.input_length, workload.batch)
    steps = tuple(
        Step(size, without, tuple((at_k - without) / layers for at_k in at_all))
        for size, (without, *at_all) in zip(sizes, (reading, writing), strict=True)
    )
    return steps


def check_steps(steps: Sequence[Step]) -> None:
    """Raise AdapterError for a step whose time, or that of a layer, is not above 0."""
    for step in steps:
        if min(step.other_ms, *step.layer_ms) <= 0:
            raise AdapterError(f"a step of {step.tokens} tokens got no slower with MoE layers; measure more rounds")


def _add_spread(step: Step, rounds: Sequence[Step]) -> Step:
    def halve(values: Sequence[float]) -> float:
        return (max(values) - min(values)) / 2

    layer = [*zip(*(one.layer_ms for one in rounds), strict=True)]
    # Of a median: that of the mean by sqrt(pi / 2), for rounds that vary as a normal distribution does.
    errors = [math.sqrt(math.pi / 2 / len(values)) * statistics.stdev(values) for values in layer]
    return replace(
        step,
        other_spread=halve([one.other_ms for one in rounds]),
        layer_spread=tuple(map(halve, layer)),
        layer_stderr=tuple(errors),
    )


def find_dips(steps: Sequence[Step]) -> Iterator[str]:
    """A line for every k at which a layer takes less time than at k - 1."""
    for step in sorted(steps, key=lambda step: step.tokens):
        for k, (fewer, more) in enumerate(itertools.pairwise(step.layer_ms), 2):
            if more < fewer:
                line = f"in a step of {step.tokens} tokens a layer takes less time at k = {k} than at k = {k - 1}"
                line += f": {more:.4f} and {fewer:.4f} ms"
                if step.layer_spread:
                    noisy = fewer - more <= step.layer_spread[k - 1] + step.layer_spread[k - 2]
                    line += ", within" if noisy else ", beyond"
                    line += " the spread of the rounds" + ("; more --rounds tell" if noisy else "")
                yield line


def predict(steps: Sequence[Step], workload: Workload, top_k: Mapping[int, int]) -> float:
    """Predicted seconds of a workload, end to end, with the k of `top_k` in the MoE layers."""
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
    base = dict.fromkeys(model.moe_layers, model.top_k)
    return [
        Check(
            str(workload),
            top_k,
            predict(steps, workload, base) / predict(steps, workload, top_k),
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
    """The cost table: for every size of step, the time outside the MoE layers and that of each layer at each k."""
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
            | (
                {"layers_stderr": {str(layer): list(step.layer_stderr) for layer in model.moe_layers}}
                if step.layer_stderr
                else {}
            )
            for step in steps
        },
        "made_by": {
            **made_by,
            **({"spread_ms": _list_spreads(steps)} if all(step.layer_spread for step in steps) else {}),
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


def _list_spreads(steps: Sequence[Step]) -> dict[str, Any]:
    """Half the range over the rounds, of what `make_document` has for every step."""
    return {str(step.tokens): {"other_ms": step.other_spread, "layer_ms": list(step.layer_spread)} for step in steps}
