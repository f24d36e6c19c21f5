"""Tables, plots and conclusions of the fidelity study, every number from its results.

python examples/fidelity/report.py results/*.json -o report
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import click
import sections
from figures import plot_losses, plot_tables
from sections import percent
from views import ORACLE, PLAIN, View, is_wide, list_cells, read_views

FIGURES = ("losses.png", "tables.png")


def conclude(views: Sequence[View], default: str) -> list[str]:
    """Plain sentences, with the numbers of the study."""
    cells = list(list_cells(views))
    wide = [cell for cell in cells if is_wide(*cell)]
    families = {view.found["base"]["model_type"] for view in views}
    lines = [
        f"{len(views)} trained models of {len(families)} families, {len(cells)} cells of model and budget; in "
        f"{len(wide)} of them the oracle gains at least {percent(sections.LEAST_GAIN)} over uniform."
    ]
    lines += [describe_method(name, cells) for name in dict.fromkeys((default, "paper/frobenius", "paper/squared"))]
    lines += [describe_exponent(views), describe_compounding(views)]
    refined = [
        view.found["refined"][str(budget)][PLAIN]["increase"]["mean"] / view.increase(ORACLE, budget) - 1
        for view, budget in cells
        if "refined" in view.found and view.increase(ORACLE, budget) > 0
    ]
    if refined:
        lines.append(
            "A search that runs whole allocations changes the held-out loss increase, against the oracle's, "
            f"by {percent(fmean(refined))} in the mean, {percent(min(refined))} at best and "
            f"{percent(max(refined))} at worst."
        )
    left_out = sorted({piece for view in views for piece in view.found["skipped"]})
    if left_out:
        lines.append(f"Left out of at least one model: {', '.join(left_out)}; the reasons are at the end.")
    return [f"- {line}" for line in lines] + [""]


def describe_method(name: str, cells: Sequence[tuple[View, int]]) -> str:
    known = [cell for cell in cells if name in cell[0].found["cells"]]
    if not known:
        return f"`{name}` was not measured."
    above = sum(view.above(name, budget) > 0 for view, budget in known)
    wide = [cell for cell in known if is_wide(*cell)]
    closed = sections.average(view.closed(name, budget) for view, budget in wide)
    there = f", and closes {percent(closed)} of the gap in the mean where the oracle gains enough" if wide else ""
    return f"`{name}` loses more than uniform in {above} of {len(known)} cells{there}."


def describe_exponent(views: Sequence[View]) -> str:
    better, all_of, best = 0, 0, []
    for view in views:
        rows = view.found["uniform"]
        for k in range(view.found["base"]["top_k"] - 1):
            increases = {name: rows_of_k[k]["increase"]["mean"] for name, rows_of_k in rows.items()}
            better += increases[sections.HALF] < increases[PLAIN]
            all_of += 1
            best.append(float(min(sections.list_exponents(view), key=increases.get)))
    return (
        f"With gate exponent {sections.HALF}, uniform k loses less than plain in {better} of {all_of} cases of model "
        f"and k; the best exponent tried lies between {min(best):g} and {max(best):g}, {fmean(best):.2f} in the mean."
    )


def describe_compounding(views: Sequence[View]) -> str:
    rows = [row for view in views for row in view.found.get("compounding", ()) if row["sum"] > 0]
    ratios = {
        of: [row["real"] / row["sum"] for row in rows if row["of"] == of] for of in ("uniform", "oracle", "random")
    }
    parts = [f"{fmean(values):.2f} times for {of} allocations" for of, values in ratios.items() if values]
    return f"Losses compound: whole allocations lose the sum of their single-layer increases {', '.join(parts)}."


def write(views: Sequence[View], default: str) -> list[str]:
    """The report's lines."""
    domains = {domain for view in views for domain in view.found["base"]["domains"]}
    made_by = views[0].found["made_by"]
    lines = ["# Fidelity: what allocations really lose", "", "## Conclusions", *conclude(views, default)]
    lines += sections.judge_default(views, default)
    lines += ["## Models", *sections.list_models(views)]
    lines += [f"Made with {', '.join(f'{name} {value}' for name, value in made_by.items())}.", ""]
    lines += [
        "Loss increases are in nats per token over the unreduced model, held-out text that nothing was measured on,"
    ]
    lines += ["mean over domains. Between two uniform k, uniform is interpolated linearly in the budget. Gap closed is"]
    lines += ["(uniform - x) / (uniform - oracle), the oracle being the exact search on brute-force increases.", ""]
    lines += ["## Ways to make the table", *sections.compare_methods(views), f"![losses]({FIGURES[0]})", ""]
    lines += ["## Every cell", ""]
    for view in views:
        lines += [f"### {view.name}", "", *sections.tabulate_cells(view)]
    lines += ["## Rank correlations (Spearman)", *sections.tabulate_correlations(views), f"![tables]({FIGURES[1]})", ""]
    lines += ["## Gate exponent, uniform k", *sections.tabulate_exponents(views)]
    lines += ["## Compounding", *sections.tabulate_compounding(views)]
    lines += ["## Beyond sums", *sections.tabulate_refined(views)]
    for title, method in (("oracle", "oracle/increase"), ("calibrated", "calibrated/relative")):
        lines += [f"## Measured on one domain, judged on each: {title}"]
        lines += sections.tabulate_parts(views, method, lambda name: name.partition("@")[2] in domains, "measured on")
        lines += [f"## Measured on fewer tokens: {title}"]
        lines += sections.tabulate_parts(views, method, lambda name: name.partition("@")[2] not in domains, "tokens")
    lines += ["## Pruning", *sections.tabulate_pruned(views), "## Times", *sections.tabulate_times(views)]
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
