"""Where weights stay between passes: every layer has a place, what stays is read once, and no value changes."""

import itertools
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from slow_kernels import multiply_slowly

from lexi_search.checkpoint.reader import open_checkpoint
from lexi_search.layers.kernels.grouped import stacked_outputs
from lexi_search.models.decoder_stack import describe_decoder
from lexi_search.models.loading.residence import DEVICE, FILES, HOST, Residence, Room, find_room, place_layers
from lexi_search.models.model import describe
from lexi_search.profiling.divergence import open_run
from lexi_search.profiling.forward.losses import measure_losses
from lexi_search.profiling.forward.variants import Variant

EVERYTHING = Room(1 << 40, 0)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    folder = tiny.make_checkpoint("olmoe", tmp_path_factory.mktemp("olmoe") / "olmoe", num_hidden_layers=5)
    checkpoint = open_checkpoint(folder)
    model = describe(checkpoint)
    return checkpoint, model, describe_decoder(checkpoint, model)


def to_host(weights):
    experts = [np.asarray(part) for expert in weights.moe.experts for part in expert if part is not None]
    return [*map(np.asarray, jax.tree.leaves(weights._replace(moe=None))), np.asarray(weights.moe.router), *experts]


def list_runs(layers, devices):
    """Every way to cut layers into so many runs."""
    for ends in itertools.combinations(range(1, layers), devices - 1):
        yield [range(a, b) for a, b in itertools.pairwise((0, *ends, layers))]


@given(
    layers=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=7),
    devices=st.integers(1, 3),
    room=st.integers(0, 40),
    host=st.integers(0, 40),
)
def test_every_layer_has_a_place_and_the_cut_is_the_best(layers, devices, room, host):
    sizes, work = zip(*layers, strict=True)
    places = place_layers(sizes, work, devices=devices, room=Room(room, host))
    assert len(places) == len(layers)
    owners = [place.device for place in places]
    assert owners == sorted(owners) and set(owners) <= set(range(devices))

    def cost(runs):
        beyond = sum(max(sum(sizes[n] for n in run) - room, 0) for run in runs)
        return beyond, max(sum(work[n] for n in run) for run in runs)

    runs = [[n for n, own in enumerate(owners) if own == device] for device in sorted(set(owners))]
    best = [min(map(cost, list_runs(len(layers), count))) for count in range(1, min(devices, len(layers)) + 1)]
    assert cost(runs) == next((one for one in best if one[0] == 0), best[-1])
    assert len(runs) == next((count for count, one in enumerate(best, 1) if one[0] == 0), len(best))
    for run in runs:
        kept = sum(sizes[n] for n in run if places[n].kept == DEVICE)
        assert kept <= room
        whole = sum(sizes[n] for n in run)
        assert (kept == whole) == (whole <= room)
    assert sum(sizes[n] for n, place in enumerate(places) if place.kept == HOST) <= host


def make_rooms(residence):
    first, *_ = residence.sizes
    ends = residence._measure(residence._decoder.ends)
    return {
        DEVICE: EVERYTHING,
        HOST: Room(0, 1 << 40),
        FILES: Room(0, 0),
        "two": Room(4 * first + ends, 0),  # of five, since two more are on their way
    }


@pytest.mark.parametrize("kept", [DEVICE, HOST, FILES, "two"])
def test_what_stays_is_read_once_and_what_does_not_again(opened, reads, kept):
    whole = Residence(*opened, room=EVERYTHING)
    [layers] = whole.stages
    residence = Residence(*opened, room=make_rooms(whole)[kept])
    expected = [to_host(weights) for _, weights in whole.stream(layers)]
    reads.clear()
    counts = []
    for _ in range(3):
        for (_, weights), values in zip(residence.stream(layers), expected, strict=True):
            for one, other in zip(to_host(weights), values, strict=True):
                np.testing.assert_array_equal(one, other)
        counts.append(len(reads))
    again = [counts[1] - counts[0], counts[2] - counts[1]]
    staying = residence.staying
    assert sum(staying) == sum(residence.sizes)
    if kept in (DEVICE, HOST):
        assert again == [0, 0] and staying[2] == 0
    elif kept == FILES:
        assert again == [counts[0]] * 2 and staying == (0, 0, sum(residence.sizes))
    else:
        assert 0 < again[0] == again[1] < counts[0] and staying.device == sum(residence.sizes[:2])


def test_ends_are_read_once_where_there_is_room(opened, reads):
    for room, more in ((EVERYTHING, False), (Room(0, 0), True)):
        residence = Residence(*opened, room=room)
        first = residence.read_ends(first=True)
        assert first.norm == () and first.head == () and residence.read_ends(first=False).embedding == ()
        count = len(reads)
        np.testing.assert_array_equal(residence.read_ends(first=True).embedding, first.embedding)
        assert (len(reads) > count) == more


def test_sizes_are_those_of_what_is_there(opened):
    checkpoint, *_ = opened
    residence = Residence(*opened, room=EVERYTHING)
    assert sum(residence.sizes) + residence._measure(residence._decoder.ends) == sum(
        entry.size for entry in checkpoint.entries.values()
    )


def test_room_is_what_is_asked_for_or_a_share_of_the_memory():
    assert find_room(device=5, host=7) == Room(5, 7)
    found = find_room()
    assert found.device > 1 << 20 and found.host == 0  # on a CPU the device's memory is the host's


@pytest.mark.parametrize(("room", "replicas"), [(EVERYTHING, 1), (EVERYTHING, 2), (Room(0, 0), 1)])
def test_a_pass_with_stacked_experts_computes_what_one_by_one_computes(room, replicas, tmp_path, monkeypatch):
    """The path of Hopper GPUs: stacked where they stay, or else in every pass; its kernels interpreted. Two replicas on
    the one device have a sequence each."""
    pytest.importorskip("absl", reason="Pallas' GPU side needs it")
    from lexi_search.layers.kernels import hopper
    from lexi_search.models.loading import residence as residence_of
    from lexi_search.profiling.forward import layer as layer_of
    from lexi_search.profiling.forward import variants as variants_of

    shape = {"hidden_size": 256, "intermediate_size": 128, "num_hidden_layers": 2}
    checkpoint = open_checkpoint(tiny.make_checkpoint("olmoe", tmp_path / "olmoe", **shape))
    model, stacked = describe(checkpoint), []
    tokens = np.random.default_rng(0).integers(3, 250, (2, 16)).astype(np.int32)
    variants = [Variant((1, model.top_k)), Variant((2, 1), 0.5)]
    expected = measure_losses(open_run(checkpoint, model, "float32"), tokens, variants)

    def multiply_stacked(x, choice, experts):
        stacked.append(len(x))
        return stacked_outputs(x, choice, experts, interpret=True)

    monkeypatch.setattr(hopper, "multiply_blocks", multiply_slowly)
    monkeypatch.setattr(layer_of, "stacked_outputs", multiply_stacked)
    for module in (residence_of, layer_of):
        monkeypatch.setattr(module, "can_group", lambda experts, device, **traits: traits["dtype"] == "float32")
    run = open_run(checkpoint, model, "float32", room=room)
    run.residence.devices = jax.local_devices()[:1] * replicas
    if replicas > 1:
        monkeypatch.setattr(variants_of, "PASS_BYTES", 1)
    for _ in range(2):
        found = measure_losses(run, tokens, variants)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-3, atol=1e-6)
    assert (
        len(stacked) == 2 * 4 * replicas
    )  # the model in both layers; in the second what branched off, with exponent and without


TWICE = """
import sys, numpy as np, jax
from lexi_search.checkpoint.reader import open_checkpoint
from lexi_search.models.model import describe
from lexi_search.models.loading.residence import Room
from lexi_search.profiling.divergence import open_run
from lexi_search.profiling.forward.losses import measure_losses
from lexi_search.profiling.forward.sampling import draw_tokens
from lexi_search.profiling.forward.variants import Variant
checkpoint = open_checkpoint(sys.argv[1])
devices, model = len(jax.local_devices()), describe(checkpoint)
whole = open_run(checkpoint, model, "float32").residence
assert whole.stages == (range(5),) and len(whole.replicas) == devices  # one holds all
room = Room(whole._measure(whole._decoder.ends) + max(whole.sizes) * -(-5 // devices), 0)
run = open_run(checkpoint, model, "float32", room=room)
assert len(run.residence.stages) == devices and run.residence.staying.files == 0
tokens = draw_tokens(run, sequences=8, length=16, seed=0)
full, layers = run.model.top_k, len(run.model.layers)
cells = [(own, k) for own in range(layers) for k in (1, 2)]
variants = [Variant(tuple(k if n == own else full for n in range(layers)), 0.3) for own, k in cells]
seen = []
losses = measure_losses(run, tokens, [*variants, Variant((2,) * layers)], report=seen.append)
np.savez(sys.argv[2], tokens=tokens, seen=seen, *losses)
"""


def test_several_devices_compute_what_one_computes(opened, tmp_path):
    """Each has a run of layers, and chunks of sequences go from one to the next."""
    found = {}
    for devices in (1, 2, 3):
        place = tmp_path / f"{devices}.npz"
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
        subprocess.run([sys.executable, "-c", TWICE, opened[0].folder, place], env=environment, check=True, timeout=300)
        found[devices] = dict(np.load(place))
    for devices in (2, 3):
        for name, values in found[1].items():
            if name == "seen":
                assert sorted(found[devices][name]) == sorted(values)
            else:
                np.testing.assert_allclose(found[devices][name], values, rtol=1e-3, atol=1e-6)
