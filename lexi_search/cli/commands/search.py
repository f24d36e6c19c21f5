"""`lexi-search search`."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lexi_search.artifacts.allocation import Allocation
from lexi_search.artifacts.codec import encode
from lexi_search.artifacts.compensation import SHARED, Maps, check_maps_place, name_beside
from lexi_search.artifacts.files import Nature, check_writable, check_writable_folder, json_bytes, write_atomically
from lexi_search.artifacts.profile import Profile
from lexi_search.artifacts.records import HISTORY
from lexi_search.artifacts.serialisation import describe_nature, read_profile, read_profile_maps, write_allocations
from lexi_search.cli.console import (
    conclude,
    echo,
    format_share,
    json_option,
    loss_option,
    prepare_environment,
    print_json,
    print_table,
)
from lexi_search.cli.options import (
    CONSTRAINTS,
    COSTS,
    add_options,
    find_time,
    force_option,
    make_constraints,
    parse_budget,
    parse_budgets,
    read_cost,
)
from lexi_search.errors import InputError

if TYPE_CHECKING:
    from lexi_search.allocation.allocate import AllocationResult

EVOLUTION = ("population", "generations", "mutation_rate", "restarts")  # options of this method alone
_Target = tuple[float | None, float | None]  # milliseconds or a speed-up, the other is None


EXAMPLES = """\b
Examples:
  lexi-search search profile.json --budget 50%
  lexi-search search profile.json --budgets 25%:75%:12.5% -o allocations
  lexi-search search profile.json --cost cost.json --mix 16 --target-speedup 1.2 -o faster.json
  lexi-search search profile.json --budget k=5 --history history.json -o five.json
"""


@click.command(epilog=EXAMPLES)
@click.argument("profile")
@click.option(
    "--budget",
    "single",
    multiple=True,
    help="The paper's B, active experts per token: summed over layers (80), as a share of the model's own (50%), or on "
    "average (k=4.5); repeatable.",
)
@click.option(
    "--budgets",
    "ranges",
    multiple=True,
    help="START:STOP:STEP, each as for --budget: 64:128:8 or 25%:75%:12.5%; STOP included where the steps hit it.",
)
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
@click.option("--population", default=512, help="The paper's P: allocations per generation.")
@click.option("--generations", default=400, help="The paper's G: generations.")
@click.option("--mutation-rate", default=0.25, help="Share of the children that mutate, from 0 to 1.")
@click.option("--restarts", default=1, help="Populations per budget.")
@click.option("--seed", default=0, type=click.IntRange(0, 2**32 - 1), help="Seed of the search and of the resampling.")
@click.option(
    "--resamples",
    default=200,
    type=click.IntRange(0),
    help="Resampled profiles from which the certainty of each k is estimated.",
)
@click.option("--history", help="JSON file for the best and mean fitness after each generation, for `plot`.")
@force_option
@json_option
def search(
    profile: str,
    single: tuple[str, ...],
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
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Find the k per layer that loses least at each budget.

    Every result is shown beside the exact optimum and, where there is one, the uniform k of the same budget. "sure" is
    how often a layer's k would be the same with another sample of the profile (and of a cost table that says how well
    it is known), averaged over layers.

    With --cost a budget is a time (--target-ms) or a speed-up over the model's own k (--target-speedup).
    """
    targets = [(time, None) for time in sorted(set(times))] + [(None, speedup) for speedup in sorted(set(speedups))]
    _check_goals([*single, *ranges], targets, cost_file, history if method == "exact" else None)
    measured = read_profile(profile)
    maps = read_profile_maps(profile, measured)
    budgets = _find_budgets(measured, single, ranges)
    names = _name_goals(budgets, targets)
    several = bool(ranges) or len(names) > 1
    destination = Path(output or ("allocations" if several else "allocation.json"))
    inputs = [profile, cost_file, *([] if maps is None else [Path(profile).parent / measured.compensation.file])]
    own = names if several else None
    files = _check_outputs(destination, own, history, inputs, measured, corrected=maps is not None, force=force)
    prepare_environment()
    from lexi_search.allocation.allocate import allocate

    evolution = {name: options.pop(name) for name in EVOLUTION}
    cost = read_cost(measured, cost_file, mix)
    results = allocate(
        measured,
        [find_time(cost, *target) for target in targets] or budgets,
        cost=cost,
        constraints=make_constraints(measured, **options),
        loss=loss,
        method=method,
        resamples=resamples,
        seed=seed,
        **(evolution if method == "evolution" else {}),
    )
    shared = destination / SHARED if several else None
    written = _write_results(results, files, maps, shared=shared, apart_from=inputs, force=force)
    named = dict(zip(names, written, strict=True))
    if history:
        write_atomically(history, _format_history(measured, named), apart_from=[*inputs, *files], force=force)
    _print_results(named, files, destination, timed=bool(targets), as_json=as_json)
    _conclude(profile, named, files, history, quiet=as_json, remedy=_find_remedy(measured))


def _write_results(
    results: Sequence["AllocationResult"],
    files: Sequence[Path],
    maps: Maps | None,
    *,
    shared: Path | None,
    apart_from: Sequence[str | os.PathLike[str] | None],
    force: bool,
) -> list["AllocationResult"]:
    """Write the allocations, and what they use of `maps`; the results with the allocations as they were written."""
    if shared is not None:
        shared.parent.mkdir(exist_ok=True)
    allocations = [result.allocation for result in results]
    written = write_allocations(files, allocations, maps, shared=shared, apart_from=apart_from, force=force)
    return [result._replace(allocation=allocation) for result, allocation in zip(results, written, strict=True)]


def _find_budgets(profile: Profile, single: Sequence[str], ranges: Sequence[str]) -> list[int]:
    """The budgets that --budget and --budgets name, ascending."""
    size = {"layers": len(profile.model.moe_layers), "top_k": profile.model.top_k}
    found = {parse_budget(text, **size) for text in single}
    return sorted(found.union(*(parse_budgets(text, **size) for text in ranges)))


def _check_goals(
    budgets: Sequence[str], targets: Sequence[_Target], cost_file: str | None, history: str | None
) -> None:
    """Raise InputError unless there are either budgets in experts, or targets of time and their cost table.

    Also for a `history` of the exact method.
    """
    if history:
        raise InputError("--history is of generations, which the exact method has none of")
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
    destination: Path,
    names: Sequence[str] | None,
    history: str | None,
    inputs: Sequence[str | os.PathLike[str] | None],
    profile: Profile,
    *,
    corrected: bool,
    force: bool,
) -> list[Path]:
    """The files to write: for `names` in the folder `destination`, without them that alone.

    Without `force`, only results of the profile's model are replaced. If `corrected`, corrections are written, too.
    """
    result = None if force else describe_nature(Allocation, profile.model)
    files = [destination]
    if names is not None:
        check_writable_folder(destination)
        files = [destination / f"allocation-{name}.json" for name in names]
    for file in files if names is None or destination.exists() else ():
        check_writable(file, apart_from=inputs, nature=result)
    shared = [name_beside(destination) if names is None else destination / SHARED] if corrected else []
    for place in shared if names is None or destination.exists() else ():
        check_maps_place(place, profile.model, owners=files, apart_from=[*inputs, *files], force=force)
    if history:
        taken = [*files, *shared, *([] if destination.is_dir() else [destination])]
        check_writable(history, apart_from=[*inputs, *taken], nature=result and Nature(HISTORY, result.model))
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


def _format_history(profile: Profile, named: Mapping[str, "AllocationResult"]) -> bytes:
    """The bytes of --history: name of a budget -> best and mean fitness after each generation."""
    histories = {
        name: {"best": result.history[0].tolist(), "mean": result.history[1].tolist()} for name, result in named.items()
    }
    loss = next(iter(named.values())).allocation.made_by["loss"]
    origin = {"format": HISTORY, "version": 1, "model": encode(profile.model), "loss": loss}
    return json_bytes(origin | {"budgets": histories})


def _find_remedy(profile: Profile) -> str:
    """What makes a profile less noisy, by the command that it is from."""
    if "lexi_search" not in profile.made_by:
        return "more text (--sequences)"  # of `lexi-adapter sensitivity`
    return "a smaller --relative-error" if profile.settings.input == "paper" else "more text (--samples)"


def _warn_of_noise(named: Mapping[str, "AllocationResult"], remedy: str) -> None:
    """Print one line on stderr if a more precise profile would likely lead to a better allocation.

    Not for a search that stopped short of the optimum: there, the search is the larger loss.
    """
    from lexi_search.solvers.uncertainty import NOISY, find_saving

    noisy = {
        name: result.regret
        for name, result in named.items()
        if (result.regret or 0) > NOISY and not result.allocation.gap
    }
    if noisy:
        worst = max(noisy, key=noisy.get)
        echo(
            f"the profile is too noisy for budget {', '.join(noisy)}: another sample of it would have led to losses "
            f"{format_share(find_saving(noisy[worst]))} smaller (budget {worst}); profile again with {remedy}",
            err=True,
        )


def _conclude(
    profile: str,
    named: Mapping[str, "AllocationResult"],
    files: Sequence[Path],
    history: str | None,
    *,
    quiet: bool,
    remedy: str,
) -> None:
    """Say where nothing is better than even k, or the profile is noisy, which has a `remedy`; unless `quiet` what was
    found and how to go on."""
    from lexi_search.cli.tables import describe_result, explain_fallbacks

    if line := explain_fallbacks(named):
        echo(line, err=True)
    _warn_of_noise(named, remedy)
    if quiet:
        return

    steps = [["lexi-search", "plot", history, "-o", "history.png"]] if history else []
    if len(files) == 1:
        (result,) = named.values()
        export = ["lexi-search", "export", files[0], "--to", "vllm", "--model", "WEIGHTS", "-o", "served"]
        conclude(describe_result(result), *steps, ["lexi-search", "plot", profile, files[0]], export)
        return
    some = [files[0], files[len(files) // 2], files[-1]] if len(files) > 3 else files
    conclude(
        f"{len(files)} allocations, one for each of {', '.join(named)}",
        *steps,
        ["lexi-search", "plot", profile, *some],
        ["lexi-search", "judge", "WEIGHTS", *some],
    )
