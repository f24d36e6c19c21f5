"""Draws iterations of Stage 1's input and measures them on one layer until its losses are known well enough."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from lexi_search.artifacts import ProfileSettings
from lexi_search.controls import OTHERS, sum_controls
from lexi_search.experts import expert_outputs
from lexi_search.models import Model
from lexi_search.moe import squared_distances
from lexi_search.moments import Moments, accumulate, begin, relative_errors
from lexi_search.routing import Choice, route
from lexi_search.weights import LayerWeights

MIN_ITERATIONS = 2  # one draw may look surer than it is
# Expert outputs of one pass: a GPU wants many rows per expert, a CPU is fastest within its cache. A share of the
# memory, which also holds two layers, the inputs, and copies while products are tuned; or bytes where it is not told.
PASS_SHARE, PASS_BYTES = 1 / 12, 64 << 20


def measure_layer(model: Model, weights: LayerWeights, layer: int, settings: ProfileSettings) -> Moments:
    """Draw and measure iterations until every k is known to `relative_error` or the next would exceed `max_samples`.

    Iterations are computed several at a time and counted one by one, so that how many share a pass through the device
    decides nothing but the speed. Not finite where an output overflows.
    """
    moments = begin(model.top_k, settings.control_variate)
    limit = settings.max_samples // (settings.batch * settings.length)
    while moments.iterations < limit:
        first = moments.iterations
        count = min(_plan_pass(model, moments, settings), limit - first)
        x = draw(model, layer, first, count, settings)
        distances = measure_tokens(x, model, weights)
        sums = _sum_iterations(distances, size=settings.batch * settings.length)
        if settings.control_variate:
            controls = _sum_controls(x, distances, model, weights, layer, first, count, settings)
            sums = jnp.concatenate([sums, controls], axis=1)
        for squares, fourths, *controls in np.asarray(sums, np.float64):
            moments = accumulate(moments, settings.batch * settings.length, squares, fourths, *controls)
            if not np.isfinite(squares).all() or _is_known(moments, settings):
                return moments
    return moments


def _sum_controls(
    x: Float[Array, "tokens hidden"],
    distances: Float[Array, "tokens K"],
    model: Model,
    weights: LayerWeights,
    layer: int,
    first: int,
    count: int,
    settings: ProfileSettings,
) -> Float[Array, "iterations 4 K"]:
    """The sums of `moments.Controls` over each iteration; its other tokens are a part of their own of the draws."""
    ratio, traits = settings.control_variate, {"routing": model.routing, "size": settings.batch * settings.length}
    measured = sum_controls(_route(x, model, weights).scores, distances, **traits)
    others = []
    for part in range(ratio):
        unmeasured = draw(model, OTHERS + layer, first * ratio + part * count, count, settings)
        others.append(sum_controls(_route(unmeasured, model, weights).scores, distances, **traits)[:, :1])
    mean = jnp.concatenate(others).reshape(count, ratio, -1).mean(axis=1, keepdims=True)
    return jnp.concatenate([measured, mean], axis=1)


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
    choice = _route(x, model, weights)
    outputs = expert_outputs(x, choice.experts, weights.experts, activation=model.activation)
    return squared_distances(outputs, choice.scores, routing=model.routing)


def _route(x: Float[Array, "tokens hidden"], model: Model, weights: LayerWeights) -> Choice:
    return route(x, weights.router, weights.bias, routing=model.routing, top_k=model.top_k)


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
    full = max(int(space // (model.top_k * row * settings.batch * settings.length)), 1)
    few = min(MIN_ITERATIONS, full)
    if moments.iterations == 0:
        return few
    missing = moments.iterations * (relative_errors(moments).max() / max(settings.relative_error, 1e-9)) ** 2
    return full if missing - moments.iterations > few else few


def _is_known(moments: Moments, settings: ProfileSettings) -> bool:
    return moments.iterations >= MIN_ITERATIONS and relative_errors(moments).max() <= settings.relative_error
