"""Layer weights, read from the checkpoint and put on the device one layer ahead of their use.

Weights are transferred as they are stored: quantised ones stay packed on the device and are dequantised when used.
"""

import math
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from lexi_search.checkpoint.reader import Checkpoint
from lexi_search.layers.weights import MEMORY_SHARE, LayerWeights, find_memory
from lexi_search.models.loading.pieces import list_parts, list_pieces
from lexi_search.models.loading.reader import NeededExperts, Reader, Weights, read_layer
from lexi_search.models.model import Model


def stream_layers(
    checkpoint: Checkpoint, model: Model, layers: Sequence[int], *, needed: NeededExperts | None = None
) -> Iterator[tuple[int, LayerWeights]]:
    """Yield (decoder-layer index, weights on the default device) for each of `layers`.

    While the caller works on one layer, the next is read and sent to the device, `READERS` tensors at a time; so two
    layers are on the device, as stored, unless they leave no room for the caller's own copy of one. `needed`, called in
    another thread, may return the experts of a layer that are to be read ahead. All others are read on first access,
    so it affects only the speed.

    Raises:
        InputError: a shard that cannot be read; NaN or Inf in a router, a bias or an expert that is read, by name.
    """
    reader = Reader(checkpoint)
    overlap = can_overlap(checkpoint, model, [layer for layer in layers if layer in model.tensors])
    try:
        yield from stream_ahead(layers, partial(read_layer, reader, model, needed), ahead=int(overlap))
    finally:
        reader.close()


def stream_ahead(
    layers: Sequence[int], read: Callable[[int], Weights], *, ahead: int
) -> Generator[tuple[int, Weights], None, None]:
    """A generator of (layer, what `read` returns for it), of which up to `ahead` are read before their turn.

    The first are begun at once; closing the generator ends the reading. With an `ahead` of 0 the next is begun only
    when the caller is done with the last; with more than 1, two are read at a time.
    """
    stream = _stream_ahead(layers, read, ahead=ahead)
    next(stream)
    return stream


def _stream_ahead(layers: Sequence[int], read: Callable[[int], Weights], *, ahead: int) -> Generator:
    waiting, reading = deque(layers), deque[tuple[int, Future]]()
    pool = ThreadPoolExecutor(max_workers=min(max(ahead, 1), 2))

    def begin(count: int) -> None:
        while waiting and len(reading) < count:
            layer = waiting.popleft()
            reading.append((layer, pool.submit(read, layer)))

    try:
        begin(max(ahead, 1))
        yield
        while reading:
            layer, future = reading.popleft()
            weights = future.result()
            del future  # it holds the weights
            begin(ahead)
            yield layer, weights
            del weights  # else it would still be on the device while the layer after the next arrives
            begin(max(ahead, 1))
    finally:
        # Without waiting: this may run in a finaliser, where waiting for a thread may never end.
        pool.shutdown(wait=False, cancel_futures=True)


def can_overlap(checkpoint: Checkpoint, model: Model, layers: Sequence[int]) -> bool:
    """Whether two layers as stored, and one more as 16-bit matrices, take at most `MEMORY_SHARE` of the device."""
    memory, tensors = find_memory(), checkpoint.tensors
    sizes = [0]
    for layer in layers if memory else ():
        pieces = [piece for expert in list_pieces(tensors, model.tensors[layer].experts) for piece in expert]
        stored = sum(checkpoint.entries[part].size for part in list_parts(tensors, model.tensors[layer]))
        sizes.append(2 * stored + 2 * sum(math.prod(piece.recipe.shape) for piece in pieces))
    return memory is None or max(sizes) <= MEMORY_SHARE * memory
