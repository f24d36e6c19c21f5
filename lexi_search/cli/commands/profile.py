"""`lexi-search profile`."""

import os
from contextlib import nullcontext
from typing import Any

import click

from lexi_search.artifacts.profile import Profile, find_missing, format_layers
from lexi_search.cli.console import (
    Interruption,
    conclude,
    echo,
    explain_lost_process,
    prepare_environment,
)
from lexi_search.cli.options import SIZE, dtype_option, force_option, parse_layers
from lexi_search.cli.progress import Reporter, describe_process, make_progress

INPUTS = ("weights", "paper")
EXAMPLES = """\b
Examples:
  lexi-search profile weights/
  lexi-search profile weights/ --seed 1 -o other.json
  lexi-search profile weights/ --text mine.txt -o on-mine.json
  lexi-search profile weights/ --input paper --iterations 10 -o paper.json
"""


@click.command(epilog=EXAMPLES)
@click.argument("weights")
@click.option("-o", "--output", default="profile.json", help="File to write.")
@click.option("--layers", help="Only these decoder layers: 0:15 (both ends included), 3, or 0,2,5.  [default: all]")
@click.option(
    "--input",
    type=click.Choice(INPUTS),
    default="weights",
    help="weights: text sampled from the model, through the whole model. paper: X ~ N(0, 1) to each layer by itself.",
)
@click.option(
    "--text",
    metavar="FILE",
    help="Measure on a text of yours instead of one that it samples: the beginning of this UTF-8 file, in tokens "
    "of WEIGHTS' tokenizer.json.",
)
@click.option("--batch", default=4, help="Sequences per iteration, the paper's B of Algorithm 1.")
@click.option("--length", default=512, help="Tokens per sequence, the paper's L.")
@click.option(
    "--iterations",
    type=int,
    help="The paper's N_iter: exactly so many iterations of BATCH x LENGTH tokens; with --input paper.  [default: as "
    "--relative-error and --samples say]",
)
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
    help="Tokens of text, sampled or given; with --input paper the most that a layer takes.  [default: 4096; paper: "
    "1048576]",
)
@click.option(
    "--control-variate",
    type=click.IntRange(1),
    metavar="RATIO",
    help="Send RATIO times as many tokens through the router alone, to need fewer; with --input paper.  [default: off]",
)
@click.option("--seed", default=0, type=click.IntRange(0, 2**32 - 1), help="Seed of the random input.")
@dtype_option
@click.option(
    "--max-k", type=int, help="Look at more experts per token than the model's own k_base; with --input paper."
)
@click.option(
    "--gate-exponent",
    metavar="NUMBER|auto",
    help="Let kept experts take over a part of the others' gate mass: 0 nothing, 1 all; auto finds out how much.  "
    "[default: auto with compensation, else as the model does]",
)
@click.option(
    "--compensation",
    type=click.Choice(("full", "exponent", "none")),
    show_default=False,
    help="Make up for dropped experts. full: a gate exponent, and corrections by what the router says of a token, "
    "fitted to the text. exponent: that alone. none: the paper's method.  [default: full where the family "
    "allows it; with --input paper none]",
)
@click.option(
    "--rank",
    type=click.IntRange(1),
    show_default=False,
    help="Rank of the corrections: more fits better and serves slower.  [default: 32]",
)
@click.option(
    "--background-k",
    type=click.IntRange(1),
    show_default=False,
    help="The k of all other layers while a layer is measured.  [default: half of the model's own; with --compensation "
    "none its own]",
)
@click.option(
    "--device-memory",
    type=SIZE,
    metavar="SIZE",
    show_default=False,
    help="Weights that stay on each GPU between passes, such as 20GB.  [default: half of the memory that JAX has]",
)
@click.option(
    "--host-memory",
    type=SIZE,
    metavar="SIZE",
    show_default=False,
    help="Weights that stay in host memory, where the GPUs have no room. What fits in neither is read again in every "
    "pass.  [default: half of what is free, 32GB at most]",
)
@click.option("--verbose", is_flag=True, help="Say at the end how long each phase took, and what was read.")
@click.option("--restart", is_flag=True, help="Throw away the layers that a run cut short has finished.")
@force_option
@click.option("--distributed", is_flag=True, help="One of several processes of Slurm, MPI or Kubernetes.")
@click.option("--coordinator", help="HOST:PORT where process 0 listens, for several processes started by hand.")
@click.option("--num-processes", type=click.IntRange(1), help="How many processes there are.")
@click.option("--process-id", type=click.IntRange(0), help="Which of them this is, from 0.")
def profile(
    weights: str,
    output: str,
    layers: str | None,
    distributed: bool,
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    verbose: bool,
    device_memory: int | None,
    host_memory: int | None,
    **settings: Any,
) -> None:
    """Measure how much the model in WEIGHTS loses with each layer at each k.

    WEIGHTS is a folder with config.json and safetensors shards, or a hub id. The model samples a text and is then run
    on it, with every layer at every k in turn and all others at --background-k: ten passes. With --text there are four,
    and the result depends on data. Weights that memory has room for are read once; for the rest, two layers at most are
    in memory. Several GPUs of one process keep a copy of the layers each, or a part where one cannot hold all.
    Hidden states take tokens x (2 + MoE layers x (k - 1)) x hidden size numbers, in host memory where the GPU has none
    to spare. Without attention and embeddings, or for families that are not known here, use --input paper.

    Cut short, the same command goes on from what is kept in OUTPUT.partial: the text, which is six of the ten passes,
    or on --input paper every finished layer.

    Several processes, on one host or many, share out the layers: start all with the same arguments, on their own GPUs
    each (CUDA_VISIBLE_DEVICES). Process 0 writes OUTPUT.
    """
    wanted = parse_layers(layers) if layers else None
    address = (coordinator, num_processes, process_id)
    together = distributed or address != (None, None, None)
    if together:
        explain_lost_process()
    prepare_environment()
    if host_memory is not None:  # it grows by doubling
        os.environ.setdefault("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", str(max(64, 2 * host_memory // 10**9 + 2)))
    from lexi_search.models.loading.residence import find_room
    from lexi_search.profiling.distributed import Group, join
    from lexi_search.profiling.session import profile_checkpoint

    with join(*address) if together else nullcontext(Group()) as group:
        with make_progress(quiet=group.index > 0) as progress:
            observer = Reporter(progress, from_text=settings["input"] != "paper")
            try:
                room = find_room(device=device_memory, host=host_memory)
                told = {"layers": wanted, "room": room, "group": group, "observer": observer}
                made = profile_checkpoint(weights, output, **told, **settings)
            except KeyboardInterrupt:
                if observer.kept is None or not (observer.kept.layers or observer.kept.findings):
                    raise
                raise Interruption(f"interrupted; {observer.describe_end()}") from None
        if made is None:
            return
        if verbose:
            for line in (*observer.list_phases(), *describe_process()):
                echo(line, err=True)
        if rest := len(observer.kept.layers):
            echo(f"{rest} more finished layers stay in {observer.kept.folder}", err=True)
    echo(output)
    _conclude(output, made, by_default=settings["compensation"] is None, rank=settings["rank"])


def _conclude(output: str, profile: Profile, *, by_default: bool, rank: int | None) -> None:
    """Say what was measured, and how to go on; `by_default` nobody asked for a compensation or for none.

    `rank` is the one that was asked for.
    """
    from lexi_search.cli.tables import describe_profile, explain_rank

    if line := explain_rank(profile, rank):
        echo(line, err=True)
    said = describe_profile(profile, profile.default_loss)
    if by_default and profile.settings.input == "weights" and profile.settings.gate_exponent is None:
        said += "; without compensation, as this family's gate weights are not the scores up to one factor a token"
    if missing := find_missing(profile):
        rest = format_layers(missing)
        merge = ["lexi-search", "merge", output, "rest.json", "-o", "whole.json"]
        conclude(said, ["lexi-search", "profile", "WEIGHTS", "--layers", rest, "-o", "rest.json"], merge)
    else:
        plot = ["lexi-search", "plot", output, "-o", "heatmap.png"]
        conclude(said, plot, ["lexi-search", "search", output, "--budget", "50%"])
