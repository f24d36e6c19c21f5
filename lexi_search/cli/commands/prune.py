"""`lexi-search prune`."""

import re
from fractions import Fraction
from typing import TYPE_CHECKING

import click

from lexi_search.cli.console import make_progress, prepare_environment
from lexi_search.errors import InputError

if TYPE_CHECKING:
    from lexi_search.pruning.prune import Pruning


@click.command()
@click.argument("weights")
@click.option("--experts", metavar="PERCENT", help="Leave out this share of every layer's experts, such as 25%.")
@click.option("--width", metavar="PERCENT", help="Leave out this share of every expert's channels, such as 25%.")
@click.option("-o", "--output", required=True, help="Model folder to make.")
@click.option(
    "--input",
    "source",
    type=click.Choice(("paper", "weights")),
    default="paper",
    help="paper: N(0, 1) to each layer by itself. weights: text that the model writes, through the whole model.",
)
@click.option("--samples", default=4096, type=click.IntRange(1), help="Tokens that tell what is important.")
@click.option("--seed", default=0, type=click.IntRange(0, 2**32 - 1), help="Seed of the tokens.")
def prune(
    weights: str, experts: str | None, width: str | None, output: str, source: str, samples: int, seed: int
) -> None:
    """Write a smaller checkpoint of WEIGHTS, a folder, from the weights alone.

    Whole experts go, or channels of each expert, or both: the same number in every layer, the least important first.
    lexi-pruning.json in the new folder says which.
    """
    if experts is None and width is None:
        raise InputError("nothing to prune; give --experts or --width, such as --experts 25%")
    shares = {"experts": parse_share(experts, "--experts"), "width": parse_share(width, "--width")}
    prepare_environment()
    from lexi_search.pruning.prune import prune as write_pruned

    with make_progress() as progress:
        task = progress.add_task("pruning", total=100)
        pruning = write_pruned(
            weights,
            output,
            **shares,
            input=source,
            samples=samples,
            seed=seed,
            report=lambda share: progress.update(task, completed=int(100 * share)),
        )
    for line in describe(pruning):
        click.echo(line)
    click.echo(output)


def parse_share(text: str | None, option: str) -> Fraction:
    """25% as 1/4; nothing as 0."""
    if text is None:
        return Fraction(0)
    if not re.fullmatch(r"\d{1,2}(\.\d{1,9})?%", text):
        raise InputError(f"{option} {text!r} is not understood; write a share from 0% to below 100%, such as 25%")
    return Fraction(text.removesuffix("%")) / 100


def describe(pruning: "Pruning") -> list[str]:
    """What became of each size, with the shares that whole numbers allow."""
    sizes = {
        "experts a layer": pruning.num_experts,
        "channels an expert": pruning.width,
        "shared experts, as wide together and filled up with zeros": pruning.shared_experts,
    }
    lines = [f"{what}: {before} -> {after}{_share(before, after)}" for what, (before, after) in sizes.items() if before]
    before, after = pruning.size
    return [*lines, f"bytes of weights: {before} -> {after}{_share(before, after)}"]


def _share(before: int, after: int) -> str:
    return "" if after >= before else f" (-{100 * (before - after) / before:.3g} %)"
