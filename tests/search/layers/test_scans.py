"""Recurrences in chunks against the recurrence itself, a token at a time in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from lexi_search.layers.mixers.recurrent import convolve
from lexi_search.layers.mixers.scans import CHUNK, scan_channels, scan_delta, scan_linear
from lexi_search.layers.weights import Affine

SEQUENCES, GROUPS, HEADS, KEY, VALUE = 2, 2, 3, 5, 4
LENGTHS = [1, CHUNK - 1, CHUNK, 2 * CHUNK + 9]


def draw(length, *, channels=1, strength=1.0):
    """Queries, keys, values, decays and rates; keys of length one, as the delta rule has them."""
    rng = np.random.default_rng(length)
    queries, keys = rng.normal(size=(2, SEQUENCES, length, GROUPS, KEY))
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    values = rng.normal(size=(SEQUENCES, length, GROUPS, HEADS, VALUE))
    decays = -strength * rng.exponential(size=(SEQUENCES, length, GROUPS, HEADS, channels))
    return queries, keys, values, decays, rng.uniform(size=values.shape[:-1])


def run_loop(queries, keys, values, decays, rates=None):
    """The recurrence as it is defined; the delta rule if there are `rates`."""
    read = np.zeros(values.shape)
    for sequence, group, head in np.ndindex(SEQUENCES, GROUPS, HEADS):
        state = np.zeros((KEY, VALUE))
        for t in range(values.shape[1]):
            at, key = (sequence, t, group, head), keys[sequence, t, group]
            state *= np.exp(decays[at])[:, None]
            written = values[at] if rates is None else rates[at] * (values[at] - state.T @ key)
            state += np.outer(key, written)
            read[at] = state.T @ queries[sequence, t, group]
    return read


def assert_near(ours, theirs, tolerance=1e-5):
    assert ours.shape == theirs.shape and np.abs(ours - theirs).max() < tolerance * np.abs(theirs).max()


def find_tolerance(strength):
    """Logarithms of decays are summed over a chunk in float32: the larger, the less exact."""
    return max(1e-5, 2e-6 * strength)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("strength", [0.01, 1.0, 100.0])
def test_linear_recurrence_equals_the_loop(length, strength):
    *inputs, _ = draw(length, strength=strength)
    assert_near(scan_linear(*map(jnp.float32, inputs), dtype=jnp.float32), run_loop(*inputs), find_tolerance(strength))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("strength", "channels"), [(0.01, 1), (1.0, 1), (100.0, 1), (0.01, KEY), (100.0, KEY)])
def test_delta_rule_equals_the_loop(length, strength, channels):
    inputs = draw(length, strength=strength, channels=channels)
    assert_near(scan_delta(*map(jnp.float32, inputs), dtype=jnp.float32), run_loop(*inputs), find_tolerance(strength))


def test_products_of_sixteen_bits_are_near_the_loop():
    *inputs, rates = draw(3 * CHUNK, strength=0.01)
    assert_near(scan_linear(*map(jnp.float32, inputs), dtype=jnp.bfloat16), run_loop(*inputs), tolerance=0.02)
    ours = scan_delta(*map(jnp.float32, (*inputs, rates)), dtype=jnp.bfloat16)
    assert_near(ours, run_loop(*inputs, rates), tolerance=0.02)


def test_delta_rule_whose_keys_are_all_the_same_equals_the_loop():
    """The worst case of the triangular system: what every token writes hangs on all before it."""
    queries, keys, values, decays, rates = draw(3 * CHUNK)
    inputs = queries, np.broadcast_to(keys[:, :1], keys.shape), values, 0 * decays, np.ones_like(rates)
    assert_near(scan_delta(*map(jnp.float32, inputs), dtype=jnp.float32), run_loop(*inputs), tolerance=1e-4)


@pytest.mark.parametrize("length", LENGTHS)
def test_recurrence_of_channels_equals_the_loop(length):
    rng, channels = np.random.default_rng(length), 3
    queries, keys = rng.normal(size=(2, SEQUENCES, length, KEY))
    values, rates = rng.normal(size=(SEQUENCES, length, channels)), -rng.exponential(size=(channels, KEY))
    steps = rng.exponential(size=values.shape)
    read, state = np.zeros(values.shape), np.zeros((SEQUENCES, channels, KEY))
    for t in range(length):
        state *= np.exp(steps[:, t, :, None] * rates)
        state += values[:, t, :, None] * keys[:, t, None]
        read[:, t] = (state * queries[:, t, None]).sum(axis=-1)
    assert_near(scan_channels(*map(jnp.float32, (queries, keys, values, steps, rates))), read)


@pytest.mark.parametrize("width", [1, 4])
def test_convolution_equals_the_loop(width):
    rng = np.random.default_rng(width)
    x, kernel, bias = rng.normal(size=(2, 9, 3)), rng.normal(size=(3, 1, width)), rng.normal(size=3)
    ours = convolve(jnp.float32(x), Affine(jnp.float32(kernel), jnp.float32(bias)))
    for sequence, t, channel in np.ndindex(*x.shape):
        seen = [x[sequence, t - i, channel] * kernel[channel, 0, -1 - i] for i in range(width) if t >= i]
        np.testing.assert_allclose(ours[sequence, t, channel], sum(seen) + bias[channel], rtol=1e-5, atol=1e-5)
