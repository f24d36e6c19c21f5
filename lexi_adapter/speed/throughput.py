"""Throughput of variants of one model, in vLLM, beside each other.

LExI's protocol (arXiv 2509.02753, figure 2): a batch of requests with fixed input and output lengths; throughput is
input and output tokens over the end-to-end seconds. Engines that share the card are measured in turn, round by round,
so that what drifts meets all of them alike.
"""

import itertools
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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
# Before the first round: unmeasured runs, in which kernels compile, and answers that tell variants apart.
WARM_UP_RUNS, WARM_UP_TOKENS = 2, 16  # at most so many output tokens
ANSWERS = 2
RECORDED_TOKENS = 32  # output tokens of a run whose kernels are recorded, at most: further steps are the same again


@dataclass(frozen=True)
class Run:
    """One measured run: `seconds` of `workload` under `variant`; a round has as many as it takes."""

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


# An engine to start, and the variants that are measured on it.
Seat = tuple[Variant, tuple[Variant, ...]]


def assign(variants: Sequence[Variant], *, in_place: bool, experts_spread: bool = False) -> tuple[Seat, ...]:
    """An engine for every variant; with `in_place` those of the first one's weights share its engine.

    A gate exponent is built into the layers, so an allocation that has one keeps an engine of its own; so does a pruned
    model whose experts are spread over several cards.
    """
    base = variants[0]

    def shares(variant: Variant) -> bool:
        same = (variant.folder, variant.environment) == (base.folder, base.environment)
        known = (variant.kept and not experts_spread) or variant.overrides == base.overrides
        return same and known and (variant.allocation is None or variant.allocation.gate_exponent is None)

    if not in_place:
        return tuple((variant, (variant,)) for variant in variants)
    guests = tuple(variant for variant in variants if variant is base or shares(variant))
    return ((base, guests), *((variant, (variant,)) for variant in variants if variant not in guests))


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
) -> dict[str, Any]:
    """Measure, and give `report` the document after every round; returns the last one.

    Args:
        together: engines on the card at once; None for all of them.
        engine: arguments of `make_options`.
        locks: files of `turns`, for runs that share cards.
        seconds: a round repeats a short workload, with other tokens, until so long has been measured.
        kernels: after the rounds, record every variant's kernels at every workload, by kind.
        answers: greedy answers to ask of every variant before the rounds.

    Raises:
        AllocationError: an allocation that an engine of its own would not see.
        EngineError: an engine that did not come up, or does not run the k or the tokens that were asked for.
    """
    seats = assign(variants, in_place=in_place, experts_spread=engine["parallel"].get("enable_expert_parallel", False))
    check_plugin(variant for variant, _ in seats)
    size = together or len(seats)
    runs: list[Run] = []
    facts: dict[str, dict[str, Any]] = {}
    answered: dict[str, list[list[int]]] = {}
    recorded: list[dict[str, Any]] = []
    document: dict[str, Any] = {}
    for group in (seats[first : first + size] for first in range(0, len(seats), size)):
        wanted = [(v.name, make_options(v, workloads, **engine), v.environment) for v, _ in group]
        with measure_engines(wanted, load_format=engine["load_format"], locks=locks) as engines:
            seated = [chair for pair in zip(engines, group, strict=True) for chair in _seat(*pair)]
            for chair in seated:
                facts[chair.variant.name] = chair.take()
                short = [_shorten(workload, WARM_UP_TOKENS) for workload in workloads]
                for _, workload in itertools.product(range(WARM_UP_RUNS), short):
                    chair.engine.call(time_run, workload, 0)
                answered[chair.variant.name] = chair.engine.call(answer_greedily, replace(short[0], batch=answers))
            for turn in range(rounds):
                for workload, chair in itertools.product(workloads, seated):
                    chair.take()
                    seeds = range(1 + turn, sys.maxsize, rounds)  # of the tokens; the same for every variant
                    runs += [
                        Run(chair.variant.name, str(workload), turn, taken)
                        for taken in chair.repeat(workload, seeds, seconds)
                    ]
                document = make_document(variants, workloads, runs, facts, answered, recorded)
                report(document)
            if kernels:
                recorded += _record(seated, [_shorten(workload, RECORDED_TOKENS) for workload in workloads])
                document = make_document(variants, workloads, runs, facts, answered, recorded)
                report(document)
    return document


@dataclass(frozen=True)
class Seated:
    """A variant on a running engine; `top_k` is what to give its layers first, if other variants sit there too."""

    engine: Engine
    variant: Variant
    top_k: Mapping[int, int] | None

    def take(self) -> dict[str, Any]:
        """Make the engine this variant's, and say what it is then."""
        if self.top_k is not None:
            self.engine.call(switch_layers, self.top_k, self.variant.kept)
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


def _record(seated: Sequence[Seated], workloads: Sequence[Workload]) -> Iterator[dict[str, Any]]:
    for chair, workload in itertools.product(seated, workloads):
        chair.take()
        kernels = chair.engine.call(record_kernels, workload, 0)
        yield {"variant": chair.variant.name, "workload": str(workload), **kernels}


def _shorten(workload: Workload, output_length: int) -> Workload:
    return replace(workload, output_length=min(workload.output_length, output_length))


def _seat(engine: Engine, seat: Seat) -> Iterator[Seated]:
    _, guests = seat
    own = engine.call(describe_engine)["top_k"]
    for variant in guests:
        given = own if variant.allocation is None else dict(variant.allocation.top_k)
        yield Seated(engine, variant, given if len(guests) > 1 else None)


def summarise(runs: Sequence[Run], base: str) -> tuple[Summary, ...]:
    """Medians, extremes and factors over `base`, in the order in which variants and workloads first ran."""
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
    """The JSON object of what was measured so far; "answers" are greedy tokens: the same model, the same tokens.

    kernels: what `kernels.combine` gives, with its variant and workload; left out if there are none.
    """
    described = [
        {
            "name": v.name,
            "overrides": dict(v.overrides),
            "gate_exponent": v.allocation and v.allocation.gate_exponent,
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


def _to_json(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {k: {str(i): n for i, n in v.items()} if isinstance(v, Mapping) else v for k, v in facts.items()}
