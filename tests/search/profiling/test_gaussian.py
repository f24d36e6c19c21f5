"""What passes hold, who computes them, and how much they compute."""

import dataclasses
import json
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lexi_search.artifacts.profile import ProfileSettings
from lexi_search.checkpoint.reader import open_checkpoint
from lexi_search.layers import experts
from lexi_search.layers.spec import Activation
from lexi_search.layers.weights import ExpertWeights
from lexi_search.models.loading.streaming import stream_layers
from lexi_search.models.model import describe
from lexi_search.profiling.paper import gaussian
from lexi_search.profiling.paper.gaussian import measure_layer

SETTINGS = ProfileSettings(
    input="paper", seed=0, batch=2, length=32, dtype="float32", relative_error=0.0, max_samples=64 * 25
)

PROFILE = """
import dataclasses, json, sys
import jax
from lexi_search.profiling.paper import gaussian
from lexi_search.artifacts.profile import ProfileSettings
from lexi_search.checkpoint.reader import open_checkpoint
from lexi_search.models.model import describe
from lexi_search.profiling.profile import profile_layers

gaussian.PASS_BYTES = 100_000
folder, settings = sys.argv[1], ProfileSettings(**json.loads(sys.argv[2]))
checkpoint = open_checkpoint(folder)
model = describe(checkpoint)
losses = dict(profile_layers(checkpoint, model, layers=model.layers, settings=settings))
print(json.dumps([len(jax.local_devices()), {k: dataclasses.asdict(v) for k, v in losses.items()}]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"))


@pytest.mark.parametrize("relative_error", [0.0, 0.03])
def test_number_of_devices_decides_nothing(folder, relative_error):
    settings = json.dumps(dataclasses.asdict(dataclasses.replace(SETTINGS, relative_error=relative_error)))
    results = []
    for count in (1, 3):
        environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}
        command = [sys.executable, "-c", PROFILE, str(folder), settings]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
        devices, losses = json.loads(done.stdout)
        assert devices == count
        results.append(losses)
    assert results[0] == results[1]  # JSON holds every digit
    iterations = {loss["iterations"] for loss in results[0].values()}
    assert iterations == {25} if relative_error == 0.0 else max(iterations) < 25


def test_passes_are_counted_in_order_wherever_they_end(folder, monkeypatch):
    """With slow passes and fast ones, what is counted is the first iterations, one by one, up to the limit."""
    checkpoint = open_checkpoint(folder)
    model = describe(checkpoint)
    settings = dataclasses.replace(SETTINGS, relative_error=0.2)
    spread = np.linspace(3, 0, 25)[:, None, None] * np.ones((1, 2, model.top_k))

    def measure(model, weights, layer, first, count, settings, *, device):
        started.append((first, count))
        return jnp.asarray(np.stack([1 + spread[:, 0], 1 + 64 * spread[:, 1]], axis=1)[first : first + count])

    monkeypatch.setattr(gaussian, "_measure_pass", measure)
    monkeypatch.setattr(gaussian, "_size_passes", lambda model, settings: (2, 6))
    (_, weights), *_ = stream_layers(checkpoint, model, model.layers[:1])
    for limit in (1, 2, 8, 25):
        started = []
        moments = measure_layer(model, weights, 0, dataclasses.replace(settings, max_samples=64 * limit))
        assert moments.iterations == limit  # this spread is never small enough
        assert sum(count for _, count in started) == limit
        if limit == 25:
            assert sorted(started) == [(0, 2), (2, 6), (8, 6), (14, 6), (20, 5)]
        np.testing.assert_allclose(moments.squares, (1 + spread[:limit, 0]).sum(axis=0), rtol=1e-6)


@pytest.mark.parametrize("num_experts, top_k", [(64, 2), (128, 8)])
def test_expert_product_is_never_dense(num_experts, top_k, monkeypatch):
    """What the compiled programs of one call compute, and hold beside their results, against what the loads ask for.

    A masked dense product would compute num_experts / top_k times as much.
    """
    hidden, width, tokens = 64, 32, 8192
    draw = np.random.default_rng(0)
    weights = ExpertWeights(
        *(jnp.asarray(draw.normal(size=s), jnp.float32) for s in ((width, hidden), (width, hidden), (hidden, width)))
    )
    x = jnp.asarray(draw.normal(size=(tokens, hidden)), jnp.float32)
    chosen = jnp.asarray(np.argsort(draw.normal(size=(tokens, num_experts)), axis=1)[:, :top_k], jnp.int32)
    programs = []
    call = experts._apply_expert

    def inspect(*args, **kwargs):
        programs.append((kwargs["size"], call.lower(*args, **kwargs).compile()))
        return call(*args, **kwargs)

    monkeypatch.setattr(experts, "_apply_expert", inspect)
    experts.expert_outputs(x, chosen, (weights,) * num_experts, activation=Activation())
    ideal = 6 * tokens * top_k * hidden * width
    flops = sum(program.cost_analysis()["flops"] for _, program in programs)
    assert ideal < flops < 1.2 * ideal
    for rows, program in programs:
        held = rows * 4 * (2 * hidden + 3 * width)  # inputs, outputs, and three of the width between them
        assert program.memory_analysis().temp_size_in_bytes < 1.2 * held
