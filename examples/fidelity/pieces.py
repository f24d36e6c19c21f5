"""The pieces of the study of one model, in order; each is a function of the study so far and gives plain JSON."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import tables
from gaps import MEASURES, find_budgets
from judging import Choice, Judge, Loaded, find_losses, load, round_off, to_floats
from refining import refine
from windows import Windows

from lexi_adapter.model.variants import draw_top_k
from lexi_adapter.sensitivity.windows import generate

SHARES = (0.25, 0.375, 0.5, 0.625, 0.75)  # of the model's own sum of k
EXPONENTS = (None, 0.0, 0.25, 0.4, 0.5, 0.6, 0.75, 1.0)
EXPONENT = 0.5  # the one that every allocation is also judged with
RANDOM = 150  # allocations
RANDOM_WINDOWS = 10  # of each domain, that these are judged on: they are many
SIZES = (1, 2, 4, 8, 16, 32, 64)  # thousand tokens
PARTS = ("oracle/increase", "calibrated/relative")  # tables that are also made of parts of the text, and judged
# Tables whose allocations are held to the floors, or that these are told by: judged on more windows than the rest.
FLOORS = (
    "oracle/increase",
    "oracle/divergence",
    "calibrated/relative",
    "weights/divergence",
    "weights/relative",
    "weights/both",
    "weights+b/divergence",
    "weights+b/relative",
    "weights+b/both",
    "paper/frobenius",
)
PRUNED = tuple(product(("experts", "width"), (0.25, 0.375, 0.5)))  # the share of them that is left out
GENERATED = 32  # sequences that the model writes itself
REFINED_WINDOWS = 5  # of each domain, that the search over whole allocations runs on

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Study:
    """One model under study. `found` holds the pieces that are done, as results.json does.

    `more` judges what is held to the floors, on the windows of `judge` and more. `files` are what commands write
    meanwhile, profiles and pruned models, by name: waited for where they are needed.
    """

    folder: Path
    loaded: Loaded
    measuring: Windows
    judge: Judge
    more: Judge
    batch: int
    profiles: Path
    found: dict[str, Any]
    files: Mapping[str, Future[Path]]

    @property
    def layers(self) -> int:
        return len(self.loaded.identity.moe_layers)

    @property
    def top_k(self) -> int:
        return self.loaded.identity.top_k

    @property
    def budgets(self) -> dict[str, int]:
        return find_budgets(SHARES, self.layers, self.top_k)

    def find_profile(self, name: str) -> Path:
        """Where the profile of a command is, or will be."""
        return self.profiles / f"{name}.json"

    def shorten(self, error: Exception) -> str:
        """A message without the folders that the model happens to be in."""
        return str(error).replace(str(self.folder), self.folder.name)

    def get(self, *names: str) -> Any:
        """What earlier pieces found. Raises `Failed` where it is missing."""
        found = self.found
        for name in names:
            if name not in found:
                raise tables.Failed(f"{name} is missing")
            found = found[name]
        return found

    def read_table(self, name: str) -> np.ndarray:
        return np.array(self.get("tables", name))


def judge_base(study: Study) -> Result:
    windows = study.judge.windows
    losses = find_losses(study.loaded.model, windows.tokens, batch=study.batch)
    identity = study.loaded.identity
    return {
        "cross_entropy": to_floats(windows.average(losses)),
        "model_type": identity.model_type,
        "layers": study.layers,
        "num_experts": identity.num_experts,
        "top_k": study.top_k,
        "parameters": sum(weight.numel() for weight in study.loaded.model.parameters()),
        "budgets": study.budgets,
        "judged_tokens": windows.tokens.numel(),
        "measured_tokens": study.measuring.tokens.numel(),
        "length": windows.tokens.shape[1],
        "domains": list(dict.fromkeys(windows.domains)),
    }


def judge_uniform(study: Study) -> Result:
    """Every uniform k under every exponent."""
    return compare_uniform(study, study.judge, EXPONENTS)


def judge_uniform_on_more(study: Study) -> Result:
    """The same beside what is held to the floors, and on how many tokens that is judged."""
    return {
        "judged_tokens": study.more.windows.tokens.numel(),
        "uniform": compare_uniform(study, study.more, (None, EXPONENT)),
    }


def compare_uniform(study: Study, judge: Judge, exponents: Sequence[float | None]) -> Result:
    """Exponent -> the losses of uniform k, a list, k = 1 first."""
    ks = range(1, study.top_k + 1)
    found = judge.compare([Choice((k,) * study.layers, exponent) for exponent in exponents for k in ks])
    rows = [found[first : first + study.top_k] for first in range(0, len(found), study.top_k)]
    return dict(zip(map(name_exponent, exponents), rows, strict=True))


def judge_random(study: Study) -> list[Result]:
    """Random allocations, as many at each budget."""
    budgets = list(study.budgets.values())
    drawn = []
    for number in range(RANDOM):
        top_k = draw_top_k(study.loaded.identity, budgets[number % len(budgets)], seed=number)
        drawn.append(tuple(top_k[layer] for layer in study.loaded.identity.moe_layers))
    domains = len(study.get("base")["domains"])
    judge = Judge(study.loaded, study.judge.windows.take(RANDOM_WINDOWS * domains), batch=study.batch)
    return [
        {"top_k": list(top_k), **{name: {"mean": found[name]["mean"]} for name in MEASURES}}
        for top_k, found in zip(drawn, judge.judge([Choice(top_k) for top_k in drawn]), strict=True)
    ]


def measure_tables(study: Study) -> Result:
    """Brute force once; from it the oracle and the calibrated tables, of all domains, of each, of fewer tokens."""
    windows = study.measuring
    measured = tables.measure_windows(study.loaded, windows, batch=study.batch)
    found = dict(name_tables(tables.tabulate(measured, windows)))
    domains = np.array(windows.domains)
    for domain in dict.fromkeys(windows.domains):
        part = tables.tabulate(measured.take(domains == domain), windows.take_domain(domain))
        found |= {f"{name}@{domain}": table for name, table in name_tables(part) if name in PARTS}
    length = windows.tokens.shape[1]
    for size in SIZES:
        count = size * 1024 // length
        if 1 <= count <= len(domains):
            part = tables.tabulate(measured.take(np.arange(len(domains)) < count), windows.take(count))
            found |= {f"{name}@{size}k": table for name, table in name_tables(part) if name in PARTS}
    return {name: round_table(table) for name, table in found.items()}


def name_tables(found: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """What was measured on text, by whether whole models were run for it."""
    for kind, table in found.items():
        yield f"{'oracle' if kind in tables.WHOLE else 'calibrated'}/{kind}", table


def generate_tables(study: Study) -> Result:
    """The same without any text: brute force on what the model itself writes."""
    length = study.measuring.tokens.shape[1]
    tokens = generate(study.loaded.model, length=length, sequences=GENERATED, batch=GENERATED, seed=0).clone()
    windows = Windows(tokens, ("generated",) * len(tokens))
    found = tables.tabulate(tables.measure_windows(study.loaded, windows, batch=study.batch), windows)
    return {f"generated/{kind}": round_table(table) for kind, table in found.items()}


def start_commands(
    pool: Executor, model: Path, profiles: Path, scratch: Path, *, until: float = math.inf
) -> dict[str, Future[Path]]:
    """Have commands write what the study needs of a model, by name: its profiles, and pruned models."""

    def make(function: Callable[..., None], what: tuple[Any, ...], file: Path) -> Path:
        function(*what, model, file, until=until)
        return file

    files = {
        name: pool.submit(make, tables.make_profile, (name,), profiles / f"{name}.json") for name in tables.COMMANDS
    }
    for option, share in PRUNED:
        name = f"{option} {share:g}"
        files[name] = pool.submit(make, tables.make_pruned, (option, share), scratch / name)
    return files


def profile(study: Study, name: str) -> Result:
    """The tables of a profile that a command makes."""
    file = study.files[name].result()
    return {f"{name}/{kind}": round_table(table) for kind, table in tables.read_tables(name, file)}


def judge_cells(study: Study, name: str, *, on_more: bool = False) -> Result:
    """Budget -> the table's optimal allocation and its real loss: plain, and of tables of all the text with `EXPONENT`,
    and with the exponent of the profile's own (`own`) where it has one."""
    judge = study.more if on_more else study.judge
    source = name.partition("/")[0]
    own = tables.read_exponent(study.find_profile(source)) if source in tables.COMMANDS else None
    exponents = {"plain": None} | ({} if "@" in name else {name_exponent(EXPONENT): EXPONENT})
    exponents |= {} if own is None else {"own": own}
    budgets = list(study.budgets.values())
    allocations = tables.search(study.read_table(name), budgets)
    found = iter(judge.compare([Choice(top_k, b) for top_k in allocations for b in exponents.values()]))
    return {
        str(budget): {"top_k": list(top_k), "exponent": own, **{label: next(found) for label in exponents}}
        for budget, top_k in zip(budgets, allocations, strict=True)
    }


def correlate(study: Study) -> Result:
    """Every table against the oracle's, of all the text and of each domain, and its sums against the real losses of the
    random allocations."""
    truth, drawn = study.read_table("oracle/increase"), study.get("random")
    real = np.array([row["increase"]["mean"] for row in drawn])
    sums = np.array([sum(row["top_k"]) for row in drawn])
    found = {}
    for name in study.get("tables"):
        table = study.read_table(name)
        predicted = np.array([tables.predict(table, row["top_k"]) for row in drawn])
        within = [tables.correlate(predicted[sums == budget], real[sums == budget]) for budget in sorted(set(sums))]
        known = [value for value in within if value is not None]
        domains = {
            domain: tables.compare(table, study.read_table(f"oracle/increase@{domain}"))["layers"]
            for domain in study.get("base")["domains"]
        }
        found[name] = {
            **tables.compare(table, truth),
            "random": tables.correlate(predicted, real),
            "random_at_a_budget": float(np.mean(known)) if known else None,
            "domains": domains,
        }
    return found


def compound(study: Study) -> list[Result]:
    """The sum of single-layer increases beside the real one: of uniform k, the oracle and random allocations."""
    table = study.read_table("oracle/increase")
    uniform = [((k,) * study.layers, row) for k, row in enumerate(study.get("uniform")["plain"], 1)]
    oracle = [(cell["top_k"], cell["plain"]) for cell in study.get("cells", "oracle/increase").values()]
    drawn = [(row["top_k"], row) for row in study.get("random")]
    return [
        {"of": of, "budget": sum(top_k), "sum": tables.predict(table, top_k), "real": row["increase"]["mean"]}
        for of, rows in (("uniform", uniform[:-1]), ("oracle", oracle), ("random", drawn))
        for top_k, row in rows
    ]


def refine_oracle(study: Study) -> Result:
    """Budget -> what the search over whole allocations found, its fitness the divergence on windows to measure on."""
    domains = len(set(study.measuring.domains))
    judge = Judge(study.loaded, study.measuring.take(REFINED_WINDOWS * domains), batch=study.batch)

    def evaluate(allocations: Sequence[tuple[int, ...]]) -> list[float]:
        return [row["divergence"]["mean"] for row in judge.judge([Choice(top_k) for top_k in allocations])]

    found = {}
    prior = study.read_table("oracle/divergence")
    for budget in study.budgets.values():
        best = refine(prior, budget, evaluate)
        plain, compensated = study.judge.compare([Choice(best.top_k), Choice(best.top_k, EXPONENT)])
        found[str(budget)] = {
            "top_k": list(best.top_k),
            "evaluated": best.evaluated,
            "history": list(best.history),
            name_exponent(None): plain,
            name_exponent(EXPONENT): compensated,
        }
    return found


def judge_pruned(study: Study) -> Result:
    """What dropping experts, or narrowing them, loses; a reason where it cannot be had."""
    base, windows, found = study.get("base")["cross_entropy"], study.judge.windows, {}
    device = study.loaded.model.device.type
    for name, file in find_pruned(study):
        if isinstance(file, tables.Failed):
            found[name] = {"left_out": study.shorten(file)}
            continue
        losses = find_losses(load(file, device=device).model, windows.tokens, batch=study.batch)
        increase = {domain: float(loss) - base[domain] for domain, loss in windows.average(losses).items()}
        found[name] = {"increase": increase}
    return found


def find_pruned(study: Study) -> Iterator[tuple[str, Path | tables.Failed]]:
    """Every pruned model by name, or why there is none."""
    for option, share in PRUNED:
        name = f"{option} {share:g}"
        try:
            yield name, study.files[name].result()
        except tables.Failed as error:
            yield name, error


def name_exponent(exponent: float | None) -> str:
    return "plain" if exponent is None else f"{exponent:g}"


def round_table(table: np.ndarray) -> list[list[float]]:
    return [[round_off(value) for value in row] for row in table]
