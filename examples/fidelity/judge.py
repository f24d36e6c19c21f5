"""What allocations of a few profiles really lose on a model's held-out tokens, at a few budgets; on a CPU in minutes.

    python examples/fidelity/judge.py MODEL_DIR --tokens held_out.npz --budget 24

Without --profile it makes those of --only first. `study.py` asks for much more.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import click
import jax
import numpy as np
from judging import Choice, Judge, load
from records import MEASURES, Results, Row, describe_run, find_neighbours, interpolate_uniform, write_results
from tables import PROFILES, make_profile, search, search_default
from windows import cut, read_streams

from lexi_search.artifacts.profile import Profile
from lexi_search.artifacts.serialisation import read_profile

LENGTH, DEFAULT = 512, ("paper", "weights", "compensated")


def judge_profiles(judge: Judge, profiles: Mapping[Path, Profile], budgets: Sequence[int]) -> list[Row]:
    """What each uniform k near the budgets loses, and then the exact optimum of each loss of each profile.

    With a profile's compensation, uniform k is listed with that, too.
    """
    near = find_neighbours(budgets, judge.layers)
    named = [("uniform", Choice((k,) * judge.layers)) for k in near]
    for file, profile in profiles.items():
        exponent, own = profile.settings.gate_exponent, file if profile.compensation else None
        if exponent is not None:
            named += [(f"uniform with {file.stem}", Choice((k,) * judge.layers, exponent, own)) for k in near]
        for kind in profile.loss_kinds:
            default = kind == profile.default_loss
            found = search_default(profile, budgets) if default else search(np.array(profile.losses(kind)), budgets)
            named += [(f"{file.stem}/{kind}", Choice(top_k, exponent, own)) for top_k in found]
    return judge.judge(named)


def list_lines(rows: Sequence[Row], budgets: Sequence[int], layers: int) -> Iterator[str]:
    """A table for reading, budget by budget, uniform k first."""
    uniform = [row for row in rows if row.method.startswith("uniform")]
    yield f"{'profile':24s} exponent budget {' '.join(f'{name:>10s}' for name in MEASURES)}  k per layer"
    for budget in budgets:
        for method in dict.fromkeys(row.method for row in uniform):
            like = [row for row in uniform if row.method == method]
            lost = [{row.top_k[0]: getattr(row, name) for row in like} for name in MEASURES]
            shown = " ".join(f"{interpolate_uniform(each, budget, layers):10.4f}" for each in lost)
            yield f"{method:24s} {'' if like[0].exponent is None else like[0].exponent:>8} {budget:6d} {shown}"
        for row in rows:
            if row.budget == budget and row not in uniform:
                exponent = "" if row.exponent is None else f"{row.exponent:g}"
                start = f"{row.method:24s} {exponent:>8s} {budget:6d} {row.increase:10.4f} {row.divergence:10.4f}"
                yield f"{start}  {' '.join(map(str, row.top_k))}"


@click.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--tokens", type=click.Path(exists=True, path_type=Path), required=True, help="An .npz, ids by domain.")
@click.option("--profile", "files", type=click.Path(exists=True, path_type=Path), multiple=True, help="Repeat it.")
@click.option("--only", type=click.Choice(list(PROFILES)), multiple=True, default=DEFAULT, show_default=True)
@click.option("--budget", "budgets", type=int, multiple=True, required=True, help="Experts over layers; repeat it.")
@click.option("--sequences", type=click.IntRange(2), default=10, show_default=True, help="Of each domain.")
@click.option("--device", default="cpu", show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write a table such as those of study.py.")
def main(
    model: Path,
    tokens: Path,
    files: tuple[Path, ...],
    only: tuple[str, ...],
    budgets: tuple[int, ...],
    sequences: int,
    device: str,
    output: Path | None,
) -> None:
    """Print what the exact optimum of each loss of each profile really loses at each budget."""
    jax.config.update("jax_platforms", "cpu")  # searches are small, and the GPU's memory is PyTorch's
    with tempfile.TemporaryDirectory() as folder:
        if not files:
            click.echo(f"making profiles: {', '.join(only)}", err=True)
            files = tuple(make_profile(source, model, Path(folder, f"{source}.json")) for source in only)
        profiles = {file: read_profile(file) for file in files}
        _, judging = cut(read_streams(tokens), measure=0, judge=sequences, length=LENGTH)
        judge = Judge(load(model, device=device), judging, batch=sequences)
        rows = judge_profiles(judge, profiles, budgets)
    click.echo("\n".join(list_lines(rows, budgets, judge.layers)))
    if output:
        identity = judge.loaded.identity
        facts = {"model": model.resolve().name, "layers": judge.layers, "top_k": identity.top_k}
        write_results(output, Results(facts | describe_run(device), rows))


if __name__ == "__main__":
    main()
