"""Quality over throughput: what `eval` and `bench` measured of the same variants, joined (LExI's figures 4 to 8)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lexi_adapter.errors import AllocationError


@dataclass(frozen=True)
class Point:
    """One variant: tokens per second at one workload (median, and lowest and highest round), and a score."""

    variant: str
    kind: str
    throughput: float
    lowest: float
    highest: float
    value: float
    stderr: float | None


@dataclass(frozen=True)
class Panel:
    """All variants at one task, metric and workload, the base first."""

    task: str
    metric: str
    workload: str
    points: tuple[Point, ...]


def match(quality: Mapping[str, Any], speed: Mapping[str, Any]) -> dict[str, str]:
    """Name in `eval`'s document -> name in `bench`'s: the same name, or the same k and exponent of the same weights.

    Variants that one of the two does not have are left out.

    Raises:
        AllocationError: two variants of one name that ran different k, or other gate exponents.
    """
    measured = {variant["name"]: variant for variant in speed["variants"]}
    pairs = {}
    for variant in quality["variants"]:
        name, top_k = variant["name"], variant.get("top_k")
        if name in measured:
            other = measured[name]["engine"]["top_k"]
            if top_k not in (None, other):
                layer = next(layer for layer in top_k | other if top_k.get(layer) != other.get(layer))
                ours, theirs = top_k.get(layer), other.get(layer)
                raise AllocationError(
                    f"{name!r} ran with top-k {ours} of layer {layer} in eval, but {theirs} in bench; measure the "
                    "same in both"
                )
            if top_k is not None and variant.get("gate_exponent") != measured[name].get("gate_exponent"):
                raise AllocationError(
                    f"{name!r} ran with another gate exponent in eval than in bench; measure one in both"
                )
            pairs[name] = name
            continue
        alike = (
            other
            for other, found in measured.items()
            if not found["overrides"]
            and top_k == found["engine"]["top_k"]
            and variant.get("gate_exponent") == found.get("gate_exponent")
        )
        if (other := next(alike, None)) is not None:
            pairs[name] = other
    return pairs


def join(
    quality: Mapping[str, Any], speed: Mapping[str, Any], *, tasks: Sequence[str] = (), workloads: Sequence[str] = ()
) -> tuple[Panel, ...]:
    """A panel for every workload, task and metric; `tasks` and `workloads` choose among those there are.

    Of a task with several metrics the first is taken, in the order of `eval`'s table.

    Raises:
        AllocationError: a task or workload that is not there, or fewer than two variants in both documents.
    """
    pairs = match(quality, speed)
    if len(pairs) < 2:
        theirs = ", ".join(repr(variant["name"]) for variant in speed["variants"])
        raise AllocationError(f"fewer than two variants are in both files; bench has {theirs}: measure the same there")
    known = list(dict.fromkeys(line["task"] for line in quality["summary"]))
    chosen = _choose("task", tasks, known)
    panels = []
    for task in chosen:
        lines = [line for line in quality["summary"] if line["task"] == task]
        metric = lines[0]["metric"]
        scores = {line["variant"]: line for line in lines if line["metric"] == metric}
        for workload in _choose("workload", workloads, speed["workloads"]):
            rates = {line["variant"]: line for line in speed["summary"] if line["workload"] == workload}
            points = tuple(
                Point(
                    variant=name,
                    kind=find_kind(name, quality),
                    throughput=rates[other]["median"],
                    lowest=rates[other]["lowest"],
                    highest=rates[other]["highest"],
                    value=scores[name]["value"],
                    stderr=scores[name]["stderr"],
                )
                for name, other in pairs.items()
                if name in scores and other in rates
            )
            if not points:
                raise AllocationError(
                    f"no variant was measured by both {task!r} and {workload!r}; finish eval and bench"
                )
            panels.append(Panel(task, metric, workload, points))
    return tuple(panels)


def find_kind(name: str, quality: Mapping[str, Any]) -> str:
    """ "base", "uniform", "allocation" or "folder"."""
    variant = next(variant for variant in quality["variants"] if variant["name"] == name)
    if name == "base":
        return "base"
    if "top_k" not in variant:
        return "folder"
    return "uniform" if len(set(variant["top_k"].values())) == 1 else "allocation"


def _choose(what: str, wanted: Sequence[str], known: Sequence[str]) -> Sequence[str]:
    for name in wanted:
        if name not in known:
            raise AllocationError(f"no {what} {name!r} in the results, which have {', '.join(known)}")
    return wanted or known
