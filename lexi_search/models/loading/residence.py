"""The weights of a decoder that many passes go through: read once, as far as memory holds them.

Layers stay as they are stored: on a device, or in host memory that a device can copy from directly; what fits in
neither is read again in every pass. Where one device cannot hold all layers, several each keep a run of them, of about
the same work. Where the others hold all of them again, these keep copies: replicas, for a share of the text each.
"""

import math
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import jax
from jax.sharding import SingleDeviceSharding

from lexi_search.checkpoint.reader import Checkpoint
from lexi_search.layers.decoder import Decoder
from lexi_search.layers.kernels.blocks import StackedExperts, stack_experts
from lexi_search.layers.kernels.grouped import can_group, has_kernels, import_kernels
from lexi_search.layers.weights import BlockWeights, EndWeights, find_memory
from lexi_search.models.loading.pieces import list_parts
from lexi_search.models.loading.reader import Reader, read_block, read_tensors
from lexi_search.models.loading.streaming import can_overlap, stream_ahead
from lexi_search.models.model import Model

DEVICE, HOST, FILES = "device", "host", "files"  # where a layer stays between passes
# Shares of a device's memory for weights that stay, and of the host's free memory. A pass over a layer takes the rest:
# hidden states, expert outputs, two layers that are on their way, a copy of one layer's experts.
DEVICE_SHARE, HOST_SHARE = 1 / 2, 1 / 2
COPIES = 20  # of the text that go through every layer in a profile's other passes
HOST_MOST = 32 * 10**9  # by default: JAX has 64 GB of such host memory, which grows by doubling
MEMINFO = Path("/proc/meminfo")


class Room(NamedTuple):
    """Bytes of weights that may stay: on each device, and in host memory."""

    device: int
    host: int


NO_ROOM = Room(0, 0)


class Place(NamedTuple):
    """The device that computes a layer, by its number in the first replica, and where the layer's weights stay."""

    device: int
    kept: str


class Staying(NamedTuple):
    """Bytes of a checkpoint's weights, by where they stay between passes."""

    device: int
    host: int
    files: int


def find_room(*, device: int | None = None, host: int | None = None) -> Room:
    """The bytes that are given, else shares of the memory that there is; a CPU's devices share the host's.

    For more than `HOST_MOST` of host memory JAX has to be told, by XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB, before it starts.
    """
    memory = find_memory()
    free = int(HOST_SHARE * _read_free_memory())
    own = int(DEVICE_SHARE * memory) if memory else free // jax.local_device_count()
    beside = min(free, HOST_MOST) if memory else 0
    return Room(own if device is None else device, beside if host is None else host)


def _read_free_memory() -> int:
    """Bytes that a program can have without swapping; 0 where Linux does not say."""
    try:
        lines = MEMINFO.read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), 0)


def place_layers(sizes: Sequence[int], work: Sequence[int], *, devices: int, room: Room) -> tuple[Place, ...]:
    """The place of every layer, of `sizes` in bytes: on the fewest devices that hold all, each with a run of layers.

    So as many replicas as can be fit on all devices. The largest work of one device is as small as it can be. Where all
    devices together cannot hold the layers, the least has to leave them.
    """
    places, host = [], room.host
    for device, layers in enumerate(_cut(sizes, work, devices, room.device)):
        left = room.device
        if sum(sizes[layer] for layer in layers) > left:  # two that do not stay are on their way
            left -= 2 * max(sizes[layer] for layer in layers)
        for layer in layers:
            if sizes[layer] <= left:  # the first ones, one after the other
                places.append(Place(device, DEVICE))
                left -= sizes[layer]
                continue
            left = -1
            if sizes[layer] <= host:
                places.append(Place(device, HOST))
                host -= sizes[layer]
            else:
                places.append(Place(device, FILES))
    return tuple(places)


def _cut(sizes: Sequence[int], work: Sequence[int], devices: int, room: int) -> list[range]:
    """Runs of layers, one a device, by exact dynamic programming over (bytes beyond room, largest work)."""
    layers = len(sizes)
    best = {0: (0, 0, ())}  # the end of the runs so far -> what they cost, and their ends
    for _ in range(min(devices, layers)):
        following: dict[int, tuple[int, int, tuple[int, ...]]] = {}
        for start, (beyond, most, ends) in best.items():
            size = load = 0
            for end in range(start + 1, layers + 1):
                size, load = size + sizes[end - 1], load + work[end - 1]
                cost = (beyond + max(size - room, 0), max(most, load), (*ends, end))
                following[end] = min(cost, following.get(end, cost))
        best = following
        beyond, _, ends = best[layers]
        if beyond == 0:
            break
    return [range(start, end) for start, end in zip((0, *ends), ends, strict=False)]


class Residence:
    """The layers and ends of one checkpoint. `stages` are the layers of each device of a replica, in order.

    Each file is read once for all replicas. Different threads may use different stages and replicas at the same time.
    Experts that stay on a device are stacked for its kernels, if these multiply them as they are stored, in `dtype`.
    Not finite values, and files that cannot be read, are errors where a layer is first used, as in `stream_layers`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: Model,
        decoder: Decoder,
        *,
        dtype: str | None = None,
        room: Room | None = None,
    ):
        self.devices = jax.local_devices()
        self._dtype = dtype
        self._checkpoint, self._model, self._decoder = checkpoint, model, decoder
        self._room = find_room() if room is None else room
        self._layers: dict[tuple[int, int], BlockWeights] = {}  # (replica, layer) -> what stays
        self._locks = [Lock() for _ in decoder.tensors]  # of the layers of the first replica
        self._ends: dict[tuple[jax.Device, bool], EndWeights] = {}
        self._ends_lock = Lock()
        self._arriving: dict[tuple[int, range], tuple[Reader, Generator]] = {}

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each layer as stored."""
        tensors = self._decoder.tensors
        return tuple(self._measure(own) + self._measure_moe(layer) for layer, own in enumerate(tensors))

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """Where each layer is computed, and where it stays."""
        moe, others = self._model.layers, self._model.top_k - 1
        work = [1 + COPIES + others * sum(own <= layer for own in moe) for layer in range(len(self.sizes))]
        room = self._room._replace(device=max(self._room.device - self._measure(self._decoder.ends), 0))
        return place_layers(self.sizes, work, devices=len(self.devices), room=room)

    @cached_property
    def stages(self) -> tuple[range, ...]:
        """The layers of each device of a replica, in order."""
        own = [
            [layer for layer, place in enumerate(self.places) if place.device == device]
            for device in range(len(self.devices))
        ]
        return tuple(range(layers[0], layers[-1] + 1) for layers in own if layers)

    @cached_property
    def replicas(self) -> tuple[tuple[jax.Device, ...], ...]:
        """The devices of each replica, one a stage: as many as there are devices for, or one if not all layers stay."""
        stages, whole = len(self.stages), all(place.kept == DEVICE for place in self.places)
        count = len(self.devices) // stages if whole else 1
        return tuple(tuple(self.devices[stages * n : stages * (n + 1)]) for n in range(count))

    @property
    def staying(self) -> Staying:
        """Bytes of layers by where they stay, in one replica."""
        sizes = Counter()
        for size, place in zip(self.sizes, self.places, strict=True):
            sizes[place.kept] += size
        return Staying(sizes[DEVICE], sizes[HOST], sizes[FILES])

    def is_kept(self, layers: range, replica: int = 0) -> bool:
        """Whether all these layers are on their device, so that going through them reads and copies nothing."""
        return all((replica, layer) in self._layers and self.places[layer].kept == DEVICE for layer in layers)

    def stream(self, layers: range, replica: int = 0) -> Iterator[tuple[int, BlockWeights]]:
        """Yield (index, weights on their device, with `LayerWeights` of MoE layers) of a stage's layers, in order."""
        if self.is_kept(layers, replica):
            yield from ((layer, self._layers[replica, layer]) for layer in layers)
            return
        self.begin(layers, replica)
        reader, staying = self._arriving.pop((replica, layers))
        others = [layer for layer in layers if self.places[layer].kept != DEVICE]
        try:
            yield from staying
            yield from stream_ahead(others, partial(self._fetch, reader, replica), ahead=int(self._overlap))
        finally:
            staying.close()
            reader.close()

    def begin(self, layers: range, replica: int = 0) -> None:
        """Start to read those of a stage's layers that stay on its device; `stream` yields them.

        They may arrive as fast as they can be read: there is room for all.
        """
        if (replica, layers) not in self._arriving:
            reader = Reader(self._checkpoint, self._find_device(layers[0]))
            staying = [layer for layer in layers if self.places[layer].kept == DEVICE]
            stream = stream_ahead(staying, partial(self._fetch, reader, replica), ahead=len(staying))
            self._arriving[replica, layers] = reader, stream

    @contextmanager
    def read_ahead(self) -> Iterator[None]:
        """A block in which the first stage is being read, until `stream` goes on with it or the block ends."""
        self.begin(self.stages[0])
        try:
            yield
        finally:
            while self._arriving:
                _, (reader, stream) = self._arriving.popitem()
                stream.close()
                reader.close()

    @cached_property
    def _overlap(self) -> bool:
        return can_overlap(self._checkpoint, self._model, self._model.layers)

    def _find_device(self, layer: int, replica: int = 0) -> jax.Device:
        return self.replicas[replica][self.places[layer].device]

    def _fetch(self, reader: Reader, replica: int, layer: int) -> BlockWeights:
        """A layer on its device. Who asks first reads it, for the first replica; the others copy it from there."""
        with self._locks[layer]:
            first = self._fetch_first(reader, layer)
        if replica == 0:
            return first
        if (replica, layer) not in self._layers:
            self._layers[replica, layer] = _move(first, self._find_device(layer, replica))
        return self._layers[replica, layer]

    def _fetch_first(self, reader: Reader, layer: int) -> BlockWeights:
        device, kept = self._find_device(layer), self.places[layer].kept
        if (0, layer) in self._layers:
            weights = self._layers[0, layer]
            return weights if kept == DEVICE else _move(weights, SingleDeviceSharding(device, memory_kind="device"))
        if self._dtype is not None and has_kernels(device, self._dtype):
            import_kernels()
        weights = read_block(reader, self._model, self._decoder, layer)
        if kept == DEVICE:
            weights = self._layers[0, layer] = self._stack(weights, device)
        elif kept == HOST:
            self._layers[0, layer] = _move(weights, SingleDeviceSharding(device, memory_kind="pinned_host"))
        return weights

    def _stack(self, weights: BlockWeights, device: jax.Device) -> BlockWeights:
        moe, model = weights.moe, self._model
        if moe is None or self._dtype is None or not moe.experts.are_plain or moe.experts[0].up.dtype != self._dtype:
            return weights
        traits = {"activation": model.activation, "routing": model.routing, "dtype": self._dtype}
        if not can_group(moe.experts, device, top_k=model.top_k, **traits):
            return weights
        return weights._replace(moe=moe._replace(experts=stack_experts(moe.experts, dtype=self._dtype)))

    def read_ends(self, device: jax.Device | None = None, *, first: bool) -> EndWeights:
        """The embedding if `first`, else final norm and LM head, on a device, by default the first; the others are
        empty."""
        device, ends = device or self.devices[0], self._decoder.ends
        wanted = ends._replace(norm=(), head=(), connection=()) if first else ends._replace(embedding=())
        with self._ends_lock:
            if (device, first) in self._ends:
                return self._ends[device, first]
            there = next((found for (_, same), found in self._ends.items() if same == first), None)
            if there is not None:
                found = jax.device_put(there, device)
            else:
                found = read_tensors(self._checkpoint, wanted, device=device)
            if self._measure(ends) <= self._room.device:
                self._ends[device, first] = found
            return found

    def _measure(self, tree: Any) -> int:
        """Bytes of a tree's tensors, which are dequantised where they are read."""
        tensors = (self._checkpoint.tensors[name] for name in {leaf.name for leaf in jax.tree.leaves(tree)})
        return sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors)

    def _measure_moe(self, layer: int) -> int:
        if layer not in self._model.tensors:
            return 0
        parts = list_parts(self._checkpoint.tensors, self._model.tensors[layer])
        return sum(self._checkpoint.entries[part].size for part in parts)


def _move(weights: BlockWeights, target: Any) -> BlockWeights:
    """The weights on a device, or in host memory."""
    moe = weights.moe
    if moe is not None:
        stacked = isinstance(moe.experts, StackedExperts)
        experts = jax.device_put(moe.experts, target) if stacked else moe.experts.put(target)
        router, bias, choices = jax.device_put((moe.router, moe.bias, moe.choices), target)
        moe = moe._replace(router=router, bias=bias, experts=experts, choices=choices)
    return jax.device_put(weights._replace(moe=None), target)._replace(moe=moe)
