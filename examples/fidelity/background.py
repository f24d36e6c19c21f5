"""How well sums of single layers' losses say what whole allocations lose, by the k of all other layers meanwhile.

    lexi-search profile MODEL_DIR -o profile.json
    python examples/fidelity/background.py MODEL_DIR profile.json --tokens held_out.npz -o background.json

For each background k, loss tables are measured on the text of the profile, with its compensation. Then allocations are
measured whole, on another text of the model's own and on held-out tokens: random ones, and each table's optimum, at
budgets that the same k in every layer meets. Printed for each budget and table:

- the correlation of summed and whole losses over the random allocations, relative to the same k in every layer, and the
  root mean square of their difference,
- what the table's optimum loses whole, relative to the same k.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from records import describe_run
from windows import cut_what_fits, read_streams

from lexi_adapter.files import write_json
from lexi_search.artifacts.serialisation import read_profile, read_profile_maps
from lexi_search.checkpoint.reader import open_checkpoint
from lexi_search.models.model import describe
from lexi_search.profiling.divergence import draw_samples, measure_layers, measure_variants, open_run
from lexi_search.profiling.forward.variants import Run, Variant
from lexi_search.solvers.exact import solve
from lexi_search.solvers.problem import pose, sum_over_layers


def draw_allocations(k: int, most: int, layers: int, count: int, rng: np.random.Generator) -> list[tuple[int, ...]]:
    """Random allocations with a mean of `k`: some experts of some layers are moved to others."""
    found = []
    for _ in range(count):
        top_k = np.full(layers, k)
        for _ in range(rng.integers(2, 3 * layers)):
            more, less = rng.choice(layers, 2, replace=False)
            if top_k[more] < most and top_k[less] > 1:
                top_k[[more, less]] += (1, -1)
        found.append(tuple(top_k.tolist()))
    return found


def measure_table(run: Run, text: np.ndarray, settings: Any, background_k: int, maps: Any) -> np.ndarray:
    """[layers, K]: the divergence with one layer at each k, less that at its own, with all others at `background_k`."""
    around = None if background_k == run.model.top_k else background_k
    losses = dict(measure_layers(run, text, run.model.layers, replace(settings, background_k=around), maps=maps))
    return np.array([losses[layer].divergence for layer in run.model.layers])


def compare(
    table: np.ndarray, tops: Sequence[tuple[int, ...]], even: tuple[int, ...], whole: np.ndarray
) -> list[float]:
    """The correlation and the error of a table; `whole` [tops and then even] are relative to even k's."""
    allocations = np.array([*tops, even])
    summed = sum_over_layers(table, allocations)
    difference, real = summed[:-1] - summed[-1], whole[:-1] - whole[-1]
    return [float(np.corrcoef(difference, real)[0, 1]), float(np.sqrt(np.mean((difference - real) ** 2)) / whole[-1])]


@click.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False))
@click.argument("profile", type=click.Path(exists=True, dir_okay=False))
@click.option("--tokens", type=click.Path(exists=True, path_type=Path), help="[default: MODEL/held_out.npz]")
@click.option("--background", "backgrounds", type=int, multiple=True, help="[default: K/4, K/2, 3K/4 and K]")
@click.option("--random", "count", default=20, show_default=True, help="Random allocations at each budget.")
@click.option("--judge", type=click.IntRange(2), default=16, show_default=True, help="Windows of each domain.")
@click.option("-o", "--output", type=click.Path(dir_okay=False), required=True)
def main(
    model: str, profile: str, tokens: Path | None, backgrounds: tuple[int, ...], count: int, judge: int, output: str
):
    """Compare loss tables of MODEL by their background k, with the compensation and on the text of PROFILE."""
    measured = read_profile(profile)
    maps, settings = read_profile_maps(profile, measured), measured.settings
    checkpoint = open_checkpoint(model)
    described = describe(checkpoint, gate_exponent=settings.gate_exponent)
    run = open_run(checkpoint, described, settings.dtype)
    most, layers = described.top_k, len(described.layers)
    quarters = sorted({max(1, share * most // 4) for share in (1, 2, 3, 4)})
    text = draw_samples(run, settings, layers=layers)
    tables = {k: measure_table(run, text, settings, k, maps) for k in backgrounds or quarters}
    rng = np.random.default_rng(0)
    budgets = [k for k in quarters if 1 < k < most]
    drawn = {k: draw_allocations(k, most, layers, count, rng) for k in budgets}
    best = {around: solve(pose(table, layers * np.array(budgets))).top_k.tolist() for around, table in tables.items()}
    tops = [(k,) * layers for k in budgets] + [one for each in drawn.values() for one in each]
    tops = list(dict.fromkeys([*tops, *(tuple(one) for each in best.values() for one in each)]))
    streams = read_streams(tokens or Path(model, "held_out.npz"))
    _, judged, _ = cut_what_fits(streams, measure=1, judge=judge, least=2, length=settings.length)
    texts = {"own": None, "held-out": judged.tokens.numpy().astype(np.int32)}
    variants = [Variant(one, settings.gate_exponent, maps) for one in tops]
    other = replace(settings, seed=settings.seed + 1)
    whole = {name: measure_variants(run, other, variants, tokens=each).mean(axis=1) for name, each in texts.items()}
    place, rows = {one: number for number, one in enumerate(tops)}, []
    for at, k in enumerate(budgets):
        even = (k,) * layers
        for around, table in tables.items():
            row: dict[str, Any] = {"share": k / most, "background_k": around}
            for name, losses in whole.items():
                correlation, error = compare(table, drawn[k], even, losses[[place[one] for one in (*drawn[k], even)]])
                gain = 1 - losses[place[tuple(best[around][at])]] / losses[place[even]]
                row |= {f"{name} correlation": correlation, f"{name} error": error, f"{name} gain": float(gain)}
            rows.append(row)
            click.echo("  ".join(f"{key} {value:.3g}" for key, value in row.items()))
    facts = describe_run("cuda" if torch.cuda.is_available() else "cpu") | {
        "model": Path(model).name,
        "gate_exponent": settings.gate_exponent,
        "top_k": most,
    }
    write_json(
        output, {"made_by": facts, "rows": rows, "tables": {str(k): table.tolist() for k, table in tables.items()}}
    )


if __name__ == "__main__":
    main()
