"""Algorithm 1 of the paper read literally, in PyTorch with transformers' blocks, beside lexi_search on the same inputs.

    python examples/benchmarks/profile_vs_reference.py CHECKPOINT [--iterations 8] [-o out.json]
    python examples/benchmarks/profile_vs_reference.py --shape olmoe-1b-7b --shape mixtral-8x7b [--iterations 64]

Literally: for every MoE layer and every k, a forward pass of the layer's block, and the Frobenius norm of what it
differs by from the pass at the model's own k; experts are computed by whichever of transformers' implementations is
faster here. Both get the same draws of [batch, length, hidden].

With a CHECKPOINT both run in float32 over all of its layers, lexi_search reading the files. With --shape one block of
a model's real shapes is drawn on the device, and both run in its bfloat16, after compiling. Printed: seconds of both,
and the largest difference between the norms of any layer and k, relative and in standard errors; for --shape that of
the block in float32 over the first 8 iterations. Where two experts' scores are equal to seven digits, the two may
choose differently, which moves one token.
"""

import copy
import dataclasses
import json
import os
import platform
import time
from datetime import date

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", ".5")  # the rest is PyTorch's

import click  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import profile_shapes  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from lexi_search.artifacts.identity import ModelIdentity
from lexi_search.artifacts.profile import ProfileSettings  # noqa: E402
from lexi_search.checkpoint.reader import open_checkpoint  # noqa: E402
from lexi_search.layers.spec import Activation  # noqa: E402
from lexi_search.layers.weights import (
    ExpertWeights,  # noqa: E402
    LayerWeights,  # noqa: E402
)
from lexi_search.models.model import Model, describe  # noqa: E402
from lexi_search.profiling.paper.gaussian import draw, measure_layer  # noqa: E402
from lexi_search.profiling.paper.moments import summarise  # noqa: E402
from lexi_search.profiling.profile import profile_layers  # noqa: E402

# model type, and its keys for the experts' width and number
FAMILIES = {
    "mixtral-8x7b": ("mixtral", "intermediate_size", "num_local_experts"),
    "olmoe-1b-7b": ("olmoe", "intermediate_size", "num_experts"),
    "qwen3-30b-a3b": ("qwen3_moe", "moe_intermediate_size", "num_experts"),
}
COMPARED = 8  # iterations whose norms are compared with float32 ones
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def profile_literally(blocks, described, settings):
    """Mean Frobenius norms, layer -> [K], and the seconds: one forward pass per layer, iteration and k."""
    inputs = {
        (layer, i): as_torch(draw(described, layer, i, 1, settings)).view(settings.batch, settings.length, -1)
        for layer in blocks
        for i in range(settings.max_samples // (settings.batch * settings.length))
    }
    losses = {layer: torch.zeros(described.identity.top_k, device=DEVICE) for layer in blocks}
    wait()
    start = time.perf_counter()
    with torch.no_grad():
        for (layer, _), x in inputs.items():
            x = x.to(next(blocks[layer].parameters()).dtype)
            base = run_block(blocks[layer], x, described.identity.top_k)
            for k in range(1, described.identity.top_k):
                difference = run_block(blocks[layer], x, k) - base
                losses[layer][k - 1] += torch.linalg.vector_norm(difference, dtype=torch.float32)
    wait()
    seconds = time.perf_counter() - start
    draws = len(inputs) // len(blocks)
    return {layer: row.cpu().double().numpy() / draws for layer, row in losses.items()}, seconds


def run_block(block, x, k):
    for module in block.modules():
        if hasattr(module, "top_k"):
            module.top_k = k
    return block(x)


def as_torch(array):
    if DEVICE == "cuda":
        return torch.utils.dlpack.from_dlpack(array)
    return torch.tensor(np.asarray(array, np.float32)).to(getattr(torch, array.dtype.name))


def wait():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def profile_checkpoint(folder, settings):
    """Both over all layers of a checkpoint, in float32: ours, theirs, and the seconds of each."""
    source = open_checkpoint(folder)
    described = describe(source)
    warm = dataclasses.replace(settings, max_samples=settings.batch * settings.length)
    list(profile_layers(source, described, layers=described.layers[:1], settings=warm))
    start = time.perf_counter()
    ours = dict(profile_layers(source, described, layers=described.layers, settings=settings))
    our_seconds = time.perf_counter() - start
    # On a CPU the grouped product is far slower than the loop over experts.
    experts = "grouped_mm" if DEVICE == "cuda" else "eager"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation=experts
    ).to(DEVICE)
    blocks = {layer: model.model.layers[layer].mlp for layer in described.layers}
    theirs, their_seconds = profile_literally(blocks, described, settings)
    return ours, theirs, {"lexi_search": our_seconds, "literal": their_seconds}


def profile_shape(name, settings):
    """Both over one block of real shapes, in bfloat16: ours, the block's in float32, and the seconds of each."""
    block, config, model, weights = make_block(name)
    measure_layer(model, weights, 0, settings)
    start = time.perf_counter()
    measure_layer(model, weights, 0, settings)
    seconds = {"lexi_search": time.perf_counter() - start}
    one, compared = (
        dataclasses.replace(settings, max_samples=n * settings.batch * settings.length) for n in (1, COMPARED)
    )
    for implementation in ("grouped_mm", "eager"):
        config._experts_implementation = implementation
        profile_literally({0: block}, model, one)
        seconds[f"literal, {implementation}"] = profile_literally({0: block}, model, settings)[1]
    ours = {0: summarise(measure_layer(model, weights, 0, compared))}
    theirs, _ = profile_literally({0: copy.deepcopy(block).float()}, model, compared)
    seconds["literal"] = min(seconds["literal, grouped_mm"], seconds["literal, eager"])
    return ours, theirs, seconds


def make_block(name):
    """transformers' block of one layer, drawn on the device, its config, and the same as lexi_search takes it."""
    hidden, width, experts, top_k, _, routing = profile_shapes.SHAPES[name]
    model_type, width_key, experts_key = FAMILIES[name]
    config = transformers.AutoConfig.for_model(
        model_type,
        **{width_key: width, experts_key: experts, "num_experts_per_tok": top_k, "hidden_size": hidden},
        norm_topk_prob=routing.renormalize,
        num_hidden_layers=1,
        vocab_size=16,
        pad_token_id=0,
    )
    with torch.device(DEVICE):
        block = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).model.layers[0].mlp
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    views = (block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj)
    router, gate_up, down = (jax.dlpack.from_dlpack(view.detach()) for view in views)
    identity = ModelIdentity(name, 1, experts, top_k, (0,), "layers.{}.gate.weight", "k", "0" * 64)
    model = Model(identity=identity, hidden_size=hidden, activation=Activation(), routing=routing, tensors={})
    made = tuple(ExpertWeights(gate_up[e, :width], gate_up[e, width:], down[e]) for e in range(experts))
    return block, block.experts.config, model, jax.block_until_ready(LayerWeights(router, None, made))


def compare(name, ours, theirs, seconds):
    norms = {layer: (np.array(ours[layer].frobenius), np.array(ours[layer].frobenius_stderr)) for layer in theirs}
    relative, in_errors = (
        max(np.max(np.abs(norm - theirs[layer])[:-1] / by(norm, error)[:-1]) for layer, (norm, error) in norms.items())
        for by in (lambda norm, _: norm, lambda _, error: error)
    )
    row = {
        "what": name,
        "seconds": seconds,
        "times_faster": seconds["literal"] / seconds["lexi_search"],
        "largest_difference": {"relative": float(relative), "in_standard_errors": float(in_errors)},
        "norms": {
            str(layer): {"lexi_search": ours[layer].frobenius, "literal": theirs[layer].tolist()} for layer in ours
        },
    }
    click.echo(
        f"{name}: literal {seconds['literal']:.2f} s, lexi_search {seconds['lexi_search']:.3f} s, "
        f"{row['times_faster']:.1f} times faster; norms within {relative:.1e}, {in_errors:.2f} standard errors"
    )
    return row


@click.command(help=__doc__.splitlines()[0])
@click.argument("checkpoint", required=False, type=click.Path(exists=True, file_okay=False))
@click.option("--shape", "shapes", multiple=True, type=click.Choice(tuple(FAMILIES)))
@click.option("--batch", default=4, show_default=True)
@click.option("--length", default=512, show_default=True)
@click.option("--iterations", default=8, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Write the numbers here as JSON.")
def main(checkpoint, shapes, batch, length, iterations, seed, output):
    if not checkpoint and not shapes:
        raise click.UsageError("give a CHECKPOINT or a --shape")
    settings = ProfileSettings("paper", seed, batch, length, "float32", 0.0, iterations * batch * length)
    what = " ".join(([checkpoint] if checkpoint else []) + [f"--shape {name}" for name in shapes])
    result = {
        "command": f"python examples/benchmarks/profile_vs_reference.py {what} --iterations {iterations}",
        "device": jax.devices()[0].device_kind,
        "processors": f"{os.cpu_count()} x {platform.machine()}",
        "date": date.today().isoformat(),
        "versions": {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "settings": dataclasses.asdict(settings) | {"dtype": "float32 for a checkpoint, bfloat16 for a shape"},
        "rows": [],
    }
    work = [(checkpoint, profile_checkpoint, settings)] if checkpoint else []
    work += [(name, profile_shape, dataclasses.replace(settings, dtype="bfloat16")) for name in shapes]
    for subject, profile, chosen in work:
        result["rows"].append(compare(subject, *profile(subject, chosen)))
        if output:
            with open(output, "w") as file:
                file.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
