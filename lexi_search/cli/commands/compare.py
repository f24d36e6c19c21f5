"""`lexi-search compare`."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

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

    Only the k are judged: every allocation is taken to run with the compensation that REFERENCE was measured with.
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
        print_json(_list_comparisons(comparisons, others))
        return
    made_up = tables.describe_compensation(truth)
    how = ", ".join(filter(None, (truth.text, f"with {made_up}" if made_up else "without compensation")))
    title = f"by {loss} of {reference}, measured {how}"
    print_table(tables.tabulate_comparisons(comparisons, others, title=title))
    different = [path for path, other in others.items() if tables.describe_compensation(other) != made_up]
    if different:
        echo(
            f"{', '.join(different)}: measured with another compensation than {reference}, so that the k are judged, "
            "not what they lose with their own; lexi-search judge measures that",
            err=True,
        )
    _conclude(comparisons, others, loss, reference, truth)


def _list_comparisons(
    comparisons: Mapping[tuple[str, str], "Comparison"], profiles: Mapping[str, Profile]
) -> list[dict[str, Any]]:
    """The rows of the table as JSON objects; entry j of a list is for budget j."""
    return [
        {
            "profile": path,
            "loss": kind,
            "input": profiles[path].settings.input,
            "text_sha256": profiles[path].made_by.get("text_sha256"),
            "gate_exponent": profiles[path].settings.gate_exponent,
            "compensation_rank": profiles[path].settings.compensation_rank,
            "spearman": None if math.isnan(comparison.correlation) else comparison.correlation,
            **{
                name: getattr(comparison, name).tolist()
                for name in ("budgets", "uniform", "found", "optimum", "lead_error", "closed_error", "distinguishable")
            },
        }
        for (path, kind), comparison in comparisons.items()
    ]


def _conclude(
    comparisons: Mapping[tuple[str, str], "Comparison"],
    others: Mapping[str, Profile],
    loss: str,
    reference: str,
    truth: Profile,
) -> None:
    """Say which is best of those that can be told, and warn where the reference is too noisy to tell."""
    unsure = sum(int((~each.distinguishable).sum()) for each in comparisons.values())
    every = sum(each.distinguishable.size for each in comparisons.values())
    less = loss != "divergence" and "divergence" in truth.loss_kinds
    if unsure:
        echo(
            f"by {loss}, {unsure} of {every} results are not distinguishable from the same k in every layer (~); "
            + ("--loss divergence is mostly less noisy" if less else "profiles of more text would tell"),
            err=True,
        )
    told = {key: each for key, each in comparisons.items() if each.distinguishable.any()}
    if every and not told:
        words = ["lexi-search", "compare", reference, *others, "--loss", "divergence"]
        if not less:
            samples = 4 * truth.settings.max_samples
            text = ["--text", "FILE"] if truth.settings.input == "text" else []
            words = ["lexi-search", "profile", "WEIGHTS", *text, "--samples", str(samples), "-o", "more.json"]
        conclude("no profile has k that can be told from the same k in every layer, so none is named the best", words)
        return
    # Of several as good, the loss that a search takes by itself.
    (path, kind), best = min(
        (told or comparisons).items(),
        key=lambda item: (item[1].found.sum(), item[0][1] != others[item[0][0]].default_loss),
    )
    said = "no budget leaves a choice"
    if told:
        clear = best.distinguishable.nonzero()[0]
        place = min(clear.tolist(), key=lambda each: abs(each - len(best.budgets) // 2))
        share, error = best.closed[place], best.closed_error[place]
        said = f"the least loss has {path} by {kind}"
        if share == share:
            said += f": {100 * share:.0f} ±{100 * error:.0f} % of the way to the optimum at B = {best.budgets[place]}"
    conclude(said, ["lexi-search", "search", path, "--loss", kind, "--budget", "50%"])
