"""A gated delta net, attention and the MoE of one layer, each timed at Qwen3.5-35B-A3B's shape.

    python examples/benchmarks/token_mixers.py [--tokens 32768] [--length 2048 --length 32768] [-o token_mixers.json]

Weights are drawn on the device in bfloat16. For each length of sequences, of `--tokens` tokens together: seconds of the
token mixer with its norms and residual stream (`layers.decoder.attend`), for a layer of each kind, and of the MoE part
as a profile of the default input computes it (router, every expert output of the largest k, their mixture). The script
fails if the gated delta net takes longer than the MoE.
"""

import json
import platform
import time
from datetime import date

import click
import jax
import jax.numpy as jnp

from lexi_search.layers.decoder import attend
from lexi_search.layers.moe import compute_outputs, mix
from lexi_search.layers.routing import route
from lexi_search.layers.spec import Activation, Block, GatedDeltaNet, GroupedAttention, Norm, Rope, Routing
from lexi_search.layers.weights import Affine, BlockWeights, DeltaWeights, ExpertWeights, GroupedWeights, Norms

HIDDEN, WIDTH, EXPERTS, TOP_K = 2048, 512, 256, 8
NORM = Norm(1e-6, offset=1.0)
DELTA = GatedDeltaNet(
    num_groups=16, num_heads=32, key_dim=128, value_dim=128, activation="silu", norm=Norm(1e-6), gate="silu"
)
ROPE = Rope(tuple(1e7 ** (-i / 32) for i in range(32)))
ATTENTION = GroupedAttention(16, 2, 256, 256**-0.5, NORM, ROPE, gated=True)
ROUTING = Routing(renormalize=True)


class Drawer:
    """Random bfloat16 arrays, each of another key."""

    def __init__(self):
        self.key = jax.random.key(0)

    def draw(self, *shape):
        self.key, key = jax.random.split(self.key)
        return (jax.random.normal(key, shape) * shape[-1] ** -0.5).astype(jnp.bfloat16)

    def draw_affine(self, *shape):
        return Affine(self.draw(*shape))


def make_blocks(drawer):
    """Name -> block and weights of a layer with each kind of token mixer."""
    keys, values = DELTA.num_groups * DELTA.key_dim, DELTA.num_heads * DELTA.value_dim
    rows = 2 * keys + values, values, DELTA.num_heads, DELTA.num_heads
    delta = DeltaWeights(
        inputs=tuple(drawer.draw_affine(count, HIDDEN) for count in rows),
        conv=drawer.draw_affine(2 * keys + values, 1, 4),
        decay_rate=drawer.draw(DELTA.num_heads),
        decay_bias=drawer.draw(DELTA.num_heads),
        norm=Affine(jnp.ones(DELTA.value_dim, jnp.bfloat16)),
        o=drawer.draw_affine(HIDDEN, values),
    )
    heads, kv_heads, dim = ATTENTION.num_heads, ATTENTION.num_kv_heads, ATTENTION.head_dim
    attention = GroupedWeights(
        q=drawer.draw_affine(2 * heads * dim, HIDDEN),
        k=drawer.draw_affine(kv_heads * dim, HIDDEN),
        v=drawer.draw_affine(kv_heads * dim, HIDDEN),
        o=drawer.draw_affine(HIDDEN, heads * dim),
        q_norm=drawer.draw_affine(dim),
        k_norm=drawer.draw_affine(dim),
    )
    norms = Norms(attention_input=drawer.draw_affine(HIDDEN), ffn_input=drawer.draw_affine(HIDDEN))
    mixers = {"gated delta net": (DELTA, delta), "attention": (ATTENTION, attention)}
    return {
        name: (Block(mixer, NORM, Activation()), BlockWeights(weights, norms, None, None))
        for name, (mixer, weights) in mixers.items()
    }


def make_moe(drawer):
    """A function of tokens to the output of their experts at the largest k."""
    router = drawer.draw(EXPERTS, HIDDEN)
    shapes = (WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)
    experts = tuple(ExpertWeights(*(drawer.draw(*shape) for shape in shapes)) for _ in range(EXPERTS))

    def run(x):
        choice = route(x, router, None, routing=ROUTING, top_k=TOP_K)
        outputs = compute_outputs(x, choice, experts, routing=ROUTING, activation=Activation())
        return mix(outputs, choice.scores, jnp.int32(TOP_K), routing=ROUTING)

    return run


def measure_seconds(function, *args, repeats):
    jax.block_until_ready(function(*args))
    start = time.perf_counter()
    for _ in range(repeats):
        result = function(*args)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / repeats


@click.command()
@click.option("--tokens", default=32768, show_default=True, help="Tokens of all sequences together.")
@click.option("--length", "lengths", multiple=True, type=int, default=(2048, 32768), show_default=True)
@click.option("--repeats", default=10, show_default=True)
@click.option("-o", "--output", type=click.Path(dir_okay=False))
def main(tokens, lengths, repeats, output):
    drawer, rows = Drawer(), []
    blocks, run_moe = make_blocks(drawer), make_moe(drawer)
    for length in lengths:
        hidden = drawer.draw(max(tokens // length, 1), length, HIDDEN)
        row = {"length": length, "sequences": len(hidden)}
        for name, (block, weights) in blocks.items():
            row[name] = measure_seconds(attend, block, weights, hidden, repeats=repeats)
        row["moe"] = measure_seconds(run_moe, hidden.reshape(-1, HIDDEN), repeats=repeats)
        rows.append(row)
        print(", ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
    if output:
        device = jax.local_devices()[0].device_kind
        about = {"device": device, "jax": jax.__version__, "python": platform.python_version()}
        with open(output, "w") as file:
            json.dump(about | {"date": date.today().isoformat(), "tokens": tokens, "rows": rows}, file, indent=1)
    if slow := [row["length"] for row in rows if row["gated delta net"] > row["moe"]]:
        raise SystemExit(f"the gated delta net takes longer than the MoE at lengths {slow}")


if __name__ == "__main__":
    main()
