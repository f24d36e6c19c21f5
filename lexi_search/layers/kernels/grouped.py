"""The outputs of many tokens and their distances, with all experts in one launch on a GPU.

The results are those of `experts` and `moe`, up to rounding, for the most common kind of expert: gated by SiLU, without
biases. Those compute every other kind, device and element type.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lexi_search.layers.kernels.blocks import (
    BLOCK_COLUMNS,
    BLOCK_ROWS,
    GATED_COLUMNS,
    GRAM_ROWS,
    StackedExperts,
    lay_out,
)
from lexi_search.layers.moe import mixing_changes
from lexi_search.layers.routing import Choice
from lexi_search.layers.spec import Activation, Routing
from lexi_search.layers.weights import MEMORY_SHARE, Experts

ACTIVATIONS = (Activation("silu"), Activation("swish"))
FIRST_JAX = (0, 11)  # the version whose Pallas the kernels are written for


def has_kernels(device: jax.Device, dtype: str) -> bool:
    """Whether there are kernels for `device` and inputs of type `dtype`, whatever the experts are."""
    if jax.__version_info__ < FIRST_JAX or dtype == "float32":
        return False
    return device.platform == "gpu" and device.compute_capability == "9.0"


def import_kernels() -> None:
    """Import what the kernels are written in, which takes half a second; in a thread, while others wait for files."""
    import lexi_search.layers.kernels.hopper  # noqa: F401


def can_group(
    experts: Experts,
    device: jax.Device,
    *,
    top_k: int,
    activation: Activation,
    routing: Routing,
    dtype: str,
) -> bool:
    """Whether this module supports these experts, all of one kind, on `device`."""
    if not has_kernels(device, dtype):
        return False
    expert = experts[0]
    if expert.gate is None or any(bias is not None for bias in expert[3:]) or routing.scales_input:
        return False
    if activation not in ACTIVATIONS or top_k > GRAM_ROWS:
        return False
    width, hidden = expert.up.shape
    size = sum(matrix.size * (matrix.dtype.itemsize + jnp.dtype(dtype).itemsize) for matrix in expert[:3])
    fits = len(experts) * size <= MEMORY_SHARE * device.memory_stats()["bytes_limit"]
    return fits and hidden % BLOCK_COLUMNS == 0 and width % GATED_COLUMNS == 0


@partial(jax.jit, static_argnames=("routing", "interpret"))
def measure_stacked(
    x: Float[Array, "tokens hidden"],
    choice: Choice,
    experts: StackedExperts,
    *,
    routing: Routing,
    interpret: Any = None,
) -> Float[Array, "tokens K"]:
    """||Y_k - Y_K||^2 of every token for k = 1..K, float32."""
    from lexi_search.layers.kernels.hopper import gram_distances

    outputs, places = _multiply(x, choice, experts, interpret)
    return gram_distances(outputs, places, mixing_changes(choice.scores, routing=routing), interpret=interpret)


@partial(jax.jit, static_argnames="interpret")
def stacked_outputs(
    x: Float[Array, "tokens hidden"], choice: Choice, experts: StackedExperts, *, interpret: Any = None
) -> Float[Array, "tokens K hidden"]:
    """The output of each token's K chosen experts, in `x`'s element type."""
    outputs, places = _multiply(x, choice, experts, interpret)
    return outputs[places]


def _multiply(
    x: Float[Array, "tokens hidden"], choice: Choice, experts: StackedExperts, interpret: Any
) -> tuple[Float[Array, "rows hidden"], Int[Array, "tokens K"]]:
    """All expert outputs, sorted by expert, and the row of each (token, rank)."""
    from lexi_search.layers.kernels.hopper import multiply_blocks, spread

    layout = lay_out(choice.experts, num_experts=experts.down.shape[0])
    rows = spread(x, layout.places, rows=layout.block_experts.size * BLOCK_ROWS, interpret=interpret)
    hidden = multiply_blocks(rows, experts.gate_up, *layout[1:], gated=True, interpret=interpret)
    return multiply_blocks(hidden, experts.down, *layout[1:], gated=False, interpret=interpret), layout.places
