"""`lexi-search compare`."""

import click

from lexi_search.artifacts.profile import LOSS_KINDS
from lexi_search.artifacts.serialisation import read_profile
from lexi_search.cli.console import json_option, prepare_environment, print_json, print_table


@click.command()
@click.argument("reference")
@click.argument("profiles", nargs=-1, required=True)
@click.option(
    "--loss",
    type=click.Choice(tuple(LOSS_KINDS)),
    show_default=False,
    help="The loss of REFERENCE to judge by.  [default: increase if it has that, else divergence, else frobenius]",
)
@json_option
def compare(reference: str, profiles: tuple[str, ...], loss: str | None, as_json: bool) -> None:
    """Judge the allocations from each of PROFILES by the losses of REFERENCE, at 25 to 75 % of the budget.

    100 % is as good as REFERENCE itself, 0 % no better than the same k in every layer. Every loss that a profile holds
    is judged by itself.
    """
    truth = read_profile(reference)
    others = {path: read_profile(path) for path in profiles}
    loss = loss or ("increase" if "increase" in truth.loss_kinds else truth.default_loss)
    prepare_environment()
    from lexi_search.allocation import comparison
    from lexi_search.cli import tables

    comparisons = {
        (path, kind): comparison.compare(truth, other, reference_loss=loss, loss=kind)
        for path, other in others.items()
        for kind in other.loss_kinds
    }
    if as_json:
        print_json(tables.list_comparisons(comparisons))
    else:
        print_table(tables.tabulate_comparisons(comparisons, title=f"by {loss} of {reference}"))
