"""One page on what allocations really lose, every number from the tables of study.py, and one figure.

python examples/fidelity/report.py results/*.csv -o report
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import click
import matplotlib.pyplot as plt
from records import LEAST_GAIN, MEASURES, Results, find_closed, find_gain, interpolate_uniform, read_results

DEFAULT = "weights/divergence"  # what `lexi-search` minimises by default
DRAWN = ("oracle/increase", "calibrated/relative", DEFAULT, "paper/frobenius", "paper/squared")
FIGURE = "![losses](losses.png)"
ERRORS = 2  # standard errors that are taken for noise
EXPLAINED = f"""
Losses are those of whole allocations on held-out text that nothing was measured on, in nats per token, relative to
uniform k without a gate exponent at the same budget (between two k: linear in the budget). A cell is a model at a
budget. `oracle` is the exact search on losses that brute force found on text, one layer at a time; gap closed is
(uniform - x) / (uniform - oracle) where that gains at least {LEAST_GAIN:.0%} by the same measure. Beyond noise is more
than {ERRORS} standard errors, window by window. Narrower experts are compared at as many active parameters.
""".replace("%", " %")


class Cell(NamedTuple):
    """A method's loss for one model at one budget, beside those of uniform k and of the oracle on the same text."""

    model: str
    budget: int
    share: float  # of the model's own sum of k
    tokens: int
    loss: float
    error: float | None  # standard error of the difference to uniform k
    uniform: float
    oracle: float | None

    @property
    def above(self) -> float:
        """How far above uniform k, relative to it; negative below."""
        return -find_gain(self.uniform, self.loss)

    @property
    def closed(self) -> float | None:
        """The share of the way from uniform k to the oracle; None where that is too short, or not known."""
        return None if self.oracle is None else find_closed(self.loss, self.uniform, self.oracle)


def gather(models: Iterable[Results], measure: str) -> dict[str, list[Cell]]:
    """Method -> its cells by one of `MEASURES`, of all models."""
    found: dict[str, list[Cell]] = {}
    for results in models:
        for method, cell in list_cells(results, measure):
            found.setdefault(method, []).append(cell)
    return found


def list_cells(results: Results, measure: str) -> Iterator[tuple[str, Cell]]:
    """(method, cell) of a model; of a method that was judged on two texts, those on the longer."""
    model, layers, own = results.facts["model"], int(results.facts["layers"]), int(results.facts["top_k"])
    longest = {row.method: row.tokens for row in sorted(results.rows, key=lambda row: row.tokens)}
    uniform: dict[tuple[str, int], dict[int, float]] = {}
    losses: dict[tuple[str, int, int], tuple[float, float | None]] = {}
    for row in results.rows:
        if row.method.startswith("uniform"):
            uniform.setdefault((row.method, row.tokens), {})[row.top_k[0]] = getattr(row, measure)
        elif row.budget and (loss := getattr(row, measure)) is not None:
            losses[row.method, row.tokens, row.budget] = loss, getattr(row, f"{measure}_difference_error")
    budgets = dict.fromkeys(budget for _, _, budget in losses)
    for (method, tokens), known in uniform.items():  # with a gate exponent; without, it is what all is compared with
        if method != "uniform":
            losses |= {(method, tokens, each): (interpolate_uniform(known, each, layers), None) for each in budgets}
    for (method, tokens, budget), (loss, error) in losses.items():
        if tokens == longest[method]:
            plain = interpolate_uniform(uniform["uniform", tokens], budget, layers)
            oracle, _ = losses.get((f"oracle/{measure}", tokens, budget), (None, None))
            yield method, Cell(model, budget, budget / (layers * own), tokens, loss, error, plain, oracle)


def compare_methods(found: Mapping[str, Mapping[str, Sequence[Cell]]]) -> list[str]:
    """A table of every method by both measures: how far above uniform k, and how much of the gap is closed."""
    headers, rows = ["allocation from", "tokens"], []
    for measure in MEASURES:
        headers += [f"{measure}: mean", "worst", "above uniform", "beyond noise", "gap closed: mean", "least"]
    for method, cells in found["increase"].items():
        tokens = " or ".join(f"{number:,}" for number in sorted({cell.tokens for cell in cells}))
        rows.append((method, tokens, *summarise(cells), *summarise(found["divergence"].get(method, ()))))
    return draw_table(headers, rows)


def summarise(cells: Sequence[Cell]) -> list[str]:
    """A method's part of that table."""
    above = [cell.above for cell in cells]
    noisy = [cell.loss - cell.uniform > ERRORS * cell.error for cell in cells if cell.above > 0 and cell.error]
    closed = [cell.closed for cell in cells if cell.closed is not None]
    changes = [percent(each(above) if above else None, "+") for each in (fmean, max)]
    gap = [percent(each(closed) if closed else None) for each in (fmean, min)]
    return [*changes, count([value > 0 for value in above]), count(noisy), *gap]


def list_default(found: Mapping[str, Mapping[str, Sequence[Cell]]]) -> list[str]:
    """A table of the default's cells by both measures."""
    headers = ["model", "budget", "uniform k, nats", "default above it, nats", "oracle"]
    headers += [name for measure in MEASURES for name in (f"default by {measure}", "gap closed")]
    rows = []
    for cells in zip(*(found[measure].get(DEFAULT, ()) for measure in MEASURES), strict=True):
        cell = cells[0]
        gain = percent(None if cell.oracle is None else -find_gain(cell.uniform, cell.oracle), "+")
        row = (cell.model, cell.budget, f"{cell.uniform:.4f}", f"{cell.loss - cell.uniform:+.4f}", gain)
        for each in cells:
            error = "" if each.error is None else f" ± {100 * each.error / abs(each.uniform):.1f}"
            row += (f"{100 * each.above:+.1f}{error} %", percent(each.closed))
        rows.append(row)
    return draw_table(headers, rows)


def list_models(facts: Sequence[Mapping[str, str]]) -> list[str]:
    """A table of the models, and what made their results, once for all that say the same."""
    names = ("model", "model_type", "parameters", "layers", "num_experts", "top_k", "cross_entropy", "measured_tokens")
    lines = draw_table(names, [[each.get(name, "-") for name in names] for each in facts])
    made_by = ("command", "date", "device", "torch", "transformers", "lexi-moe")
    runs = dict.fromkeys(", ".join(f"{name} {each.get(name, '-')}" for name in made_by) for each in facts)
    return [*lines, *(f"Made by {run}." for run in runs)]


def draw(found: Mapping[str, Sequence[Cell]], file: Path) -> None:
    """Loss increase relative to uniform k over the budget, a panel for each model; bars are two standard errors."""
    models = list(dict.fromkeys(cell.model for cells in found.values() for cell in cells))
    rows, columns = -(-len(models) // 4), min(len(models), 4)
    figure, panels = plt.subplots(rows, columns, squeeze=False, layout="constrained")
    figure.set_size_inches(4 * columns, 3.2 * rows)
    for panel in panels.flat[len(models) :]:
        panel.remove()
    for panel, model in zip(panels.flat, models, strict=False):
        panel.axhline(1, color="black", linestyle="--", label="uniform")
        for method in DRAWN:
            cells = [cell for cell in found.get(method, ()) if cell.model == model]
            errors = [ERRORS * (cell.error or 0) / abs(cell.uniform) for cell in cells]
            shares, ratios = [100 * cell.share for cell in cells], [1 + cell.above for cell in cells]
            panel.errorbar(shares, ratios, yerr=errors, fmt=".-", elinewidth=0.7, label=method)
        panel.set(title=model, xlabel="active experts, % of the model's own", ylabel="loss increase / uniform k's")
        panel.set_yscale("log", base=2)
        panel.yaxis.set_major_formatter("{x:g}")
    figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    figure.savefig(file, dpi=60)
    plt.close(figure)


def write(models: Sequence[Results]) -> str:
    """The report."""
    found = {measure: gather(models, measure) for measure in MEASURES}
    lines = ["# Fidelity: what allocations really lose", EXPLAINED, *compare_methods(found), FIGURE, ""]
    lines += [f"## {DEFAULT}, cell by cell", *list_default(found), "## Models"]
    return "\n".join([*lines, *list_models([results.facts for results in models]), ""])


def draw_table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """A table in Markdown, and an empty line."""
    return ["| " + " | ".join(map(str, line)) + " |" for line in (headers, ["---"] * len(headers), *rows)] + [""]


def percent(value: float | None, sign: str = "") -> str:
    """A share, with its sign if `sign` is +; a dash for None."""
    return "-" if value is None else f"{round(100 * value):{sign}d} %"


def count(hits: Sequence[bool]) -> str:
    """How many of how many; a dash of none."""
    return f"{sum(hits)} of {len(hits)}" if hits else "-"


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("report"), show_default=True)
def main(files: tuple[Path, ...], output: Path) -> None:
    """Write report.md and its figure to the folder OUTPUT, from the tables that study.py wrote for each model."""
    models = [read_results(file) for file in files]
    output.mkdir(parents=True, exist_ok=True)
    draw(gather(models, "increase"), output / "losses.png")
    (output / "report.md").write_text(write(models))
    click.echo(output / "report.md")


if __name__ == "__main__":
    main()
