"""One layer's weights on their way from the checkpoint to the device.

What travels is what is stored: quantised weights stay packed on the device, and become matrices when they are used.
"""

import math
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from lexi_search.checkpoint.dequantise import Parts, Plain, Scheme, dequantise
from lexi_search.checkpoint.reader import Checkpoint
from lexi_search.checkpoint.tensors import Tensors
from lexi_search.errors import InputError
from lexi_search.layers.decoder import Decoder
from lexi_search.layers.weights import MEMORY_SHARE, BlockWeights, ExpertWeights, LayerWeights
from lexi_search.models.model import Model
from lexi_search.models.moe_tensors import ExpertTensors

READERS = 8  # threads that read, each into a host buffer of its own, as large as the largest tensor it has read


class _Recipe(NamedTuple):
    """How some of an expert's weights are made from one tensor's parts; hashable, static under `jit`.

    The rows [out, in] of the values belong to the `fields` of `ExpertWeights`: to one after the other or, if
    `interleaved`, to each in turn.
    """

    fields: tuple[str, ...]
    scheme: Scheme
    shape: tuple[int, ...]
    dtype: str
    transposed: bool = False
    interleaved: bool = False


class _Piece(NamedTuple):
    """A tensor that an expert takes, by its logical name; of a tensor of all experts only row `row`."""

    name: str
    row: int | None
    recipe: _Recipe


Weights = Any  # a tree of arrays, or of `Stored` tensors where arrays will be
NeededExperts = Callable[[int, Array, Array | None], Collection[int]]  # layer index, router, bias -> experts


def stream_layers(
    checkpoint: Checkpoint, model: Model, layers: Sequence[int], *, needed: NeededExperts | None = None
) -> Iterator[tuple[int, LayerWeights]]:
    """Yield (decoder-layer index, weights on the default device) for each of `layers`.

    While the caller works on one layer, the next is read and sent to the device, `READERS` tensors at a time; so two
    layers are on the device, as stored, unless they leave no room for the caller's own copy of one. `needed`, called in
    another thread, may name the experts of a layer that are to be read ahead. The others are read when they are asked
    for, and never if nobody asks: it decides only the speed.

    Raises:
        InputError: a shard that cannot be read; NaN or Inf in a router, a bias or an expert that is read, by name.
    """
    reader = _Reader(checkpoint)
    yield from _stream(reader, model, layers, partial(_read_layer, reader, model, needed))


def stream_blocks(checkpoint: Checkpoint, model: Model, decoder: Decoder) -> Iterator[tuple[int, BlockWeights]]:
    """Yield (index, weights on the default device, with a MoE's `LayerWeights`) of every decoder layer, in order.

    As `stream_layers` does it: one layer ahead, and errors alike.
    """
    reader = _Reader(checkpoint)
    yield from _stream(reader, model, range(len(decoder.blocks)), partial(_read_block, reader, model, decoder))


def read_tensors(checkpoint: Checkpoint, tensors: Weights) -> Weights:
    """The same tree with an array on the default device for every `Stored` tensor in it, dequantised.

    Raises:
        InputError: a shard that cannot be read; NaN or Inf in a tensor, by name.
    """
    reader = _Reader(checkpoint)
    try:
        return _read_tree(reader, tensors)
    finally:
        reader.pool.shutdown(wait=False, cancel_futures=True)


def _stream(
    reader: "_Reader", model: Model, layers: Sequence[int], read: Callable[[int], Weights]
) -> Iterator[tuple[int, Weights]]:
    overlap = _can_overlap(reader, model, [layer for layer in layers if layer in model.tensors])
    ahead = ThreadPoolExecutor(max_workers=1)
    start = partial(ahead.submit, read)
    try:
        reading = start(layers[0]) if layers else None
        for place, layer in enumerate(layers):
            weights = reading.result()
            following = partial(start, layers[place + 1]) if place + 1 < len(layers) else lambda: None
            if overlap:
                reading = following()
            yield layer, weights
            del weights  # else it would still be on the device while the layer after the next arrives
            if not overlap:
                reading = following()
    finally:
        # Without waiting: this may run in a finaliser, anywhere, and there a wait for a thread may never end.
        for pool in (ahead, reader.pool):
            pool.shutdown(wait=False, cancel_futures=True)


def _can_overlap(reader: "_Reader", model: Model, layers: Sequence[int]) -> bool:
    """Whether two layers as stored, and one more as 16-bit matrices, take at most `MEMORY_SHARE` of the device."""
    memory = jax.local_devices()[0].memory_stats()
    sizes = [0]
    for layer in layers if memory else ():
        pieces = [piece for expert in _list_pieces(reader.tensors, model.tensors[layer].experts) for piece in expert]
        names = {part for piece in pieces for part in reader.tensors[piece.name].parts.values()}
        stored = sum(reader.count_bytes(name) for name in names)
        sizes.append(2 * stored + 2 * sum(math.prod(piece.recipe.shape) for piece in pieces))
    return memory is None or max(sizes) <= MEMORY_SHARE * memory["bytes_limit"]


def _read_layer(reader: "_Reader", model: Model, needed: NeededExperts | None, layer: int) -> LayerWeights:
    tensors = model.tensors[layer]
    router = reader.load_plain(tensors.router)
    bias = reader.load_plain(tensors.bias).reshape(-1) if tensors.bias else None  # some store it [1, E]
    experts = _Experts(reader, _list_pieces(reader.tensors, tensors.experts))
    wanted = range(len(experts)) if needed is None else sorted(needed(layer, router, bias))
    experts.load(wanted, apply=reader.pool.map)
    return LayerWeights(router, bias, experts)


def _read_block(reader: "_Reader", model: Model, decoder: Decoder, layer: int) -> BlockWeights:
    moe = _read_layer(reader, model, None, layer) if layer in model.tensors else None
    return _read_tree(reader, decoder.tensors[layer])._replace(moe=moe)


def _read_tree(reader: "_Reader", tensors: Weights) -> Weights:
    leaves, structure = jax.tree.flatten(tensors)
    recipes = [_describe_recipe(reader.tensors, leaf.name, ("values",)) for leaf in leaves]
    pieces = tuple(_Piece(leaf.name, None, recipe) for leaf, recipe in zip(leaves, recipes, strict=True))
    parts = reader.load({0: pieces}, apply=reader.pool.map)[0]
    values = [_make_values(*made, rows=leaf.rows) for leaf, *made in zip(leaves, parts, recipes, strict=True)]
    return jax.tree.unflatten(structure, values)


def _make_values(parts: Parts, recipe: "_Recipe", *, rows: tuple[int, int] | None) -> Array:
    plain = recipe.scheme == Plain()
    values = parts["weight"] if plain else _dequantise(parts, recipe=recipe)
    return values if rows is None else values[slice(*rows)]


class _Experts(Sequence[ExpertWeights]):
    """The experts of one layer: plain ones as matrices, quantised ones as their parts; read at the latest when used."""

    def __init__(self, reader: "_Reader", pieces: Sequence[tuple[_Piece, ...]]):
        self._reader, self._pieces = reader, pieces
        self._loaded: dict[int, ExpertWeights | tuple[Parts, ...]] = {}

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, expert: int) -> ExpertWeights:
        expert = range(len(self))[expert]
        if expert not in self._loaded:
            self.load([expert])
        loaded = self._loaded[expert]
        return loaded if isinstance(loaded, ExpertWeights) else self._make(expert, loaded)

    def load(self, experts: Collection[int], *, apply: Callable = map) -> None:
        """Bring experts to the device and look at them."""
        pieces = {expert: self._pieces[expert] for expert in experts}
        parts = self._reader.load(pieces, apply=apply)
        for expert, group in pieces.items():  # one by one, lest all be there twice
            plain = all(piece.recipe.scheme == Plain() for piece in group)
            self._loaded[expert] = self._make(expert, parts.pop(expert)) if plain else parts.pop(expert)

    def _make(self, expert: int, parts: tuple[Parts, ...]) -> ExpertWeights:
        recipes = tuple(piece.recipe for piece in self._pieces[expert])
        if all(recipe == _Recipe(recipe.fields[:1], Plain(), recipe.shape, recipe.dtype) for recipe in recipes):
            made = {recipe.fields[0]: own["weight"] for recipe, own in zip(recipes, parts, strict=True)}
            return ExpertWeights(**{"gate": None} | made)  # as they are: a compiled function would copy them
        return _make_expert(parts, recipes=recipes)


class _Reader:
    """Reads tensors by their logical names and sends their parts to the device, several at a time."""

    def __init__(self, checkpoint: Checkpoint):
        self.tensors = checkpoint.tensors
        self.pool = ThreadPoolExecutor(max_workers=READERS)
        self._checkpoint = checkpoint
        self._buffers = threading.local()

    def count_bytes(self, part: str) -> int:
        return self._checkpoint.entries[part].size

    def load_plain(self, name: str) -> Array:
        recipe = _describe_recipe(self.tensors, name, ("router",))
        return self.load({0: (_Piece(name, None, recipe),)})[0][0]["weight"]

    def load(self, pieces: Mapping[int, tuple[_Piece, ...]], *, apply: Callable = map) -> dict[int, tuple[Parts, ...]]:
        """The parts of every expert's tensors on the device; InputError names a tensor whose values are not finite.

        `apply` is `pool.map` for many at a time; a few are read here, not behind what the pool is busy with.
        """
        reading = {expert: apply(self._read, group) for expert, group in pieces.items()}
        parts = {expert: tuple(results) for expert, results in reading.items()}
        # Looking at every flag waits for all of them.
        flags = jax.device_get([_all_finite(parts[e], recipes=tuple(p.recipe for p in pieces[e])) for e in pieces])
        for group, finite in zip(pieces.values(), flags, strict=True):
            for piece, ok in zip(group, finite, strict=True):
                if not ok:
                    file = self.tensors[piece.name].file
                    raise InputError(f"{file}: tensor {piece.name} holds NaN or Inf; is the file damaged?")
        return parts

    def _read(self, piece: _Piece) -> dict[str, Array]:
        parts = self.tensors[piece.name].parts
        return {role: self._place(self._fill(part, piece.row)) for role, part in parts.items()}

    def _fill(self, name: str, row: int | None) -> np.ndarray:
        size = self._checkpoint.entries[name].size
        if getattr(self._buffers, "size", -1) < size:
            self._buffers.buffer, self._buffers.size = np.empty(size, np.uint8), size
        return self._checkpoint.read(name, self._buffers.buffer, row=row)

    def _place(self, view: np.ndarray) -> Array:
        """A copy on the default device, whole when this returns: the buffer may be used again."""
        if view.dtype.name == "float8_e8m0fnu":
            view = view.view(np.uint8)  # as schemes take them; not every backend knows the type
        array = jax.device_put(view)
        if array.device.platform == "cpu":
            array = jnp.copy(array)  # this backend borrows the buffer
        return array.block_until_ready()


def _list_pieces(tensors: Tensors, experts: ExpertTensors) -> list[tuple[_Piece, ...]]:
    """What each expert is made of."""
    if not experts.fused:
        return [
            tuple(
                _Piece(name, None, _describe_recipe(tensors, name, (field,)))
                for field, name in zip(("gate", "up", "down")[-len(names) :], names, strict=True)
            )
            for names in experts.separate
        ]
    fields = (("gate", "up"), ("down",), ("gate_bias", "up_bias"), ("down_bias",))
    recipes = [
        _describe_recipe(tensors, name, own, fused=True)._replace(
            transposed=experts.transposed, interleaved=experts.interleaved
        )
        for name, own in zip(experts.fused, fields, strict=False)
    ]
    num_experts = tensors[experts.fused[0]].shape[0]
    return [
        tuple(_Piece(name, row, recipe) for name, recipe in zip(experts.fused, recipes, strict=True))
        for row in range(num_experts)
    ]


def _describe_recipe(tensors: Tensors, name: str, fields: tuple[str, ...], fused: bool = False) -> _Recipe:
    stored = tensors[name]
    return _Recipe(fields, stored.scheme, stored.shape[1:] if fused else stored.shape, stored.dtype.name)


@partial(jax.jit, static_argnames="recipe")
def _dequantise(parts: Parts, *, recipe: _Recipe) -> Array:
    return dequantise(parts, recipe.scheme, recipe.shape, recipe.dtype)


@partial(jax.jit, static_argnames="recipes")
def _make_expert(parts: tuple[Parts, ...], *, recipes: tuple[_Recipe, ...]) -> ExpertWeights:
    made: dict[str, Array | None] = {"gate": None}
    for stored, recipe in zip(parts, recipes, strict=True):
        values = dequantise(stored, recipe.scheme, recipe.shape, recipe.dtype)
        values, count = values.T if recipe.transposed else values, len(recipe.fields)
        if count == 1:
            rows = [values]
        else:
            rows = [values[i::count] for i in range(count)] if recipe.interleaved else jnp.split(values, count)
        made |= zip(recipe.fields, rows, strict=True)
    return ExpertWeights(**made)


@partial(jax.jit, static_argnames="recipes")
def _all_finite(parts: tuple[Parts, ...], *, recipes: tuple[_Recipe, ...]) -> Bool[Array, " pieces"]:
    values = [dequantise(p, r.scheme, r.shape, r.dtype) for p, r in zip(parts, recipes, strict=True)]
    return jnp.stack([jnp.isfinite(value).all() for value in values])
