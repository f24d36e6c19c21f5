"""The outputs of one MoE layer at every k, from one pass over the experts of the largest k.

Each token's K expert outputs y_1..y_K are computed once, and every k only mixes them differently: Y_k = sum_j c_k[j]
y_j. Distances between outputs come from each token's K x K Gram matrix G, ||Y_k - Y_K||^2 = (c_k - c_K)^T G
(c_k - c_K), which also avoids the rounding of a subtraction of two nearly equal outputs. Shared experts add the same to
every Y_k and cancel.

What the router says of a token also tells, in part, what the dropped experts would have added: a correction of Y_k is
an affine map of low rank from `find_features` to the layer's output.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

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
    exponent: Float[Array | np.ndarray | np.generic, "..."] | None = None,
    *,
    routing: Routing,
) -> Float[Array, "tokens hidden"]:
    """The layer's output at `k`, one number or [tokens, 1], without shared experts, float32.

    So is `exponent`, a gate exponent in the place of that of `routing`. The output is needed only to pass tokens on to
    the next layer, and in tests: `squared_distances` does without.
    """
    weights = mixing_weights(scores, k, routing=routing if exponent is None else routing._replace(exponent=exponent))
    # Not a matrix product: so outputs are read once, in the type that they are stored in.
    return (weights[:, :, None] * outputs.astype(jnp.float32)).sum(axis=1)


class Correction(NamedTuple):
    """B A phi + c, which is added to a layer's output at each of some values of k; float32.

    phi is of `find_features`. `A` maps it to `rank` numbers, and `B` those to the layer's output. Tokens of which the
    router sees nothing, `find_seen`, get nothing.
    """

    A: Float[Array, "variants rank features"]
    B: Float[Array, "variants hidden rank"]
    c: Float[Array, "variants hidden"]


def find_features(choice: Choice, k: Int[Array, "..."], *, routing: Routing) -> Float[Array, "tokens features"]:
    """phi, three numbers an expert: its logit, then its mixing weight at K if it is among the k kept experts, then the
    same if it is one of the K - k dropped ones; 0 for all others. `k` is one number, or [tokens, 1].
    """
    plain = routing._replace(exponent=None)
    top_k = choice.scores.shape[-1]
    weights = mixing_weights(choice.scores, jnp.asarray(top_k, jnp.int32), routing=plain)
    kept = jnp.where(jnp.arange(top_k)[None, :] < k, weights, 0.0)
    rows, empty = jnp.arange(len(weights))[:, None], jnp.zeros_like(choice.logits)
    spread = [empty.at[rows, choice.experts].set(part) for part in (kept, weights - kept)]
    return jnp.concatenate([choice.logits, *spread], axis=1)


def find_seen(choice: Choice) -> Bool[Array, " tokens"]:
    """The tokens that have any logit but zero.

    The hidden state of a token whose embedding is zero, as of padding, stays zero in every layer; what its experts add
    is zero, and a constant would move it.
    """
    return (choice.logits != 0).any(axis=1)


@partial(jax.jit, static_argnames="routing")
def correct(
    choice: Choice, k: Int[Array, "..."], correction: Correction, *, routing: Routing
) -> Float[Array, "tokens hidden"]:
    """What the correction adds at `k`, one number or [tokens, 1]; tokens are as many for each of its variants."""
    features = find_features(choice, k, routing=routing).reshape(len(correction.c), -1, correction.A.shape[2])
    precision = jax.lax.Precision.HIGHEST
    inner = jnp.einsum("vtf,vrf->vtr", features, correction.A, precision=precision)
    added = jnp.einsum("vtr,vhr->vth", inner, correction.B, precision=precision) + correction.c[:, None]
    return jnp.where(find_seen(choice)[:, None], added.reshape(-1, added.shape[-1]), 0.0)


@partial(jax.jit, static_argnames="routing")
def corrected_distances(
    outputs: Float[Array, "tokens K hidden"], choice: Choice, correction: Correction, *, routing: Routing
) -> Float[Array, "tokens K"]:
    """||Y_k - Y_K||^2 of every token for k = 1..K, with `correction` for k = 1..K-1; the last column is zero."""
    change = mixing_changes(choice.scores, routing=routing)

    def measure(k: Int[Array, ""]) -> Float[Array, " tokens"]:
        own = jax.tree.map(lambda array: array[None, k - 1], correction)
        moved = (change[:, k - 1, :, None] * outputs.astype(jnp.float32)).sum(axis=1)
        return jnp.square(moved + correct(choice, k, own, routing=routing)).sum(axis=1)

    distances = jax.lax.map(measure, jnp.arange(1, outputs.shape[1], dtype=jnp.int32))
    return jnp.pad(distances.T, ((0, 0), (0, 1)))
