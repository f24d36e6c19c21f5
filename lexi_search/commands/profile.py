"""`lexi-search profile`."""

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, closing

import click

from lexi_search import __version__
from lexi_search.artifacts import DTYPES, LayerLoss, Profile, ProfileSettings, write_profile
from lexi_search.console import Interruption, explain_lost_process, make_progress, parse_layers, prepare_environment
from lexi_search.files import check_writable
from lexi_search.merging import Header
from lexi_search.partials import Partials, keep_partials


@click.command()
@click.argument("weights")
@click.option("-o", "--output", default="profile.json", help="File to write.")
@click.option("--layers", help="Only these decoder layers: 0:15 (both ends included), 3, or 0,2,5.  [default: all]")
@click.option("--batch", default=4, help="Sequences per iteration.")
@click.option("--length", default=512, help="Tokens per sequence.")
@click.option("--relative-error", default=0.01, help="Stop a layer when every k is known this well.")
@click.option("--samples", default=2**20, help="Stop a layer before it takes more tokens than this.")
@click.option(
    "--control-variate",
    type=click.IntRange(1),
    metavar="RATIO",
    help="Send RATIO times as many tokens through the router alone, to need fewer in all.  [default: off]",
)
@click.option("--seed", default=0, type=click.IntRange(0, 2**32 - 1), help="Seed of the random input.")
@click.option(
    "--dtype",
    type=click.Choice(("auto", *DTYPES)),
    default="auto",
    help="Element type of the input; auto: the weights'.",
)
@click.option("--max-k", type=int, help="Look at more experts per token than the model's own k, up to this many.")
@click.option(
    "--gate-exponent",
    type=float,
    help="Let kept experts take over a part of the others' gate mass: 0 nothing, 1 all.  [default: as the model does]",
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
    batch: int,
    length: int,
    relative_error: float,
    samples: int,
    control_variate: int | None,
    seed: int,
    dtype: str,
    max_k: int | None,
    gate_exponent: float | None,
    restart: bool,
    distributed: bool,
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
) -> None:
    """Measure how much each layer of WEIGHTS loses at each k.

    WEIGHTS is a folder with config.json and safetensors shards, or a hub id. Reads one layer at a time. Finished layers
    are kept in OUTPUT.partial until all are: cut short, the same command goes on from there.

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
    prepare_environment()
    from lexi_search.checkpoint import open_checkpoint
    from lexi_search.distribution import Group, agree, estimate_costs, gather, join, spread
    from lexi_search.models import describe, find_dtype
    from lexi_search.profiling import profile_layers, sample_weights

    with ExitStack() as stack:
        group = stack.enter_context(join(*place)) if together else Group()
        checkpoint = open_checkpoint(weights)
        model = describe(checkpoint, max_k=max_k, gate_exponent=gate_exponent)
        settings = ProfileSettings(
            input="paper",
            seed=seed,
            batch=batch,
            length=length,
            dtype=find_dtype(checkpoint, model) if dtype == "auto" else dtype,
            relative_error=relative_error,
            max_samples=samples,
            control_variate=control_variate,
            max_k=max_k,
            gate_exponent=gate_exponent,
        )
        made_by = {"lexi_search": __version__, "weights_sample_sha256": sample_weights(checkpoint)}
        header, chosen, partials = Header(model.identity, settings, made_by), wanted or model.layers, None
        if group.index == 0:
            check_writable(output)
            partials = stack.enter_context(keep_partials(output, header, restart=restart))
            _tell_what_is_there(partials, chosen)
        missing = agree(group, header, [layer for layer in chosen if not partials or layer not in partials.layers])
        own = spread(estimate_costs(checkpoint, model, missing), group.size)[group.index]
        measured = stack.enter_context(closing(profile_layers(checkpoint, model, layers=own, settings=settings)))
        results = gather(group, measured, missing)
        if partials is None:
            deque(results, maxlen=0)
            return
        _keep(results, partials, chosen)
        losses = {layer: partials.layers[layer] for layer in chosen}
        write_profile(output, Profile(model.identity, settings, losses, made_by))
        partials.drop(chosen)
        if partials.layers:
            click.echo(f"{len(partials.layers)} more finished layers stay in {partials.folder}", err=True)
    click.echo(output)


def _tell_what_is_there(partials: Partials, chosen: tuple[int, ...]) -> None:
    if partials.layers or partials.damaged:
        damaged = f"; files that are damaged there, and measured again: {partials.damaged}" if partials.damaged else ""
        click.echo(f"{_count_finished(partials, chosen)} are finished in {partials.folder}{damaged}", err=True)


def _keep(results: Iterator[tuple[int, LayerLoss]], partials: Partials, chosen: tuple[int, ...]) -> None:
    try:
        with make_progress() as progress:
            finished = sum(layer in partials.layers for layer in chosen)
            task = progress.add_task("layers", total=len(chosen), completed=finished)
            for layer, loss in results:
                partials.add(layer, loss)
                progress.advance(task)
    except KeyboardInterrupt:
        if not partials.layers:
            raise
        kept = f"{_count_finished(partials, chosen)} are kept in {partials.folder}"
        raise Interruption(f"interrupted; {kept}, and the same command goes on from there") from None


def _count_finished(partials: Partials, chosen: tuple[int, ...]) -> str:
    return f"{sum(layer in partials.layers for layer in chosen)} of {len(chosen)} layers"
