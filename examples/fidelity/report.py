"""Tables, plots and conclusions of the fidelity study, every number from its results.

python examples/fidelity/report.py results/*.json -o report
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
import floors
import parts
import sections
from conclusions import conclude
from figures import plot_losses, plot_tables
from gaps import LEAST_GAIN, MEASURES
from views import ERRORS, View, read_views
from wording import percent

FIGURES = ("losses.png", "tables.png")
PARTS = ("oracle/increase", "calibrated/relative")  # tables that were also measured on parts of the text


def explain() -> list[str]:
    """What the words of the report mean."""
    return [
        "Losses are those of whole allocations on held-out text that nothing was measured on, in nats per token, mean",
        "over domains: the increase of the cross-entropy over the unreduced model, or the divergence from it, which is",
        "less noisy. Differences are relative to plain uniform k at the same budget; between two k, uniform is",
        "interpolated linearly in the budget. Gap closed is (uniform - x) / (uniform - oracle), the oracle being the",
        "exact search on brute-force losses of the same measure, and is given only where that gains at least",
        f"{percent(LEAST_GAIN)}. Beyond noise is a paired difference, over windows, of more than {ERRORS} standard",
        "errors. What is held to the floors is judged on as many tokens as the list of models says, beside uniform k",
        "and oracles on the same; all else, parts of the text and what they are compared with too, on the fewer.",
        "",
    ]


def list_origins(views: Sequence[View]) -> list[str]:
    """What made the results, once for all models that say the same."""
    origins = {tuple(view.found["made_by"].items()): None for view in views}
    return [f"Made by {', '.join(f'{name} {value}' for name, value in origin)}." for origin in origins] + [""]


def write(views: Sequence[View], default: str) -> list[str]:
    """The report's lines."""
    lines = ["# Fidelity: what allocations really lose", "", "## Conclusions", *conclude(views, default)]
    lines += [*floors.judge_default(views, default), *explain()]
    lines += ["## Cells in which the default misses its aim", *floors.list_doubtful(views, default)]
    lines += ["## Models", *sections.list_models(views), *list_origins(views)]
    for measure in MEASURES:
        measured = [replace(view, measure=measure) for view in views]
        lines += [f"## Ways to make the table, by {measure}", *floors.compare_methods(measured)]
    lines += [f"![losses]({FIGURES[0]})", ""]
    lines += ["## Increase of the cross-entropy beside divergence, uniform k", *sections.tabulate_measures(views)]
    lines += ["## Budgets met by one k, and between", *floors.compare_budgets(views, default)]
    lines += ["## Rank correlations (Spearman) with brute force", *sections.average_correlations(views)]
    lines += [f"![tables]({FIGURES[1]})", ""]
    lines += ["## Tables from one domain, and from fewer tokens"]
    lines += [line for method in PARTS for line in parts.average_parts(views, method)]
    lines += ["## Compounding", *sections.tabulate_compounding(views)]
    lines += ["## Beyond sums", *sections.tabulate_refined(views)]
    lines += ["## Pruning", *sections.tabulate_pruned(views), "## Times", *sections.tabulate_times(views)]
    lines += ["## Gate exponent, uniform k", *sections.tabulate_exponents(views)]
    lines += ["## Every cell: increase of the cross-entropy", ""]
    for view in views:
        lines += [f"### {view.name}", "", *sections.tabulate_cells(view, default)]
    lines += ["## Every model: rank correlations", *sections.tabulate_correlations(views)]
    lines += ["## Every model: tables from one domain, and from fewer tokens; loss, mean over budgets"]
    lines += [line for method in PARTS for line in parts.tabulate_parts(views, method)]
    return [*lines, "## Left out", *sections.list_skipped(views)]


@click.command()
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("report"), show_default=True)
@click.option("--default", default="weights/divergence", show_default=True, help="The table that is held to the floor.")
def main(results: tuple[Path, ...], output: Path, default: str) -> None:
    """Write report.md and its plots to the folder OUTPUT, from the files that study.py wrote for each model."""
    views = read_views(results)
    if not views:
        names = ", ".join(map(str, results))
        raise click.UsageError(f"there is no model with an oracle yet in {names}: let study.py finish one")
    output.mkdir(parents=True, exist_ok=True)
    methods = dict.fromkeys(("oracle/increase", "calibrated/relative", default, "paper/frobenius", "paper/squared"))
    plot_losses(views, list(methods), output / FIGURES[0])
    plot_tables(views, default, output / FIGURES[1])
    (output / "report.md").write_text("\n".join(write(views, default)))
    click.echo(output / "report.md")


if __name__ == "__main__":
    main()
