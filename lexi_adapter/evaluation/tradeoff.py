"""Quality over throughput: the results of `eval` and `bench` for the same variants, joined (LExI's figures 4 to 8)."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lexi_adapter.errors import AdapterError
from lexi_adapter.model.variants import COMPENSATED, UNCOMPENSATED

COMPENSATION = ("gate_exponent", "compensation")  # keys of a variant in both documents
BASE = "base"  # the name of the first variant, which is also a kind of its own
NUMBER = r"\d+(?:\.\d+)?"


@dataclass(frozen=True)
class Point:
    """One variant: tokens per second at one workload (the median, lowest and highest of the rounds), and a score.

    `method` is the same for variants that differ in their budget alone, and `label` says the budget, as a share of the
    base's active experts. `interval` is the 95 % interval of a share of right answers.
    """

    variant: str
    kind: str
    throughput: float
    lowest: float
    highest: float
    value: float
    stderr: float | None
    method: str
    label: str
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Panel:
    """All variants at one task, metric and workload, the base first."""

    task: str
    metric: str
    workload: str
    points: tuple[Point, ...]


def match(quality: Mapping[str, Any], speed: Mapping[str, Any]) -> dict[str, str]:
    """Name in `eval`'s document -> name in `bench`'s: the same name, or the same k and exponent on the same weights.

    Variants that only one document has are left out.

    Raises:
        AdapterError: variants of one name that ran with different k, gate exponents or compensations.
    """
    benchmarked = {variant["name"]: variant for variant in speed["variants"]}
    pairs = {}
    for variant in quality["variants"]:
        name, top_k = variant["name"], variant.get("top_k")
        if name in benchmarked:
            _check_same(variant, benchmarked[name])
            pairs[name] = name
            continue
        same = (
            other["name"]
            for other in benchmarked.values()
            if not other["overrides"]
            and top_k == other["engine"]["top_k"]
            and not any(variant.get(key) != other.get(key) for key in COMPENSATION)
        )
        if (other_name := next(same, None)) is not None:
            pairs[name] = other_name
    return pairs


def _check_same(evaluated: Mapping[str, Any], benchmarked: Mapping[str, Any]) -> None:
    """Raise AdapterError where variants of one name ran with different k or compensation in `eval` and `bench`."""
    name, top_k, other = evaluated["name"], evaluated.get("top_k"), benchmarked["engine"]["top_k"]
    if top_k is None:
        return
    if top_k != other:
        layer = next(layer for layer in top_k | other if top_k.get(layer) != other.get(layer))
        raise AdapterError(
            f"{name!r} ran with top-k {top_k.get(layer)} of layer {layer} in eval, but {other.get(layer)} in bench; "
            "measure the same in both"
        )
    if differing := next((key for key in COMPENSATION if evaluated.get(key) != benchmarked.get(key)), None):
        what = differing.replace("_", " ")
        raise AdapterError(f"{name!r} ran with another {what} in eval than in bench; measure one in both")


def join(
    quality: Mapping[str, Any],
    speed: Mapping[str, Any],
    *,
    tasks: Sequence[str] = (),
    workloads: Sequence[str] = (),
    wanted: Callable[[str], bool] = lambda name: True,
) -> tuple[Panel, ...]:
    """A panel for every task and workload; `tasks` and `workloads` choose some of them, or all where they are empty.

    Of the variants the base is in every panel, and those whose name in one of the files is `wanted`.
    Of a task with several metrics, only the first in `eval`'s table is used.

    Raises:
        AdapterError: a task or workload that the documents lack, or fewer than two variants in both.
    """
    both = match(quality, speed)
    pairs = {name: other for name, other in both.items() if name == BASE or wanted(name) or wanted(other)}
    if len(pairs) < 2:
        measured = ", ".join(repr(variant["name"]) for variant in speed["variants"])
        which = "are in both files" if len(both) < 2 else "of those named are in both files"
        raise AdapterError(f"fewer than two variants {which}; bench has {measured}: measure the same there")
    titles = {name: describe(name, other, quality, speed) for name, other in pairs.items()}
    evaluated = list(dict.fromkeys(line["task"] for line in quality["summary"]))
    panels = []
    for task in _choose("task", tasks, evaluated):
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
                    stderr=scores[name].get("stderr"),
                    method=titles[name][0],
                    label=titles[name][1],
                    interval=_read_interval(scores[name].get("interval")),
                )
                for name, other in pairs.items()
                if name in scores and other in rates
            )
            if not points:
                raise AdapterError(f"no variant was measured by both {task!r} and {workload!r}; finish eval and bench")
            panels.append(Panel(task, metric, workload, points))
    return tuple(panels)


def _read_interval(interval: Sequence[float] | None) -> tuple[float, float] | None:
    return None if interval is None else (interval[0], interval[1])


def describe(name: str, other: str, quality: Mapping[str, Any], speed: Mapping[str, Any]) -> tuple[str, str]:
    """The method and the label of a `Point`; `other` is the variant's name in `bench`'s document.

    Files and folders whose names differ in numbers alone, as those of one search over budgets do, are one method.
    """
    kind = find_kind(name, quality)
    if kind == BASE:
        return BASE, BASE
    if kind == "folder":
        return re.sub(NUMBER, "*", name), Path(name).name
    running = {variant["name"]: variant["engine"]["top_k"] for variant in speed["variants"]}
    share = sum(running[other].values()) / sum(running[speed["variants"][0]["name"]].values())
    method = "uniform k" if kind == "uniform" else re.sub(NUMBER, "*", name.partition(", ")[0])
    method += next((end for end in (COMPENSATED, UNCOMPENSATED) if name.endswith(end)), "")
    return method, f"{100 * share:.3g} %"


def find_kind(name: str, quality: Mapping[str, Any]) -> str:
    """The kind of a variant: "base", "uniform", "allocation" or "folder"."""
    variant = next(variant for variant in quality["variants"] if variant["name"] == name)
    if name == BASE:
        return BASE
    if variant.get("top_k") is None:
        return "folder"
    return "uniform" if len(set(variant["top_k"].values())) == 1 else "allocation"


def _choose(noun: str, wanted: Sequence[str], known: Sequence[str]) -> Sequence[str]:
    """The wanted names, or all known ones where none are wanted. AdapterError for a name that is not known."""
    for name in wanted:
        if name not in known:
            raise AdapterError(f"no {noun} {name!r} in the results, which have {', '.join(known)}")
    return wanted or known
