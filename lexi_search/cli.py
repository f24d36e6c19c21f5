"""`lexi-search`: profile a checkpoint, search allocations, show, plot and export them. The only module that prints."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lexi_search import __version__
from lexi_search.artifacts import (
    DTYPES,
    LOSS_KINDS,
    Allocation,
    Profile,
    ProfileSettings,
    read_allocation,
    read_artifact,
    read_profile,
    write_allocation,
    write_profile,
)
from lexi_search.errors import InputError
from lexi_search.files import check_writable, check_writable_folder, json_bytes, write_atomically

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress



class Refusal(click.ClickException):
    """Bad input: one line on stderr and, as for a wrong option, exit code 2."""

    exit_code = 2


class Commands(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            raise Refusal(str(error)) from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__)
def main() -> None:
    """A top-k for every layer of a mixture-of-experts model, from its weights alone (LExI).

    \b
    lexi-search profile WEIGHTS                   how much each layer loses at each k
    lexi-search search profile.json --budget 80   the best k per layer, 80 in sum
    lexi-search export allocation.json --to vllm --model WEIGHTS -o FOLDER
    """


loss_option = click.option(
    "--loss",
    type=click.Choice(LOSS_KINDS),
    default="frobenius",
    help="The paper's norm, the root mean square per token, or its square.",
)
normalised_option = click.option(
    "--normalised/--absolute", default=True, help="Relative to the largest loss of the table, or as measured."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


@main.command()
@click.argument("weights")
@click.option("-o", "--output", default="profile.json", help="File to write.")
@click.option("--layers", help="Only these decoder layers: 0:15 (both ends included), 3, or 0,2,5.  [default: all]")
@click.option("--batch", default=4, help="Sequences per iteration.")
@click.option("--length", default=512, help="Tokens per sequence.")
@click.option("--relative-error", default=0.01, help="Stop a layer when every k is known this well.")
@click.option("--samples", default=2**20, help="Stop a layer before it takes more tokens than this.")
@click.option("--seed", default=0, type=click.IntRange(0, 2**32 - 1), help="Seed of the random input.")
@click.option(
    "--dtype",
    type=click.Choice(("auto", *DTYPES)),
    default="auto",
    help="Element type of the input; auto: the weights'.",
)
def profile(
    weights: str,
    output: str,
    layers: str | None,
    batch: int,
    length: int,
    relative_error: float,
    samples: int,
    seed: int,
    dtype: str,
) -> None:
    """Measure how much each layer of WEIGHTS loses at each k.

    WEIGHTS is a folder with config.json and safetensors shards, or a hub id. Reads one layer at a time.
    """
    check_writable(output)
    wanted = parse_layers(layers) if layers else None
    prepare_environment()
    from lexi_search.checkpoint import open_checkpoint
    from lexi_search.models import describe, find_dtype
    from lexi_search.profiling import profile_layers

    checkpoint = open_checkpoint(weights)
    model = describe(checkpoint)
    settings = ProfileSettings(
        input="paper",
        seed=seed,
        batch=batch,
        length=length,
        dtype=find_dtype(checkpoint, model) if dtype == "auto" else dtype,
        relative_error=relative_error,
        max_samples=samples,
    )
    chosen = wanted or model.layers
    with make_progress() as progress:
        measured = profile_layers(checkpoint, model, layers=chosen, settings=settings)
        losses = dict(progress.track(measured, total=len(chosen), description="layers"))
    write_profile(output, Profile(model.identity, settings, losses, {"lexi_search": __version__}))
    click.echo(output)


@main.command()
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


@main.command()
@click.argument("file")
@loss_option
@normalised_option
@json_option
def show(file: str, loss: str, normalised: bool, as_json: bool) -> None:
    """Show a profile or an allocation as a table."""
    artifact = read_artifact(file)
    from lexi_search import tables

    scale, allocated = {"loss": loss, "normalised": normalised}, isinstance(artifact, Allocation)
    if as_json:
        print_json(tables.summarise(artifact) if allocated else tables.list_losses(artifact, **scale))
    else:
        print_table(tables.tabulate_allocation(artifact) if allocated else tables.tabulate_profile(artifact, **scale))


@main.command()
@click.argument("profile")
@click.argument("allocations", nargs=-1)
@click.option("-o", "--output", default="heatmap.png", help="File to write, .png or .svg.")
@loss_option
@normalised_option
def plot(profile: str, allocations: tuple[str, ...], output: str, loss: str, normalised: bool) -> None:
    """Draw a PROFILE as a heatmap, layers by k, with the k of ALLOCATIONS over it."""
    check_writable(output)
    drawn = read_profile(profile), {path: read_allocation(path) for path in allocations}
    from lexi_search.plots import draw_heatmap, render

    figure = draw_heatmap(*drawn, loss=loss, normalised=normalised)
    write_atomically(output, render(figure, Path(output).suffix.lstrip(".").lower()))
    click.echo(output)


@main.command()
@click.argument("allocation")
@click.option("--to", "form", required=True, type=click.Choice(("vllm", "transformers", "json", "csv")), help="Form.")
@click.option("--model", help="The model's original folder; for vllm without -o a hub id will do.")
@click.option("-o", "--output", help="Model folder to make (vllm, transformers with --model), or file to write.")
@click.option("--force", is_flag=True, help="Replace a model folder that was exported before.")
def export(allocation: str, form: str, model: str | None, output: str | None, force: bool) -> None:
    """Turn an ALLOCATION into what a serving engine takes.

    \b
    vllm          the command to run; with -o a model folder for it, which needs the LExI plugin
    transformers  what to lay over config.json; with --model and -o a model folder,
                  and the call that loads it and applies the allocation
    json, csv     the k per layer
    """
    chosen = read_allocation(allocation)
    from lexi_search import exporters

    config = exporters.read_config(model) if model else {}
    if model:
        exporters.check_config(chosen.model, config)
    elif form == "vllm":
        raise InputError("--to vllm needs --model, the model's folder or hub id")
    if form == "vllm":
        overrides = exporters.make_vllm_overrides(chosen, config)
        if output:
            exporters.write_folder(output, model, overrides, force=force)
            click.echo(exporters.format_vllm_command(output, chosen.model.model_type))
        else:
            click.echo(exporters.format_vllm_command(model, chosen.model.model_type, overrides))
    elif form == "transformers" and model and output:
        exporters.write_folder(output, model, exporters.make_transformers_overrides(chosen), force=force)
        click.echo(exporters.format_transformers_call(output, allocation))
    elif output:
        write_atomically(output, exporters.format_text(chosen, form).encode())
        click.echo(output)
    else:
        click.echo(exporters.format_text(chosen, form), nl=False)


def parse_layers(text: str) -> tuple[int, ...]:
    """`0:15` (both ends included), `3`, `0,2,5` or a mix of them, as ascending layer indices."""
    try:
        ends = [[int(end) for end in part.split(":")] for part in text.split(",")]
    except ValueError:
        ends = []
    if not ends or any(len(part) > 2 or part[0] < 0 or part[-1] < part[0] for part in ends):
        raise InputError(f"--layers {text!r} is not understood; write 0:15 (both ends included), 3, or 0,2,5")
    return tuple(sorted({layer for part in ends for layer in range(part[0], part[-1] + 1)}))


def parse_budgets(text: str) -> range:
    """START:STOP:STEP, STOP included where the steps hit it."""
    try:
        start, stop, step = map(int, text.split(":"))
    except ValueError:
        start, stop, step = 0, 0, 0
    if step < 1 or stop < start:
        raise InputError(f"--budgets {text!r} is not understood; write START:STOP:STEP, such as 64:128:8")
    return range(start, stop + 1, step)


def print_json(document: Any) -> None:
    click.echo(json_bytes(document).decode(), nl=False)


def print_table(table: "RenderableType") -> None:
    """In a pipe nothing is folded or cut: the reader is a program."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 10_000).print(table)


def make_progress() -> "Progress":
    """A bar with the time left on stderr where that is a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


def prepare_environment() -> None:
    """Before JAX is imported: keep what it compiles in the user's cache folder, unless the user said otherwise."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    caches = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or Path.home() / ".cache"
    folder = Path(caches) / "lexi-search" / "jax"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # a cache that cannot be had only costs time
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
