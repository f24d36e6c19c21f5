"""`lexi-search show` and `lexi-search plot`."""

from pathlib import Path

import click

from lexi_search.artifacts import Allocation, read_allocation, read_artifact, read_profile
from lexi_search.console import json_option, loss_option, normalised_option, print_json, print_table
from lexi_search.files import check_writable, write_atomically


@click.command()
@click.argument("file")
@loss_option
@normalised_option
@json_option
def show(file: str, loss: str | None, normalised: bool, as_json: bool) -> None:
    """Show a profile or an allocation as a table."""
    artifact = read_artifact(file)
    from lexi_search import tables

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
@click.argument("allocations", nargs=-1)
@click.option("-o", "--output", default="heatmap.png", help="File to write, .png or .svg.")
@loss_option
@normalised_option
def plot(profile: str, allocations: tuple[str, ...], output: str, loss: str | None, normalised: bool) -> None:
    """Draw a PROFILE as a heatmap, layers by k, with the k of ALLOCATIONS over it."""
    check_writable(output)
    drawn = read_profile(profile), {path: read_allocation(path) for path in allocations}
    from lexi_search.plots import draw_heatmap, render

    figure = draw_heatmap(*drawn, loss=loss, normalised=normalised)
    write_atomically(output, render(figure, Path(output).suffix.lstrip(".").lower()))
    click.echo(output)
