"""`lexi-search search`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lexi_search.artifacts.files import check_writable, check_writable_folder, json_bytes, write_atomically
from lexi_search.artifacts.serialisation import read_profile, write_allocation
from lexi_search.cli.console import (
    echo,
    json_option,
    loss_option,
    parse_budgets,
    prepare_environment,
    print_json,
    print_table,
)
from lexi_search.cli.options import CONSTRAINTS, COSTS, add_options, make_constraints, read_cost
from lexi_search.errors import InputError

if TYPE_CHECKING:
    from lexi_search.allocation.allocate import AllocationResult
    from lexi_search.allocation.costs import Cost

# Remedies for a noisy profile, by its input; profiles of other inputs come from `lexi-adapter sensitivity`.
_REMEDIES = {"paper": "a smaller --relative-error", "weights": "more text (--samples)"}
_Target = tuple[float | None, float | None]  # milliseconds or a speed-up, the other is None


@click.command()
@click.argument("profile")
@click.option("--budget", "single", type=int, multiple=True, help="Experts per token, summed over layers; repeatable.")
@click.option("--budgets", "ranges", multiple=True, help="START:STOP:STEP, STOP included where the steps hit it.")
@click.option("--target-speedup", "speedups", type=float, multiple=True, help="With --cost: times as fast; repeatable.")
@click.option("--target-ms", "times", type=float, multiple=True, help="With --cost: at most this time; repeatable.")
@click.option("-o", "--output", help="File for one budget, else a folder.  [default: allocation.json, allocations]")
@loss_option
@add_options(COSTS)
@add_options(CONSTRAINTS)
@click.option(
    "--method",
    type=click.Choice(("evolution", "exact")),
    default="evolution",
    help="The paper's evolutionary search, or the exact optimum.",
)
@click.option("--population", default=512, help="Allocations per generation.")
@click.option("--generations", default=400, help="Generations.")
@click.option("--mutation-rate", default=0.25, help="Share of the children that mutate.")
@click.option("--restarts", default=1, help="Populations per budget.")
@click.option("--seed", default=0, type=click.IntRange(0, 2**32 - 1), help="Seed of the search and of the resampling.")
@click.option(
    "--resamples",
    default=200,
    type=click.IntRange(0),
    help="Resampled profiles from which the certainty of each k is estimated.",
)
@click.option("--history", help="JSON file for the best and mean fitness after each generation.")
@json_option
def search(
    profile: str,
    single: tuple[int, ...],
    ranges: tuple[str, ...],
    speedups: tuple[float, ...],
    times: tuple[float, ...],
    output: str | None,
    loss: str | None,
    cost_file: str | None,
    mix: str | None,
    method: str,
    seed: int,
    resamples: int,
    history: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Find the k per layer that loses least at each budget.

    Every result is shown beside the exact optimum and, where there is one, the uniform k of the same budget. "sure" is
    how often a layer's k would be the same with another sample of the profile, averaged over layers.

    With --cost a budget is a time (--target-ms) or a speed-up over the model's own k (--target-speedup).
    """
    budgets = sorted({*single, *(budget for text in ranges for budget in parse_budgets(text))})
    targets = [(time, None) for time in sorted(set(times))] + [(None, speedup) for speedup in sorted(set(speedups))]
    _check_goals(budgets, targets, cost_file)
    if history and method == "exact":
        raise InputError("--history is of generations, which the exact method has none of")
    measured = read_profile(profile)
    several = bool(ranges) or len(budgets) + len(targets) > 1
    destination = Path(output or ("allocations" if several else "allocation.json"))
    names = _name_goals(budgets, targets)
    inputs = [profile, cost_file]
    files = _check_outputs(destination, names if several else None, history, inputs)
    prepare_environment()
    from lexi_search.allocation.allocate import allocate

    evolution = {name: options.pop(name) for name in ("population", "generations", "mutation_rate", "restarts")}
    cost = read_cost(measured, cost_file, mix)
    results = allocate(
        measured,
        [_find_time(cost, *target) for target in targets] or budgets,
        cost=cost,
        constraints=make_constraints(measured, **options),
        loss=loss,
        method=method,
        resamples=resamples,
        seed=seed,
        **(evolution if method == "evolution" else {}),
    )
    named = dict(zip(names, results, strict=True))
    if several:
        destination.mkdir(exist_ok=True)
    for file, result in zip(files, results, strict=True):
        write_allocation(file, result.allocation, apart_from=inputs)
    if history:
        write_atomically(history, json_bytes(_list_histories(named)), apart_from=[*inputs, *files])
    _print_results(named, files, destination, timed=bool(targets), as_json=as_json)
    _warn_of_noise(named, measured.settings.input)


def _check_goals(budgets: Sequence[int], targets: Sequence[_Target], cost_file: str | None) -> None:
    """Raise InputError unless there are either budgets in experts, or targets of time and their cost table."""
    if bool(budgets) == bool(targets):
        raise InputError(
            "give budgets in experts or targets of time, not both"
            if budgets
            else "no budget given; add --budget B or --budgets START:STOP:STEP, or --cost and --target-speedup"
        )
    if targets and cost_file is None:
        raise InputError("--target-ms and --target-speedup need --cost, which `lexi-adapter latency` measures")
    if budgets and cost_file is not None:
        raise InputError("with --cost a budget is a time; give --target-ms or --target-speedup")


def _check_outputs(
    destination: Path, names: Sequence[str] | None, history: str | None, inputs: Sequence[str | None]
) -> list[Path]:
    """The files to write: for `names` in the folder `destination`, without them that alone."""
    files = [destination]
    if names is not None:
        check_writable_folder(destination)
        files = [destination / f"allocation-{name}.json" for name in names]
    for file in files if names is None or destination.exists() else ():
        check_writable(file, apart_from=inputs)
    if history:
        taken = files if destination.is_dir() else [destination, *files]
        check_writable(history, apart_from=[*inputs, *taken])
    return files


def _name_goals(budgets: Sequence[int], targets: Sequence[_Target]) -> list[str]:
    """Names of budgets and targets for files and tables: 80, 12.5ms, 1.2x."""
    named = [f"{speedup!r}x" if ms is None else f"{ms!r}ms" for ms, speedup in targets]
    return [*map(str, budgets), *named]


def _print_results(
    named: Mapping[str, "AllocationResult"], files: Sequence[Path], destination: Path, *, timed: bool, as_json: bool
) -> None:
    from lexi_search.cli.tables import summarise_result, tabulate_search

    results = list(named.values())
    if as_json:
        print_json([summarise_result(row) | {"file": str(file)} for file, row in zip(files, results, strict=True)])
    else:
        print_table(tabulate_search(results, list(named) if timed else ()))
        echo(destination)


def _find_time(cost: "Cost", ms: float | None, speedup: float | None) -> float:
    """The milliseconds that a target allows; InputError where every allocation takes longer."""
    value = ms if speedup is None else speedup
    name = "--target-ms" if speedup is None else "--target-speedup"
    if not 0 < value < float("inf"):
        raise InputError(f"{name} {value:g} must be above 0, and finite")
    limit = ms if speedup is None else cost.base_ms / speedup
    fastest = cost.other_ms + float(cost.ms.min(axis=1).sum())
    if limit < fastest:
        raise InputError(
            f"{name} {value:g} is out of reach: the fastest k in every layer takes {fastest:g} ms, "
            f"a speed-up of {cost.base_ms / fastest:.3f}"
        )
    return limit


def _list_histories(named: Mapping[str, "AllocationResult"]) -> dict[str, Any]:
    """Name of a budget -> best and mean fitness after each generation."""
    return {
        name: {"best": result.history[0].tolist(), "mean": result.history[1].tolist()} for name, result in named.items()
    }


def _warn_of_noise(named: Mapping[str, "AllocationResult"], source: str) -> None:
    """Print one line on stderr if a more precise profile would likely lead to a better allocation.

    Not for a search that stopped short of the optimum: there, the search is the larger loss.
    """
    from lexi_search.solvers.uncertainty import NOISY

    noisy = {
        name: result.regret
        for name, result in named.items()
        if (result.regret or 0) > NOISY and not result.allocation.gap
    }
    if noisy:
        worst = max(noisy, key=noisy.get)
        remedy = _REMEDIES.get(source, "more text (--sequences)")
        echo(
            f"the profile is too noisy for budget {', '.join(noisy)}: another sample of it would have led to losses "
            f"{100 * noisy[worst]:.2g} % smaller (budget {worst}); profile again with {remedy}",
            err=True,
        )
