"""Stage 1 against Algorithm 1 read literally, and what its numbers may and may not depend on."""

import dataclasses

import numpy as np
import pytest
import tiny
import torch
from blocks import compute_reference
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lexi_search.artifacts.profile import ProfileSettings
from lexi_search.checkpoint.reader import Checkpoint, open_checkpoint
from lexi_search.errors import InputError
from lexi_search.layers.spec import Activation
from lexi_search.models.model import describe
from lexi_search.profiling.paper import gaussian
from lexi_search.profiling.paper.gaussian import draw
from lexi_search.profiling.paper.moments import Moments, relative_errors, summarise
from lexi_search.profiling.profile import profile_layers

SETTINGS = ProfileSettings(
    input="paper", seed=0, batch=2, length=32, dtype="float32", relative_error=0.0, max_samples=256
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"))


def run(folder, *, layers=None, **changes):
    checkpoint = open_checkpoint(folder)
    model = describe(checkpoint)
    settings = dataclasses.replace(SETTINGS, **changes)
    return dict(profile_layers(checkpoint, model, layers=layers or model.layers, settings=settings))


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "deepseek_v2"])
def test_equals_the_algorithm_read_literally(family, tmp_path):
    """For every layer and k: forward passes of transformers' block, Frobenius norms of differences, their mean."""
    folder = tiny.make_checkpoint(family, tmp_path)
    model, described = tiny.build_reference(family), describe(open_checkpoint(folder))
    measured = run(folder)
    for layer, block in tiny.find_moe_blocks(model).items():
        assert measured[layer].iterations == 4 and measured[layer].samples == 256
        norms, squares = [], []
        for iteration in range(4):
            x = torch.tensor(np.asarray(draw(described, layer, iteration, 1, SETTINGS)))
            outputs = [compute_reference(block, x, k) for k in range(1, 5)]
            norms.append([np.linalg.norm(output - outputs[-1]) for output in outputs])
            squares.append([((output - outputs[-1]) ** 2).sum(axis=1) for output in outputs])
        np.testing.assert_allclose(measured[layer].frobenius, np.mean(norms, axis=0), rtol=1e-4)
        tokens = np.concatenate(squares, axis=1).astype(np.float64)
        np.testing.assert_allclose(measured[layer].rms, np.sqrt(tokens.mean(axis=1)), rtol=1e-4)
        spread = tokens[:-1].std(axis=1) / np.sqrt(256) / (2 * np.sqrt(tokens[:-1].mean(axis=1)))
        np.testing.assert_allclose(measured[layer].rms_stderr[:-1], spread, rtol=1e-3)


def test_input_is_standard_normal():
    described = describe_olmoe_like(hidden_size=4096)
    for dtype, tolerance in (("float32", 0.01), ("bfloat16", 0.01), ("float16", 0.01)):
        x = np.asarray(draw(described, 3, 1, 1, dataclasses.replace(SETTINGS, dtype=dtype))).astype(np.float64)
        assert x.shape == (64, 4096)
        assert abs(x.mean()) < tolerance and abs(x.std() - 1) < tolerance
        assert len(np.unique(x)) > 1000  # drawn in bfloat16 it would be 128


def describe_olmoe_like(hidden_size):
    from lexi_search.models.model import Model

    return Model(identity=None, hidden_size=hidden_size, activation=Activation(), routing=None, tensors={})


def test_a_layer_does_not_depend_on_the_others(folder):
    assert run(folder, layers=(2,))[2] == run(folder)[2] == run(folder, layers=(2, 0))[2]


def test_size_of_a_pass_decides_nothing(folder, monkeypatch):
    together = run(folder, relative_error=0.03, max_samples=1 << 12)
    monkeypatch.setattr(gaussian, "PASS_BYTES", 1)
    alone = run(folder, relative_error=0.03, max_samples=1 << 12)
    for layer, loss in together.items():
        assert loss.iterations == alone[layer].iterations > 4
        np.testing.assert_allclose(loss.rms, alone[layer].rms, rtol=1e-5)
        np.testing.assert_allclose(loss.frobenius, alone[layer].frobenius, rtol=1e-5)


def test_seed_decides(folder):
    assert run(folder) == run(folder)
    assert run(folder, seed=1) != run(folder)


def test_stops_at_the_relative_error(folder):
    loose = run(folder, relative_error=0.05, max_samples=1 << 20)
    tight = run(folder, relative_error=0.02, max_samples=1 << 20)
    for layer in loose:
        for result, bound in ((loose[layer], 0.05), (tight[layer], 0.02)):
            assert max(e / r for e, r in zip(result.rms_stderr[:-1], result.rms[:-1], strict=True)) <= bound
        assert loose[layer].samples < tight[layer].samples < 1 << 20
        near = np.array(loose[layer].rms[:-1]) / np.array(tight[layer].rms[:-1])
        assert (abs(near - 1) < 5 * np.hypot(0.05, 0.02)).all()


def test_cap_below_one_iteration_is_refused(folder):
    with pytest.raises(InputError, match="allow no iteration of batch 2 x length 32"):
        run(folder, max_samples=63)


def test_standard_error_is_honest(folder):
    """Over independent seeds, the estimates scatter as their standard errors say."""
    results = [run(folder, layers=(0,), seed=seed)[0] for seed in range(40)]
    scatter = np.std([result.rms[:-1] for result in results], axis=0, ddof=1)
    claimed = np.mean([result.rms_stderr[:-1] for result in results], axis=0)
    assert (scatter < 1.5 * claimed).all() and (scatter > 0.6 * claimed).all()


def test_bfloat16_agrees_within_its_rounding(folder):
    exact, rounded = run(folder), run(folder, dtype="bfloat16")
    for layer in exact:
        np.testing.assert_allclose(rounded[layer].rms[:-1], exact[layer].rms[:-1], rtol=0.03)


def test_an_unknown_layer_is_refused(folder):
    with pytest.raises(InputError, match="layer 7 is no MoE layer; those are 0, 1, 2"):
        run(folder, layers=(7,))


def test_a_layer_that_looks_its_experts_up_by_token_is_refused(tmp_path):
    tiny.make_checkpoint("deepseek_v4", tmp_path)
    with pytest.raises(InputError, match="layer 0 looks its experts up by token, and keeps its k; others are 1, 2"):
        run(tmp_path, layers=(0,))
    assert sorted(run(tmp_path, layers=(1, 2))) == [1, 2]


@pytest.mark.parametrize("name", ["model.layers.1.mlp.gate.weight", "model.layers.1.mlp.experts.5.down_proj.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_are_refused_by_name(name, value, folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    tensors[name][0, 3] = value
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(InputError, match=f"model.safetensors: tensor {name} holds NaN or Inf"):
        run(tmp_path)
    assert run(tmp_path, layers=(0,)) == run(folder, layers=(0,))


def test_overflow_is_refused(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    huge = {key: t * 3e3 if ".experts." in key else t for key, t in tensors.items()}
    save_file(huge, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(InputError, match="output of layer 0 overflows in float16; try --dtype float32"):
        run(tmp_path, dtype="float16")


def test_experts_that_add_nothing_have_no_loss(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    save_file({k: t * 0 if "down_proj" in k else t for k, t in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    result = run(tmp_path, relative_error=0.01)[0]
    assert result.frobenius == result.rms == result.rms_stderr == (0.0,) * 4 and result.iterations == 2


@given(st.lists(st.lists(st.floats(0, 100), min_size=2, max_size=2), min_size=2, max_size=30))
def test_summary_is_that_of_the_tokens(tokens):
    d = np.array([[*row, 0.0] for row in tokens])
    moments = Moments(1, len(d), np.sqrt(d.sum(axis=0)), d.sum(axis=0), (d * d).sum(axis=0))
    summary = summarise(moments)
    np.testing.assert_allclose(summary.rms, np.sqrt(d.mean(axis=0)))
    np.testing.assert_allclose(summary.frobenius, np.linalg.norm(np.sqrt(d), axis=0))
    errors = relative_errors(moments)
    assert np.isfinite(errors).all() and errors[-1] == 0
    mean, spread = d.mean(axis=0)[:2], d.std(axis=0)[:2] / np.sqrt(len(d))
    positive = mean > 1e-6
    np.testing.assert_allclose(errors[:2][positive], spread[positive] / (2 * mean[positive]), rtol=1e-3, atol=1e-6)


def test_experts_that_get_no_token_are_not_read(tmp_path, monkeypatch):
    """A bias keeps expert 5 from ever being chosen: its weights may hold anything, and nobody looks."""
    folder = tiny.make_checkpoint("deepseek_v3", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("e_score_correction_bias")]:
        tensors[name][5] = -1e9
    save_file(tensors, folder / "model.safetensors")
    whole = run(folder)
    for name in [name for name in tensors if ".experts.5." in name]:
        tensors[name] = torch.full_like(tensors[name], float("nan"))
    save_file(tensors, folder / "model.safetensors")
    read, names = Checkpoint.read, set()
    monkeypatch.setattr(Checkpoint, "read", lambda self, name, *a, **k: names.add(name) or read(self, name, *a, **k))
    assert run(folder) == whole
    assert not [name for name in names if ".experts.5." in name] and [name for name in names if ".experts.4." in name]
