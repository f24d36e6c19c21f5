"""What allocations from each kind of profile really lose on one or more models, beside uniform k and brute force.

    python examples/fidelity/study.py MODEL_DIR ... -o results

A model folder is a checkpoint with its held-out tokens, as `examples/train_small_moe/train.py` leaves one, or any other
beside `--tokens`. Each model's table is written again after every part, and a second run goes on where the first ended.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import jax
import numpy as np
import torch
from judging import Choice, Judge, Loaded, find_losses, load
from records import MINUS, Results, Row, describe_run, find_budgets, read_results, write_results
from tables import (
    PROFILES,
    Failed,
    make_profile,
    measure_windows,
    read_tables,
    run_search,
    search,
    search_default,
    tabulate,
)
from windows import Windows, cut_what_fits, read_streams

from lexi_adapter.errors import AdapterError
from lexi_search.artifacts.serialisation import read_profile

SHARES = (0.25, 0.375, 0.5, 0.625, 0.75)  # of the model's own sum of k
EXPONENT, EXPONENTS = 0.5, (0.0, 0.25, 0.4, 0.5, 0.6, 0.75, 1.0)  # for allocations from profiles, and for uniform k
WITH_EXPONENT = "{} with exponent {:g}"
PRUNED = {f"{what} {100 * share:g}%": share for what in ("experts", "width") for share in (0.25, 0.375, 0.5)}
LEAST = 40  # windows to judge on that a domain needs to be in the study, unless fewer are asked for
SETTINGS = ("router_sha256", "length", "measured_tokens", "judged_tokens")  # that all rows of a table share


class Study(NamedTuple):
    """One model under study: windows to measure on, a judge on others, and the folder of its profiles."""

    folder: Path
    loaded: Loaded
    measuring: Windows
    judge: Judge
    profiles: Path

    @property
    def budgets(self) -> dict[float, int]:
        """Share of the model's own sum of k -> budget, where there is one."""
        return find_budgets(SHARES, self.judge.layers, self.loaded.identity.top_k)


def list_parts(study: Study) -> dict[str, Callable[[], list[Row]]]:
    """The parts of a study in order. A part's first rows are named after it, or after it and a slash."""
    parts = {"uniform": partial(judge_uniform, study), "oracle": partial(judge_text, study)}
    parts |= {source: partial(judge_profile, study, source) for source in PROFILES}
    return parts | {f"pruned/{what}": partial(judge_pruned, study, what) for what in PRUNED}


def judge_uniform(study: Study) -> list[Row]:
    """Every uniform k, as the model does and with every gate exponent."""
    names = {None: "uniform"} | {exponent: WITH_EXPONENT.format("uniform", exponent) for exponent in EXPONENTS}
    uniform = [(k,) * study.judge.layers for k in range(1, study.loaded.identity.top_k + 1)]
    return study.judge.judge([(name, Choice(top_k, each)) for each, name in names.items() for top_k in uniform])


def judge_text(study: Study) -> list[Row]:
    """Brute force on text, by what the whole model loses (`oracle`) and by each layer's own output (`calibrated`)."""
    measured = measure_windows(study.loaded, study.measuring, batch=study.judge.batch)
    found = tabulate(measured, study.measuring)
    oracle = {f"oracle/{kind}": found[kind] for kind in ("increase", "divergence")}
    return judge_tables(study, oracle | {f"calibrated/{kind}": found[kind] for kind in ("relative", "squared")})


def judge_profile(study: Study, source: str) -> list[Row]:
    """Every loss of a profile from the weights, with its gate exponent, or else plain and with `EXPONENT`."""
    file = make_profile(source, study.folder, study.profiles / f"{source}.json")
    held, exponent = read_tables(source, file)
    named = {f"{source}/{kind}": table for kind, table in held.items()}
    rows = judge_tables(study, named, exponent, file)
    if exponent is not None:
        rows += judge_compensation(study, source, Choice((1,) * study.judge.layers, exponent, file))
    if exponent is None:
        named = {WITH_EXPONENT.format(name, EXPONENT): table for name, table in named.items()}
        rows += judge_tables(study, named, EXPONENT)
    return rows


def judge_compensation(study: Study, source: str, like: Choice) -> list[Row]:
    """Every uniform k with the compensation of `like`, what a search chooses, and how much more that loses."""
    ks = range(1, study.loaded.identity.top_k + 1)
    rows = study.judge.judge([(f"uniform with {source}", like.spread(k)) for k in ks])
    found = search_default(read_profile(like.profile), list(study.budgets.values()))
    chosen = [like._replace(top_k=top_k) for top_k in found]
    rows += study.judge.judge([(f"{source}/default", choice) for choice in chosen])
    return rows + [study.judge.subtract(MINUS.format(source), choice) for choice in chosen]


def judge_tables(
    study: Study, named: Mapping[str, np.ndarray], exponent: float | None = None, profile: Path | None = None
) -> list[Row]:
    """Each table's exact optimum at each budget, with the compensation of a profile."""
    budgets = list(study.budgets.values())
    chosen = [(name, top_k) for name, table in named.items() for top_k in search(table, budgets)]
    return study.judge.judge([(name, Choice(top_k, exponent, profile)) for name, top_k in chosen])


def judge_pruned(study: Study, what: str) -> list[Row]:
    """A model without some of its experts or some of their width, every layer with its own k."""
    windows = study.judge.windows
    with tempfile.TemporaryDirectory() as folder:
        run_search(("prune", str(study.folder), *f"--{what}".split(), "-o", f"{folder}/pruned"))
        pruned = load(Path(folder, "pruned"), device=study.loaded.model.device.type)
    losses = [find_losses(each.model, windows.tokens, batch=study.judge.batch) for each in (pruned, study.loaded)]
    increase = np.subtract(*losses)
    found = (float(windows.average(increase)["mean"]), windows.find_error(increase))
    # Narrower experts leave as many active parameters as fewer of them; dropped experts leave all that are active.
    budget = study.budgets.get(1 - PRUNED[what]) if what.startswith("width") else None
    return [Row(f"pruned/{what}", None, budget, windows.tokens.numel(), *found, None, None, None, None, ())]


def run(study: Study, output: Path, facts: Mapping[str, str], only: Sequence[str] = ()) -> list[str]:
    """Make the parts, or `only` some, that the table lacks, writing it after each; the names of those that fail."""
    results, failed = Results(facts, []), []
    if output.is_file():
        results = read_results(output)
        if changed := [name for name in SETTINGS if results.facts.get(name) != facts[name]]:
            raise ValueError(f"{output} was made with another {changed[0]}; name another -o, or delete it")
    done = {name for row in results.rows for name in (row.method, row.method.partition("/")[0])}
    for name, make in list_parts(study).items():
        if name in done or (only and name not in only):
            continue
        started = time.monotonic()
        try:
            results = Results(facts, [*results.rows, *make()])
        except (Failed, AdapterError, RuntimeError) as error:  # PyTorch's own are RuntimeError
            failed.append(name)
            click.echo(f"  {name}: left out: {str(error).replace(str(study.folder), study.folder.name)}")
        else:
            write_results(output, results)
            click.echo(f"  {name}: {time.monotonic() - started:.1f} s")
    return failed


def describe(study: Study) -> dict[str, str]:
    """What is known of the model and of the text."""
    identity, windows = study.loaded.identity, study.judge.windows
    losses = find_losses(study.loaded.model, windows.tokens, batch=study.judge.batch)
    model = {name: getattr(identity, name) for name in ("model_type", "num_experts", "top_k", "router_sha256")}
    model |= {"parameters": study.loaded.model.num_parameters(), "layers": study.judge.layers}
    text = {"length": windows.tokens.shape[1], "cross_entropy": f"{windows.average(losses)['mean']:.6g}"}
    text |= {"measured_tokens": study.measuring.tokens.numel(), "judged_tokens": windows.tokens.numel()}
    return {name: str(value) for name, value in ({"model": study.folder.name} | model | text).items()}


@click.command()
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("results"), show_default=True)
@click.option("--tokens", type=click.Path(path_type=Path), help="Held-out tokens.  [default: MODEL/held_out.npz]")
@click.option("--profiles", type=click.Path(path_type=Path), default=Path("profiles"), show_default=True)
@click.option("--only", multiple=True, help="A part, such as uniform; repeat it.  [default: all]")
@click.option("--measure", default=42, show_default=True, help="Windows of each domain to measure on.")
@click.option("--judge", type=click.IntRange(2), default=160, show_default=True, help="And to judge on, at most.")
@click.option("--length", default=512, show_default=True, help="Tokens of a window.")
@click.option("--batch", default=32, show_default=True, help="Windows in one forward pass.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default="cuda if there, or cpu")
@click.option("--command", help="What the results say made them.  [default: this call]")
def main(
    models: tuple[Path, ...],
    output: Path,
    tokens: Path | None,
    command: str | None,
    only: tuple[str, ...],
    **options: Any,
) -> None:
    """Study each of MODELS and write what it loses to a table of its name in the folder OUTPUT."""
    jax.config.update("jax_platforms", "cpu")  # searches are small, and the GPU's memory is PyTorch's
    output.mkdir(parents=True, exist_ok=True)
    made_by = describe_run(options["device"], command=command)
    for folder in map(Path.resolve, models):
        if not (file := tokens or folder / "held_out.npz").is_file():
            raise click.UsageError(f"there are no held-out tokens in {file}: name a file of them with --tokens")
        try:
            study = begin(folder, file, **options)
            failed = run(study, output / f"{folder.name}.csv", describe(study) | made_by, only)
        except (AdapterError, ValueError) as error:
            raise click.UsageError(f"{folder}: {error}") from error
        click.echo(f"{folder.name}: left out: {', '.join(failed)}" if failed else f"{folder.name} is done")


def begin(
    folder: Path, tokens: Path, *, profiles: Path, measure: int, judge: int, length: int, batch: int, device: str
) -> Study:
    """A model in memory, with the windows that its held-out tokens have room for."""
    windows = {"measure": measure, "judge": judge, "least": min(judge, LEAST), "length": length}
    measuring, judging, short = cut_what_fits(read_streams(tokens), **windows)
    for reason in short.values():
        click.echo(f"  left out: {reason}")
    loaded = load(folder, device=device)
    return Study(folder, loaded, measuring, Judge(loaded, judging, batch=batch), profiles / folder.name)


if __name__ == "__main__":
    main()
