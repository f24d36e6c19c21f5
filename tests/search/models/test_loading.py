"""Loading of weights: which tensors are read when, what stays on the device, and that no value changes."""

import gc
import json
import threading
import time

import jax
import numpy as np
import pytest
import tiny
import torch
from quantised import CASES
from safetensors.torch import load_file, save_file

from lexi_search.checkpoint.reader import Checkpoint, open_checkpoint
from lexi_search.errors import InputError
from lexi_search.models.loading import reader as loading
from lexi_search.models.loading.streaming import stream_layers
from lexi_search.models.model import describe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"), num_experts=8)


@pytest.fixture
def opened(folder):
    checkpoint = open_checkpoint(folder)
    return checkpoint, describe(checkpoint)


def to_host(weights):
    return [None if part is None else np.asarray(part) for expert in weights.experts for part in expert]


@pytest.mark.parametrize("readers", [1, 3, 8])
def test_values_do_not_depend_on_the_threads(readers, opened, monkeypatch):
    monkeypatch.setattr(loading, "READERS", readers)
    checkpoint, model = opened
    stem = "model.layers.{}.mlp.experts.{}.{}_proj.weight"
    order = model.layers[::-1]
    for expected, (layer, weights) in zip(order, stream_layers(checkpoint, model, order), strict=True):
        assert layer == expected
        for number, expert in enumerate(weights.experts):
            for part, name in zip(expert[:3], ("gate", "up", "down"), strict=True):
                np.testing.assert_array_equal(np.asarray(part), checkpoint[stem.format(layer, number, name)])


def test_only_experts_that_are_needed_are_read(opened, reads):
    checkpoint, model = opened
    wanted, asked = {0: [1, 5], 1: [], 2: range(8)}, []

    def needed(layer, router, bias):
        assert router.shape == (8, model.hidden_size) and bias is None
        asked.append(layer)
        return wanted[layer]

    for layer, weights in stream_layers(checkpoint, model, model.layers, needed=needed):
        ahead = [name for name in reads if f"layers.{layer}.mlp.experts" in name]
        assert {int(name.split(".experts.")[1].split(".")[0]) for name in ahead} == set(wanted[layer])
        assert len(ahead) == 3 * len(wanted[layer]) and len(weights.experts) == 8
        if layer == 0:
            assert (
                np.asarray(weights.experts[2].up).tolist()
                == checkpoint["model.layers.0.mlp.experts.2.up_proj.weight"].tolist()
            )
            assert weights.experts[2].up is weights.experts[-6].up  # read once
            assert len([name for name in reads if "layers.0.mlp.experts.2." in name]) == 4  # with the line before
            with pytest.raises(IndexError):
                weights.experts[8]
    assert asked == [0, 1, 2]
    del reads[:]
    [(_, weights)] = stream_layers(checkpoint, model, [0], needed=lambda *_: [])
    name = "model.layers.0.mlp.experts.7.up_proj.weight"
    assert reads == ["model.layers.0.mlp.gate.weight"]  # and the stream is at its end
    np.testing.assert_array_equal(weights.experts[7].up, checkpoint[name])


def test_an_expert_that_nobody_asks_for_may_hold_anything(folder, tmp_path, reads):
    """Its values cannot change a result. Asked for, it is refused by name."""
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    tensors[name][0, 0] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    checkpoint = open_checkpoint(tmp_path)
    model = describe(checkpoint)
    for _, weights in stream_layers(checkpoint, model, [1], needed=lambda *_: [0, 2]):
        assert weights.experts[0].down.shape == (64, 32)
        with pytest.raises(InputError, match=f"model.safetensors: tensor {name} holds NaN"):
            weights.experts[3]
    with pytest.raises(InputError, match=f"tensor {name} holds NaN"):
        next(stream_layers(checkpoint, model, [1]))


def test_errors_of_other_threads_reach_the_caller(opened, monkeypatch):
    checkpoint, model = opened
    with pytest.raises(ZeroDivisionError):
        list(stream_layers(checkpoint, model, model.layers, needed=lambda *_: 1 // 0))
    entry = checkpoint.entries["model.layers.2.mlp.experts.7.up_proj.weight"]
    cut = dict(checkpoint.entries) | {"model.layers.2.mlp.experts.7.up_proj.weight": entry._replace(start=2**40)}
    broken = Checkpoint(checkpoint.folder, checkpoint.config, cut)
    seen = []
    with pytest.raises(InputError, match="the file ends inside tensor model.layers.2.mlp.experts.7.up_proj.weight"):
        seen += (layer for layer, _ in stream_layers(broken, model, model.layers))


def test_no_thread_outlives_the_stream(opened):
    checkpoint, model = opened
    before = set(threading.enumerate())  # of which some may be ending
    stream = stream_layers(checkpoint, model, model.layers)
    next(stream)
    started = set(threading.enumerate()) - before
    assert started
    stream.close()
    deadline = time.monotonic() + 30
    while started & set(threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not started & set(threading.enumerate())


def count_device_bytes():
    gc.collect()  # what earlier tests left in reference cycles would be freed between two counts
    return sum(array.nbytes for array in jax.live_arrays())


def test_two_layers_are_on_the_device_at_most(opened):
    checkpoint, model = opened
    layer_bytes = sum(e.size for n, e in checkpoint.entries.items() if ".layers.0.mlp." in n)
    before, found = count_device_bytes(), []
    for _, weights in stream_layers(checkpoint, model, [0, 1, 2, 0, 1]):
        weights.experts[0].up.block_until_ready()
        found.append(count_device_bytes() - before)
    assert layer_bytes <= min(found) and max(found) <= 2.5 * layer_bytes  # and copies under way
    del weights
    assert count_device_bytes() - before < layer_bytes / 10


def test_quantised_weights_stay_packed_on_the_device(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": CASES["awq"].config}))
    rng, tensors = np.random.default_rng(0), {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        is_matrix = "layers.0.mlp.experts." in name
        tensors |= CASES["awq"](rng, name, *tensor.shape).tensors if is_matrix else {name: tensor}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    before = count_device_bytes()
    [(_, weights)] = stream_layers(checkpoint, describe(checkpoint), [0])
    packed = count_device_bytes() - before
    matrices = sum(part.nbytes for expert in weights.experts for part in expert[:3])
    assert 0 < packed < matrices / 4


def test_float64_is_cut_down(folder, tmp_path):
    tensors = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    checkpoint = open_checkpoint(tmp_path)
    [(_, weights)] = stream_layers(checkpoint, describe(checkpoint), [0])
    assert weights.experts[0].up.dtype == np.float32
