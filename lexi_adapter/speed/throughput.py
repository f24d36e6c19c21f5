"""Throughput of variants of one model in vLLM, side by side.

LExI's protocol (arXiv 2509.02753, figure 2): a batch of requests with fixed input and output lengths; throughput is
input and output tokens over the end-to-end seconds. Engines that share the card are measured in turn, round by round,
so that a drift in speed affects all of them alike; every other round in reverse, as the first run after another
workload can be slower.
"""

import itertools
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lexi_adapter.engines.measuring import (
    answer_greedily,
    describe_engine,
    measure_engines,
    record_kernels,
    switch_layers,
    time_run,
)
from lexi_adapter.engines.options import check_plugin, check_top_k, make_options
from lexi_adapter.engines.process import Engine
from lexi_adapter.engines.workload import Workload, parse_workload
from lexi_adapter.model.variants import Variant

FORMAT, VERSION = "lexi-bench", 1
WARM_UP_RUNS, WARM_UP_TOKENS = 2, 16  # unmeasured runs before the first round, in which kernels compile; output tokens
ANSWERS = 2  # greedy answers of each variant, which tell variants apart
RECORDED_TOKENS = 32  # most output tokens of a run whose kernels are recorded: further steps would be alike


@dataclass(frozen=True)
class Run:
    """One measured run: `seconds` of `workload` under `variant`. A round has one run or more."""

    variant: str
    workload: str
    round: int
    seconds: float


@dataclass(frozen=True)
class Summary:
    """One variant at one workload: tokens per second, and the factor over the base's median."""

    variant: str
    workload: str
    median: float
    lowest: float
    highest: float
    speedup: float


# The variant whose engine is started, and the variants that are measured on that engine.
Assignment = tuple[Variant, tuple[Variant, ...]]


def assign(variants: Sequence[Variant], *, in_place: bool, experts_spread: bool = False) -> tuple[Assignment, ...]:
    """An engine for every variant; with `in_place`, one for all variants that have the weights of the first one.

    A gate exponent and a correction are built into the layers, so an allocation that has them starts an engine of its
    own; one that begins with them can leave them out. A pruned model whose experts are spread over several cards has an
    engine of its own, too.
    """
    base = variants[0]

    def shares(variant: Variant) -> bool:
        same = (variant.folder, variant.environment) == (base.folder, base.environment)
        known = (variant.kept and not experts_spread) or variant.overrides == base.overrides
        stated = base.allocation is None or variant.allocation is not None  # the engine's own k is its allocation's
        return same and known and stated and not _has_exponent(variant)

    if not in_place:
        return tuple((variant, (variant,)) for variant in variants)
    sharing = tuple(variant for variant in variants if variant is base or shares(variant))
    return ((base, sharing), *((variant, (variant,)) for variant in variants if variant not in sharing))


def measure(
    variants: Sequence[Variant],
    workloads: Sequence[Workload],
    *,
    rounds: int,
    together: int | None,
    in_place: bool,
    engine: Mapping[str, Any],
    report: Callable[[Mapping[str, Any]], None],
    locks: Sequence[str] = (),
    kernels: bool = False,
    seconds: float = 0.0,
    answers: int = ANSWERS,
    progress: Callable[[int, int, str], None] = lambda done, total, part: None,
) -> dict[str, Any]:
    """Measure, and give `report` the document after every round; returns the last one.

    Args:
        together: engines on the card at once; None for all of them.
        engine: arguments of `make_options`.
        locks: files for cards that other runs share, see `engines.locks`.
        seconds: a round repeats a short workload, with other tokens, until so long has been measured.
        kernels: after the rounds, record every variant's kernels at every workload, by kind.
        answers: greedy answers to ask of every variant before the rounds.
        progress: gets, after every variant's turn at a workload, the turns so far, their total, and words for the last.

    Raises:
        AdapterError: an allocation that its engine would ignore.
        EngineError: an engine that did not come up, or does not run the k or the tokens that were asked for.
    """
    spread = engine["parallel"].get("enable_expert_parallel", False)
    assignments = assign(variants, in_place=in_place, experts_spread=spread)
    check_plugin(variant for variant, _ in assignments)
    size = together or len(assignments)
    results, turns = _Results(variants, workloads), itertools.count(1)
    total = rounds * len(workloads) * len(variants)
    progress(0, total, "engines start")
    for first in range(0, len(assignments), size):
        group = assignments[first : first + size]
        wanted = [(v.name, make_options(v, workloads, **engine), v.environment) for v, _ in group]
        with measure_engines(wanted, load_format=engine["load_format"], locks=locks) as engines:
            running = [current for pair in zip(engines, group, strict=True) for current in _share_engine(*pair)]
            for current in running:
                results.facts[current.variant.name] = current.activate()
                results.answers[current.variant.name] = _warm_up(current.engine, workloads, answers)
            if first == 0:
                progress(0, total, "engines are up")
            for number in range(rounds):
                for workload, current in itertools.product(workloads, running[:: -1 if number % 2 else 1]):
                    results.runs += _take_turn(current, workload, number, rounds, seconds)
                    turn = f"round {number + 1} of {rounds}, {workload}, {current.variant.name}"
                    progress(next(turns), total, turn)
                report(results.make_document())
            if kernels:
                results.kernels += _record(running, [_shorten(w, RECORDED_TOKENS) for w in workloads])
                report(results.make_document())
    return results.make_document()


@dataclass
class _Results:
    """The results so far: runs and kernels in the order of measuring, facts and answers by the variant's name."""

    variants: Sequence[Variant]
    workloads: Sequence[Workload]
    runs: list[Run] = field(default_factory=list)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    answers: dict[str, list[list[int]]] = field(default_factory=dict)
    kernels: list[dict[str, Any]] = field(default_factory=list)

    def make_document(self) -> dict[str, Any]:
        return make_document(self.variants, self.workloads, self.runs, self.facts, self.answers, self.kernels)


@dataclass(frozen=True)
class _Running:
    """A variant on a running engine; `top_k` is to be set first, if the engine is shared with other variants.

    `compensated` says of an engine that was started with a gate exponent whether this variant has it.
    """

    engine: Engine
    variant: Variant
    top_k: Mapping[int, int] | None
    compensated: bool | None = None

    def activate(self) -> dict[str, Any]:
        """Switch the engine to this variant, and return its facts."""
        if self.top_k is not None:
            self.engine.call(switch_layers, self.top_k, self.variant.kept, self.compensated)
        facts = self.engine.call(describe_engine)
        check_top_k(self.variant, facts["top_k"])
        return facts

    def repeat(self, workload: Workload, seeds: Iterable[int], seconds: float) -> Iterator[float]:
        """Seconds of runs of a workload, at least one, until they are `seconds` together."""
        spent = 0.0
        for seed in seeds:
            yield (taken := self.engine.call(time_run, workload, seed))
            if (spent := spent + taken) >= seconds:
                return


def _share_engine(engine: Engine, assignment: Assignment) -> Iterator[_Running]:
    host, sharing = assignment
    own_top_k = engine.call(describe_engine)["top_k"]
    for variant in sharing:
        top_k = own_top_k if variant.allocation is None else dict(variant.allocation.top_k)
        compensated = _has_exponent(variant) if _has_exponent(host) else None
        yield _Running(engine, variant, top_k if len(sharing) > 1 else None, compensated)


def _has_exponent(variant: Variant) -> bool:
    return variant.allocation is not None and variant.allocation.gate_exponent is not None


def _warm_up(engine: Engine, workloads: Sequence[Workload], answers: int) -> list[list[int]]:
    """Run every workload unmeasured, and return greedy answers to the first."""
    short = [_shorten(workload, WARM_UP_TOKENS) for workload in workloads]
    for _, workload in itertools.product(range(WARM_UP_RUNS), short):
        engine.call(time_run, workload, 0)
    return engine.call(answer_greedily, replace(short[0], batch=answers))


def _take_turn(current: _Running, workload: Workload, number: int, rounds: int, seconds: float) -> Iterator[Run]:
    current.activate()
    seeds = range(1 + number, sys.maxsize, rounds)  # of the tokens; the same for every variant
    for taken in current.repeat(workload, seeds, seconds):
        yield Run(current.variant.name, str(workload), number, taken)


def _record(running: Sequence[_Running], workloads: Sequence[Workload]) -> Iterator[dict[str, Any]]:
    for current, workload in itertools.product(running, workloads):
        current.activate()
        kernels = current.engine.call(record_kernels, workload, 0)
        yield {"variant": current.variant.name, "workload": str(workload), **kernels}


def _shorten(workload: Workload, output_length: int) -> Workload:
    return replace(workload, output_length=min(workload.output_length, output_length))


def summarise(runs: Sequence[Run], base: str) -> tuple[Summary, ...]:
    """Medians, extremes and speedups over `base`, in the order in which variants and workloads first ran."""
    rates: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        rates.setdefault((run.variant, run.workload), []).append(parse_workload(run.workload).tokens / run.seconds)
    medians = {key: statistics.median(values) for key, values in rates.items()}
    return tuple(
        Summary(
            variant,
            workload,
            medians[variant, workload],
            min(values),
            max(values),
            medians[variant, workload] / medians[base, workload],
        )
        for (variant, workload), values in rates.items()
    )


def make_document(
    variants: Sequence[Variant],
    workloads: Sequence[Workload],
    runs: Sequence[Run],
    facts: Mapping[str, Mapping[str, Any]],
    answers: Mapping[str, list[list[int]]],
    kernels: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The JSON object of the results so far; its "answers" are greedy tokens, the same for the same model.

    Args:
        kernels: records of `kernels.combine` with their variant and workload; left out if there are none.
    """
    described = [
        {
            "name": v.name,
            "overrides": dict(v.overrides),
            "pruning": _name_pruning(v, variants[0]),
            "gate_exponent": v.allocation and v.allocation.gate_exponent,
            "compensation": v.allocation and v.allocation.compensation and v.allocation.compensation.sha256,
            "engine": _to_json(facts[v.name]),
            "answers": answers[v.name],
        }
        for v in variants
        if v.name in facts
    ]
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": variants[0].folder,
        "variants": described,
        "workloads": [str(workload) for workload in workloads],
        "runs": [asdict(run) for run in runs],
        "summary": [asdict(line) for line in summarise(runs, variants[0].name)],
        **({"kernels": list(kernels)} if kernels else {}),
    }


def _name_pruning(variant: Variant, base: Variant) -> str | None:
    """The variants of one name here have the same weights, and differ from the base in them; None for the base's."""
    if variant.kept:
        return variant.name.partition(", k = ")[0]
    return variant.name if variant.folder != base.folder else None


def _to_json(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {k: {str(i): n for i, n in v.items()} if isinstance(v, Mapping) else v for k, v in facts.items()}
