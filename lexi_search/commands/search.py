"""`lexi-search search`."""

from pathlib import Path
from typing import Any

import click

from lexi_search.artifacts import read_profile, write_allocation
from lexi_search.console import json_option, loss_option, parse_budgets, prepare_environment, print_json, print_table
from lexi_search.errors import InputError
from lexi_search.files import check_writable, check_writable_folder


@click.command()
@click.argument("profile")
@click.option("--budget", "single", type=int, multiple=True, help="Experts per token, summed over layers; repeatable.")
@click.option("--budgets", "ranges", multiple=True, help="START:STOP:STEP, STOP included where the steps hit it.")
@click.option("-o", "--output", help="File for one --budget, else a folder.  [default: allocation.json, allocations]")
@loss_option
@click.option("--min-k", default=1, help="Smallest k of a layer.")
@click.option("--max-k", type=int, help="Largest k of a layer.  [default: the model's own]")
@click.option("--population", default=512, help="Allocations per generation.")
@click.option("--generations", default=400, help="Generations.")
@click.option("--mutation-rate", default=0.25, help="Share of the children that mutate.")
@click.option("--seed", default=0, type=click.IntRange(0, 2**32 - 1), help="Seed of the search.")
@json_option
def search(
    profile: str,
    single: tuple[int, ...],
    ranges: tuple[str, ...],
    output: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Find the k per layer that loses least at each budget.

    Every result is shown beside the exact optimum and, where there is one, the uniform k of the same budget.
    """
    budgets = sorted({*single, *(budget for text in ranges for budget in parse_budgets(text))})
    if not budgets:
        raise InputError("no budget given; add --budget B or --budgets START:STOP:STEP")
    measured = read_profile(profile)
    several = bool(ranges) or len(budgets) > 1
    target = Path(output or ("allocations" if several else "allocation.json"))
    (check_writable_folder if several else check_writable)(target)
    prepare_environment()
    from lexi_search.allocations import allocate, uniform_loss
    from lexi_search.tables import summarise, tabulate_search

    allocations = allocate(measured, budgets, **settings)
    paths = [target / f"allocation-{budget}.json" if several else target for budget in budgets]
    if several:
        target.mkdir(exist_ok=True)
    for path, allocation in zip(paths, allocations, strict=True):
        write_allocation(path, allocation)
    uniform = [uniform_loss(measured, budget, loss=settings["loss"]) for budget in budgets]
    if as_json:
        records = zip(paths, allocations, uniform, strict=True)
        print_json([summarise(a) | {"uniform_loss": loss, "file": str(path)} for path, a, loss in records])
    else:
        print_table(tabulate_search(allocations, uniform))
        click.echo(target)
