"""The router-only control variate: how many fewer tokens does the same true error take?

    python examples/benchmarks/control_variate.py [--ratio 8] [--repeats 48] [-o control_variate.json]

One layer is measured on `--tokens` tokens many times over, each time with another seed, without and with the control
variate (`lexi-search profile --control-variate RATIO`): the first and last layer of `examples/tiny-olmoe`, which is
trained, and layers of `profile_shapes.py` with fewer experts or a smaller hidden size, but experts as wide as they are.
The error is the spread of the results over the seeds. Printed for each k:

- the relative error without and with, in percent;
- fewer: the square of their ratio, so many times fewer tokens give the same error; and the same as the standard errors
  claim it, which come from one run each;
- last row: the worst k without over the worst k with, which is what stops a profile.
"""

import dataclasses
import json
import platform
from datetime import date
from pathlib import Path

import click
import jax
import numpy as np
import profile_shapes

from lexi_search.artifacts.profile import ProfileSettings
from lexi_search.checkpoint.reader import open_checkpoint
from lexi_search.models.loading.streaming import stream_layers
from lexi_search.models.model import describe
from lexi_search.profiling.paper.gaussian import measure_layer
from lexi_search.profiling.paper.moments import relative_errors, summarise

TINY = Path(__file__).parents[1] / "tiny-olmoe"
SMALLER = {  # hidden, width, experts of the shape in `profile_shapes.py`
    "olmoe-1b-7b": (512, 1024, 32),
    "qwen3-30b-a3b": (512, 768, 64),
    "mixtral-8x7b": (512, 3584, 8),
}


def list_layers():
    """(name, model, layer, weights) of everything that is measured, one at a time."""
    checkpoint = open_checkpoint(TINY)
    model = describe(checkpoint)
    for layer, weights in stream_layers(checkpoint, model, [model.layers[0], model.layers[-1]]):
        yield f"tiny-olmoe layer {layer}", model, layer, weights
    for name, (hidden, width, experts) in SMALLER.items():
        profile_shapes.SHAPES[name] = (hidden, width, experts, *profile_shapes.SHAPES[name][3:])
        yield f"{name} at {hidden}x{width}x{experts}", *_insert(0, profile_shapes.make_layer(name))


def _insert(layer, made):
    model, weights = made
    return model, layer, weights


def repeat(model, weights, layer, settings, repeats):
    """Losses [repeats, K - 1] and their claimed relative errors."""
    runs = [
        measure_layer(model, weights, layer, dataclasses.replace(settings, seed=seed)) for seed in range(1, repeats + 1)
    ]
    losses = np.array([summarise(moments).rms[:-1] for moments in runs])
    return losses, np.array([relative_errors(moments)[:-1] for moments in runs])


def compare(name, model, weights, layer, settings, ratio, repeats):
    row = {"name": name}
    for kind, control in (("plain", None), ("with", ratio)):
        chosen = dataclasses.replace(settings, control_variate=control)
        losses, claimed = repeat(model, weights, layer, chosen, repeats)
        row[kind] = (losses.std(axis=0, ddof=1) / losses.mean(axis=0)).tolist()
        row[f"{kind}_claimed"] = np.sqrt((claimed**2).mean(axis=0)).tolist()
    for claimed in ("", "_claimed"):
        plain, controlled = np.array(row["plain" + claimed]), np.array(row["with" + claimed])
        row[f"fewer{claimed}"] = ((plain / controlled) ** 2).tolist()
        row[f"worst_fewer{claimed}"] = float((plain.max() / controlled.max()) ** 2)
    return row


@click.command(help=__doc__.splitlines()[0])
@click.option("--ratio", default=8, show_default=True, help="Router-only tokens per measured token.")
@click.option("--tokens", default=1024, show_default=True, help="Measured tokens of one run, a multiple of 512.")
@click.option("--repeats", default=48, show_default=True, help="Runs, each with its own seed.")
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Write the numbers here as JSON.")
def main(ratio, tokens, repeats, output):
    settings = ProfileSettings("paper", 0, 1, 512, "float32", 0.0, tokens)
    result = {
        "command": f"python examples/benchmarks/control_variate.py --ratio {ratio} --tokens {tokens} "
        f"--repeats {repeats}",
        "device": jax.devices()[0].device_kind,
        "host": platform.processor() or platform.machine(),
        "date": date.today().isoformat(),
        "jax": jax.__version__,
        "rows": [],
    }
    click.echo(f"{'layer':32}     k  plain %   with %  fewer  claimed")
    for name, model, layer, weights in list_layers():
        row = compare(name, model, weights, layer, settings, ratio, repeats)
        result["rows"].append(row)
        for k, (plain, controlled) in enumerate(zip(row["plain"], row["with"], strict=True), 1):
            fewer, claimed = row["fewer"][k - 1], row["fewer_claimed"][k - 1]
            click.echo(f"{name:32} {k:5} {100 * plain:8.2f} {100 * controlled:8.2f} {fewer:6.2f} {claimed:8.2f}")
        plain, controlled = max(row["plain"]), max(row["with"])
        click.echo(
            f"{name:32} worst {100 * plain:8.2f} {100 * controlled:8.2f} {row['worst_fewer']:6.2f} "
            f"{row['worst_fewer_claimed']:8.2f}"
        )
        if output:
            Path(output).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
