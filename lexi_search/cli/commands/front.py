"""`lexi-search front`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lexi_search.artifacts.allocation import Allocation
from lexi_search.artifacts.codec import encode
from lexi_search.artifacts.compensation import check_maps_place, name_beside
from lexi_search.artifacts.files import Nature, check_writable, write_atomically
from lexi_search.artifacts.profile import Profile
from lexi_search.artifacts.serialisation import (
    describe_nature,
    read_profile,
    read_profile_maps,
    sha256,
    write_allocations,
)
from lexi_search.cli.console import conclude, echo, loss_option, prepare_environment, print_table
from lexi_search.cli.options import (
    CONSTRAINTS,
    COSTS,
    add_options,
    force_option,
    make_constraints,
    parse_loss,
    read_cost,
)
from lexi_search.errors import InputError

if TYPE_CHECKING:
    from lexi_search.allocation.allocate import AllocationResult
    from lexi_search.allocation.costs import Cost
    from lexi_search.allocation.tradeoff import Front, Point
    from lexi_search.solvers.problem import Constraints


FORMAT = "lexi-front"
FIGURES = ("png", "svg", "pdf")
# What a file is that this command writes, by its suffix; of JSON also the model.
NATURES = {"json": Nature(FORMAT), "csv": Nature("table by budget")} | dict.fromkeys(FIGURES, Nature("figure"))
EXAMPLES = """\b
Examples:
  lexi-search front profile.json -o front.json -o front.png --knee
  lexi-search front profile.json --max-loss 20% --allocation gentle.json
  lexi-search front profile.json --cost cost.json --mix 16 -o faster.pdf --target-speedup 1.2 --allocation faster.json
"""


@click.command(epilog=EXAMPLES)
@click.argument("profile")
@click.option(
    "-o",
    "--output",
    "outputs",
    multiple=True,
    default=("front.json",),
    help="File to write, .json, .csv, .png, .svg or .pdf; repeatable.",
)
@loss_option
@add_options(COSTS)
@add_options(CONSTRAINTS)
@click.option("--target-speedup", type=float, help="Choose the least loss at this speed-up; needs --cost.")
@click.option("--target-ms", type=float, help="Choose the least loss in this time; needs --cost.")
@click.option(
    "--max-loss", help="Choose the cheapest with at most this loss, or this share of the front's largest: 20%."
)
@click.option("--knee", is_flag=True, help="Choose the knee of the front, where its curve bends most.")
@click.option("--allocation", default="front-allocation.json", help="File for the chosen allocation.")
@click.option("--points", type=click.IntRange(2), help="Write at most this many points, evenly spread.  [default: all]")
@force_option
def front(
    profile: str,
    outputs: tuple[str, ...],
    loss: str | None,
    cost_file: str | None,
    mix: str | None,
    target_speedup: float | None,
    target_ms: float | None,
    max_loss: str | None,
    knee: bool,
    allocation: str,
    points: int | None,
    force: bool,
    **options: Any,
) -> None:
    """Write the Pareto front of cost and loss that PROFILE offers, computed exactly.

    Cost is the time of --cost or, without it, the sum of k. One option may choose a point; its allocation is written.
    """
    wishes = [target_speedup is not None, target_ms is not None, max_loss is not None, knee]
    if sum(wishes) > 1:
        raise InputError("choose by one of --target-speedup, --target-ms, --max-loss and --knee")
    names = (*outputs, *([allocation] if any(wishes) else []))
    kept_apart = {name: [profile, cost_file, *names[:index]] for index, name in enumerate(names)}
    for name, others in kept_apart.items():
        check_writable(name, apart_from=others)
    if unknown := [name for name in outputs if _find_form(name) not in NATURES]:
        raise InputError(f"--output {unknown[0]}: name a file in .json, .csv, .png, .svg or .pdf")
    measured = read_profile(profile)
    maps = read_profile_maps(profile, measured)
    if maps is not None and any(wishes):
        kept_apart[allocation] += [Path(profile).parent / measured.compensation.file]
        others = [*kept_apart[allocation], *names]
        check_maps_place(name_beside(allocation), measured.model, owners=[allocation], apart_from=others, force=force)
    if not force:
        _check_replaceable(outputs, allocation if any(wishes) else None, measured)
    loss = loss or measured.default_loss
    prepare_environment()
    from lexi_search.allocation import tradeoff
    from lexi_search.cli.tables import UNITS, describe_result, tabulate_front

    cost, constraints = read_cost(measured, cost_file, mix), make_constraints(measured, **options)
    pareto = tradeoff.find_front(measured, cost=cost, constraints=constraints, loss=loss)
    chosen = _choose(pareto, knee=knee, max_loss=max_loss, ms=target_ms, speedup=target_speedup)
    shown = tradeoff.thin(pareto.points, points) if points else pareto.points
    for name in outputs:
        data = _format_front(name, measured, pareto, points=shown, chosen=chosen, loss=loss, cost=cost)
        write_atomically(name, data, apart_from=kept_apart[name], force=force)
    print_table(tabulate_front(pareto, chosen, title=f"{measured.model.model_type}, {loss} loss in {UNITS[loss]}"))
    for name in outputs:
        echo(name)
    if chosen is None:
        _conclude(profile, pareto, loss)
        return
    result = _make_result(chosen, pareto.error, measured, constraints, cost, loss)
    apart_from = kept_apart[allocation]
    write_allocations([allocation], [result.allocation], maps, apart_from=apart_from, force=force)
    _report(allocation, result)
    export = ["lexi-search", "export", allocation, "--to", "vllm", "--model", "WEIGHTS", "-o", "served"]
    conclude(describe_result(result), ["lexi-search", "plot", profile, allocation], export)


def _make_result(
    chosen: "Point", error: float, profile: Profile, constraints: "Constraints", cost: "Cost | None", loss: str
) -> "AllocationResult":
    """The allocation of a point of a front that may be off by the relative `error`."""
    from lexi_search.allocation.allocate import (
        AllocationResult,
        allocate,
        describe_origin,
        describe_spending,
        make_allocation,
        needs_caution,
    )

    if needs_caution(profile, loss):
        [result] = allocate(profile, [chosen.limit], cost=cost, constraints=constraints, loss=loss, method="exact")
        return result
    made_by = describe_origin(profile, constraints, loss=loss, method="exact")
    made_by |= describe_spending(cost, chosen.ms, chosen.speedup)
    optimal = chosen.loss / (1 + error)
    point = make_allocation(profile, chosen.top_k, loss=chosen.loss, optimal_loss=optimal, made_by=made_by)
    return AllocationResult(point, None, chosen.ms, chosen.speedup)


def _report(file: str, result: "AllocationResult") -> None:
    """Print the name of the allocation's file; on stderr, if k are as even as can be since nothing is surely better."""
    from lexi_search.cli.tables import explain_fallbacks

    echo(file)
    if line := explain_fallbacks({str(result.allocation.budget): result}):
        echo(line, err=True)


def _check_replaceable(outputs: Sequence[str], allocation: str | None, profile: Profile) -> None:
    """Raise InputError where an output would replace a file of another model or another kind."""
    result = describe_nature(Allocation, profile.model)
    for name in outputs:
        nature = NATURES[_find_form(name)]
        check_writable(name, nature=nature._replace(model=result.model) if nature.kind == FORMAT else nature)
    if allocation is not None:
        check_writable(allocation, nature=result)


def _conclude(profile: str, front: "Front", loss: str) -> None:
    """Say what was found where no point was asked for, and how to choose one."""
    from lexi_search.cli.tables import UNITS

    first, last = front.points[0], front.points[-1]
    ends = f"from budget {first.budget} with loss {first.loss:.4g} to {last.budget} with {last.loss:.4g}"
    conclude(
        f"{len(front.points)} allocations that none beats, {ends} {UNITS[loss]}; no point was chosen",
        ["lexi-search", "front", profile, "--loss", loss, "--knee"],
        ["lexi-search", "front", profile, "--loss", loss, "--max-loss", "20%"],
    )


def _choose(
    front: "Front", *, knee: bool, max_loss: str | None, ms: float | None, speedup: float | None
) -> "Point | None":
    """The point that the one option given asks for; None without one."""
    from lexi_search.allocation import tradeoff

    if knee:
        return tradeoff.find_knee(front)
    if max_loss is not None:
        limit, relative = parse_loss(max_loss)
        return tradeoff.find_fastest_within(front, limit * front.points[0].loss if relative else limit)
    if ms is None and speedup is None:
        return None
    return tradeoff.find_best_within(front, ms=ms, speedup=speedup)


def _find_form(name: str) -> str:
    """The format of an output file, by its suffix."""
    return Path(name).suffix.lstrip(".").lower()


def _format_front(
    name: str,
    profile: Profile,
    front: "Front",
    *,
    points: "Sequence[Point]",
    chosen: "Point | None",
    loss: str,
    cost: "Cost | None",
) -> bytes:
    """The bytes of an output file: all `points` as JSON or CSV, or a drawing of the front."""
    from lexi_search.cli.tables import list_points

    form, layers = _find_form(name), profile.model.moe_layers
    if form in FIGURES:
        from lexi_search.cli.plots import draw_front, render
        from lexi_search.cli.tables import UNITS

        title = f"{profile.model.model_type}, {len(layers)} MoE layers: every best trade of cost and loss"
        return render(draw_front(front, chosen, title=title, loss=f"{loss} loss, {UNITS[loss]}"), form)
    rows = list_points(points, layers)
    if form == "csv":
        head = [key for key in rows[0] if key != "top_k"] + [f"top_k_{layer}" for layer in layers]
        lines = [[*(value for key, value in row.items() if key != "top_k"), *row["top_k"].values()] for row in rows]
        return "".join(",".join(map(str, line)) + "\n" for line in [head, *lines]).encode()
    origin = {"format": FORMAT, "version": 1, "profile_sha256": sha256(profile), "loss": loss}
    origin["model"] = encode(profile.model)
    if cost is not None:
        origin["cost"] = cost.describe() | {"base_ms": cost.base_ms}
    # One point per line: a front may have ten thousand of them.
    head = json.dumps(origin | {"error": front.error}, sort_keys=True)
    lines = ",\n ".join(json.dumps(row) for row in rows)
    return f'{head[:-1]}, "points": [\n {lines}\n]}}\n'.encode()
