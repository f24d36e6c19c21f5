"""`lexi-search merge`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click

from lexi_search.artifacts.compensation import merge_maps, name_beside, write_maps
from lexi_search.artifacts.files import check_writable
from lexi_search.artifacts.profile import Profile, find_missing, format_layers, merge
from lexi_search.artifacts.serialisation import describe_nature, read_profile, read_profile_maps, write_profile
from lexi_search.cli.console import conclude, echo
from lexi_search.cli.options import force_option
from lexi_search.errors import InputError

EXAMPLES = """\b
Example:
  lexi-search profile weights/ --layers 0:3 -o first.json
  lexi-search profile weights/ --layers 4:7 -o second.json
  lexi-search merge first.json second.json -o whole.json
"""


@click.command("merge", epilog=EXAMPLES)
@click.argument("profiles", nargs=-1, required=True)
@click.option("-o", "--output", default="profile.json", help="File to write.")
@force_option
def merge_profiles(profiles: tuple[str, ...], output: str, force: bool) -> None:
    """Merge PROFILES of some layers each, as `profile --layers` makes them, into one.

    With `--input paper` the result has the same bytes as one run over all layers; with the default input its losses are
    equal up to rounding. If layers are missing, it can be merged again.
    """
    check_writable(output, apart_from=profiles)
    parts = _read_parts(profiles)
    merged = merge(parts)
    check_writable(output, nature=None if force else describe_nature(Profile, merged.model))
    maps = {path: read_profile_maps(path, part) for path, part in parts.items()}
    if merged.settings.compensation_rank is not None:
        apart_from = [*profiles, *(Path(path).parent / part.compensation.file for path, part in parts.items())]
        place = name_beside(output)
        named = write_maps(place, merge_maps(maps), merged.model, owners=[output], apart_from=apart_from, force=force)
        merged = replace(merged, compensation=named)
    write_profile(output, merged, apart_from=profiles, force=force)
    echo(output)
    count = f"{len(merged.layers)} of {len(merged.model.moe_layers)} MoE layers, from {len(profiles)} parts"
    if missing := find_missing(merged):
        rest = format_layers(missing)
        conclude(
            f"{count}; still missing: --layers {rest}",
            ["lexi-search", "profile", "WEIGHTS", "--layers", rest, "-o", "rest.json"],
            ["lexi-search", "merge", output, "rest.json", "-o", "whole.json"],
        )
    else:
        conclude(count, ["lexi-search", "search", output, "--budget", "50%"])


def _read_parts(paths: Sequence[str]) -> dict[str, Profile]:
    """The profile in each file; InputError where two of them are one: the same file, or copies of it."""
    parts: dict[str, Profile] = {}
    for path in paths:
        part = read_profile(path)
        if twin := next((name for name, other in parts.items() if other == part), None):
            raise InputError(f"{path}: the same part as {twin}; name each part once")
        parts[path] = part
    return parts
