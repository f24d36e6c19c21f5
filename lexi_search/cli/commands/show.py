"""`lexi-search show` and `lexi-search plot`."""

from pathlib import Path

import click

from lexi_search.artifacts.allocation import Allocation
from lexi_search.artifacts.files import check_writable, write_atomically
from lexi_search.artifacts.serialisation import read_artifact, read_profile
from lexi_search.cli.console import echo, json_option, loss_option, normalised_option, print_json, print_table


@click.command()
@click.argument("file")
@loss_option
@normalised_option
@json_option
def show(file: str, loss: str | None, normalised: bool, as_json: bool) -> None:
    """Show a profile or an allocation as a table."""
    artifact = read_artifact(file)
    from lexi_search.cli import tables

    if isinstance(artifact, Allocation):
        summarise, tabulate, scale = tables.summarise, tables.tabulate_allocation, {}
    else:
        summarise, tabulate = tables.list_losses, tables.tabulate_profile
        scale = {"loss": loss or artifact.default_loss, "normalised": normalised}
    if as_json:
        print_json(summarise(artifact, **scale))
    else:
        print_table(tabulate(artifact, **scale))


@click.command()
@click.argument("profile")
@click.argument("others", nargs=-1)
@click.option("-o", "--output", default="heatmap.png", help="File to write, .png or .svg.")
@loss_option
@normalised_option
def plot(profile: str, others: tuple[str, ...], output: str, loss: str | None, normalised: bool) -> None:
    """Draw a PROFILE as a heatmap, layers by k, with OTHERS: profiles beside it, allocations as steps over all."""
    check_writable(output, apart_from=[profile, *others])
    profiles, allocations = {profile: read_profile(profile)}, {}
    for path in others:
        artifact = read_artifact(path)
        (allocations if isinstance(artifact, Allocation) else profiles)[path] = artifact
    from lexi_search.cli.plots import draw_heatmap, render

    shown = profiles if len(profiles) > 1 else profiles[profile]
    figure = draw_heatmap(shown, allocations, loss=loss, normalised=normalised)
    drawn = render(figure, Path(output).suffix.lstrip(".").lower())
    write_atomically(output, drawn, apart_from=[profile, *others])
    echo(output)
