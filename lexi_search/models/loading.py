"""Layer weights, read from the checkpoint and put on the device one layer ahead of their use.

Weights are transferred as they are stored: quantised ones stay packed on the device and are dequantised when used.
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
from lexi_search.layers.experts import limit_layer, project_layer, scale_layer
from lexi_search.layers.weights import MEMORY_SHARE, BlockWeights, ExpertWeights, LayerWeights, Scales
from lexi_search.models.finder import Stored
from lexi_search.models.model import Model
from lexi_search.models.moe_tensors import ExpertTensors

READERS = 8  # threads that read, each into its own host buffer, as large as the largest tensor it has read


class _Recipe(NamedTuple):
    """The conversion of one tensor's stored parts into some of an expert's weights; hashable, static under `jit`.

    The rows of the values [out, in] belong to the `fields` of `ExpertWeights`: in equal blocks or, if `interleaved`,
    alternately.
    """

    fields: tuple[str, ...]
    scheme: Scheme
    shape: tuple[int, ...]
    dtype: str
    transposed: bool = False
    interleaved: bool = False


class _Piece(NamedTuple):
    """A tensor that an expert needs, by its logical name; only row `row` of a tensor that holds all experts."""

    name: str
    row: int | None
    recipe: _Recipe


Weights = Any  # a tree of arrays, or of `Stored` references in their places
_NeededExperts = Callable[[int, Array, Array | None], Collection[int]]  # layer index, router, bias -> experts


def stream_layers(
    checkpoint: Checkpoint, model: Model, layers: Sequence[int], *, needed: _NeededExperts | None = None
) -> Iterator[tuple[int, LayerWeights]]:
    """Yield (decoder-layer index, weights on the default device) for each of `layers`.

    While the caller works on one layer, the next is read and sent to the device, `READERS` tensors at a time; so two
    layers are on the device, as stored, unless they leave no room for the caller's own copy of one. `needed`, called in
    another thread, may return the experts of a layer that are to be read ahead. All others are read on first access,
    so it affects only the speed.

    Raises:
        InputError: a shard that cannot be read; NaN or Inf in a router, a bias or an expert that is read, by name.
    """
    reader = _Reader(checkpoint)
    yield from _stream(reader, model, layers, partial(_read_layer, reader, model, needed))


def stream_blocks(checkpoint: Checkpoint, model: Model, decoder: Decoder) -> Iterator[tuple[int, BlockWeights]]:
    """Yield (index, weights on the default device, with `LayerWeights` of MoE layers) of every decoder layer, in order.

    Reads one layer ahead and raises as `stream_layers` does.
    """
    reader = _Reader(checkpoint)
    yield from _stream(reader, model, range(len(decoder.blocks)), partial(_read_block, reader, model, decoder))


def read_tensors(checkpoint: Checkpoint, tensors: Weights) -> Weights:
    """The same tree with a dequantised array on the default device for every `Stored` reference in it.

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
        for index, layer in enumerate(layers):
            weights = reading.result()
            read_next = partial(start, layers[index + 1]) if index + 1 < len(layers) else lambda: None
            if overlap:
                reading = read_next()
            yield layer, weights
            del weights  # else it would still be on the device while the layer after the next arrives
            if not overlap:
                reading = read_next()
    finally:
        # Without waiting: this may run in a finaliser, where waiting for a thread may never end.
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


def _read_layer(reader: "_Reader", model: Model, needed: _NeededExperts | None, layer: int) -> LayerWeights:
    tensors = model.tensors[layer]
    router = reader.load_plain(tensors.router)
    bias = reader.load_plain(tensors.bias).reshape(-1) if tensors.bias else None  # some store it [1, E]
    experts = _Experts(reader, _list_pieces(reader.tensors, tensors.experts))
    weights = LayerWeights(router, bias, experts)
    if tensors.scales is not None:
        weights = scale_layer(weights, Scales(*map(reader.load_plain, tensors.scales)))
    if tensors.latent is not None:
        weights = project_layer(weights, *_read_tree(reader, tuple(map(Stored, tensors.latent))))
    if tensors.limit is not None:
        weights = limit_layer(weights, tensors.limit)
    first = range(len(experts)) if needed is None else sorted(needed(layer, weights.router, bias))
    experts.load(first, apply=reader.pool.map)
    return weights


def _read_block(reader: "_Reader", model: Model, decoder: Decoder, layer: int) -> BlockWeights:
    moe = _read_layer(reader, model, None, layer) if layer in model.tensors else None
    return _read_tree(reader, decoder.tensors[layer])._replace(moe=moe)


def _read_tree(reader: "_Reader", tensors: Weights) -> Weights:
    leaves, structure = jax.tree.flatten(tensors)
    recipes = [_describe_recipe(reader.tensors, leaf.name, ("values",)) for leaf in leaves]
    pieces = tuple(_Piece(leaf.name, None, recipe) for leaf, recipe in zip(leaves, recipes, strict=True))
    parts = reader.load({0: pieces}, apply=reader.pool.map)[0]
    zipped = zip(leaves, parts, recipes, strict=True)
    values = [_make_values(stored, recipe, rows=leaf.rows) for leaf, stored, recipe in zipped]
    return jax.tree.unflatten(structure, values)


def _make_values(parts: Parts, recipe: "_Recipe", *, rows: tuple[int, int] | None) -> Array:
    plain = recipe.scheme == Plain()
    values = parts["weight"] if plain else _dequantise(parts, recipe=recipe)
    return values if rows is None else values[slice(*rows)]


class _Experts(Sequence[ExpertWeights]):
    """The experts of one layer: plain ones as matrices, quantised ones as stored parts; read by the first access."""

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
        """Put experts on the device and check that their values are finite."""
        pieces = {expert: self._pieces[expert] for expert in experts}
        parts = self._reader.load(pieces, apply=apply)
        for expert, group in pieces.items():  # one by one, so that not all are on the device twice
            plain = all(piece.recipe.scheme == Plain() for piece in group)
            self._loaded[expert] = self._make(expert, parts.pop(expert)) if plain else parts.pop(expert)

    def _make(self, expert: int, parts: tuple[Parts, ...]) -> ExpertWeights:
        recipes = tuple(piece.recipe for piece in self._pieces[expert])
        if all(recipe == _make_plain(recipe) for recipe in recipes):
            matrices = {recipe.fields[0]: stored["weight"] for recipe, stored in zip(recipes, parts, strict=True)}
            return ExpertWeights(**{"gate": None} | matrices)  # as they are: a compiled function would copy them
        return _make_expert(parts, recipes=recipes)


class _Reader:
    """A reader that gets tensors by their logical names and sends their parts to the device, several at a time."""

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

        `apply` is `pool.map` for many; a few are read in this thread, not queued behind the pool's other work.
        """
        reading = {expert: apply(self._read, group) for expert, group in pieces.items()}
        parts = {expert: tuple(results) for expert, results in reading.items()}
        # One transfer for the flags of all experts; it waits for all of them.
        flags = jax.device_get([_all_finite(parts[e], recipes=tuple(p.recipe for p in pieces[e])) for e in pieces])
        for group, finite in zip(pieces.values(), flags, strict=True):
            for piece, ok in zip(group, finite, strict=True):
                if not ok:
                    file = self.tensors[piece.name].file
                    raise InputError(f"{file}: tensor {piece.name} holds NaN or Inf; is the file damaged?")
        return parts

    def _read(self, piece: _Piece) -> dict[str, Array]:
        stored = self.tensors[piece.name]
        rows = {role: None if role in stored.shared else piece.row for role in stored.parts}
        return {role: self._send(self._read_part(part, rows[role])) for role, part in stored.parts.items()}

    def _read_part(self, name: str, row: int | None) -> np.ndarray:
        size = self._checkpoint.entries[name].size
        if getattr(self._buffers, "size", -1) < size:
            self._buffers.buffer, self._buffers.size = np.empty(size, np.uint8), size
        return self._checkpoint.read(name, self._buffers.buffer, row=row)

    def _send(self, view: np.ndarray) -> Array:
        """A copy on the default device, complete on return: the buffer may be used again."""
        if view.dtype.name == "float8_e8m0fnu":
            view = view.view(np.uint8)  # as schemes expect it; not every backend has the type
        array = jax.device_put(view)
        if array.device.platform == "cpu":
            array = jnp.copy(array)  # this backend may share the buffer
        return array.block_until_ready()


def _list_pieces(tensors: Tensors, experts: ExpertTensors) -> list[tuple[_Piece, ...]]:
    """The tensors, or rows of tensors, that each expert is made of."""
    if not experts.fused:
        return [
            tuple(
                _Piece(name, None, _describe_recipe(tensors, name, (field,)))
                for field, name in zip(("gate", "up", "down")[-len(names) :], names, strict=True)
            )
            for names in experts.separate
        ]
    fields = (("gate", "up"), ("down",), ("gate_bias", "up_bias"), ("down_bias",))
    if experts.apart:
        fields = (("gate",), ("up",), ("down",))
    recipes = [
        _describe_recipe(tensors, name, group, fused=True)._replace(
            transposed=experts.transposed, interleaved=experts.interleaved
        )
        for name, group in zip(experts.fused, fields, strict=False)
    ]
    num_experts = tensors[experts.fused[0]].shape[0]
    return [
        tuple(_Piece(name, row, recipe) for name, recipe in zip(experts.fused, recipes, strict=True))
        for row in range(num_experts)
    ]


def _make_plain(recipe: _Recipe) -> _Recipe:
    """The recipe of one plain matrix, stored as it is used, of the same shape and type."""
    return _Recipe(fields=recipe.fields[:1], scheme=Plain(), shape=recipe.shape, dtype=recipe.dtype)


def _describe_recipe(tensors: Tensors, name: str, fields: tuple[str, ...], fused: bool = False) -> _Recipe:
    stored = tensors[name]
    shape = stored.shape[1:] if fused else stored.shape
    return _Recipe(fields=fields, scheme=stored.scheme, shape=shape, dtype=stored.dtype.name)


@partial(jax.jit, static_argnames="recipe")
def _dequantise(parts: Parts, *, recipe: _Recipe) -> Array:
    return dequantise(parts, recipe.scheme, recipe.shape, recipe.dtype)


@partial(jax.jit, static_argnames="recipes")
def _make_expert(parts: tuple[Parts, ...], *, recipes: tuple[_Recipe, ...]) -> ExpertWeights:
    weights: dict[str, Array | None] = {"gate": None}
    for stored, recipe in zip(parts, recipes, strict=True):
        values = dequantise(stored, recipe.scheme, recipe.shape, recipe.dtype)
        values, count = values.T if recipe.transposed else values, len(recipe.fields)
        if count == 1:
            rows = [values]
        else:
            rows = [values[i::count] for i in range(count)] if recipe.interleaved else jnp.split(values, count)
        weights |= zip(recipe.fields, rows, strict=True)
    return ExpertWeights(**weights)


@partial(jax.jit, static_argnames="recipes")
def _all_finite(parts: tuple[Parts, ...], *, recipes: tuple[_Recipe, ...]) -> Bool[Array, " pieces"]:
    values = [dequantise(p, r.scheme, r.shape, r.dtype) for p, r in zip(parts, recipes, strict=True)]
    return jnp.stack([jnp.isfinite(value).all() for value in values])
