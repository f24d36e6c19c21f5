"""Algorithm 1 of the paper read literally, in PyTorch with transformers' blocks, beside lexi_search on the same inputs.

    python examples/benchmarks/profile_vs_reference.py CHECKPOINT [--batch 4] [--length 512] [--iterations 8]

Literally: for every MoE layer and every k, a forward pass of the layer's block, and the Frobenius norm of what it
differs by from the pass at the model's own k. The script prints both tables at k = 1, relative to the largest layer,
the largest relative difference over all layers and k, and the seconds that each took on this machine. Both run in
float32 on the same draws, so they may differ by rounding alone: where two experts' scores are equal to seven digits,
the two may choose differently, which moves one token.
"""

import dataclasses
import json
import os
import platform
import time
from datetime import date

import click
import jax
import numpy as np
import torch
import transformers

from lexi_search.artifacts import ProfileSettings
from lexi_search.checkpoint import open_checkpoint
from lexi_search.measuring import draw
from lexi_search.models import describe
from lexi_search.profiling import profile_layers


def profile_literally(folder, described, settings, device):
    """Mean Frobenius norms, layer -> [K]: one forward pass per layer, iteration and k."""
    # The faster one: on a CPU the grouped product is far slower than the loop over experts.
    experts = "grouped_mm" if device == "cuda" else "eager"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation=experts
    ).to(device)
    blocks = {layer: model.model.layers[layer].mlp for layer in described.layers}
    inputs = {
        (layer, i): torch.tensor(np.asarray(draw(described, layer, i, 1, settings)), device=device)
        for layer in blocks
        for i in range(settings.max_samples // (settings.batch * settings.length))
    }
    losses = {layer: np.zeros(described.identity.top_k) for layer in blocks}
    start = time.perf_counter()
    with torch.no_grad():
        for (layer, _), x in inputs.items():
            x = x.view(settings.batch, settings.length, -1)
            base = run_block(blocks[layer], x, described.identity.top_k)
            for k in range(1, described.identity.top_k):
                losses[layer][k - 1] += float(torch.linalg.norm(run_block(blocks[layer], x, k) - base))
    seconds = time.perf_counter() - start
    draws = len(inputs) // len(blocks)
    return {layer: row / draws for layer, row in losses.items()}, seconds


def run_block(block, x, k):
    for module in block.modules():
        if hasattr(module, "top_k"):
            module.top_k = k
    return block(x)


@click.command(help=__doc__.splitlines()[0])
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False))
@click.option("--batch", default=4, show_default=True)
@click.option("--length", default=512, show_default=True)
@click.option("--iterations", default=8, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Write the numbers here as JSON.")
def main(checkpoint, batch, length, iterations, seed, output):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = open_checkpoint(checkpoint)
    described = describe(source)
    settings = ProfileSettings("paper", seed, batch, length, "float32", 0.0, iterations * batch * length)
    warm = dataclasses.replace(settings, max_samples=batch * length)
    list(profile_layers(source, described, layers=described.layers[:1], settings=warm))
    start = time.perf_counter()
    ours = dict(profile_layers(source, described, layers=described.layers, settings=settings))
    our_seconds = time.perf_counter() - start
    theirs, their_seconds = profile_literally(checkpoint, described, settings, device)
    table = {layer: np.array(ours[layer].frobenius) for layer in described.layers}
    worst = max(np.max(np.abs(table[layer][:-1] / theirs[layer][:-1] - 1)) for layer in table)
    result = {
        "command": f"python examples/benchmarks/profile_vs_reference.py {checkpoint}",
        "device": jax.devices()[0].device_kind,
        "processors": f"{os.cpu_count()} x {platform.machine()}",
        "date": date.today().isoformat(),
        "settings": dataclasses.asdict(settings),
        "k1_relative_to_largest": {"lexi_search": relative(table), "literal": relative(theirs)},
        "largest_relative_difference": float(worst),
        "seconds": {"lexi_search": round(our_seconds, 2), "literal": round(their_seconds, 2)},
    }
    if output:
        with open(output, "w") as file:
            file.write(json.dumps(result, indent=1) + "\n")
    for name, row in result["k1_relative_to_largest"].items():
        click.echo(f"{name:>12}, k = 1, relative to the largest: {' '.join(f'{value:.3f}' for value in row)}")
    click.echo(f"largest relative difference over all layers and k: {worst:.1e}")
    click.echo(f"seconds, after compiling: lexi_search {our_seconds:.2f} (weights read), literal {their_seconds:.2f}")


def relative(table):
    column = np.array([row[0] for row in table.values()])
    return [round(float(value), 4) for value in column / column.max()]


if __name__ == "__main__":
    main()
