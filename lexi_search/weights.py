"""One layer's weights on their way from the checkpoint to the device."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from lexi_search.checkpoint import Checkpoint
from lexi_search.errors import InputError
from lexi_search.ffn import ExpertWeights
from lexi_search.layouts import ExpertTensors, LayerTensors
from lexi_search.models import Model


class LayerWeights(NamedTuple):
    """One MoE layer: the router, the bias of its selection or None, and the experts."""

    router: Float[Array, "experts hidden"]
    bias: Float[Array, " experts"] | None
    experts: tuple[ExpertWeights, ...]


def stream_layers(checkpoint: Checkpoint, model: Model, layers: Sequence[int]) -> Iterator[tuple[int, LayerWeights]]:
    """Yield (decoder-layer index, weights on the default device, in their stored types) for each of `layers`.

    While the caller works on one layer, the next is read from disk. Two host buffers, each as large as the largest
    layer, take turns: a layer has left its buffer when it is yielded.

    Raises:
        InputError: a shard that cannot be read; NaN or Inf in a tensor, by name.
    """
    size = max((_count_bytes(checkpoint, model.tensors[layer]) for layer in layers), default=0)
    buffers = (np.empty(size, np.uint8), np.empty(size, np.uint8))
    with ThreadPoolExecutor(max_workers=1) as reader:

        def start_reading(place: int):
            return reader.submit(_read_layer, checkpoint, model.tensors[layers[place]], buffers[place % 2])

        reading = start_reading(0) if layers else None
        for place, layer in enumerate(layers):
            views = reading.result()
            if place + 1 < len(layers):
                reading = start_reading(place + 1)
            yield layer, _put_layer(checkpoint, model.tensors[layer], views)


def _read_layer(checkpoint: Checkpoint, tensors: LayerTensors, buffer: np.ndarray) -> dict[str, np.ndarray]:
    views, position = {}, 0
    for name in _list_tensors(tensors):
        views[name] = checkpoint.read(name, buffer[position:])
        position += checkpoint.entries[name].size
    return views


def _put_layer(checkpoint: Checkpoint, tensors: LayerTensors, views: Mapping[str, np.ndarray]) -> LayerWeights:
    experts = list(_split_experts(views, tensors.experts))
    pieces = [(name, views[name]) for name in (tensors.router, tensors.bias) if name]
    pieces += [piece for expert in experts for piece in expert.values()]
    # Copies: the CPU backend would otherwise alias the buffer. Looking at every flag waits for all of them to be made.
    arrays = [jnp.array(view, copy=True) for _, view in pieces]
    for (name, _), finite in zip(pieces, jax.device_get([_all_finite(array) for array in arrays]), strict=True):
        if not finite:
            raise InputError(f"{checkpoint.entries[name].file}: tensor {name} holds NaN or Inf; is the file damaged?")
    placed = iter(arrays)
    router, bias = next(placed), next(placed) if tensors.bias else None
    made = ({part: next(placed) for part in expert} for expert in experts)
    return LayerWeights(router, bias, tuple(ExpertWeights(**{"gate": None} | parts) for parts in made))


def _list_tensors(tensors: LayerTensors) -> list[str]:
    separate = (name for expert in tensors.experts.separate for name in expert)
    return [name for name in (tensors.router, tensors.bias, *separate, *(tensors.experts.fused or ())) if name]


def _count_bytes(checkpoint: Checkpoint, tensors: LayerTensors) -> int:
    return sum(checkpoint.entries[name].size for name in _list_tensors(tensors))


def _split_experts(
    views: Mapping[str, np.ndarray], experts: ExpertTensors
) -> Iterator[dict[str, tuple[str, np.ndarray]]]:
    """Each expert's parts, by the fields of `ExpertWeights`: the tensor they came from, and an [out, in] view of it."""
    for expert in experts.separate:
        parts = ("gate", "up", "down")[-len(expert) :]
        yield {part: (name, views[name]) for part, name in zip(parts, expert, strict=True)}
    if experts.fused:
        for stored in zip(*(views[name] for name in experts.fused), strict=True):
            parts = {}
            for name, array, suffix in zip(experts.fused, stored, ("", "", "_bias", "_bias"), strict=False):
                array = array.T if experts.transposed else array
                if name in experts.fused[::2]:
                    gate, up = (array[::2], array[1::2]) if experts.interleaved else np.split(array, 2)
                    parts |= {f"gate{suffix}": (name, gate), f"up{suffix}": (name, up)}
                else:
                    parts[f"down{suffix}"] = (name, array)
            yield parts


@jax.jit
def _all_finite(array: Array) -> Bool[Array, ""]:
    return jnp.isfinite(array).all()
