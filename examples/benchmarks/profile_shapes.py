"""Stage 1 at the shapes of real models: how near the card's own matrix product does profiling come?

    python examples/benchmarks/profile_shapes.py [--model mixtral-8x7b ...] [--tokens 1048576] [-o shapes.json]

Weights of one layer are drawn on the device at a model's real shapes, in bfloat16; the norms of the router's rows are
spread (log-normal, sigma 0.3), so that experts are loaded unevenly, as in trained models. Printed for each model:

- max/mean load of the experts,
- tokens per second, and TFLOP/s of the useful expert products (6 x tokens x k x hidden x width) end to end, that is
  with drawing, routing, sorting, stacking and distances,
- the same as a share of what plain 8192^3 bf16 products reach in the same process, repeated for as many seconds: a card
  that is at work for longer than some hundredths of a second becomes slower,
- seconds that the whole model takes for a relative standard error of 1 %, and at one million tokens a layer, both
  without reading weights, after compiling,
- the most device memory held so far (models are ordered by size).

With --parts the file also holds where the time of one pass goes. The script fails if distances differ from a slow
reference's, or if the rows that are multiplied, or their memory, are more than 1.2 times what the loads ask for, as
they would be if a dense product stood in.
"""

import dataclasses
import json
import platform
import time
from datetime import date
from functools import partial

import click
import jax
import jax.numpy as jnp
import numpy as np

from lexi_search.artifacts.identity import ModelIdentity
from lexi_search.artifacts.profile import ProfileSettings
from lexi_search.layers.kernels.blocks import BLOCK_ROWS, GATED_COLUMNS, lay_out, stack_experts
from lexi_search.layers.kernels.grouped import can_group, measure_stacked
from lexi_search.layers.moe import mixing_changes
from lexi_search.layers.routing import Choice, mixing_weights, route
from lexi_search.layers.spec import Activation, Routing
from lexi_search.layers.weights import ExpertWeights, LayerWeights
from lexi_search.models.model import Model
from lexi_search.profiling.paper.gaussian import _size_passes, draw, measure_layer

SIGMOID = Routing(scoring="sigmoid", renormalize=True, scale=2.5, num_groups=8, topk_groups=4, group_score="top2")
# hidden, width, experts, k, MoE layers, routing
SHAPES = {
    "deepseek-vl2-tiny": (1280, 896, 64, 6, 11, Routing()),
    "minicpm-moe-8x2b": (2304, 5760, 8, 2, 40, Routing(renormalize=True)),
    "olmoe-1b-7b": (2048, 1024, 64, 8, 16, Routing()),
    "qwen1.5-moe-a2.7b": (2048, 1408, 60, 4, 24, Routing()),
    "deepseek-v2-lite": (2048, 1408, 64, 6, 26, Routing()),
    "qwen3-30b-a3b": (2048, 768, 128, 8, 48, Routing(renormalize=True)),
    "mixtral-8x7b": (4096, 14336, 8, 2, 32, Routing(renormalize=True)),
    "deepseek-v3": (7168, 2048, 256, 8, 58, SIGMOID),
}
MOST = 1.2  # times the rows, or the bytes, that the loads ask for
SLOW_TOKENS = 64  # that the slow reference measures


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
    model = Model(identity=identity, hidden_size=hidden, activation=Activation(), routing=routing, tensors={})
    return model, jax.block_until_ready(weights)


def measure_plain(seconds=0.0, size=8192, least=20):
    """TFLOP/s of plain bfloat16 matrix products, repeated for about so many seconds, after as many to warm up."""
    a, b = (jax.random.normal(jax.random.key(i), (size, size)).astype(jnp.bfloat16) for i in range(2))
    multiply = jax.jit(jnp.matmul)
    each = measure_seconds(multiply, a, b, repeats=least)[1]
    repeats = max(round(seconds / each), least)
    for _ in range(2 if repeats > least else 0):
        each = measure_seconds(multiply, a, b, repeats=repeats)[1]
    return 2 * size**3 / each / 1e12


def measure_seconds(function, *args, repeats=1, **kwargs):
    """What the function returns, and the seconds that it takes after compiling."""
    jax.block_until_ready(function(*args, **kwargs))
    start = time.perf_counter()
    for _ in range(repeats):
        result = function(*args, **kwargs)
    jax.block_until_ready(result)
    return result, (time.perf_counter() - start) / repeats


def run(name, tokens, parts):
    hidden, width, experts, top_k, layers, _ = SHAPES[name]
    model, weights = make_layer(name)
    settings = ProfileSettings("paper", 0, 4, 512, "bfloat16", 0.0, tokens)
    few, full = _size_passes(model, settings)
    passes = max(round((tokens / 2048 - few) / full), 0)  # whole ones, as only those need compiling
    settings = dataclasses.replace(settings, max_samples=2048 * (few + passes * full))
    one_percent = dataclasses.replace(settings, relative_error=0.01)
    moments, seconds = measure_seconds(measure_layer, model, weights, 0, settings)
    plain = measure_plain(seconds)
    at_1_percent, seconds_at_1_percent = measure_seconds(measure_layer, model, weights, 0, one_percent)
    flops = 6 * moments.samples * top_k * hidden * width
    x = draw(model, 0, 0, few, settings)
    choice = route(x, weights.router, None, routing=model.routing, top_k=top_k)
    loads = np.bincount(np.asarray(choice.experts).ravel(), minlength=experts)
    traits = {"top_k": top_k, "activation": model.activation, "routing": model.routing, "dtype": "bfloat16"}
    grouped = can_group(weights.experts, jax.local_devices()[0], **traits)
    row = {
        "model": name,
        "tokens": moments.samples,
        "max_over_mean_load": float(loads.max() / loads.mean()),
        "tokens_per_s": moments.samples / seconds,
        "tflops": flops / seconds / 1e12,
        "seconds": seconds,
        "plain_tflops": plain,
        "share_of_plain": flops / seconds / 1e12 / plain,
        "model_s_at_1_percent": layers * seconds_at_1_percent,
        "tokens_at_1_percent": at_1_percent.samples,
        "model_s_at_1m_tokens": layers * seconds * 2**20 / moments.samples,
        "one_launch_for_all_experts": grouped,
    }
    if grouped:
        stack, stacking = measure_seconds(stack_experts, weights.experts, dtype="bfloat16")
        row["checks"] = check(model, weights, stack, x, choice, full)
        row |= {"stacking_ms": 1e3 * stacking}
        if parts:
            row["parts_of_a_pass"] = time_parts(model, weights, stack, full, settings)
    memory = jax.local_devices()[0].memory_stats() or {}
    return row | {"peak_gb_so_far": memory.get("peak_bytes_in_use", 0) / 1e9}


def check(model, weights, stack, x, choice, full):
    """Fails where the products of all experts in one launch are wrong, or do more than the loads ask for."""
    name, hidden, (num_experts, _, width) = model.identity.model_type, model.hidden_size, stack.down.shape
    found = np.asarray(measure_stacked(x, choice, stack, routing=model.routing)[:SLOW_TOKENS, :-1])
    few = jax.tree.map(lambda array: array[:SLOW_TOKENS], choice)
    expected = np.asarray(measure_slowly(x[:SLOW_TOKENS], few, stack, routing=model.routing)[:, :-1])
    difference = np.abs(found / expected - 1).max()
    if not difference < 0.05:
        raise click.ClickException(f"{name}: a token's distance differs by {difference:.1%} from the slow reference")
    tokens = full * 2048
    arguments = (
        (x, *choice) if x.shape[0] == tokens else (jnp.tile(a, (-(-full // 2), 1))[:tokens] for a in (x, *choice))
    )
    x, *chosen = arguments
    pairs = choice.experts.shape[1] * tokens
    compiled = measure_stacked.lower(x, Choice(*chosen), stack, routing=model.routing).compile()
    layout = jax.jit(lambda e: lay_out(e, num_experts=num_experts))(chosen[0])
    ratios = {
        "rows_over_asked": int(layout.num_blocks[0]) * BLOCK_ROWS / pairs,
        "bytes_over_asked": compiled.memory_analysis().temp_size_in_bytes / (pairs * 2 * (2 * hidden + width)),
    }
    for what, ratio in ratios.items():
        if ratio > MOST:
            raise click.ClickException(
                f"{name}: {what} is {ratio:.2f}, at most {MOST} expected: is it a dense product?"
            )
    return ratios | {"largest_relative_difference": float(difference)}


@partial(jax.jit, static_argnames="routing")
def measure_slowly(x, choice, stack, *, routing):
    """The distances of a few tokens, one after another, each by its own experts' matrices, subtracted in float32."""

    def measure(token):
        x, experts, weights = token
        both = jnp.einsum("kwh,h->kw", stack.gate_up[experts], x, preferred_element_type=jnp.float32)
        gate, up = jnp.moveaxis(both.reshape(len(experts), -1, 2, GATED_COLUMNS), 2, 0)
        hidden = (jax.nn.silu(gate) * up).reshape(len(experts), -1).astype(x.dtype)
        y = jnp.einsum("khw,kw->kh", stack.down[experts], hidden, preferred_element_type=jnp.float32)
        outputs = jnp.einsum("ij,jh->ih", weights, y, precision="highest")
        return jnp.square(outputs - outputs[-1:]).sum(axis=1)

    ks = jnp.arange(1, choice.scores.shape[1] + 1)
    weights = jax.vmap(lambda k: mixing_weights(choice.scores, k, routing=routing), out_axes=1)(ks)
    return jax.lax.map(measure, (x, choice.experts, weights))


def time_parts(model, weights, stack, full, settings):
    """Milliseconds of each part of a full pass, one at a time, and TFLOP/s of its products."""
    from lexi_search.layers.kernels.hopper import gram_distances, multiply_blocks, spread

    time_it = partial(measure_seconds, repeats=5)
    num_experts, hidden, width = stack.down.shape
    x, drawing = time_it(draw, model, 0, 0, full, settings)
    choice, routing = time_it(route, x, weights.router, None, routing=model.routing, top_k=model.identity.top_k)
    layout, sorting = time_it(jax.jit(lambda e: lay_out(e, num_experts=num_experts)), choice.experts)
    size = layout.block_experts.size * BLOCK_ROWS
    rows, spreading = time_it(jax.jit(lambda x, p: spread(x, p, rows=size)), x, layout.places)
    up = jax.jit(lambda x, w, *blocks: multiply_blocks(x, w, *blocks, gated=True))
    inner, first = time_it(up, rows, stack.gate_up, *layout[1:])
    down = jax.jit(lambda x, w, *blocks: multiply_blocks(x, w, *blocks, gated=False))
    outputs, second = time_it(down, inner, stack.down, *layout[1:])
    change = jax.jit(lambda s: mixing_changes(s, routing=model.routing))(choice.scores)
    _, distances = time_it(jax.jit(gram_distances), outputs, layout.places, change)
    parts = {"draw": drawing, "route": routing, "sort": sorting, "spread": spreading, "gate_up": first}
    parts |= {"down": second, "distances": distances}
    flops = 2 * choice.experts.size * hidden * width / 1e12
    return {
        "tokens": x.shape[0],
        "milliseconds": {part: 1e3 * seconds for part, seconds in parts.items()},
        "gate_up_tflops": 2 * flops / first,
        "down_tflops": flops / second,
    }


@click.command(help=__doc__.splitlines()[0])
@click.option("--model", "names", multiple=True, type=click.Choice(tuple(SHAPES)), help="[default: all]")
@click.option("--tokens", default=2**20, show_default=True, help="About so many tokens are timed: whole passes.")
@click.option("--parts", is_flag=True, help="Also time the parts of a pass.")
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Write the numbers here as JSON.")
def main(names, tokens, parts, output):
    burst = measure_plain()
    device = jax.devices()[0].device_kind
    result = {
        "command": f"python examples/benchmarks/profile_shapes.py --tokens {tokens}" + " --parts" * parts,
        "device": device,
        "host": platform.processor() or platform.machine(),
        "date": date.today().isoformat(),
        "jax": jax.__version__,
        "plain_tflops_in_a_burst": burst,
        "rows": [],
    }
    click.echo(f"{device}, jax {jax.__version__}; {tokens} tokens; 20 plain 8192^3 bf16 products: {burst:.0f} TFLOP/s")
    click.echo(
        f"{'model':18} {'max/mean':>8} {'tokens/s':>10} {'TFLOP/s':>8} {'plain':>6} {'share':>6} {'1 % [s]':>8} "
        f"{'1M tokens [s]':>13} {'peak [GB]':>9}"
    )
    for name in names or SHAPES:
        row = run(name, tokens, parts)
        result["rows"].append(row)
        click.echo(
            f"{name:18} {row['max_over_mean_load']:8.2f} {row['tokens_per_s']:10.0f} {row['tflops']:8.0f} "
            f"{row['plain_tflops']:6.0f} {row['share_of_plain']:6.2f} {row['model_s_at_1_percent']:8.2f} "
            f"{row['model_s_at_1m_tokens']:13.1f} {row['peak_gb_so_far']:9.1f}"
        )
        if output:
            with open(output, "w") as file:
                file.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
