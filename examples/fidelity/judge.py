"""What allocations of a few profiles really lose on a model's held-out tokens, at a few budgets; on a CPU in minutes.

    python judge.py MODEL_DIR --tokens held_out.npz --budget 24

Without --profile it makes those of --only first. `study.py` asks for much more.
"""

import tempfile
from itertools import product
from pathlib import Path

import click
import numpy as np
import tables
from gaps import MEASURES, interpolate_uniform
from judging import Choice, Judge, load
from origins import describe_run
from windows import cut, read_streams

from lexi_adapter.files import write_json
from lexi_search.artifacts.serialisation import read_profile

LENGTH = 512


@click.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--tokens", type=click.Path(exists=True, path_type=Path), required=True, help="An .npz, ids by domain.")
@click.option("--profile", "files", type=click.Path(exists=True, path_type=Path), multiple=True, help="Repeat it.")
@click.option(
    "--only",
    "names",
    type=click.Choice(list(tables.COMMANDS)),
    multiple=True,
    default=("paper", "weights"),
    show_default=True,
    help="Profiles to make where no --profile is given; repeat it.",
)
@click.option("--budget", "budgets", type=int, multiple=True, required=True, help="Experts over layers; repeat it.")
@click.option("--sequences", type=click.IntRange(2), default=10, show_default=True, help="Of each domain.")
@click.option("--device", default="cpu", show_default=True)
@click.option("-o", "--output", help="The same as JSON.")
def main(
    model: Path,
    tokens: Path,
    files: tuple[Path, ...],
    names: tuple[str, ...],
    budgets: tuple[int, ...],
    sequences: int,
    device: str,
    output: str | None,
) -> None:
    """Print what the exact optimum of each loss of each profile really loses at each budget."""
    with tempfile.TemporaryDirectory() as folder:
        if not files:
            files = tuple(Path(folder) / f"{name}.json" for name in names)
            for name, file in zip(names, files, strict=True):
                click.echo(f"profile {name}", err=True)
                tables.make_profile(name, model, file)
        profiles = {file.stem: read_profile(file) for file in files}
    _, judging = cut(read_streams(tokens), measure=0, judge=sequences, length=LENGTH)
    loaded = load(model, device=device)
    judge = Judge(loaded, judging, batch=sequences)
    layers = judge.layers
    near = {k for budget in budgets for k in (budget // layers, -(-budget // layers))}
    chosen = {}
    for (name, profile), budget in product(profiles.items(), budgets):
        for kind in profile.loss_kinds:
            [top_k] = tables.search(np.array(profile.losses(kind)), [budget])
            chosen[name, kind, budget] = Choice(top_k, profile.settings.gate_exponent)
    uniform = {k: Choice((k,) * layers) for k in near}
    choices = [*uniform.values(), *chosen.values()]
    lost = {
        choice: {name: found[name]["mean"] for name in MEASURES}
        for choice, found in zip(choices, judge.judge(choices), strict=True)
    }
    known = {name: {k: lost[choice][name] for k, choice in uniform.items()} for name in MEASURES}
    rows = [
        ("uniform", "", None, budget, *(interpolate_uniform(known[name], budget, layers) for name in MEASURES), ())
        for budget in budgets
    ]
    rows += [
        (name, kind, choice.exponent, budget, *lost[choice].values(), choice.top_k)
        for (name, kind, budget), choice in chosen.items()
    ]
    rows.sort(key=lambda row: budgets.index(row[3]))
    heads = " ".join(f"{name:>10s}" for name in MEASURES)
    click.echo(f"{'profile':12s} {'loss':12s} {'exponent':>8s} {'budget':>6s} {heads}  k per layer")
    for name, kind, exponent, budget, *losses, top_k in rows:
        shown = "" if exponent is None else f"{exponent:g}"
        numbers = " ".join(f"{loss:10.4f}" for loss in losses)
        click.echo(f"{name:12s} {kind:12s} {shown:>8s} {budget:6d} {numbers}  {' '.join(map(str, top_k))}")
    if output:
        columns = ("profile", "loss", "gate_exponent", "budget", *MEASURES, "top_k")
        rounded = [(*row[:4], *(round(value, 6) for value in row[4:-1]), row[-1]) for row in rows]
        tokens = judging.tokens.numel()
        document = {"rows": [dict(zip(columns, row, strict=True)) for row in rounded], "judged_tokens": tokens}
        write_json(output, document | {"made_by": describe_run(device)})


if __name__ == "__main__":
    main()
