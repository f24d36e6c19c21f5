"""What goes through a model, and how it is cut: variants, and how many tokens of them at a time."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lexi_search.artifacts.compensation import Maps
from lexi_search.checkpoint.reader import Checkpoint
from lexi_search.errors import check_memory
from lexi_search.layers.decoder import Decoder
from lexi_search.layers.weights import find_memory
from lexi_search.models.loading.residence import NO_ROOM, Residence
from lexi_search.models.model import Model

# Shares of a device's memory: expert outputs computed at once, hidden states of all variants. Where it is not told,
# bytes. Weights that stay have a half of it (`residence`).
PASS_SHARE, PASS_BYTES, HIDDEN_SHARE = 1 / 32, 16 << 20, 1 / 4
CHUNK_TOKENS = 2**11  # of the model, where shapes are to repeat: half of the text that is usual
GROUP_TOKENS = 2**15  # of variants that go through a layer together: more would not make a device faster
CHUNKS_PER_DEVICE = 4  # of the sequences, where several devices work on them one after the other
MODEL = -1  # the variant index of the unreduced model

Hidden = Float[Array, "chunk length *streams hidden"]  # of some of the sequences
Kept = Hidden | Float[np.ndarray, "chunk length *streams hidden"]  # on the device, or in host memory


class Variant(NamedTuple):
    """A top-k for each MoE layer, in order, a gate exponent or None (see `Routing`), and corrections of the layers.

    `maps` has those of every (decoder layer, k below K) of the variant, or is None.
    """

    top_k: tuple[int, ...]
    exponent: float | None = None
    maps: Maps | None = None


class Run(NamedTuple):
    """A checkpoint and the element type of its hidden states: what all forward passes have in common.

    `residence` keeps the weights between passes; without one every pass reads them.
    """

    checkpoint: Checkpoint
    model: Model
    decoder: Decoder
    dtype: str
    residence: Residence | None = None

    def find_residence(self) -> Residence:
        """The residence, or one for a single pass, in which nothing stays."""
        return self.residence or Residence(self.checkpoint, self.model, self.decoder, room=NO_ROOM)


class Plan(NamedTuple):
    """The cut of a forward pass: `chunk` sequences at a time, `together` variants of them at a time.

    `leaders` are those of `find_leaders`. The first `apart` variants go through layers by themselves. `keep` moves
    hidden states to where they wait for the next layer: device or host memory.
    """

    chunk: int
    together: int
    leaders: tuple[tuple[int, ...], ...]
    apart: int
    keep: Callable[[Hidden], Any]


def plan_pass(
    run: Run,
    tokens: Int[np.ndarray, "sequences length"],
    variants: Sequence[Variant],
    *,
    apart: int = 0,
    devices: int = 1,
) -> Plan:
    """The cut of a pass over the `devices` of each replica, which depends on no results."""
    sequences, length = tokens.shape
    leaders = find_leaders(variants, layers=len(run.model.layers), top_k=run.model.top_k)
    chunk = cut(run, sequences, length, devices=devices)
    states = {MODEL, *leaders[-1]}
    keep = _choose_storage(run, tokens.size * len(states))
    together = min(_limit_tokens(run), GROUP_TOKENS) // (chunk * length)
    return Plan(chunk, max(min(together, len(states) - 1), 1), leaders, apart, keep)


def cut(run: Run, sequences: int, length: int, *, devices: int) -> int:
    """The sequences of a chunk, of which each of a replica's `devices` has one at a time; a divisor of `sequences`.

    It does not depend on how many replicas there are: nor do the bits of a chunk's results.
    """
    share = sequences if devices == 1 else sequences // (CHUNKS_PER_DEVICE * devices)
    if jax.default_backend() != "cpu":  # every shape is compiled: one for the model, one for groups of variants
        share = min(share, CHUNK_TOKENS // length)
    return divide(sequences, min(_limit_tokens(run) // length, share))


def find_leaders(variants: Sequence[Variant], *, layers: int, top_k: int) -> tuple[tuple[int, ...], ...]:
    """For each number of MoE layers, from none to all: the variant that each variant is the same as after so many.

    It is the first of them, or `MODEL` while all k are the model's own. Variants that are the same so far share their
    hidden states.
    """
    leaders = [(MODEL,) * len(variants)]
    for place in range(layers):
        first: dict[tuple[Any, ...], int] = {}
        found = []
        for number, (before, variant) in enumerate(zip(leaders[-1], variants, strict=True)):
            k = variant.top_k[place]
            alike = (before, k, variant.exponent, id(variant.maps))
            own = before == MODEL and k == top_k
            found.append(MODEL if own else first.setdefault(alike, number))
        leaders.append(tuple(found))
    return tuple(leaders)


def _limit_tokens(run: Run) -> int:
    """The tokens whose expert outputs are computed at once."""
    memory = find_memory()
    space = PASS_SHARE * memory if memory else PASS_BYTES
    rows = run.model.top_k + run.decoder.num_streams - 1  # expert outputs, and streams beside the usual one
    return int(space // (rows * run.model.hidden_size * jnp.dtype(run.dtype).itemsize))


def _choose_storage(run: Run, tokens: int) -> Callable[[Hidden], Any]:
    """A function that moves hidden states to where they wait for the next layer: the device, or host memory.

    `tokens` counts them over all variants.
    """
    memory, size = find_memory(), check_room(run, tokens)
    return (lambda hidden: hidden) if memory is None or size <= HIDDEN_SHARE * memory else np.asarray


def check_room(run: Run, tokens: int) -> int:
    """Bytes of the hidden states of so many tokens, over all variants; InputError for more than the host has."""
    size = tokens * run.decoder.num_streams * run.model.hidden_size * jnp.dtype(run.dtype).itemsize
    check_memory("hidden states under all changes of k", size, "lower --samples, or take --layers in parts")
    return size


def group(numbers: Sequence[int], variants: Sequence[Variant], size: int) -> Iterator[list[int]]:
    """Groups of at most `size` variants, as lists of their indices; all or none of a group have an exponent."""
    for without in (True, False):
        alike = [number for number in numbers if (variants[number].exponent is None) == without]
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def divide(count: int, most: int) -> int:
    """The largest divisor of `count` up to `most`, at least 1."""
    return next(size for size in range(max(min(count, most), 1), 0, -1) if count % size == 0)
