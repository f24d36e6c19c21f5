"""The outputs of one MoE layer at every k, from one pass over the experts of the largest k.

Each token's K expert outputs y_1..y_K are computed once, and every k only mixes them differently: Y_k = sum_j c_k[j]
y_j. Distances between outputs come from each token's K x K Gram matrix G, ||Y_k - Y_K||^2 = (c_k - c_K)^T G
(c_k - c_K), which also avoids the rounding of a subtraction of two nearly equal outputs. Shared experts add the same to
every Y_k and cancel.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lexi_search.layers.experts import expert_outputs
from lexi_search.layers.ffn import find_precision
from lexi_search.layers.routing import Choice, mixing_weights
from lexi_search.layers.spec import Activation, Routing
from lexi_search.layers.weights import Experts


def compute_outputs(
    x: Float[Array, "tokens hidden"],
    choice: Choice,
    weights: Experts,
    *,
    routing: Routing,
    activation: Activation,
) -> Float[Array, "tokens K hidden"]:
    """The output of each token's K chosen experts, in `x`'s element type; none of them depends on k.

    Where scores scale the experts' inputs, every (token, rank) is a row of its own.
    """
    if not routing.scales_input:
        return expert_outputs(x, choice.experts, weights, activation=activation)
    rows = (x.astype(jnp.float32)[:, None, :] * choice.scores[:, :, None]).astype(x.dtype).reshape(-1, x.shape[1])
    outputs = expert_outputs(rows, choice.experts.reshape(-1, 1), weights, activation=activation)
    return outputs.reshape(*choice.experts.shape, -1)


@partial(jax.jit, static_argnames="routing")
def squared_distances(
    outputs: Float[Array, "tokens K hidden"], scores: Float[Array, "tokens K"], *, routing: Routing
) -> Float[Array, "tokens K"]:
    """||Y_k - Y_K||^2 of every token for k = 1..K, from its Gram matrix; the last column is zero."""
    gram = jnp.einsum(
        "tih,tjh->tij", outputs, outputs, precision=find_precision(outputs), preferred_element_type=jnp.float32
    )
    change = mixing_changes(scores, routing=routing)
    distances = jnp.einsum("tki,tij,tkj->tk", change, gram, change, precision=jax.lax.Precision.HIGHEST)
    # A quadratic form of a Gram matrix, and zero at k = K: only rounding can make it negative, or other than zero.
    return jnp.maximum(distances, 0.0).at[:, -1].set(0.0)


def mixing_changes(scores: Float[Array, "tokens K"], *, routing: Routing) -> Float[Array, "tokens K K"]:
    """c_k - c_K of every token for k = 1..K, which is also the second axis."""
    ks = jnp.arange(1, scores.shape[-1] + 1)
    weights = jax.vmap(lambda k: mixing_weights(scores, k, routing=routing), out_axes=1)(ks)
    return weights - weights[:, -1:, :]


@partial(jax.jit, static_argnames="routing")
def mix(
    outputs: Float[Array, "tokens K hidden"],
    scores: Float[Array, "tokens K"],
    k: Int[Array, "..."],
    *,
    routing: Routing,
) -> Float[Array, "tokens hidden"]:
    """The layer's output at `k`, one number or [tokens, 1], without shared experts, float32.

    It is needed only to pass tokens on to the next layer, and in tests: `squared_distances` does without.
    """
    weights = mixing_weights(scores, k, routing=routing)
    # Not a matrix product: so outputs are read once, in the type that they are stored in.
    return (weights[:, :, None] * outputs.astype(jnp.float32)).sum(axis=1)
