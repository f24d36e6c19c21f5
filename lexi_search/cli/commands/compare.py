"""`lexi-search compare`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from lexi_search.artifacts.profile import LOSS_KINDS, Profile
from lexi_search.artifacts.serialisation import read_profile
from lexi_search.cli.console import conclude, echo, json_option, prepare_environment, print_json, print_table

if TYPE_CHECKING:
    from lexi_search.allocation.comparison import Comparison


EXAMPLES = """\b
Examples:
  lexi-search profile weights/ --seed 2 -o truth.json
  lexi-search compare truth.json profile.json other.json
"""


@click.command(epilog=EXAMPLES)
@click.argument("reference")
@click.argument("profiles", nargs=-1, required=True)
@click.option(
    "--loss",
    type=click.Choice(tuple(LOSS_KINDS)),
    show_default=False,
    help="The loss of REFERENCE to judge by.  [default: increase if it has that, else divergence, else frobenius]",
)
@click.option(
    "--resamples",
    default=200,
    type=click.IntRange(0),
    help="Resampled profiles from which the standard errors are estimated.",
)
@json_option
def compare(reference: str, profiles: tuple[str, ...], loss: str | None, resamples: int, as_json: bool) -> None:
    """Judge the allocations from each of PROFILES by the losses of REFERENCE, at 25 to 75 % of the budget.

    100 % is as good as REFERENCE itself, 0 % no better than the same k in every layer. Every loss that a profile holds
    is judged by itself. Standard errors come from those of the profiles; "~" marks what is within two of them of the
    same k in every layer: there REFERENCE cannot tell which is better.
    """
    truth = read_profile(reference)
    others = {path: read_profile(path) for path in profiles}
    loss = loss or ("increase" if "increase" in truth.loss_kinds else truth.default_loss)
    prepare_environment()
    from lexi_search.allocation import comparison
    from lexi_search.cli import tables

    comparisons = {
        (path, kind): comparison.compare(truth, other, reference_loss=loss, loss=kind, resamples=resamples)
        for path, other in others.items()
        for kind in other.loss_kinds
    }
    if as_json:
        print_json(tables.list_comparisons(comparisons))
    else:
        print_table(tables.tabulate_comparisons(comparisons, title=f"by {loss} of {reference}"))
        _conclude(comparisons, loss, truth)


def _conclude(comparisons: Mapping[tuple[str, str], "Comparison"], loss: str, truth: Profile) -> None:
    """Say which is best, and warn where the reference is too noisy to tell."""
    unsure = sum(int((~each.distinguishable).sum()) for each in comparisons.values())
    every = sum(each.distinguishable.size for each in comparisons.values())
    if unsure:
        less = loss != "divergence" and "divergence" in truth.loss_kinds
        echo(
            f"by {loss}, {unsure} of {every} results are not distinguishable from the same k in every layer (~); "
            + ("--loss divergence is mostly less noisy" if less else "profiles of more text would tell"),
            err=True,
        )
    (path, kind), best = min(comparisons.items(), key=lambda item: item[1].found.sum())
    middle = len(best.budgets) // 2
    said = "no budget leaves a choice"
    if len(best.budgets):
        share, error = best.closed[middle], best.closed_error[middle]
        said = f"the least loss has {path} by {kind}"
        if share == share:
            said += f": {100 * share:.0f} ±{100 * error:.0f} % of the way to the optimum at B = {best.budgets[middle]}"
    conclude(said, ["lexi-search", "search", path, "--loss", kind, "--budget", "50%"])
