"""`lexi-search show` and `lexi-search plot`."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click

from lexi_search.artifacts.allocation import Allocation
from lexi_search.artifacts.compensation import read_maps
from lexi_search.artifacts.files import (
    Nature,
    check_writable,
    find_nature,
    read_bytes,
    read_json_object,
    write_atomically,
)
from lexi_search.artifacts.profile import Profile
from lexi_search.artifacts.records import HISTORY, read_record
from lexi_search.artifacts.serialisation import read_artifact, read_profile
from lexi_search.cli.console import (
    conclude,
    echo,
    format_size,
    json_option,
    loss_option,
    normalised_option,
    print_json,
    print_table,
)
from lexi_search.cli.options import force_option
from lexi_search.errors import InputError

SHOW_EXAMPLES = """\b
Examples:
  lexi-search show profile.json
  lexi-search show profile.json --loss frobenius --absolute
  lexi-search show allocation.json
  lexi-search show front.json
  lexi-search show served
"""
PLOT_EXAMPLES = """\b
Examples:
  lexi-search plot profile.json -o heatmap.png
  lexi-search plot profile.json allocation.json -o heatmap.pdf
  lexi-search plot history.json -o history.svg
"""


@click.command(epilog=SHOW_EXAMPLES)
@click.argument("file")
@loss_option
@normalised_option
@json_option
def show(file: str, loss: str | None, normalised: bool, as_json: bool) -> None:
    """Show as a table any FILE that these tools write.

    That is a profile, an allocation, a front, a history, a cost table, results of eval, bench and loads, a folder that
    export or prune made, and what a run that was cut short has finished (its .partial).
    """
    from lexi_search.cli import tables

    if _find_kind(file) not in ("lexi-profile", "lexi-allocation"):
        _show_record(file, as_json)
        return
    artifact = read_artifact(file)
    if isinstance(artifact, Allocation):
        tabulate, scale = tables.tabulate_allocation, {}
        summarise: Callable[..., dict[str, Any]] = partial(_summarise, file)
        said = tables.describe_budget(artifact) + _describe_compensation(file, artifact)
        words = ["lexi-search", "export", file, "--to", "vllm", "--model", "WEIGHTS", "-o", "served"]
    else:
        summarise, tabulate = tables.list_losses, tables.tabulate_profile
        scale = {"loss": loss or artifact.default_loss, "normalised": normalised}
        said = tables.describe_profile(artifact, scale["loss"]) + _describe_compensation(file, artifact)
        words = ["lexi-search", "search", file, "--budget", "50%"]
    if as_json:
        print_json(summarise(artifact, **scale))
    else:
        print_table(tabulate(artifact, **scale))
        conclude(said, words)


def _summarise(file: str, allocation: Allocation) -> dict[str, Any]:
    """An allocation as a JSON object, with what makes up for dropped experts."""
    from lexi_search.cli.tables import summarise

    measured = _measure_compensation(file, allocation)
    named = None if measured is None else vars(allocation.compensation) | measured._asdict()
    return summarise(allocation) | {"gate_exponent": allocation.gate_exponent, "compensation": named}


class _Size(NamedTuple):
    """How many corrections there are, the bytes of their file, and what one costs: products per token and layer."""

    corrections: int
    bytes: int
    products: int


def _measure_compensation(file: str, artifact: Profile | Allocation) -> _Size | None:
    """How large the corrections are that a file names, and what they cost; None without any."""
    named = artifact.compensation
    if named is None:
        return None
    maps = read_maps(file, named, artifact.model)
    first, size = next(iter(maps.values())), os.path.getsize(os.path.join(os.path.dirname(file), named.file))
    return _Size(len(maps), size, first.A.size + first.B.size)


def _describe_compensation(file: str, artifact: Profile | Allocation) -> str:
    measured = _measure_compensation(file, artifact)
    if measured is None:
        return ""
    return (
        f"; {measured.corrections} corrections of rank {artifact.compensation.rank} in {artifact.compensation.file}, "
        f"{format_size(measured.bytes)}, at most {measured.products:,} products a token and layer"
    )


def _find_kind(file: str) -> str | None:
    """The format of a file, None for what cannot be read as one."""
    try:
        return find_nature(read_bytes(file)).kind
    except OSError:
        return None


def _show_record(file: str, as_json: bool) -> None:
    from lexi_search.cli import tables

    record = read_record(file)
    if as_json:
        rows = [dict(zip(record.columns, row, strict=True)) for row in record.rows]
        print_json({"title": record.title, "rows": rows})
    else:
        print_table(tables.tabulate_record(record))
        conclude(f"read {file}, {record.kind}", *_find_next(record.kind, file))


def _find_next(kind: str, file: str) -> list[list[str]]:
    """The command to go on with from a file of a kind."""
    folder, output = os.path.dirname(file) or ".", file.rstrip("/").removesuffix(".partial")
    if os.path.isdir(file):
        folder = file
    costs = ["lexi-search", "search", "profile.json", "--cost", file, "--mix", "TOKENS", "--target-speedup", "1.2"]
    return {
        "partial": [["lexi-search", "profile", "WEIGHTS", "-o", output]],
        "journal": [["lexi-adapter", "sensitivity", "WEIGHTS", "-o", output]],
        "lexi-cost": [costs],
        "lexi-front": [["lexi-search", "front", "profile.json", "--knee"]],
        HISTORY: [["lexi-search", "plot", file, "-o", "history.png"]],
        "lexi-export": [["vllm", "serve", folder]],
        "lexi-pruning": [["lexi-search", "profile", folder, "-o", "pruned.json"]],
        "lexi-eval": [["lexi-adapter", "tradeoff", file, "bench.json", "-o", "tradeoff.png"]],
        "lexi-bench": [["lexi-adapter", "tradeoff", "eval.json", file, "-o", "tradeoff.png"]],
    }.get(kind, [])


@click.command(epilog=PLOT_EXAMPLES)
@click.argument("profile")
@click.argument("others", nargs=-1)
@click.option(
    "-o", "--output", help="File to write, .png, .svg or .pdf.  [default: heatmap.png; of a history history.png]"
)
@loss_option
@normalised_option
@force_option
def plot(
    profile: str, others: tuple[str, ...], output: str | None, loss: str | None, normalised: bool, force: bool
) -> None:
    """Draw a PROFILE as a heatmap, layers by k, with OTHERS: profiles beside it, allocations as steps over all.

    In place of a profile, a file of `search --history`: the loss over the generations.
    """
    kind = _find_kind(profile)
    output = output or ("history.png" if kind == HISTORY else "heatmap.png")
    check_writable(output, apart_from=[profile, *others], nature=None if force else Nature("figure"))
    from lexi_search.cli import plots

    if kind == HISTORY:
        if others:
            raise InputError(f"{profile} is a history, which is drawn alone; leave {others[0]} out")
        figure, said = _draw_history(profile), "the best and the mean loss of the population over generations"
        words = ["lexi-search", "show", profile]
    else:
        figure, said, words = _draw_heatmap(profile, others, loss=loss, normalised=normalised)
    drawn = plots.render(figure, Path(output).suffix.lstrip(".").lower())
    write_atomically(output, drawn, apart_from=[profile, *others], force=force)
    echo(output)
    conclude(said, words)


def _draw_history(file: str) -> Any:
    from lexi_search.cli.plots import draw_history

    document = read_json_object(file)
    try:
        return draw_history(document["budgets"], title=document["model"]["model_type"], loss=document["loss"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{file}: a {HISTORY} file that is not whole; make it again") from error


def _draw_heatmap(
    profile: str, others: tuple[str, ...], *, loss: str | None, normalised: bool
) -> tuple[Any, str, list[str]]:
    """The figure, what it shows, and the words of a command to go on with."""
    from lexi_search.cli.plots import draw_heatmap

    profiles: dict[str, Profile] = {profile: read_profile(profile)}
    allocations: dict[str, Allocation] = {}
    for path in others:
        artifact = read_artifact(path)
        (allocations if isinstance(artifact, Allocation) else profiles)[path] = artifact
    shown = profiles if len(profiles) > 1 else profiles[profile]
    named = dict(zip(_shorten(list(allocations)), allocations.values(), strict=True))
    if isinstance(shown, dict):
        shown = dict(zip(_shorten(list(shown)), shown.values(), strict=True))
    figure = draw_heatmap(shown, named, loss=loss, normalised=normalised)
    maps = f"{len(profiles)} heatmap{'s' * (len(profiles) > 1)}"
    said = f"{maps} with {len(allocations)} allocation{'s' * (len(allocations) != 1)} drawn over"
    if allocations:
        chosen = next(iter(allocations))
        return figure, said, ["lexi-search", "export", chosen, "--to", "vllm", "--model", "WEIGHTS", "-o", "served"]
    return figure, said, ["lexi-search", "search", profile, "--budget", "50%"]


def _shorten(paths: list[str]) -> list[str]:
    """The files' names, or the paths as they are where two names are the same."""
    names = [os.path.basename(path) for path in paths]
    return names if len(set(names)) == len(names) else paths
