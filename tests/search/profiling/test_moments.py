"""Means and standard errors from sums, with a control variate and without, against the same from the tokens."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from lexi_search.artifacts import serialisation
from lexi_search.artifacts.profile import ProfileSettings
from lexi_search.checkpoint.reader import open_checkpoint
from lexi_search.cli.main import main
from lexi_search.errors import InputError
from lexi_search.layers.routing import mixing_weights, route
from lexi_search.models.loading.streaming import stream_layers
from lexi_search.models.model import describe
from lexi_search.profiling.paper import gaussian
from lexi_search.profiling.paper.moments import accumulate, begin, estimate, pick, relative_errors, summarise
from lexi_search.profiling.profile import profile_layers

SETTINGS = ProfileSettings(
    input="paper", seed=0, batch=2, length=32, dtype="float32", relative_error=0.0, max_samples=512, control_variate=4
)


def add_up(d, c=None, others=None, *, iterations=1):
    """Moments of tokens' d [tokens, K], of c alike, and of c over the `others`, a whole number of times as many."""
    ratio = None if c is None else len(others) // len(c)
    moments = begin(d.shape[1], ratio)
    for part in range(iterations):
        mine = slice(part * len(d) // iterations, (part + 1) * len(d) // iterations)
        sums = [d[mine].sum(axis=0), (d[mine] ** 2).sum(axis=0)]
        if ratio:
            theirs = others[mine.start * ratio : mine.stop * ratio]
            sums += [c[mine].sum(axis=0), (c[mine] ** 2).sum(axis=0), (c[mine] * d[mine]).sum(axis=0)]
            sums += [theirs.sum(axis=0) / ratio]
        moments = pick(accumulate(moments, mine.stop - mine.start, np.array([sums])), 0)
    return moments


def draw_tokens(seed, tokens, ratio, noise):
    """d and c of skewed tokens that go together, with a last k where both are zero; and c of others."""
    rng = np.random.default_rng(seed)
    c = rng.gamma(2.0, [1.0, 3.0], (tokens * (1 + ratio), 2))
    d = c * [2.0, 0.5] * rng.gamma(1 / noise, noise, c.shape)
    last = np.zeros((len(c), 1))
    c, d = np.hstack([c, last]), np.hstack([d, last])
    return d[:tokens], c[:tokens], c[tokens:]


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.sampled_from([0.1, 0.5, 2.0]))
def test_estimates_are_those_of_a_regression_over_the_tokens(seed, ratio, noise):
    d, c, others = draw_tokens(seed, 64, ratio, noise)
    mean, variance = estimate(add_up(d, c, others, iterations=4))
    for k in range(2):
        slope, start = np.polyfit(c[:, k], d[:, k], 1)
        everywhere = np.concatenate([c[:, k], others[:, k]])
        np.testing.assert_allclose(mean[k], slope * everywhere.mean() + start)
        left = d[:, k] - slope * c[:, k]
        np.testing.assert_allclose(variance[k], left.var() / 64 + slope**2 * c[:, k].var() / len(everywhere))
    assert mean[2] == variance[2] == 0
    plain = add_up(d, iterations=4)
    assert (variance[:2] <= estimate(plain)[1][:2]).all()
    np.testing.assert_allclose(estimate(plain)[0], d.mean(axis=0))
    np.testing.assert_allclose(estimate(plain)[1], d.var(axis=0) / 64)


def test_a_constant_control_changes_nothing():
    d, c, others = draw_tokens(0, 64, 2, 0.5)
    controlled, plain = add_up(d, c * 0 + 1, others * 0 + 1), add_up(d)
    np.testing.assert_array_equal(estimate(controlled)[0], estimate(plain)[0])
    np.testing.assert_array_equal(estimate(controlled)[1], estimate(plain)[1])


def test_a_correction_below_zero_is_not_made():
    """Two tokens on a steep line, and others far below it."""
    d = np.array([[1.0, 0.0], [3.0, 0.0]])
    mean, variance = estimate(add_up(d, np.array([[10.0, 0.0], [11.0, 0.0]]), np.full((8, 2), 1.0)))
    assert mean[0] == 2 and variance[0] == 0.5


@pytest.mark.parametrize("noise", [0.05, 0.5])
def test_the_truth_is_where_the_standard_error_says(noise):
    """Over 2000 seeds: no bias, errors as large as claimed, and within two of them 95 times in 100."""
    drawn = [draw_tokens(seed, 512, 8, noise) for seed in range(2000)]
    truth = np.array([4.0, 3.0])  # of d, whose gamma(2) of scale 1 and 3 are taken 2 and 0.5 times
    for moments in ([add_up(*tokens) for tokens in drawn], [add_up(tokens[0]) for tokens in drawn]):
        means, variances = (np.array(values)[:, :2] for values in zip(*map(estimate, moments), strict=True))
        distance = (means - truth) / np.sqrt(variances)
        assert (abs(distance.mean(axis=0)) < 0.1).all()  # 0.022 is its standard error
        assert (abs(distance.std(axis=0) - 1) < 0.06).all()
        assert (abs((abs(distance) < 1.96).mean(axis=0) - 0.95) < 0.02).all()


def test_norms_are_corrected_as_means_are():
    d, c, others = draw_tokens(3, 64, 4, 0.5)
    plain, controlled = summarise(add_up(d, iterations=2)), summarise(add_up(d, c, others, iterations=2))
    for k in range(2):
        assert controlled.rms[k] != plain.rms[k]
        assert controlled.frobenius[k] / plain.frobenius[k] == pytest.approx(controlled.rms[k] / plain.rms[k])
    assert controlled.rms[2] == controlled.frobenius[2] == controlled.rms_stderr[2] == 0
    assert controlled.samples == plain.samples == 64


# --- on a model


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    checkpoint = open_checkpoint(tiny.make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe")))
    return checkpoint, describe(checkpoint)


def run(opened, **changes):
    checkpoint, model = opened
    return dict(profile_layers(checkpoint, model, layers=(0,), settings=dataclasses.replace(SETTINGS, **changes)))[0]


def test_the_control_is_the_change_of_the_mixing_weights(opened):
    """From the tokens that are measured, and from four times as many, which are not the same ones."""
    checkpoint, model = opened
    ((_, weights),) = stream_layers(checkpoint, model, (0,))
    moments = gaussian.measure_layer(model, weights, 0, SETTINGS)
    assert moments.samples == 512

    def controls(layer, count):
        x = gaussian.draw(model, layer, 0, count, SETTINGS)
        scores = route(x, weights.router, weights.bias, routing=model.routing, top_k=4).scores
        c = [np.asarray(mixing_weights(scores, jnp.int32(k), routing=model.routing), np.float64) for k in range(1, 5)]
        return x, np.array([((weights_k - c[-1]) ** 2).sum(axis=1) for weights_k in c]).T

    x, c = controls(0, 8)
    d = np.asarray(gaussian.measure_tokens(x, model, weights), np.float64)
    np.testing.assert_allclose(moments.controls.sums, c.sum(axis=0), rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(moments.controls.squares, (c * c).sum(axis=0), rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(moments.controls.products, (c * d).sum(axis=0), rtol=1e-5, atol=1e-9)
    unmeasured, others = controls(gaussian.OTHERS, 32)
    np.testing.assert_allclose(moments.controls.others, others.sum(axis=0) / 4, rtol=1e-5, atol=1e-9)
    assert not (np.asarray(unmeasured)[:512] == np.asarray(x)).any()


def test_size_of_a_pass_decides_nothing(opened, monkeypatch):
    together = run(opened, relative_error=0.02, max_samples=1 << 13)
    monkeypatch.setattr(gaussian, "PASS_BYTES", 1)
    alone = run(opened, relative_error=0.02, max_samples=1 << 13)
    assert together.iterations == alone.iterations > 4
    np.testing.assert_allclose(together.rms, alone.rms, rtol=1e-5)
    np.testing.assert_allclose(together.rms_stderr, alone.rms_stderr, rtol=1e-4)


def test_standard_error_with_control_is_honest(opened):
    """Over independent seeds, the estimates scatter as their standard errors say, around the same mean as without."""
    plain = [run(opened, seed=seed, control_variate=None) for seed in range(60)]
    controlled = [run(opened, seed=seed) for seed in range(60)]
    scatter = np.std([result.rms[:-1] for result in controlled], axis=0, ddof=1)
    claimed = np.mean([result.rms_stderr[:-1] for result in controlled], axis=0)
    assert (scatter < 1.4 * claimed).all() and (scatter > 0.7 * claimed).all()
    assert (claimed < np.mean([result.rms_stderr[:-1] for result in plain], axis=0)).all()
    apart = np.mean([a.rms[:-1] for a in controlled], axis=0) - np.mean([a.rms[:-1] for a in plain], axis=0)
    assert (abs(apart) < 4 * claimed / np.sqrt(60) * np.sqrt(2)).all()


def test_it_stops_earlier(opened):
    bounds = {"relative_error": 0.01, "max_samples": 1 << 20}
    plain, controlled = run(opened, **bounds, control_variate=None), run(opened, **bounds)
    assert controlled.samples < plain.samples
    assert max(e / r for e, r in zip(controlled.rms_stderr[:-1], controlled.rms[:-1], strict=True)) <= 0.01


def test_the_command_says_so_in_the_file(opened, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    fast = ["--input", "paper", "--batch", "2", "--length", "32", "--relative-error", "0.2"]
    for name, options in (("with", ["--control-variate", "4"]), ("without", [])):
        arguments = ["profile", str(opened[0].folder), *fast, *options, "-o", str(tmp_path / name)]
        assert CliRunner().invoke(main, arguments, catch_exceptions=False).exit_code == 0
    assert serialisation.read_profile(tmp_path / "with").settings.control_variate == 4
    assert b"control_variate" not in (tmp_path / "without").read_bytes()
    with pytest.raises(InputError, match="control_variate is 0, at least 1 expected"):
        dataclasses.replace(SETTINGS, control_variate=0)


def test_relative_errors_of_nothing_are_nothing():
    assert (relative_errors(add_up(np.zeros((8, 3)))) == 0).all()
