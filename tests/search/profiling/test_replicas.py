"""Replicas of the layers, on devices of their own, against one device that takes the whole text."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from queue import SimpleQueue

import jax
import numpy as np
import pytest
import tiny

import lexi_search
from lexi_search.checkpoint.reader import open_checkpoint
from lexi_search.models.loading.residence import Residence, Room
from lexi_search.models.model import describe
from lexi_search.profiling import compensation
from lexi_search.profiling.compensation import fit_layers
from lexi_search.profiling.divergence import open_run
from lexi_search.profiling.forward import passes, variants
from lexi_search.profiling.forward.losses import measure_losses
from lexi_search.profiling.forward.passes import count_replicas, forward
from lexi_search.profiling.forward.variants import Variant

LAYERS, SEQUENCES, LENGTH = 5, 7, 16  # an odd number of chunks, of a sequence each

SCRIPT = """
import sys, numpy as np, jax
from fractions import Fraction
from lexi_search.checkpoint.reader import Checkpoint, open_checkpoint
from lexi_search.models.loading.residence import Room
from lexi_search.models.model import describe
from lexi_search.profiling.compensation import fit_layers
from lexi_search.profiling.divergence import open_run
from lexi_search.profiling.forward import variants
from lexi_search.profiling.forward.losses import measure_losses
from lexi_search.profiling.forward.passes import count_replicas, forward
from lexi_search.profiling.forward.sampling import draw_tokens
from lexi_search.profiling.forward.variants import Variant
from lexi_search.pruning.prune import prune

folder, stages, place = sys.argv[1], int(sys.argv[2]), sys.argv[3]
layers, sequences, length = map(int, sys.argv[4:])
variants.PASS_BYTES = 1
reads, read = [], Checkpoint.read
Checkpoint.read = lambda self, name, *args, **options: reads.append(name) or read(self, name, *args, **options)
checkpoint = open_checkpoint(folder)
model = describe(checkpoint)
whole = open_run(checkpoint, model, "float32").residence
room = Room(whole._measure(whole._decoder.ends) + max(whole.sizes) * -(-layers // stages), 0)
run = open_run(checkpoint, model, "float32", room=room)
devices = jax.local_devices()
replicas = len(devices) // stages
reads.clear()  # of what describes the model
assert len(run.residence.stages) == stages and len(run.residence.replicas) == replicas
assert count_replicas(run, sequences, length) == min(replicas, sequences)

seen = []
tokens = draw_tokens(run, sequences=sequences, length=length, seed=0, passes=2, report=seen.append)
full = model.top_k
cells = [(own, k) for own in range(layers) for k in (1, 2)]
tried = [Variant(tuple(k if n == own else full for n in range(layers)), 0.3) for own, k in cells]
losses = measure_losses(run, tokens, [*tried, Variant((2,) * layers)], report=seen.append)
ks = dict.fromkeys(model.layers, [1, full - 1])
[fitted] = fit_layers(run, tokens, ks, exponents=[0.5], rank=4, report=seen.append)
products = [np.float32(fitted[key].B) @ np.float32(fitted[key].A) for key in sorted(fitted)]
constants = [fitted[key].c for key in sorted(fitted)]
corrected = measure_losses(run, tokens, [Variant((full - 1,) * layers, 0.5, fitted)])
assert sorted(seen) == sorted(list(range(layers)) * 4)

used = {}
forward(run, tokens, observe=lambda first, outputs: used.update({(first, outputs.layer): outputs.x.devices()}))
stage_of = {layer: stage for stage, own in enumerate(run.residence.stages) for layer in own}
assert used == {
    (first, layer): {devices[first % replicas * stages + stage_of[layer]]}
    for first in range(sequences) for layer in range(layers)
}
counts = np.unique(reads, return_counts=True)
assert set(counts[1][[name.startswith("model.layers") for name in counts[0]]]) == {1}
prune(folder, place + ".pruned", experts=Fraction(1, 4), input="weights", samples=64)
np.savez(place, tokens=tokens, products=products, constants=constants, corrected=corrected.divergence, reads=counts[0],
         counts=counts[1], *losses)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_checkpoint("olmoe", tmp_path_factory.mktemp("olmoe") / "olmoe", num_hidden_layers=LAYERS)


def compute(folder, place, devices, stages):
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
    numbers = map(str, (LAYERS, SEQUENCES, LENGTH))
    subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT, folder, str(stages), place, *numbers],
        env=environment,
        check=True,
        timeout=300,
    )
    pruned = {path.name: path.read_bytes() for path in sorted(place.with_name(f"{place.name}.pruned").iterdir())}
    return dict(np.load(f"{place}.npz")), pruned


def test_replicas_compute_what_one_device_computes(folder, tmp_path):
    """Text and losses to the last bit: every chunk is computed as on one device. Corrections are fitted to sums that
    are added up in another order, but in one that is always the same."""
    expected, pruned = compute(folder, tmp_path / "one", 1, 1)
    for devices, stages in ((2, 1), (4, 2)):
        found, also = compute(folder, tmp_path / f"{devices}-{stages}", devices, stages)
        assert also == pruned
        for name, values in expected.items():
            if name in ("products", "constants", "corrected"):
                np.testing.assert_allclose(found[name], values, rtol=2e-2, atol=1e-3 * np.abs(values).max())
            else:
                np.testing.assert_array_equal(found[name], values, err_msg=name)
    again, _ = compute(folder, tmp_path / "again", 2, 1)
    for name, values in np.load(tmp_path / "2-1.npz").items():
        np.testing.assert_array_equal(again[name], values, err_msg=name)


@pytest.fixture
def run(folder, monkeypatch):
    """A run with two replicas, both on the one device, and chunks of a sequence."""
    monkeypatch.setattr(variants, "PASS_BYTES", 1)
    checkpoint = open_checkpoint(folder)
    run = open_run(checkpoint, describe(checkpoint), "float32", room=Room(1 << 40, 0))
    run.residence.devices = jax.local_devices()[:1] * 2
    return run


def test_chunks_are_fitted_and_measured_as_the_whole_text(run, monkeypatch):
    """Each sequence has its own fold and its own losses, however many go through a layer at once."""
    run.residence.devices = jax.local_devices()[:1]
    tokens = np.random.default_rng(0).integers(3, 250, (6, LENGTH)).astype(np.int32)
    ks, found, fetch = dict.fromkeys(run.model.layers, [1, 2]), [], compensation._fetch

    def spy(run, layer, parts):
        sums[layer] = fetch(run, layer, parts)
        return sums[layer]

    monkeypatch.setattr(compensation, "_fetch", spy)
    for size in (1, 1 << 40):
        monkeypatch.setattr(variants, "PASS_BYTES", size)
        sums = {}
        [fitted] = fit_layers(run, tokens, ks, exponents=[0.5], rank=4)
        assert all(fitted[key] for key in fitted)  # waits for them
        losses = measure_losses(run, tokens, [Variant((2,) * LAYERS)])
        found.append([*losses, *(array for layer in run.model.layers for array in sums[layer])])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4 * np.abs(other).max())


def test_there_are_no_more_replicas_than_memory_and_the_text_allow(run, folder):
    assert [count_replicas(run, sequences, LENGTH) for sequences in (1, 2, 7)] == [1, 2, 2]
    for room in (Room(0, 1 << 40), Room(0, 0)):
        residence = Residence(run.checkpoint, run.model, run.decoder, room=room)
        residence.devices = run.residence.devices
        assert len(residence.replicas) == 1


def test_an_error_in_one_replica_ends_the_others_and_is_raised(run, monkeypatch):
    tokens = np.ones((4, LENGTH), np.int32)
    ended, seen = threading.Event(), []

    class Queue:
        """One that says when a thread has ended, which is the last that it puts."""

        def __init__(self):
            self.queue = SimpleQueue()
            self.get = self.queue.get

        def put(self, item):
            self.queue.put(item)
            if item is None:
                ended.set()

    def observe(first, outputs):
        if first % 2:
            raise ValueError(f"sequence {first}")
        seen.append(outputs.layer)
        assert ended.wait(60)

    monkeypatch.setattr(passes, "SimpleQueue", Queue)
    with pytest.raises(ValueError, match="sequence 1"):
        forward(run, tokens, observe=observe)
    assert seen == [0, 0]


def test_an_error_of_the_caller_is_raised_and_the_next_pass_is_whole(run):
    tokens, seen = np.ones((4, LENGTH), np.int32), []

    def report(layer):
        raise ValueError(f"layer {layer}")

    with pytest.raises(ValueError, match="layer 0"):
        forward(run, tokens, report=report)
    forward(run, tokens, observe=lambda first, outputs: seen.append((outputs.layer, first)))
    assert sorted(seen) == [(layer, first) for layer in range(LAYERS) for first in range(4)]


WIDE = dict(model_type="olmoe", hidden_size=1024, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
WIDE |= dict(num_key_value_heads=4, num_experts=4, num_experts_per_tok=2, vocab_size=64, max_position_embeddings=512)


def test_the_benchmark_runs_and_profiles_are_equal(tmp_path):
    """On the CPU, where a chunk has as many tokens as 16 MB hold of two experts' outputs: 2,048."""
    (tmp_path / "config.json").write_text(json.dumps(WIDE))
    script = Path(lexi_search.__file__).parent.parent / "examples" / "benchmarks" / "profile_replicas.py"
    options = ["--samples", "4096", "-o", "replicas.json", "--", "--dtype", "float32", "--compensation", "none"]
    command = [sys.executable, str(script), ".", "made", *options]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, timeout=300)
    one, two = json.loads((tmp_path / "replicas.json").read_text())["rows"]
    assert (one["gpus"], two["gpus"]) == (1, 2)
    assert "weights stay on the device (" in one["said"][0] and "on the devices, in 2 copies of " in two["said"][0]
    assert set(two["difference"].values()) == {0}
    text, losses = two["phases"]["text"], two["phases"]["losses"]
    assert len(text[1]) == 6 and two["seconds"]["passes"] == pytest.approx(sum(text[1][1:]) + losses[0])
    assert two["times_as_fast"]["passes"] == one["seconds"]["passes"] / two["seconds"]["passes"]
