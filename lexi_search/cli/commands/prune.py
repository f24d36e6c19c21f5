"""`lexi-search prune`."""

from fractions import Fraction
from typing import TYPE_CHECKING

import click

from lexi_search.cli.console import conclude, echo, format_share, format_size, prepare_environment
from lexi_search.cli.options import parse_share
from lexi_search.cli.progress import make_progress
from lexi_search.errors import InputError

if TYPE_CHECKING:
    from lexi_search.pruning.prune import Pruning


EXAMPLES = """\b
Examples:
  lexi-search prune weights/ --experts 25% -o smaller
  lexi-search prune weights/ --experts 25% --width 50% --samples 1024 -o smallest
"""


@click.command(epilog=EXAMPLES)
@click.argument("weights")
@click.option("--experts", metavar="PERCENT", help="Leave out this share of every layer's experts, such as 25%.")
@click.option("--width", metavar="PERCENT", help="Leave out this share of every expert's channels, such as 25%.")
@click.option("-o", "--output", required=True, help="Model folder to make.")
@click.option(
    "--input",
    "source",
    type=click.Choice(("paper", "weights")),
    default="paper",
    help="paper: N(0, 1) into each layer by itself. weights: text that the model generates, through the whole model.",
)
@click.option("--samples", default=4096, type=click.IntRange(1), help="Tokens to measure importance on.")
@click.option("--seed", default=0, type=click.IntRange(0, 2**32 - 1), help="Seed of the tokens.")
def prune(
    weights: str, experts: str | None, width: str | None, output: str, source: str, samples: int, seed: int
) -> None:
    """Write a smaller checkpoint of WEIGHTS, a folder, from the weights alone.

    Removes whole experts, or channels of each expert, or both: the same number in every layer, the least important
    first. lexi-pruning.json in the new folder lists what is left.
    """
    if experts is None and width is None:
        raise InputError("nothing to prune; give --experts or --width, such as --experts 25%")
    shares = {"experts": _parse_share(experts, "--experts"), "width": _parse_share(width, "--width")}
    prepare_environment()
    from lexi_search.pruning.prune import prune as write_pruned

    with make_progress() as progress:
        task = progress.add_task("pruning, percent", total=100)
        pruning = write_pruned(
            weights,
            output,
            **shares,
            input=source,
            samples=samples,
            seed=seed,
            report=lambda share: progress.update(task, completed=int(100 * share)),
        )
    for line in _describe(pruning):
        echo(line)
    echo(output)
    before, after = pruning.size
    conclude(
        f"{format_size(after)} of weights instead of {format_size(before)}",
        ["lexi-search", "profile", output, "-o", "pruned.json"],
        ["vllm", "serve", output],
    )


def _parse_share(text: str | None, option: str) -> Fraction:
    """The fraction that a percentage stands for: 1/4 for 25%, 0 for None."""
    if text is None:
        return Fraction(0)
    if (share := parse_share(text, option)) >= 1:
        raise InputError(f"{option} {text} leaves nothing; write a share below 100%, such as 25%")
    return share


def _describe(pruning: "Pruning") -> list[str]:
    """Lines with every size before and after, and the share removed, which whole numbers make inexact."""
    sizes = {
        "experts a layer": pruning.num_experts,
        "channels an expert": pruning.width,
        "shared experts, as wide together and padded with zeros": pruning.shared_experts,
    }
    lines = [f"{name}: {before} -> {after}{_share(before, after)}" for name, (before, after) in sizes.items() if before]
    before, after = pruning.size
    return [*lines, f"bytes of weights: {before} -> {after}{_share(before, after)}"]


def _share(before: int, after: int) -> str:
    return "" if after >= before else f" (-{format_share((before - after) / before)})"
