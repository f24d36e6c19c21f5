"""`lexi-search profile`."""

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import click

from lexi_search import __version__
from lexi_search.artifacts.codec import require_gate_exponent
from lexi_search.artifacts.files import check_writable
from lexi_search.artifacts.merging import Header
from lexi_search.artifacts.profile import LayerLoss, Profile, ProfileSettings
from lexi_search.artifacts.serialisation import write_profile
from lexi_search.cli.console import Interruption, explain_lost_process, make_progress, parse_layers, prepare_environment
from lexi_search.cli.options import choose_dtype, dtype_option
from lexi_search.errors import InputError
from lexi_search.profiling.resume import Partials, keep_partials

if TYPE_CHECKING:
    from rich.progress import Progress

AUTO = "auto"
DEFAULTS = {  # of options, by input
    "weights": {"relative_error": 0.0, "samples": 2**12},
    "paper": {"relative_error": 0.01, "samples": 2**20},
}


@click.command()
@click.argument("weights")
@click.option("-o", "--output", default="profile.json", help="File to write.")
@click.option("--layers", help="Only these decoder layers: 0:15 (both ends included), 3, or 0,2,5.  [default: all]")
@click.option(
    "--input",
    "source",
    type=click.Choice(tuple(DEFAULTS)),
    default="weights",
    help="weights: text that the model writes, through the whole model. paper: N(0, 1) to each layer by itself.",
)
@click.option("--batch", default=4, help="Sequences per iteration.")
@click.option("--length", default=512, help="Tokens per sequence.")
@click.option(
    "--relative-error",
    type=float,
    show_default=False,
    help="Stop a layer when every k is known this well; with --input paper.  [default: 0.01]",
)
@click.option(
    "--samples",
    type=int,
    show_default=False,
    help="Tokens of text; with --input paper the most that a layer takes.  [default: 4096; paper: 1048576]",
)
@click.option(
    "--control-variate",
    type=click.IntRange(1),
    metavar="RATIO",
    help="Send RATIO times as many tokens through the router alone, to need fewer; with --input paper.  [default: off]",
)
@click.option("--seed", default=0, type=click.IntRange(0, 2**32 - 1), help="Seed of the random input.")
@dtype_option
@click.option("--max-k", type=int, help="Look at more experts per token than the model's own k; with --input paper.")
@click.option(
    "--gate-exponent",
    metavar="NUMBER|auto",
    help="Let kept experts take over a part of the others' gate mass: 0 nothing, 1 all; auto finds out how much.  "
    "[default: as the model does]",
)
@click.option("--restart", is_flag=True, help="Throw away the layers that a run cut short has finished.")
@click.option("--distributed", is_flag=True, help="One of several processes of Slurm, MPI or Kubernetes.")
@click.option("--coordinator", help="HOST:PORT where process 0 listens, for several processes started by hand.")
@click.option("--num-processes", type=click.IntRange(1), help="How many processes there are.")
@click.option("--process-id", type=click.IntRange(0), help="Which of them this is, from 0.")
def profile(
    weights: str,
    output: str,
    layers: str | None,
    source: str,
    batch: int,
    length: int,
    relative_error: float | None,
    samples: int | None,
    control_variate: int | None,
    seed: int,
    dtype: str,
    max_k: int | None,
    gate_exponent: str | None,
    restart: bool,
    distributed: bool,
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
) -> None:
    """Measure how much the model in WEIGHTS loses with each layer at each k.

    WEIGHTS is a folder with config.json and safetensors shards, or a hub id; two layers at most are in memory. The
    model writes a text and is then run on it, with every layer at every k in turn: seven times through the files.
    Hidden states take tokens x (1 + MoE layers x (k - 1)) x hidden size numbers, in host memory where the GPU has none
    to spare. Without attention and embeddings, or for families that this does not know, use --input paper.

    Cut short, the same command goes on from what is kept in OUTPUT.partial: the text, which is six of the seven times
    through the files, or on --input paper every finished layer.

    Several processes, on one host or many, share out the layers: start all with the same arguments, on their own GPUs
    each (CUDA_VISIBLE_DEVICES). Process 0 writes OUTPUT.
    """
    place = (coordinator, num_processes, process_id)
    together = distributed or place != (None, None, None)
    if together:
        explain_lost_process()
    else:
        check_writable(output)
    wanted = parse_layers(layers) if layers else None
    exponent = _parse_exponent(gate_exponent, source)
    if source != "paper":
        _refuse({"--relative-error": relative_error, "--control-variate": control_variate, "--max-k": max_k})
    prepare_environment()
    import numpy as np

    from lexi_search.checkpoint.reader import open_checkpoint, sample_weights
    from lexi_search.models.model import describe, find_dtype
    from lexi_search.profiling.distributed import Group, agree, estimate_costs, gather, join, share, spread
    from lexi_search.profiling.divergence import choose_exponent, draw_samples, open_run
    from lexi_search.profiling.profile import check_layers, profile_layers

    with ExitStack() as stack:
        group = stack.enter_context(join(*place)) if together else Group()
        checkpoint = open_checkpoint(weights)
        model = describe(checkpoint, max_k=max_k, gate_exponent=None if exponent == AUTO else exponent)
        chosen = wanted or model.layers
        check_layers(checkpoint, model, chosen)
        settings = ProfileSettings(
            input=source,
            seed=seed,
            batch=batch,
            length=length,
            dtype=choose_dtype(dtype, source, find_dtype(checkpoint, model)),
            relative_error=DEFAULTS[source]["relative_error"] if relative_error is None else relative_error,
            max_samples=DEFAULTS[source]["samples"] if samples is None else samples,
            control_variate=control_variate,
            max_k=max_k,
            gate_exponent=model.routing.exponent,
        )
        run = None if source == "paper" else open_run(checkpoint, model, settings.dtype)
        made_by = {"lexi_search": __version__, "weights_sample_sha256": sample_weights(checkpoint)}
        header, partials = Header(model.identity, settings, made_by), None
        agree(group, header)
        if group.index == 0:
            check_writable(output)
            partials = keep_partials(output, header, restart=restart, but_exponent=exponent == AUTO)
            partials = stack.enter_context(partials)
            _tell_what_is_there(partials, chosen)
        progress = stack.enter_context(make_progress(quiet=group.index > 0))
        passes = progress.add_task("decoder layers, in passes", total=None, visible=run is not None)
        traits = {"report": lambda layer: progress.advance(passes)}

        @cache
        def get_text() -> Any:
            count = -(-len(chosen) // group.size)

            def draw() -> list[list[int]]:
                return draw_samples(run, settings, layers=count, **traits).tolist()

            return np.asarray(share(group, "text", lambda: partials.find("text", draw)), np.int32)

        if exponent == AUTO:

            def choose() -> float:
                return choose_exponent(run, get_text(), **traits)

            found = share(group, "exponent", lambda: partials.find("exponent", choose))
            model = model._replace(routing=model.routing._replace(exponent=found))
            settings = replace(settings, gate_exponent=found)
            if partials is not None:
                click.echo(f"gate exponent {found:g}", err=True)
                partials.load(Header(model.identity, settings, made_by))
        missing = share(group, "missing", lambda: [layer for layer in chosen if layer not in partials.layers])
        own = spread(estimate_costs(checkpoint, model, missing, source), group.size)[group.index]
        tokens = get_text() if own and run is not None else None
        measured = profile_layers(checkpoint, model, layers=own, settings=settings, tokens=tokens, **traits)
        measured = stack.enter_context(closing(measured))
        results = gather(group, measured, missing)
        if partials is None:
            deque(results, maxlen=0)
            return
        _keep(results, partials, chosen, progress)
        losses = {layer: partials.layers[layer] for layer in chosen}
        write_profile(output, Profile(model.identity, settings, losses, made_by))
        partials.drop(chosen)
        if partials.layers:
            click.echo(f"{len(partials.layers)} more finished layers stay in {partials.folder}", err=True)
    click.echo(output)


def _tell_what_is_there(partials: Partials, chosen: tuple[int, ...]) -> None:
    if partials.layers or partials.findings or partials.damaged:
        damaged = f"; files that are damaged there, and made again: {partials.damaged}" if partials.damaged else ""
        click.echo(f"{_describe_kept(partials, chosen, 'are finished')} in {partials.folder}{damaged}", err=True)


def _keep(
    results: Iterator[tuple[int, LayerLoss]], partials: Partials, chosen: tuple[int, ...], progress: "Progress"
) -> None:
    finished = sum(layer in partials.layers for layer in chosen)
    task = progress.add_task("layers", total=len(chosen), completed=finished)
    try:
        for layer, loss in results:
            partials.add(layer, loss)
            progress.advance(task)
    except KeyboardInterrupt:
        if not partials.layers and not partials.findings:
            raise
        kept = f"{_describe_kept(partials, chosen, 'are kept')} in {partials.folder}"
        raise Interruption(f"interrupted; {kept}, and the same command goes on from there") from None


def _describe_kept(partials: Partials, chosen: tuple[int, ...], verb: str) -> str:
    text = "the text and " if "text" in partials.findings else ""
    return f"{text}{sum(layer in partials.layers for layer in chosen)} of {len(chosen)} layers {verb}"


def _parse_exponent(text: str | None, source: str) -> float | str | None:
    if text == AUTO and source == "paper":
        raise InputError("--gate-exponent auto is found on the model's own text; leave --input paper out")
    if text in (None, AUTO):
        return text
    try:
        exponent = float(text)
    except ValueError:
        raise InputError(f"--gate-exponent {text!r} is neither a number nor auto") from None
    require_gate_exponent(exponent)
    return exponent


def _refuse(options: dict[str, Any]) -> None:
    if given := [name for name, value in options.items() if value is not None]:
        raise InputError(f"{given[0]} is for --input paper; add that, or leave {given[0]} out")
