"""`lexi-search merge`."""

import click

from lexi_search.artifacts.files import check_writable
from lexi_search.artifacts.merging import find_missing, format_layers, merge
from lexi_search.artifacts.serialisation import read_profile, write_profile
from lexi_search.cli.console import echo


@click.command("merge")
@click.argument("profiles", nargs=-1, required=True)
@click.option("-o", "--output", default="profile.json", help="File to write.")
def merge_profiles(profiles: tuple[str, ...], output: str) -> None:
    """Merge PROFILES of some layers each, as `profile --layers` makes them, into one.

    The result has the same bytes as one run over all layers. If layers are missing, it can be merged again.
    """
    check_writable(output, apart_from=profiles)
    merged = merge({path: read_profile(path) for path in profiles})
    write_profile(output, merged, apart_from=profiles)
    echo(output)
    if missing := find_missing(merged):
        count = f"{len(missing)} of {len(merged.model.moe_layers)} layers"
        echo(f"{count} are still missing: --layers {format_layers(missing)}", err=True)
