"""A reader of tensors by their logical names, several at a time, into a device's memory; and of layers, by roles."""

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Shaped

from lexi_search.checkpoint.dequantise import Parts, Plain
from lexi_search.checkpoint.reader import Checkpoint, read_rows
from lexi_search.errors import InputError
from lexi_search.layers.decoder import Decoder
from lexi_search.layers.experts import limit_layer, project_layer, scale_layer
from lexi_search.layers.mixers.ngrams import find_rows
from lexi_search.layers.weights import BlockWeights, ExpertWeights, LayerWeights, Scales
from lexi_search.models.finder import Stored
from lexi_search.models.loading.pieces import (
    Piece,
    Recipe,
    all_finite,
    dequantise_one,
    describe_recipe,
    list_pieces,
    make_expert,
    make_plain,
)
from lexi_search.models.model import Model

READERS = 8  # threads that read, each into a host buffer of its own
BATCH_BYTES = 32 << 20  # of tensors that are read and sent together; a larger one goes alone
ALIGNMENT = 64  # of tensors in a buffer

Weights = Any  # a tree of arrays, or of `Stored` references in their places
NeededExperts = Callable[[int, Array, Array | None], Collection[int]]  # layer index, router, bias -> experts


class Reader:
    """A reader that gets tensors by their logical names and sends their parts to a device, several at a time.

    The device is JAX's default where none is given.
    """

    def __init__(self, checkpoint: Checkpoint, device: jax.Device | None = None):
        self.tensors = checkpoint.tensors
        self.pool = ThreadPoolExecutor(max_workers=READERS)
        self._device = device
        self._checkpoint = checkpoint
        self._buffers = threading.local()

    def close(self) -> None:
        # Without waiting: this may run in a finaliser, where waiting for a thread may never end.
        self.pool.shutdown(wait=False, cancel_futures=True)

    def load_plain(self, name: str) -> Array:
        recipe = describe_recipe(self.tensors, name, ("router",))
        return self.load({0: (Piece(name, None, recipe),)})[0][0]["weight"]

    def load_choices(self, name: str, num_experts: int) -> Array:
        """The experts of every token, [vocabulary, K]; InputError for one that is not there."""
        choices = self._checkpoint[name]
        if choices.min() < 0 or choices.max() >= num_experts:
            thing = f"experts from {choices.min()} to {choices.max()}, and there are {num_experts}"
            raise InputError(f"{self.tensors[name].file}: tensor {name} names {thing}; is the file damaged?")
        return jax.device_put(choices.astype(np.int32), self._device)

    def load(self, pieces: Mapping[int, tuple[Piece, ...]], *, apply: Callable = map) -> dict[int, tuple[Parts, ...]]:
        """The parts of every expert's tensors on the device; InputError names a tensor whose values are not finite.

        `apply` is `pool.map` for many; a few are read in this thread, not queued behind the pool's other work.
        """
        batches = list(self._cut(pieces.values()))
        found = list(apply(self._read, batches))
        # One transfer for the flags of all batches; it waits for all of them.
        for batch, finite in zip(batches, jax.device_get([flags for _, flags in found]), strict=True):
            for piece, ok in zip(batch, finite, strict=True):
                if not ok:
                    file = self.tensors[piece.name].file
                    raise InputError(f"{file}: tensor {piece.name} holds NaN or Inf; is the file damaged?")
        parts = chain.from_iterable(parts for parts, _ in found)
        return {expert: tuple(islice(parts, len(group))) for expert, group in pieces.items()}

    def _cut(self, groups: Iterable[tuple[Piece, ...]]) -> Iterator[tuple[Piece, ...]]:
        """Whole experts, as many as `BATCH_BYTES` hold; the tensors of a larger one, one by one."""
        batch, size = (), 0
        for group in groups:
            own = sum(self._measure(piece) for piece in group)
            if batch and size + own > BATCH_BYTES:
                yield batch
                batch, size = (), 0
            if own > BATCH_BYTES:
                yield from ((piece,) for piece in group)
            else:
                batch, size = batch + group, size + own
        if batch:
            yield batch

    def _measure(self, piece: Piece) -> int:
        return sum(_align(self._checkpoint.measure(part, row=row)) for _, part, row in self._list(piece))

    def _list(self, piece: Piece) -> list[tuple[str, str, int | None]]:
        """The role, stored name and row of each part."""
        stored = self.tensors[piece.name]
        return [(role, part, None if role in stored.shared else piece.row) for role, part in stored.parts.items()]

    def _read(self, batch: tuple[Piece, ...]) -> tuple[list[Parts], Bool[Array, " pieces"]]:
        """The parts of each piece, sent together, and whether each is finite."""
        buffer, start, views = self._find_buffer(sum(map(self._measure, batch))), 0, []
        for piece in batch:
            views.append({})
            for role, part, row in self._list(piece):
                views[-1][role] = self._checkpoint.read(part, buffer[start:], row=row)
                start += _align(views[-1][role].nbytes)
        parts = self._send(views)
        return parts, all_finite(tuple(parts), recipes=tuple(piece.recipe for piece in batch))

    def _find_buffer(self, size: int) -> np.ndarray:
        """This thread's, of at least so many bytes."""
        if getattr(self._buffers, "size", -1) < size:
            self._buffers.buffer, self._buffers.size = np.empty(size, np.uint8), size
        return self._buffers.buffer

    def _send(self, views: list[dict[str, np.ndarray]]) -> list[Parts]:
        """Copies on the device, complete on return: the buffer may be used again."""
        views = jax.tree.map(_store, views)
        if (self._device.platform if self._device else jax.default_backend()) == "cpu":  # it may share the buffer
            arrays = jax.tree.map(lambda view: jnp.copy(jax.device_put(view, self._device)), views)
        else:
            arrays = jax.device_put(views, self._device)
        return jax.block_until_ready(arrays)


def _store(view: np.ndarray) -> np.ndarray:
    # E8M0 as schemes expect it; not every backend has the type.
    return view.view(np.uint8) if view.dtype.name == "float8_e8m0fnu" else view


def _align(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def read_tensors(checkpoint: Checkpoint, tensors: Weights, *, device: jax.Device | None = None) -> Weights:
    """The same tree with a dequantised array on a device, by default JAX's, for every `Stored` reference in it.

    Raises:
        InputError: a shard that cannot be read; NaN or Inf in a tensor, by name.
    """
    reader = Reader(checkpoint, device)
    try:
        return read_tree(reader, tensors)
    finally:
        reader.close()


def read_layer(reader: Reader, model: Model, needed: NeededExperts | None, layer: int) -> LayerWeights:
    tensors = model.tensors[layer]
    router = reader.load_plain(tensors.router)
    bias = reader.load_plain(tensors.bias).reshape(-1) if tensors.bias else None  # some store it [1, E]
    experts = Experts(reader, list_pieces(reader.tensors, tensors.experts))
    choices = reader.load_choices(tensors.choices, len(experts)) if tensors.choices else None
    weights = LayerWeights(router, bias, experts, choices)
    if tensors.scales is not None:
        weights = scale_layer(weights, Scales(*map(reader.load_plain, tensors.scales)))
    if tensors.latent is not None:
        weights = project_layer(weights, *read_tree(reader, tuple(map(Stored, tensors.latent))))
    if tensors.limit is not None:
        weights = limit_layer(weights, tensors.limit)
    first = range(len(experts)) if needed is None else sorted(needed(layer, weights.router, bias))
    experts.load(first, apply=reader.pool.map)
    return weights


def read_ngrams(
    checkpoint: Checkpoint, decoder: Decoder, layer: int, tokens: Int[np.ndarray, "sequences length"]
) -> Shaped[np.ndarray, "sequences length width"] | None:
    """The embeddings of the n-grams that end at each position, of a layer that adds them; None for another.

    Tables may be larger than memory: only the rows of these n-grams are read.
    """
    if layer not in decoder.tables:
        return None
    names = decoder.tables[layer]
    ends = np.cumsum([checkpoint.entries[name].shape[0] for name in names])
    wanted, places = np.unique(find_rows(tokens, decoder.blocks[layer].ngrams), return_inverse=True)
    parts = np.searchsorted(ends, wanted, side="right")
    starts = np.concatenate([[0], ends])
    rows = [
        read_rows(checkpoint, names[part], (wanted[parts == part] - starts[part]).tolist()) for part in np.unique(parts)
    ]
    found = np.concatenate(rows)
    if not np.isfinite(found.astype(np.float32)).all():
        raise InputError(f"{checkpoint.entries[names[0]].file}: the table {names[0]} holds NaN or Inf; is it damaged?")
    return found[places.reshape(-1)].reshape(*tokens.shape, -1)


def read_block(reader: Reader, model: Model, decoder: Decoder, layer: int) -> BlockWeights:
    moe = read_layer(reader, model, None, layer) if layer in model.tensors else None
    return read_tree(reader, decoder.tensors[layer])._replace(moe=moe)


def read_tree(reader: Reader, tensors: Weights) -> Weights:
    leaves, structure = jax.tree.flatten(tensors)
    recipes = [describe_recipe(reader.tensors, leaf.name, ("values",)) for leaf in leaves]
    pieces = tuple(Piece(leaf.name, None, recipe) for leaf, recipe in zip(leaves, recipes, strict=True))
    parts = reader.load({0: pieces}, apply=reader.pool.map)[0]
    zipped = zip(leaves, parts, recipes, strict=True)
    values = [_make_values(stored, recipe, rows=leaf.rows) for leaf, stored, recipe in zipped]
    return jax.tree.unflatten(structure, values)


def _make_values(parts: Parts, recipe: Recipe, *, rows: tuple[int, int] | None) -> Array:
    plain = recipe.scheme == Plain()
    values = parts["weight"] if plain else dequantise_one(parts, recipe=recipe)
    return values if rows is None else values[slice(*rows)]


class Experts(Sequence[ExpertWeights]):
    """The experts of one layer: plain ones as matrices, quantised ones as stored parts; read by the first access."""

    def __init__(self, reader: Reader, pieces: Sequence[tuple[Piece, ...]]):
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

    @property
    def are_plain(self) -> bool:
        """Whether all of these experts, all of which are loaded, are matrices as they are used."""
        return all(isinstance(loaded, ExpertWeights) for loaded in self._loaded.values())

    def put(self, target: Any) -> "Experts":
        """These experts, all of which are loaded, on another device or in host memory."""
        moved = Experts(self._reader, self._pieces)
        moved._loaded = jax.device_put(self._loaded, target)
        return moved

    def _make(self, expert: int, parts: tuple[Parts, ...]) -> ExpertWeights:
        recipes = tuple(piece.recipe for piece in self._pieces[expert])
        if all(recipe == make_plain(recipe) for recipe in recipes):
            matrices = {recipe.fields[0]: stored["weight"] for recipe, stored in zip(recipes, parts, strict=True)}
            return ExpertWeights(**{"gate": None} | matrices)  # as they are: a compiled function would copy them
        return make_expert(parts, recipes=recipes)
