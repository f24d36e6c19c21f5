"""`lexi-search search`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lexi_search.artifacts.files import check_writable, check_writable_folder, json_bytes, write_atomically
from lexi_search.artifacts.serialisation import read_profile, write_allocation
from lexi_search.cli.console import (
    json_option,
    loss_option,
    parse_budgets,
    prepare_environment,
    print_json,
    print_table,
)
from lexi_search.cli.options import CONSTRAINTS, COSTS, add_options, make_constraints, read_cost
from lexi_search.errors import InputError

# Against noise, by the input of a profile; other inputs are `lexi-adapter sensitivity`'s.
REMEDIES = {"paper": "a smaller --relative-error", "weights": "more text (--samples)"}

if TYPE_CHECKING:
    from lexi_search.allocation.allocate import Found
    from lexi_search.allocation.costs import Cost


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
    help="The paper's evolutionary search, or the optimum that certifies it.",
)
@click.option("--population", default=512, help="Allocations per generation.")
@click.option("--generations", default=400, help="Generations.")
@click.option("--mutation-rate", default=0.25, help="Share of the children that mutate.")
@click.option("--restarts", default=1, help="Populations per budget.")
@click.option("--seed", default=0, type=click.IntRange(0, 2**32 - 1), help="Seed of the search and of the resampling.")
@click.option("--resamples", default=200, type=click.IntRange(0), help="Resampled profiles that tell how sure a k is.")
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
    if history and method == "exact":
        raise InputError("--history is of generations, which the exact method has none of")
    measured = read_profile(profile)
    several = bool(ranges) or len(budgets) + len(targets) > 1
    target = Path(output or ("allocations" if several else "allocation.json"))
    if several:
        check_writable_folder(target)
    else:
        check_writable(target, apart_from=[profile, cost_file])
    if history:
        check_writable(history, apart_from=[profile, cost_file, target])
    prepare_environment()
    from lexi_search.allocation.allocate import allocate
    from lexi_search.cli.tables import summarise_found, tabulate_search

    evolution = {name: options.pop(name) for name in ("population", "generations", "mutation_rate", "restarts")}
    cost = read_cost(measured, cost_file, mix)
    found = allocate(
        measured,
        [find_time(cost, *place) for place in targets] or budgets,
        cost=cost,
        constraints=make_constraints(measured, **options),
        loss=loss,
        method=method,
        resamples=resamples,
        seed=seed,
        **(evolution if method == "evolution" else {}),
    )
    names = [str(budget) for budget in budgets] + [
        f"{speedup!r}x" if time is None else f"{time!r}ms" for time, speedup in targets
    ]
    paths = [target / f"allocation-{name}.json" if several else target for name in names]
    if several:
        target.mkdir(exist_ok=True)
    for path, result in zip(paths, found, strict=True):
        write_allocation(path, result.allocation)
    if history:
        write_atomically(history, json_bytes(list_histories(names, found)))
    if as_json:
        print_json([summarise_found(row) | {"file": str(path)} for path, row in zip(paths, found, strict=True)])
    else:
        print_table(tabulate_search(found, names if targets else ()))
        click.echo(target)
    warn_of_noise(names, found, measured.settings.input)


def find_time(cost: "Cost", ms: float | None, speedup: float | None) -> float:
    """The time in ms that a target allows, within what any allocation takes."""
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


def list_histories(names: Sequence[str], found: Sequence["Found"]) -> dict[str, Any]:
    """Name of a budget -> best and mean fitness after each generation."""
    return {
        name: {"best": result.history[0].tolist(), "mean": result.history[1].tolist()}
        for name, result in zip(names, found, strict=True)
    }


def warn_of_noise(names: Sequence[str], found: Sequence["Found"], source: str) -> None:
    """One line on stderr where a better measured profile would likely lead to another, better allocation.

    Not where the search stopped short of the optimum: then that is what is lost.
    """
    from lexi_search.solvers.uncertainty import NOISY

    noisy = {
        name: result.regret
        for name, result in zip(names, found, strict=True)
        if (result.regret or 0) > NOISY and not result.allocation.gap
    }
    if noisy:
        worst = max(noisy, key=noisy.get)
        remedy = REMEDIES.get(source, "more text (--sequences)")
        click.echo(
            f"the profile is too noisy for budget {', '.join(noisy)}: another sample of it would have led to losses "
            f"{100 * noisy[worst]:.2g} % smaller (budget {worst}); profile again with {remedy}",
            err=True,
        )
