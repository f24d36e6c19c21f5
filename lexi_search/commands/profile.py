"""`lexi-search profile`."""

import click

from lexi_search import __version__
from lexi_search.artifacts import DTYPES, Profile, ProfileSettings, write_profile
from lexi_search.console import make_progress, parse_layers, prepare_environment
from lexi_search.files import check_writable


@click.command()
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
