"""How many passes does the text need that a model writes itself?

    python examples/benchmarks/text_passes.py MODEL_DIR [--held-out tokens.npz] -o FOLDER

The default profile samples its text by Jacobi iteration, all positions at once, in `sampling.PASSES` passes over the
model. Here a trained checkpoint is profiled on texts of fewer passes and several seeds, and on held-out text of the
same size, without compensation. The allocation of each profile at each budget is then judged on other held-out text by
what the whole model loses there: the KL divergence from its predictions with its own k, in nats per token.

Held-out text is an .npz file with an array of token ids for each domain, or by default the files of Python's standard
library that `../train_small_moe` keeps from training. Printed for each number of passes:

- its divergence at each budget, the mean over seeds; and how much more that is than with the most passes, in percent,
  with the standard error of that difference, over windows of the text (the allocations taken as they are) and over
  seeds, whichever is larger;
- the correlation of the logarithms of its losses with those on held-out text, over layers and k, and their mean ratio.

Profiles are kept in FOLDER: the same command goes on where it was cut short.
"""

import json
import os
import platform
import sys
from datetime import date
from pathlib import Path

import click
import jax
import numpy as np

from lexi_search import __version__
from lexi_search.allocation.allocate import allocate
from lexi_search.allocation.baselines import spread_evenly
from lexi_search.artifacts.profile import Profile, ProfileSettings
from lexi_search.artifacts.serialisation import read_profile, write_profile
from lexi_search.checkpoint.reader import open_checkpoint
from lexi_search.models.model import describe
from lexi_search.profiling.divergence import measure_layers, open_run
from lexi_search.profiling.forward.losses import measure_losses
from lexi_search.profiling.forward.sampling import draw_tokens
from lexi_search.profiling.forward.variants import Variant

LENGTH, HELD_OUT = 512, "held-out text"


def read_windows(held_out, model, count):
    """Windows [count, LENGTH] to measure on, from the first halves of all domains, and as many to judge on."""
    if held_out is None:
        sys.path.append(str(Path(__file__).parents[1] / "train_small_moe"))
        from corpus import encode, read_texts, standard_library
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        streams = [encode(tokenizer, read_texts((standard_library(),))[1])]
    else:
        streams = list(np.load(held_out).values())
    halves = []
    for half in (0, 1):
        rows = []
        for number in range(count):  # the domains take turns; windows are at even distances
            stream = streams[number % len(streams)]
            room, turns = len(stream) // 2 - LENGTH, -(-count // len(streams))
            start = half * (len(stream) // 2) + number // len(streams) * room // max(turns - 1, 1)
            rows.append(stream[start : start + LENGTH])
        halves.append(np.array(rows, np.int32))
    return halves


def make_profile(run, path, tokens, source, seed):
    """The profile on `tokens()`, from an earlier run or measured now."""
    if not path.exists():
        text = tokens()
        settings = ProfileSettings(source, seed, 4, LENGTH, run.dtype, 0.0, text.size)
        losses = dict(measure_layers(run, text, run.model.layers, settings))
        write_profile(path, Profile(run.model.identity, settings, losses, {"lexi_search": __version__}))
        click.echo(f"{path} is written", err=True)
    return read_profile(path)


def compare_losses(profile, truth):
    """The correlation of the logarithms of two profiles' losses over layers and k, and the mean ratio."""
    mine, theirs = (np.log(np.array(one.losses("divergence"))[:, :-1].ravel()) for one in (profile, truth))
    return float(np.corrcoef(mine, theirs)[0, 1]), float(np.exp((mine - theirs).mean()))


def find_top_k(profile, budgets):
    """The optimum at each budget: what `lexi-search search` chooses."""
    results = allocate(profile, list(budgets), method="exact")
    return [tuple(result.allocation.top_k[layer] for layer in profile.model.moe_layers) for result in results]


def judge(run, chosen, windows):
    """top_k -> the divergence of each window, of all that are in `chosen`."""
    variants = sorted({top_k for row in chosen.values() for top_k in row})
    divergence = measure_losses(run, windows, [Variant(top_k) for top_k in variants]).divergence
    return dict(zip(variants, divergence, strict=True))


def summarise(found, reference):
    """Mean divergence of [seeds, windows], and the difference to a reference of that shape, with its error."""
    difference = found - reference
    over = [difference.mean(axis=axis) for axis in (0, 1)]
    error = max(means.std(ddof=1) / len(means) ** 0.5 for means in over if len(means) > 1)
    return float(found.mean()), float(difference.mean()), float(error)


def tabulate(budgets, chosen, known, losses):
    """A row for each source of an allocation."""
    numbers = sorted({source[0] for source in chosen if isinstance(source, tuple)})

    def gather(source, at):
        of = [row for name, row in chosen.items() if name == source or (isinstance(name, tuple) and name[0] == source)]
        return np.array([known[row[at]] for row in of])

    for source in ("uniform", HELD_OUT, *numbers):
        cells = []
        for at, budget in enumerate(budgets):
            reference = gather(numbers[-1], at)
            mean, more, error = summarise(np.broadcast_to(gather(source, at), reference.shape), reference)
            percent = 100 / reference.mean()
            cells.append({"budget": budget, "divergence": mean, "more": more * percent, "error": error * percent})
        own = [value for name, value in losses.items() if isinstance(name, tuple) and name[0] == source]
        yield {"source": source, "cells": cells, "losses": np.mean(own, axis=0).tolist() if own else None}


def format_row(row):
    cells = " ".join(f"{one['divergence']:7.4f} {one['more']:+6.1f} ±{one['error']:4.1f}" for one in row["cells"])
    losses = "" if row["losses"] is None else "  {:.4f}  {:.3f}".format(*row["losses"])
    return f"{row['source']!s:14} {cells}{losses}"


@click.command(help=__doc__.splitlines()[0])
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--held-out", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Token ids, .npz.")
@click.option("--passes", default="1,2,3,4,6", show_default=True, help="Numbers of passes.")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(2))
@click.option("--sequences", default=8, show_default=True, help="Of a profile's text; a multiple of 4.")
@click.option("--judge", "judged", default=24, show_default=True, help="Windows of held-out text to judge on.")
@click.option("--budgets", default="37.5,50,62.5,75", show_default=True, help="Percent of the model's own experts.")
@click.option("-o", "--output", required=True, type=click.Path(file_okay=False, path_type=Path))
def main(model, held_out, passes, seeds, sequences, judged, budgets, output):
    checkpoint = open_checkpoint(model)
    run = open_run(checkpoint, describe(checkpoint), "float32")
    layers, full = len(run.model.layers), run.model.top_k
    budgets = [round(float(share) * layers * full / 100) for share in budgets.split(",")]
    measuring, judging = read_windows(held_out, model, max(sequences, judged))
    output.mkdir(parents=True, exist_ok=True)
    truth = make_profile(run, output / "held-out.json", lambda: measuring[:sequences], "text", 0)
    chosen = {"uniform": [spread_evenly(budget, layers) for budget in budgets], HELD_OUT: find_top_k(truth, budgets)}
    losses = {}
    for seed in range(seeds):
        for number in map(int, passes.split(",")):
            options = {"sequences": sequences, "length": LENGTH, "seed": seed, "passes": number}
            path = output / f"passes-{number}-seed-{seed}.json"
            profile = make_profile(run, path, lambda options=options: draw_tokens(run, **options), "weights", seed)
            losses[number, seed] = compare_losses(profile, truth)
            chosen[number, seed] = find_top_k(profile, budgets)
    rows = list(tabulate(budgets, chosen, judge(run, chosen, judging[:judged]), losses))
    click.echo(
        f"budgets {budgets}: divergence, percent more than with the most passes ± error; losses: correlation, ratio"
    )
    click.echo("\n".join(map(format_row, rows)))
    facts = {
        "command": f"python examples/benchmarks/text_passes.py {model.name} --passes {passes} --seeds {seeds} "
        f"--sequences {sequences} --judge {judged}",
        "machine": f"{jax.devices()[0].device_kind}, {platform.machine()}, {os.cpu_count()} CPU cores",
        "date": date.today().isoformat(),
        "jax": jax.__version__,
        "rows": rows,
        "top_k": {str(name): [" ".join(map(str, top_k)) for top_k in row] for name, row in chosen.items()},
    }
    (output / "text_passes.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
