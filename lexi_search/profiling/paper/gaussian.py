"""Stage 1 on the paper's input: iterations of N(0, 1) on one layer, until its losses are known well enough."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from lexi_search.artifacts.profile import ProfileSettings
from lexi_search.layers.kernels.blocks import StackedExperts, stack_experts
from lexi_search.layers.kernels.grouped import can_group, has_kernels, measure_stacked
from lexi_search.layers.moe import compute_outputs, mixing_changes, squared_distances
from lexi_search.layers.routing import Choice, route
from lexi_search.layers.spec import Routing
from lexi_search.layers.weights import LayerWeights, find_memory
from lexi_search.models.model import Model
from lexi_search.profiling.paper.moments import Moments, accumulate, begin, pick, relative_errors

# Tokens that go through the router alone are drawn as those of this many layers further on.
OTHERS = 1 << 20
MIN_ITERATIONS = 2  # one draw may look surer than it is
# Expert outputs of one pass: a GPU wants many rows per expert, a CPU is fastest within its cache. A share of the
# memory, which also holds two layers, the inputs, and copies while products are tuned; or bytes where it is not told.
PASS_SHARE, PASS_BYTES = 1 / 12, 64 << 20
PASSES_AHEAD = 2  # on each device: it goes on while the last one's sums travel


def measure_layer(model: Model, weights: LayerWeights, layer: int, settings: ProfileSettings) -> Moments:
    """The sums over iterations until every k is known to `relative_error` or the next would exceed `max_samples`.

    Iterations are computed several at a time, in passes that local devices take in turn, and counted one by one in
    their order. The size of a pass does not depend on the number of devices, which thus decides the speed alone.
    Not finite where an output overflows.
    """
    limit = settings.max_samples // (settings.batch * settings.length)
    few, full = _size_passes(model, settings)
    devices, replicas = jax.local_devices(), dict[int, LayerWeights]()
    moments, finished, size, first = begin(model.top_k, settings.control_variate), False, full, min(few, limit)
    with ThreadPoolExecutor(max_workers=len(devices)) as pool:

        def submit(index: int, start: int, count: int) -> Future:
            if index not in replicas:
                replicas[index] = _prepare(model, weights, devices[index], settings)
            work = model, replicas[index], layer, start, count, settings
            return pool.submit(_measure_pass, *work, device=devices[index])

        running = deque[Future]([submit(0, 0, first)])
        if settings.relative_error:  # how many it takes is known after a few
            moments, finished = _count(moments, running.popleft().result(), settings)
            size = few if _estimate_missing(moments, settings) <= few else full
        waiting = deque(enumerate(range(first, limit, size)))
        while not finished and (waiting or running):
            # Ahead, but not of what is likely to be needed.
            needed = max(1, -(-_estimate_missing(moments, settings) // size))
            while waiting and len(running) < min(needed, PASSES_AHEAD * len(devices)):
                number, start = waiting.popleft()
                running.append(submit(number % len(devices), start, min(size, limit - start)))
            moments, finished = _count(moments, running.popleft().result(), settings)
    return moments


def find_needed(
    model: Model,
    settings: ProfileSettings,
    layer: int,
    router: Float[Array, "experts hidden"],
    bias: Float[Array, " experts"] | None,
) -> list[int]:
    """The experts that the first pass sends tokens to, to be read ahead of it; all, where all are stacked anyway."""
    if has_kernels(jax.local_devices()[0], settings.dtype):
        return list(range(len(router)))
    count = min(_size_passes(model, settings)[0], settings.max_samples // (settings.batch * settings.length))
    x = draw(model, layer, 0, count, settings)
    chosen = route(x, router, bias, routing=model.routing, top_k=model.top_k).experts
    return np.unique(np.asarray(chosen)).tolist()


def _prepare(model: Model, weights: LayerWeights, device: jax.Device, settings: ProfileSettings) -> LayerWeights:
    """The weights on one device; stacked if it multiplies all experts at once."""
    experts = weights.experts
    traits = {"activation": model.activation, "routing": model.routing, "dtype": settings.dtype}
    if can_group(experts, device, top_k=model.top_k, **traits):
        experts = stack_experts(experts, dtype=settings.dtype)
    if device in weights.router.devices():
        return weights._replace(experts=experts)
    copied = experts if isinstance(experts, StackedExperts) else tuple(experts)
    return jax.device_put(LayerWeights(weights.router, weights.bias, copied), device)


def _measure_pass(
    model: Model,
    weights: LayerWeights,
    layer: int,
    first: int,
    count: int,
    settings: ProfileSettings,
    *,
    device: jax.Device,
) -> Float[Array, "iterations sums K"]:
    """The sums that `moments.accumulate` takes, for each iteration."""
    with jax.default_device(device):
        x = draw(model, layer, first, count, settings)
        distances = measure_tokens(x, model, weights)
        sums = _sum_iterations(distances, size=settings.batch * settings.length)
        if settings.control_variate:
            controls = _sum_controls(x, distances, model, weights, layer, first, count, settings)
            sums = jnp.concatenate([sums, controls], axis=1)
        return sums


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
    """The sums of `moments.Controls` over each iteration; its other tokens have draws of their own."""
    ratio, traits = settings.control_variate, {"routing": model.routing, "size": settings.batch * settings.length}
    measured = _sum_control_terms(_route(x, model, weights).scores, distances, **traits)
    others = []
    for part in range(ratio):
        unmeasured = draw(model, OTHERS + layer, first * ratio + part * count, count, settings)
        others.append(_sum_control_terms(_route(unmeasured, model, weights).scores, distances, **traits)[:, :1])
    mean = jnp.concatenate(others).reshape(count, ratio, -1).mean(axis=1, keepdims=True)
    return jnp.concatenate([measured, mean], axis=1)


@partial(jax.jit, static_argnames=("routing", "size"))
def _sum_control_terms(
    scores: Float[Array, "tokens K"], distances: Float[Array, "tokens K"], *, routing: Routing, size: int
) -> Float[Array, "iterations 3 K"]:
    """Sums of c, c^2 and c d over each iteration of `size` tokens, float32; c: the control variate, d: `distances`."""
    change = mixing_changes(scores, routing=routing)
    control = (change * change).sum(axis=-1)
    terms = jnp.stack([control, control * control, control * distances], axis=1)
    return terms.reshape(-1, size, *terms.shape[1:]).sum(axis=1)


def draw(model: Model, layer: int, first: int, count: int, settings: ProfileSettings) -> Float[Array, "tokens hidden"]:
    """The paper's X ~ N(0, 1) for `count` iterations from `first` on, [count * batch * length, hidden].

    The key of an iteration is (seed, layer, iteration).
    """
    key = jax.random.key(settings.seed, impl="threefry2x32")
    iterations = first + np.arange(count, dtype=np.int32)
    shape = (settings.batch * settings.length, model.hidden_size)
    return _draw(key, np.int32(layer), iterations, shape=shape, dtype=settings.dtype)


@partial(jax.jit, static_argnames=("shape", "dtype"))
def _draw(
    key: Key[Array, ""], layer: Int[Array, ""], iterations: Int[Array, " count"], *, shape: tuple[int, int], dtype: str
) -> Float[Array, "tokens hidden"]:
    key = jax.random.fold_in(key, layer)
    # Drawn in float32 and cast: drawn in bfloat16 it would take 128 distinct values and have the wrong variance.
    x = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape, jnp.float32))(iterations)
    return x.reshape(-1, shape[1]).astype(dtype)


def measure_tokens(x: Float[Array, "tokens hidden"], model: Model, weights: LayerWeights) -> Float[Array, "tokens K"]:
    """||y_k - y_base||^2 of every token of `x` for k = 1..K, float32."""
    choice = _route(x, model, weights)
    if isinstance(weights.experts, StackedExperts):
        return measure_stacked(x, choice, weights.experts, routing=model.routing)
    outputs = compute_outputs(x, choice, weights.experts, routing=model.routing, activation=model.activation)
    return squared_distances(outputs, choice.scores, routing=model.routing)


def _route(x: Float[Array, "tokens hidden"], model: Model, weights: LayerWeights) -> Choice:
    return route(x, weights.router, weights.bias, routing=model.routing, top_k=model.top_k)


@partial(jax.jit, static_argnames="size")
def _sum_iterations(distances: Float[Array, "tokens K"], *, size: int) -> Float[Array, "iterations 2 K"]:
    """Sums of the distances and of their squares over each iteration of `size` tokens, float32."""
    drawn = distances.reshape(-1, size, distances.shape[1])
    return jnp.stack([drawn.sum(axis=1), (drawn * drawn).sum(axis=1)], axis=1)


def _count(
    moments: Moments, sums: Float[Array, "iterations sums K"], settings: ProfileSettings
) -> tuple[Moments, bool]:
    """The moments after the iterations of a pass, and whether one of them was the last: losses known, or overflow."""
    sums = np.asarray(sums, np.float64)
    ends = ~np.isfinite(sums[:, 0]).all(axis=1)
    count = int(ends.argmax()) + 1 if ends.any() else len(sums)
    after = accumulate(moments, settings.batch * settings.length, sums[:count])
    with np.errstate(invalid="ignore"):  # of an overflow, which is the last
        known = relative_errors(after).max(axis=1) <= settings.relative_error
    ends = ends[:count] | (known & (after.iterations[:, 0] >= MIN_ITERATIONS))
    return pick(after, int(ends.argmax()) if ends.any() else -1), bool(ends.any())


def _size_passes(model: Model, settings: ProfileSettings) -> tuple[int, int]:
    """Iterations of the first pass and of a full one; only two sizes, because each is compiled."""
    memory = find_memory()
    space = PASS_SHARE * memory if memory else PASS_BYTES
    row = model.hidden_size * jnp.dtype(settings.dtype).itemsize
    full = max(int(space // (model.top_k * row * settings.batch * settings.length)), 1)
    return min(MIN_ITERATIONS, full), full


def _estimate_missing(moments: Moments, settings: ProfileSettings) -> int:
    """The number of further iterations that the relative error is likely to take; all, where none is asked for."""
    if not settings.relative_error:
        return settings.max_samples
    ratio = relative_errors(moments).max() / max(settings.relative_error, 1e-9)
    return int(min(moments.iterations * max(ratio**2 - 1, 0), 1e9))
