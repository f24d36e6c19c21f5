"""The results of one model as a small table: a row for each allocation, and what its losses are worth."""

import csv
import io
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, TypeVar

import click
import numpy as np
import torch

import lexi_search
from lexi_adapter.files import write_atomically

MEASURES = ("increase", "divergence")  # of the cross-entropy; KL divergence from the model with its own k
MINUS = "{}/default minus uniform with it"  # a row of differences, to uniform k with the same compensation
LEAST_GAIN = 0.1  # where brute force gains less over uniform k, relative to it, a share of that gain says little

Loss = TypeVar("Loss", float, np.ndarray)


class Row(NamedTuple):
    """What one allocation loses on held-out text, in nats per token; None where something is not known.

    `increase` is that of the cross-entropy over the model with its own k, `divergence` the KL divergence from its
    predictions. Standard errors are over windows of text: `_error` of the number itself, `_difference_error` of its
    difference to uniform k at the same budget, without a gate exponent, window by window.
    """

    method: str  # where the allocation is from, such as paper/squared: a profile, and the loss that was summed
    exponent: float | None  # the gate exponent; None lets the model do as it does
    budget: int | None  # the sum of k; of a model with narrower experts, that of as many active parameters
    tokens: int  # that the losses are measured on
    increase: float
    increase_error: float | None
    increase_difference_error: float | None
    divergence: float | None
    divergence_error: float | None
    divergence_difference_error: float | None
    top_k: tuple[int, ...]  # of every MoE layer; empty for a pruned model


class Results(NamedTuple):
    """One model: what is known of it and of the run that measured it, and a row for each allocation."""

    facts: Mapping[str, str]
    rows: Sequence[Row]


def write_results(file: Path, results: Results) -> None:
    """Write results as CSV, the facts before it in lines that begin with #."""
    text = io.StringIO()
    text.writelines(f"# {name}: {value}\n" for name, value in results.facts.items())
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Row._fields)
    writer.writerows([*map(_show, row[:-1]), " ".join(map(str, row.top_k))] for row in results.rows)
    write_atomically(file, text.getvalue().encode())


def read_results(file: Path) -> Results:
    """The results in a file that `write_results` wrote. Raises click.UsageError where it is none."""
    lines = file.read_text().splitlines()
    facts = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# ") and ": " in line)
    table = csv.DictReader(line for line in lines if not line.startswith("# "))
    if "model" not in facts or tuple(table.fieldnames or ()) != Row._fields:
        raise click.UsageError(f"{file} holds no table of study.py in today's columns; let study.py write another")
    return Results(facts, [_parse(row) for row in table])


def _show(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"  # as many digits as can mean something
    return "" if value is None else str(value)


def _parse(row: Mapping[str, str]) -> Row:
    types = dict.fromkeys(Row._fields[1:-1], float) | {"budget": int, "tokens": int}
    numbers = [make(row[name]) if row[name] else None for name, make in types.items()]
    return Row(row["method"], *numbers, tuple(map(int, row["top_k"].split())))


def interpolate_uniform(losses: Mapping[int, Loss], budget: int, layers: int) -> Loss:
    """What uniform k loses at a budget; `losses[k]` is that of k in every layer, of all the text or of each window.

    Between two k as if a share of the layers had the larger one: linear from budget `layers * k` to the next.
    """
    k, rest = divmod(budget, layers)
    return losses[k] + (losses[k + 1] - losses[k]) * rest / layers if rest else losses[k]


def find_neighbours(budgets: Iterable[int], layers: int) -> list[int]:
    """Every k that uniform k at one of the budgets is, or lies between."""
    return sorted({k for budget in budgets for k in (budget // layers, -(-budget // layers))})


def find_gain(uniform: float, loss: float) -> float:
    """How much less is lost than by uniform k, relative to uniform k."""
    return (uniform - loss) / uniform if uniform > 0 else 0.0


def find_closed(loss: float, uniform: float, oracle: float) -> float | None:
    """(uniform - loss) / (uniform - oracle): 0 is uniform k, 1 brute force; None where that gains too little."""
    return (uniform - loss) / (uniform - oracle) if find_gain(uniform, oracle) >= LEAST_GAIN else None


def find_budgets(shares: Sequence[float], layers: int, top_k: int) -> dict[float, int]:
    """Share of the model's own sum of k -> budget; those that leave no choice, such as k = 1 everywhere, are not in."""
    budgets = {share: round(share * layers * top_k) for share in shares}
    return {share: budget for share, budget in budgets.items() if layers < budget < layers * top_k}


def describe_call() -> str:
    """This process's command line, every path as its last part alone."""
    return " ".join(Path(word).name if os.sep in word else word for word in sys.argv)


def describe_run(device: str, *, command: str | None = None) -> dict[str, str]:
    """What the numbers depend on besides the models; `command` where another program called this one."""
    cores = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    card = torch.cuda.get_device_name() if device == "cuda" else cores
    run = {"command": command or describe_call(), "date": date.today().isoformat(), "device": card}
    versions = {name: version(name) for name in ("torch", "transformers", "jax", "numpy")}
    return run | versions | {"lexi-moe": lexi_search.__version__}  # it also runs from its sources, not installed
