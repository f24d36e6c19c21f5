"""Stage 1 at the shapes of real models: how near the card's own matrix product does profiling come?

    python examples/benchmarks/profile_shapes.py [--model mixtral-8x7b ...] [--tokens 262144] [-o shapes.json]

Weights of one layer are drawn on the device at a model's real shapes, in bfloat16; the norms of the router's rows are
spread (log-normal, sigma 0.3), so that experts are loaded unevenly, as in trained models. Printed for each model:

- max/mean load of the experts,
- tokens per second, and TFLOP/s of the useful expert products (6 x tokens x k x hidden x width) end to end, that is
  with drawing, routing, sorting and distances; and as a share of a plain 8192^3 bf16 product in the same process,
- seconds that one layer takes for a relative standard error of 1 %, and that the whole model takes at one million
  tokens a layer, both without reading weights, after compiling.
"""

import json
import platform
import time
from datetime import date

import click
import jax
import jax.numpy as jnp
import numpy as np

from lexi_search.architectures import Activation, Routing
from lexi_search.artifacts import ModelIdentity, ProfileSettings
from lexi_search.ffn import ExpertWeights
from lexi_search.measuring import draw, measure_layer
from lexi_search.models import Model
from lexi_search.routing import route
from lexi_search.weights import LayerWeights

# hidden, width, experts, k, MoE layers, routing
SHAPES = {
    "mixtral-8x7b": (4096, 14336, 8, 2, 32, Routing(renormalize=True)),
    "olmoe-1b-7b": (2048, 1024, 64, 8, 16, Routing()),
    "qwen1.5-moe-a2.7b": (2048, 1408, 60, 4, 24, Routing()),
    "deepseek-v2-lite": (2048, 1408, 64, 6, 26, Routing()),
    "minicpm-moe-8x2b": (2304, 5760, 8, 2, 40, Routing(renormalize=True)),
    "deepseek-vl2-tiny": (1280, 896, 64, 6, 11, Routing()),
    "qwen3-30b-a3b": (2048, 768, 128, 8, 48, Routing(renormalize=True)),
    "deepseek-v3": (7168, 2048, 256, 8, 58, Routing("sigmoid", True, 2.5, 8, 4, "top2")),
}


def make_layer(name, seed=0):
    """A `Model` of the shape and one layer's `LayerWeights`, drawn on the device."""
    hidden, width, experts, top_k, layers, routing = SHAPES[name]
    identity = ModelIdentity(name, layers, experts, top_k, tuple(range(layers)), "layers.{}.gate.weight", "k", "0" * 64)
    router_key, spread_key, *keys = jax.random.split(jax.random.key(seed), experts + 2)
    spread = jnp.exp(0.3 * jax.random.normal(spread_key, (experts, 1)))
    router = (jax.random.normal(router_key, (experts, hidden)) * spread / hidden**0.5).astype(jnp.bfloat16)
    make_expert = jax.jit(
        lambda key: ExpertWeights(
            *(
                (jax.random.normal(k, shape) / shape[1] ** 0.5).astype(jnp.bfloat16)
                for k, shape in zip(
                    jax.random.split(key, 3), ((width, hidden), (width, hidden), (hidden, width)), strict=True
                )
            )
        )
    )
    weights = LayerWeights(router, None, tuple(make_expert(key) for key in keys))
    return Model(identity, hidden, Activation(), routing, {}), jax.block_until_ready(weights)


def measure_ceiling(size=8192, repeats=20):
    """TFLOP/s of a plain bfloat16 matrix product."""
    a, b = (jax.random.normal(jax.random.key(i), (size, size)).astype(jnp.bfloat16) for i in range(2))
    product = jax.jit(jnp.matmul)
    product(a, b).block_until_ready()
    start = time.perf_counter()
    for _ in range(repeats):
        c = product(a, b)
    c.block_until_ready()
    return 2 * size**3 * repeats / (time.perf_counter() - start) / 1e12


def run(name, tokens, ceiling):
    hidden, width, experts, top_k, layers, _ = SHAPES[name]
    model, weights = make_layer(name)
    settings = ProfileSettings("paper", 0, 4, 512, "bfloat16", 1e-9, tokens)
    choice = route(
        draw(model, 0, 0, 8, settings), weights.router, None, routing=model.routing, top_k=model.identity.top_k
    )
    loads = np.bincount(np.asarray(choice.experts).ravel(), minlength=experts)
    measure_layer(model, weights, 0, settings)  # the same draws and so the same chunk sizes: everything is compiled
    start = time.perf_counter()
    measure_layer(model, weights, 0, settings)
    seconds = time.perf_counter() - start
    one_percent = ProfileSettings("paper", 0, 4, 512, "bfloat16", 0.01, tokens)
    measure_layer(model, weights, 0, one_percent)
    start = time.perf_counter()
    moments = measure_layer(model, weights, 0, one_percent)
    flops = 6 * tokens * top_k * hidden * width
    return {
        "model": name,
        "max_over_mean_load": float(loads.max() / loads.mean()),
        "tokens_per_s": tokens / seconds,
        "tflops": flops / seconds / 1e12,
        "share_of_ceiling": flops / seconds / 1e12 / ceiling,
        "layer_s_at_1_percent": time.perf_counter() - start,
        "tokens_at_1_percent": moments.samples,
        "model_s_at_1m_tokens": layers * seconds * 2**20 / tokens,
    }


@click.command(help=__doc__.splitlines()[0])
@click.option("--model", "names", multiple=True, type=click.Choice(tuple(SHAPES)), help="[default: all]")
@click.option("--tokens", default=2**18, show_default=True, help="Tokens to time, a multiple of 2048.")
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Write the numbers here as JSON.")
def main(names, tokens, output):
    ceiling = measure_ceiling()
    device = jax.devices()[0].device_kind
    result = {
        "command": f"python examples/benchmarks/profile_shapes.py --tokens {tokens}",
        "device": device,
        "host": platform.processor() or platform.machine(),
        "date": date.today().isoformat(),
        "jax": jax.__version__,
        "tokens": tokens,
        "ceiling_tflops": ceiling,
        "rows": [],
    }
    click.echo(f"{device}, jax {jax.__version__}; plain 8192^3 bf16 product: {ceiling:.0f} TFLOP/s; {tokens} tokens")
    click.echo(
        f"{'model':18} {'max/mean':>8} {'tokens/s':>10} {'TFLOP/s':>8} {'share':>6} {'1 % [s]':>8} {'1M tokens':>13}"
    )
    for name in names or SHAPES:
        row = run(name, tokens, ceiling)
        result["rows"].append(row)
        click.echo(
            f"{name:18} {row['max_over_mean_load']:8.2f} {row['tokens_per_s']:10.0f} {row['tflops']:8.0f} "
            f"{row['share_of_ceiling']:6.2f} {row['layer_s_at_1_percent']:8.3f} {row['model_s_at_1m_tokens']:13.1f}"
        )
        if output:
            with open(output, "w") as file:
                file.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
