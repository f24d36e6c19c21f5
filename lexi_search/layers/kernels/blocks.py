"""The operands of one product of all experts: a layer's experts stacked, and its tokens sorted into blocks."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lexi_search.layers.weights import Experts, ExpertWeights

BLOCK_ROWS, BLOCK_COLUMNS = 128, 256  # of one tile of a product
GATED_COLUMNS = BLOCK_COLUMNS // 2
GRAM_ROWS = 64  # of one Gram matrix, which spans several tokens
COPIED_AT_ONCE = 16  # experts


class StackedExperts(NamedTuple):
    """A layer's experts in two arrays. Blocks of GATED_COLUMNS rows of the gate and of the up projection alternate."""

    gate_up: Float[Array, "experts 2*width hidden"]
    down: Float[Array, "experts hidden width"]


class Layout(NamedTuple):
    """The row of each (token, rank) among rows sorted by expert, in blocks of BLOCK_ROWS of one expert each."""

    places: Int[Array, "tokens K"]
    block_experts: Int[Array, " blocks"]
    num_blocks: Int[Array, "1"]


def stack_experts(experts: Experts, *, dtype: str) -> StackedExperts:
    """The experts in `dtype` on their device, copied a few at a time: an access may dequantise them."""
    up = experts[0].up
    (width, hidden), [device] = up.shape, up.devices()
    shapes = (len(experts), 2 * width, hidden), (len(experts), hidden, width)
    stack = StackedExperts(*(jnp.zeros(shape, dtype, device=device) for shape in shapes))
    for first in range(0, len(experts), COPIED_AT_ONCE):
        group = tuple(experts[i] for i in range(first, min(first + COPIED_AT_ONCE, len(experts))))
        stack = _put_experts(stack, group, np.int32(first))
    return stack


@partial(jax.jit, donate_argnums=0)
def _put_experts(stack: StackedExperts, experts: tuple[ExpertWeights, ...], first: Int[Array, ""]) -> StackedExperts:
    hidden, dtype = stack.down.shape[1], stack.down.dtype
    gate, up = (
        jnp.stack([expert[part] for expert in experts]).astype(dtype).reshape(len(experts), -1, GATED_COLUMNS, hidden)
        for part in (0, 1)
    )
    gate_up = jnp.stack([gate, up], axis=2).reshape(len(experts), -1, hidden)
    down = jnp.stack([expert.down for expert in experts]).astype(dtype)
    put = jax.lax.dynamic_update_slice_in_dim
    return StackedExperts(put(stack.gate_up, gate_up, first, axis=0), put(stack.down, down, first, axis=0))


def lay_out(experts: Int[Array, "tokens K"], *, num_experts: int) -> Layout:
    """Sort (token, rank) pairs by expert; each expert starts a new block."""
    numbers = experts.reshape(-1).astype(jnp.uint8 if num_experts <= 256 else jnp.uint16)  # fewer bits to sort by
    pairs = jnp.arange(numbers.size, dtype=jnp.int32)
    numbers, pairs = jax.lax.sort((numbers, pairs), num_keys=1, is_stable=True)
    numbers = numbers.astype(jnp.int32)
    bounds = jnp.searchsorted(numbers, jnp.arange(num_experts + 1), method="compare_all").astype(jnp.int32)
    blocks = -(-jnp.diff(bounds) // BLOCK_ROWS)
    ends = jnp.cumsum(blocks)
    places = jnp.arange(numbers.size, dtype=jnp.int32) + ((ends - blocks) * BLOCK_ROWS - bounds[:-1])[numbers]
    most = numbers.size // BLOCK_ROWS + num_experts
    owners = jnp.searchsorted(ends, jnp.arange(most), side="right", method="compare_all")
    return Layout(
        places=jnp.zeros_like(pairs).at[pairs].set(places, unique_indices=True).reshape(experts.shape),
        block_experts=jnp.minimum(owners, num_experts - 1).astype(jnp.int32),
        num_blocks=ends[-1:].astype(jnp.int32),
    )
