"""The importance of each expert, and of each channel of an expert, for its layer's output, without data.

The inputs are Stage 1's, X ~ N(0, 1) (LExI, arXiv 2509.02753, section 3.1), or the layer's inputs on text that the
model generates itself (`forward.sampling`). Importance is a root mean square over tokens: for an expert, of its gate
weight times the norm of its output, zero where it is not selected, which is how far the layer's output moves if nothing
replaces the expert; for a channel, of its activation times the norm of its column of `down`. REAP (arXiv 2510.13999)
uses the first product too, as a mean over those tokens of a text that select the expert.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lexi_search.layers.ffn import compute_hidden
from lexi_search.layers.moe import compute_outputs
from lexi_search.layers.routing import Choice, mixing_weights, route
from lexi_search.layers.spec import Activation, Routing
from lexi_search.layers.weights import ExpertWeights, LayerWeights
from lexi_search.models.model import Model

ROWS = 1024  # tokens at a time
_LEAST_ROWS = 256  # tokens for the channels of one expert

Batches = Iterable[Float[Array, "rows hidden"]]


def score_experts(model: Model, weights: LayerWeights, batches: Batches) -> Float[np.ndarray, " experts"]:
    """The importance of every expert of one layer, in units of the layer's output."""
    total = np.zeros(len(weights.experts))
    routing, count = model.routing, 0
    for x in batches:
        choice = route(x, weights.router, weights.bias, routing=routing, top_k=model.identity.top_k)
        outputs = compute_outputs(x, choice, weights.experts, routing=routing, activation=model.activation)
        total += np.asarray(_sum_squares(outputs, choice, routing=routing, num_experts=total.size), np.float64)
        count += x.shape[0]
    return np.sqrt(total / count)


def score_channels(
    model: Model, weights: LayerWeights, kept: Sequence[int], batches: Batches
) -> Iterator[Float[np.ndarray, " width"]]:
    """The importance of every channel of each of the experts `kept`, in turn, in units of the expert's output.

    Measured on the tokens with the largest gate weights for the expert: as many as each expert has in a balanced load.
    """
    x = jnp.concatenate(list(batches))
    num_experts = len(weights.experts)
    choice = route(x, weights.router, weights.bias, routing=model.routing, top_k=num_experts)
    count = min(max(x.shape[0] * model.identity.top_k // num_experts, _LEAST_ROWS), x.shape[0])
    for expert in kept:
        yield np.asarray(
            _score_channels(x, choice, weights.experts[expert], expert, count=count, activation=model.activation)
        )


def draw_batches(
    hidden_size: int, number: int, *, tokens: int, seed: int, dtype: str
) -> Iterator[Float[Array, "rows hidden"]]:
    """Samples of N(0, 1) in batches of `ROWS`, at least `tokens` in all; a batch's key is (seed, number, batch)."""
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), number)
    for batch in range(-(-tokens // ROWS)):
        sample = jax.random.normal(jax.random.fold_in(key, batch), (ROWS, hidden_size), jnp.float32)
        yield sample.astype(dtype)  # sampled in bfloat16, the variance would be wrong


@partial(jax.jit, static_argnames=("routing", "num_experts"))
def _sum_squares(
    outputs: Float[Array, "tokens K hidden"], choice: Choice, *, routing: Routing, num_experts: int
) -> Float[Array, " experts"]:
    norms = jnp.linalg.norm(outputs.astype(jnp.float32), axis=-1)
    weights = mixing_weights(choice.scores, jnp.int32(choice.scores.shape[1]), routing=routing)
    return jnp.zeros(num_experts, jnp.float32).at[choice.experts].add(jnp.square(weights * norms))


@partial(jax.jit, static_argnames=("count", "activation"))
def _score_channels(
    x: Float[Array, "tokens hidden"],
    choice: Choice,
    weights: ExpertWeights,
    expert: Int[Array, ""],
    *,
    count: int,
    activation: Activation,
) -> Float[Array, " width"]:
    scores = jnp.where(choice.experts == expert, choice.scores, 0.0).sum(axis=1)
    best = x[jax.lax.top_k(scores, count)[1]]
    squares = jnp.square(compute_hidden(best, weights, activation=activation)).mean(axis=0)
    return jnp.sqrt(squares) * jnp.linalg.norm(weights.down.astype(jnp.float32), axis=0)
