"""Stage 1 (LExI section 3.1, Algorithm 1): stream a checkpoint layer by layer into the loss of each layer at each k."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from lexi_search.artifacts import LayerLoss, ProfileSettings
from lexi_search.checkpoint import Checkpoint
from lexi_search.errors import InputError
from lexi_search.models import Model
from lexi_search.moe import ACTIVATIONS, LayerWeights, expert_outputs, route, squared_distances
from lexi_search.weights import stream_layers

MIN_ITERATIONS = 2  # one draw may look surer than it is
# Expert outputs of one pass: a GPU wants many rows per expert, a CPU is fastest within its cache. A share of the
# memory, which also holds two layers, the inputs, and copies while products are tuned; or bytes where it is not told.
PASS_SHARE, PASS_BYTES = 1 / 12, 64 << 20


class Moments(NamedTuple):
    """Sums over what was drawn so far, for k = 1..K, with d = ||y_k - y_base||^2 of one token; float64.

    `frobenius` sums ||Y_k - Y_base||_F over iterations, `squares` sums d and `fourths` sums d^2 over tokens.
    """

    iterations: int
    samples: int
    frobenius: np.ndarray
    squares: np.ndarray
    fourths: np.ndarray


def profile_layers(
    checkpoint: Checkpoint, model: Model, *, layers: Sequence[int], settings: ProfileSettings
) -> Iterator[tuple[int, LayerLoss]]:
    """Measure `layers` one after another, yielding (decoder-layer index, losses) as each is done.

    What a layer yields depends on its weights, its index and `settings`, not on which other layers are measured, or in
    what order. The device holds the weights of one layer at a time, the host those of two.

    Raises:
        InputError: a layer that is no MoE layer, an activation that is not known, NaN or Inf in a weight or output,
            a sample cap below one iteration.
    """
    if extra := [layer for layer in layers if layer not in model.tensors]:
        known = ", ".join(map(str, model.layers))
        raise InputError(f"{checkpoint.folder}: layer {extra[0]} is no MoE layer; those are {known}")
    if model.activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise InputError(f"{checkpoint.folder}: hidden_act {model.activation!r} is not known; known are {known}")
    if settings.max_samples < settings.batch * settings.length:
        size = f"batch {settings.batch} x length {settings.length}"
        raise InputError(f"at most {settings.max_samples} samples allow no iteration of {size}; raise the cap")
    for layer, weights in stream_layers(checkpoint, model, layers):
        moments = measure_layer(model, weights, layer, settings)
        if not np.isfinite(moments.squares).all():
            remedy = "" if settings.dtype == "float32" else "; try --dtype float32"
            raise InputError(f"{checkpoint.folder}: the output of layer {layer} overflows in {settings.dtype}{remedy}")
        yield layer, summarise(moments)


def measure_layer(model: Model, weights: LayerWeights, layer: int, settings: ProfileSettings) -> Moments:
    """Draw and measure iterations until every k is known to `relative_error` or the next would exceed `max_samples`.

    Iterations are computed several at a time and counted one by one, so that how many share a pass through the device
    decides nothing but the speed. Not finite where an output overflows.
    """
    zero = np.zeros(model.identity.top_k)
    moments = Moments(0, 0, zero, zero, zero)
    limit = settings.max_samples // (settings.batch * settings.length)
    while moments.iterations < limit:
        first = moments.iterations
        x = draw(model, layer, first, min(_plan_pass(model, moments, settings), limit - first), settings)
        sums = _sum_iterations(measure_tokens(x, model, weights), size=settings.batch * settings.length)
        for squares, fourths in np.asarray(sums, np.float64):
            moments = _accumulate(moments, settings.batch * settings.length, squares, fourths)
            if not np.isfinite(squares).all() or _is_known(moments, settings):
                return moments
    return moments


def summarise(moments: Moments) -> LayerLoss:
    """Means with their standard errors, which all come from the spread of d over tokens, drawn independently.

    Over the few iterations that reach 1 %, the spread of the norms themselves would be a poor estimate. By the delta
    method se(sqrt(m)) = se(m) / (2 sqrt(m)); a norm over n tokens is sqrt(n) times a root mean square.
    """
    rms = np.sqrt(moments.squares / moments.samples)
    rms_stderr = rms * relative_errors(moments)
    frobenius = moments.frobenius / moments.iterations
    return LayerLoss(
        iterations=moments.iterations,
        samples=moments.samples,
        frobenius=tuple(frobenius.tolist()),
        frobenius_stderr=tuple((frobenius * relative_errors(moments)).tolist()),
        rms=tuple(rms.tolist()),
        rms_stderr=tuple(rms_stderr.tolist()),
    )


def relative_errors(moments: Moments) -> np.ndarray:
    """Relative standard error of the root mean square for k = 1..K, [K] float64; zero where the loss itself is zero."""
    mean = moments.squares / moments.samples
    variance = np.maximum(moments.fourths / moments.samples - mean * mean, 0.0)
    positive = mean > 0
    spread = np.sqrt(variance / moments.samples, where=positive, out=np.zeros_like(mean))
    return np.divide(spread, 2 * mean, where=positive, out=np.zeros_like(mean))


def draw(model: Model, layer: int, first: int, count: int, settings: ProfileSettings) -> Float[Array, "tokens hidden"]:
    """The paper's X ~ N(0, 1) for `count` iterations from `first` on, [count * batch * length, hidden].

    The key of an iteration is (seed, layer, iteration).
    """
    key = jax.random.fold_in(jax.random.key(settings.seed), layer)
    shape = (settings.batch * settings.length, model.hidden_size)
    return _draw(key, first + np.arange(count, dtype=np.int32), shape=shape, dtype=settings.dtype)


@partial(jax.jit, static_argnames=("shape", "dtype"))
def _draw(
    key: Key[Array, ""], iterations: Int[Array, " count"], *, shape: tuple[int, int], dtype: str
) -> Float[Array, "tokens hidden"]:
    # Drawn in float32 and cast: drawn in bfloat16 it would take 128 distinct values and have the wrong variance.
    x = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape, jnp.float32))(iterations)
    return x.reshape(-1, shape[1]).astype(dtype)


def measure_tokens(x: Float[Array, "tokens hidden"], model: Model, weights: LayerWeights) -> Float[Array, "tokens K"]:
    """||y_k - y_base||^2 of every token of `x` for k = 1..K, float32."""
    choice = route(x, weights.router, weights.bias, routing=model.routing, top_k=model.identity.top_k)
    outputs = expert_outputs(x, choice.experts, weights.experts, activation=model.activation)
    return squared_distances(outputs, choice.scores, routing=model.routing)


@partial(jax.jit, static_argnames="size")
def _sum_iterations(distances: Float[Array, "tokens K"], *, size: int) -> Float[Array, "iterations 2 K"]:
    """Sums of the distances and of their squares over each iteration of `size` tokens, float32."""
    drawn = distances.reshape(-1, size, distances.shape[1])
    return jnp.stack([drawn.sum(axis=1), (drawn * drawn).sum(axis=1)], axis=1)


def _plan_pass(model: Model, moments: Moments, settings: ProfileSettings) -> int:
    """How many iterations to compute together: few at first, then all that fit if many are still needed.

    Only two sizes, because each is compiled.
    """
    memory = jax.local_devices()[0].memory_stats()
    space = PASS_SHARE * memory["bytes_limit"] if memory else PASS_BYTES
    row = model.hidden_size * jnp.dtype(settings.dtype).itemsize
    full = max(int(space // (model.identity.top_k * row * settings.batch * settings.length)), 1)
    few = min(MIN_ITERATIONS, full)
    if moments.iterations == 0:
        return few
    missing = moments.iterations * (relative_errors(moments).max() / max(settings.relative_error, 1e-9)) ** 2
    return full if missing - moments.iterations > few else few


def _is_known(moments: Moments, settings: ProfileSettings) -> bool:
    return moments.iterations >= MIN_ITERATIONS and relative_errors(moments).max() <= settings.relative_error


def _accumulate(moments: Moments, samples: int, squares: np.ndarray, fourths: np.ndarray) -> Moments:
    return Moments(
        iterations=moments.iterations + 1,
        samples=moments.samples + samples,
        frobenius=moments.frobenius + np.sqrt(squares),
        squares=moments.squares + squares,
        fourths=moments.fourths + fourths,
    )
