"""The product of all experts in one launch against the product of each: its kernels, interpreted on the CPU."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click import ClickException
from hypothesis import given
from hypothesis import strategies as st
from slow_kernels import multiply_slowly

import lexi_search
from lexi_search.layers.kernels.blocks import BLOCK_ROWS, StackedExperts, lay_out, stack_experts
from lexi_search.layers.kernels.grouped import can_group, measure_stacked, stacked_outputs
from lexi_search.layers.moe import compute_outputs, squared_distances
from lexi_search.layers.routing import route
from lexi_search.layers.spec import Activation, Routing
from lexi_search.layers.weights import ExpertWeights

EXPERTS, HIDDEN, WIDTH, TOP_K, TOKENS = 4, 256, 128, 3, 70


def make_layer(dtype=jnp.bfloat16):
    draw = np.random.default_rng(0)
    shapes = ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH))
    experts = tuple(
        ExpertWeights(*(jnp.asarray(draw.normal(size=shape) / shape[1] ** 0.5, dtype) for shape in shapes))
        for _ in range(EXPERTS)
    )
    router = jnp.asarray(draw.normal(size=(EXPERTS, HIDDEN)) / HIDDEN**0.5, dtype)
    return router, experts, jnp.asarray(draw.normal(size=(TOKENS, HIDDEN)), dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_equals_the_experts_one_by_one(dtype, monkeypatch):
    pytest.importorskip("absl", reason="Pallas' GPU side needs it")
    from lexi_search.layers.kernels import hopper

    monkeypatch.setattr(hopper, "multiply_blocks", multiply_slowly)
    router, experts, x = make_layer(dtype)
    routing = Routing(renormalize=True)
    choice = route(x, router, None, routing=routing, top_k=TOP_K)
    outputs = compute_outputs(x, choice, experts, routing=routing, activation=Activation())
    expected = squared_distances(outputs, choice.scores, routing=routing)
    found = measure_stacked(x, choice, stack_experts(experts, dtype=dtype), routing=routing, interpret=True)
    assert found.shape == (TOKENS, TOP_K) and not found[:, -1].any()
    np.testing.assert_allclose(found, expected, rtol=0.05)
    np.testing.assert_allclose(found.sum(axis=0), expected.sum(axis=0), rtol=3e-3)
    each = stacked_outputs(x, choice, stack_experts(experts, dtype=dtype), interpret=True)
    assert each.dtype == outputs.dtype
    np.testing.assert_allclose(each.astype(jnp.float32), outputs.astype(jnp.float32), rtol=0.05, atol=0.02)


def test_the_benchmark_judges_by_a_slow_reference(monkeypatch):
    pytest.importorskip("absl", reason="Pallas' GPU side needs it")
    monkeypatch.syspath_prepend(Path(lexi_search.__file__).parents[1] / "examples" / "benchmarks")
    import profile_shapes

    from lexi_search.layers.kernels import hopper

    monkeypatch.setattr(hopper, "multiply_blocks", multiply_slowly)
    monkeypatch.setattr(profile_shapes, "MOST", 100)  # the reference's rows and bytes are not those of a kernel
    monkeypatch.setitem(profile_shapes.SHAPES, "tiny", (HIDDEN, WIDTH, EXPERTS, TOP_K, 1, Routing()))
    model, weights = profile_shapes.make_layer("tiny")
    x = make_layer()[2]
    choice = route(x, weights.router, None, routing=Routing(), top_k=TOP_K)
    stack = stack_experts(weights.experts, dtype="bfloat16")

    def check(factor):
        def measure(*arguments, routing):
            return factor * measure_stacked(*arguments, routing=routing, interpret=True)

        monkeypatch.setattr(profile_shapes, "measure_stacked", jax.jit(measure, static_argnames="routing"))
        return profile_shapes.check(model, weights, stack, x, choice, 1)

    assert check(1)["largest_relative_difference"] < 0.05
    with pytest.raises(ClickException, match="differs by .*% from the slow reference"):
        check(2)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the interpreter of jax 0.10 waits forever")
@pytest.mark.parametrize("gated", [False, True])
def test_kernel_equals_the_blocks_one_by_one(gated):
    pytest.importorskip("absl", reason="Pallas' GPU side needs it")
    from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams

    from lexi_search.layers.kernels.hopper import multiply_blocks

    draw = np.random.default_rng(1)
    x = jnp.asarray(draw.normal(size=(4 * BLOCK_ROWS, 320)), jnp.bfloat16)
    weights = jnp.asarray(draw.normal(size=(3, 512, 320)) / 320**0.5, jnp.bfloat16)
    blocks = jnp.array([0, 2, 2, 1], jnp.int32), jnp.array([3], jnp.int32)
    found, expected = (
        multiply(x, weights, *blocks, gated=gated, interpret=InterpretGPUParams())[: 3 * BLOCK_ROWS]
        for multiply in (multiply_blocks, multiply_slowly)
    )
    np.testing.assert_allclose(found.astype(jnp.float32), expected.astype(jnp.float32), rtol=0.02, atol=0.02)


@given(st.lists(st.permutations(range(5)), min_size=150, max_size=150), st.sampled_from([1, 5]))
def test_layout(tokens, top_k):
    experts = np.array(tokens)[:, :top_k]
    layout = jax.device_get(jax.jit(lay_out, static_argnames="num_experts")(jnp.asarray(experts), num_experts=5))
    assert len(set(layout.places.ravel().tolist())) == experts.size  # every row has one owner
    np.testing.assert_array_equal(layout.block_experts[layout.places // BLOCK_ROWS], experts)
    loads = np.bincount(experts.ravel(), minlength=5)
    assert layout.num_blocks == -(-loads // BLOCK_ROWS).sum()
    assert layout.places.max() < layout.num_blocks * BLOCK_ROWS <= layout.block_experts.size * BLOCK_ROWS


def test_stack_holds_every_expert():
    _, experts, x = make_layer()
    stack = stack_experts(experts, dtype="float32")
    assert isinstance(stack, StackedExperts) and stack.down.dtype == jnp.float32
    for number, expert in enumerate(experts):
        np.testing.assert_array_equal(stack.gate_up[number, :128], expert.gate.astype(jnp.float32))
        np.testing.assert_array_equal(stack.gate_up[number, 128:], expert.up.astype(jnp.float32))
        np.testing.assert_array_equal(stack.down[number], expert.down.astype(jnp.float32))


class Hopper:
    __class__ = jax.Device  # what `isinstance` goes by
    platform, compute_capability = "gpu", "9.0"

    def __init__(self, memory=1 << 30):
        self.memory = memory

    def memory_stats(self):
        return {"bytes_limit": self.memory}


def test_covers_what_it_computes(monkeypatch):
    expert = make_layer()[1][0]
    traits = {"top_k": 4, "activation": Activation("swish"), "routing": Routing(), "dtype": "bfloat16"}

    def covers(expert=expert, num_experts=EXPERTS, device=None, **changes):
        return can_group((expert,) * num_experts, device or Hopper(), **(traits | changes))

    monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))
    assert covers()
    assert not covers(device=jax.local_devices()[0])
    assert not covers(device=Hopper(memory=1 << 20)) and not covers(num_experts=1 << 12)
    assert not covers(dtype="float32") and not covers(top_k=65) and not covers(activation=Activation("gelu"))
    assert not covers(activation=Activation(limit=7.0)) and not covers(activation=Activation(up_offset=1.0))
    assert not covers(routing=Routing(scales_input=True))
    assert not covers(expert._replace(gate=None)) and not covers(expert._replace(down_bias=expert.down[:, 0]))
    assert not covers(ExpertWeights(expert.gate[:96], expert.up[:96], expert.down[:, :96]))
    assert not covers(ExpertWeights(expert.gate[:, :128], expert.up[:, :128], expert.down[:128]))
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    assert not covers()
