"""Stage 1 (LExI section 3.1, Algorithm 1): stream a checkpoint layer by layer into the loss of each layer at each k."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from lexi_search.artifacts import LayerLoss, ProfileSettings
from lexi_search.checkpoint import Checkpoint
from lexi_search.errors import InputError
from lexi_search.models import ExpertTensors, LayerTensors, Model
from lexi_search.moe import ACTIVATIONS, ExpertWeights, LayerWeights, expert_outputs, route, squared_distances

MIN_ITERATIONS = 2  # one draw may look surer than it is


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

    Weights of one layer at a time are in memory. What a layer yields depends on its weights, its index and `settings`
    alone, not on which other layers are measured, or in what order.

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
    buffer = np.empty(max((_layer_bytes(checkpoint, model.tensors[layer]) for layer in layers), default=0), np.uint8)
    for layer in layers:
        weights = load_layer(checkpoint, model.tensors[layer], buffer=buffer)
        moments = _measure(checkpoint, model, weights, layer, settings)
        yield layer, summarise(moments)


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


def draw(model: Model, layer: int, iteration: int, settings: ProfileSettings) -> Float[Array, "tokens hidden"]:
    """The paper's X ~ N(0, 1) for one iteration, [batch * length, hidden]. Its key is (seed, layer, iteration).

    Drawn in float32 and cast: drawn in bfloat16 it would take 128 distinct values and have the wrong variance.
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(settings.seed), layer), iteration)
    x = jax.random.normal(key, (settings.batch * settings.length, model.hidden_size), jnp.float32)
    return x.astype(settings.dtype)


def measure_iteration(
    x: Float[Array, "tokens hidden"], model: Model, weights: LayerWeights
) -> Float[Array, "tokens K"]:
    """||y_k - y_base||^2 of every token of `x` for k = 1..K, float32."""
    choice = route(x, weights.router, weights.bias, routing=model.routing, top_k=model.identity.top_k)
    outputs = expert_outputs(x, choice.experts, weights.experts, activation=model.activation)
    return squared_distances(outputs, choice.scores, routing=model.routing)


def load_layer(checkpoint: Checkpoint, tensors: LayerTensors, *, buffer: np.ndarray) -> LayerWeights:
    """Read one layer's router and experts through `buffer` (uint8) on to the default device, in their stored types.

    Raises:
        InputError: NaN or Inf in a tensor, by name.
    """
    views, position = {}, 0
    for name in _tensor_names(tensors):
        views[name] = checkpoint.read(name, buffer[position:])
        position += checkpoint.entries[name].size
    pieces = [(name, views[name]) for name in (tensors.router, tensors.bias) if name]
    pieces += _split_experts(views, tensors.experts)
    # Copies: the CPU backend would otherwise alias the buffer, which the next layer overwrites.
    arrays = [jnp.array(view, copy=True) for _, view in pieces]
    for (name, _), finite in zip(pieces, jax.device_get([_all_finite(array) for array in arrays]), strict=True):
        if not finite:
            raise InputError(f"{checkpoint.entries[name].file}: tensor {name} holds NaN or Inf; is the file damaged?")
    router, *rest = arrays
    bias = rest.pop(0) if tensors.bias else None
    experts = tuple(ExpertWeights(*rest[i : i + 3]) for i in range(0, len(rest), 3))
    return LayerWeights(router, bias, experts)


def _measure(
    checkpoint: Checkpoint, model: Model, weights: LayerWeights, layer: int, settings: ProfileSettings
) -> Moments:
    zero = np.zeros(model.identity.top_k)
    moments, size = Moments(0, 0, zero, zero, zero), settings.batch * settings.length
    while moments.samples + size <= settings.max_samples:
        x = draw(model, layer, moments.iterations, settings)
        distances = np.asarray(measure_iteration(x, model, weights), np.float64)
        if not np.isfinite(distances).all():
            remedy = "" if settings.dtype == "float32" else "; try --dtype float32"
            raise InputError(f"{checkpoint.folder}: the output of layer {layer} overflows in {settings.dtype}{remedy}")
        moments = _accumulate(moments, distances)
        if moments.iterations >= MIN_ITERATIONS and relative_errors(moments).max() <= settings.relative_error:
            break
    return moments


def _accumulate(moments: Moments, distances: np.ndarray) -> Moments:
    total = distances.sum(axis=0)
    return Moments(
        iterations=moments.iterations + 1,
        samples=moments.samples + len(distances),
        frobenius=moments.frobenius + np.sqrt(total),
        squares=moments.squares + total,
        fourths=moments.fourths + (distances * distances).sum(axis=0),
    )


def _tensor_names(tensors: LayerTensors) -> list[str]:
    separate = (name for expert in tensors.experts.separate for name in expert)
    return [name for name in (tensors.router, tensors.bias, *separate, *(tensors.experts.fused or ())) if name]


def _layer_bytes(checkpoint: Checkpoint, tensors: LayerTensors) -> int:
    return sum(checkpoint.entries[name].size for name in _tensor_names(tensors))


def _split_experts(views: Mapping[str, np.ndarray], experts: ExpertTensors) -> Iterator[tuple[str, np.ndarray]]:
    """Each expert's gate, up and down in turn, as [out, in] views of what was read, with the tensor they came from."""
    for expert in experts.separate:
        for name in expert:
            yield name, views[name]
    if experts.fused:
        for gate_up, down in zip(views[experts.fused[0]], views[experts.fused[1]], strict=True):
            if experts.transposed:
                gate_up, down = gate_up.T, down.T
            gate, up = np.split(gate_up, 2)
            yield from ((experts.fused[0], gate), (experts.fused[0], up), (experts.fused[1], down))


@jax.jit
def _all_finite(array: Array) -> Bool[Array, ""]:
    return jnp.isfinite(array).all()
