"""The routing of a MoE layer in JAX: each token's experts and their mixing weights.

The experts of top-k are the first k of those of top-K sorted by selection score: one choice of K serves every k.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lexi_search.layers.spec import Routing

SCORES = {
    "softmax": jax.nn.softmax,
    "sigmoid": jax.nn.sigmoid,
    "sqrtsoftplus": lambda logits: jnp.sqrt(jax.nn.softplus(logits)),
}


class Choice(NamedTuple):
    """Each token's K chosen experts in order of selection, their unnormalised scores, and all experts' logits."""

    experts: Int[Array, "tokens K"]
    scores: Float[Array, "tokens K"]
    logits: Float[Array, "tokens experts"]


@partial(jax.jit, static_argnames=("routing", "top_k"))
def route(
    x: Float[Array, "tokens hidden"],
    router: Float[Array, "experts hidden"],
    bias: Float[Array, " experts"] | Float[Array, "1 experts"] | None,
    *,
    routing: Routing,
    top_k: int,
) -> Choice:
    """Choose the `top_k` experts of every token, best first; logits and scores are float32 whatever `x` is.

    `bias`, also as [1, experts], is added where the routing's `bias` says.
    """
    logits = _multiply_exactly(x, router)
    if routing.bias == "logits":
        logits = logits + bias.astype(jnp.float32).reshape(1, -1)
    if routing.scoring == "sparsemixer":
        return _route_sparsemixer(logits, routing.jitter, top_k)
    scores = SCORES[routing.scoring](logits)
    keys = scores + bias.astype(jnp.float32).reshape(1, -1) if routing.bias == "selection" else scores
    sort = partial(jax.lax.top_k, k=top_k)
    if routing.num_groups > 1:
        _, experts = sort(_keep_best_groups(keys, routing))
    else:  # a GPU finds a few maxima of finite keys sooner than it sorts all
        pick = partial(_find_largest, count=top_k)
        experts = jax.lax.platform_dependent(keys, cuda=pick, default=lambda keys: sort(keys)[1])
    return Choice(experts, jnp.take_along_axis(scores, experts, axis=-1), logits)


def _find_largest(keys: Float[Array, "tokens experts"], *, count: int) -> Int[Array, "tokens K"]:
    """The places of the largest keys, none of them -inf or -0, in the order of `jax.lax.top_k`."""
    numbers, found = jax.lax.broadcasted_iota(jnp.int32, keys.shape, 1), []
    for _ in range(count):
        found.append(jnp.argmax(keys, axis=-1).astype(jnp.int32))
        keys = jnp.where(numbers == found[-1][:, None], -jnp.inf, keys)
    return jnp.stack(found, axis=1)


@partial(jax.jit, static_argnames="routing")
def look_up(
    x: Float[Array, "tokens hidden"],
    router: Float[Array, "experts hidden"],
    choices: Int[Array, "vocabulary K"],
    tokens: Int[Array | np.ndarray, " tokens"],
    *,
    routing: Routing,
) -> Choice:
    """The experts of every token by `choices`, with the scores that the router gives them; in no order."""
    logits = _multiply_exactly(x, router)
    experts = choices[tokens]
    return Choice(experts, jnp.take_along_axis(SCORES[routing.scoring](logits), experts, axis=-1), logits)


def _multiply_exactly(
    x: Float[Array, "tokens hidden"], router: Float[Array, "experts hidden"]
) -> Float[Array, "tokens experts"]:
    """x @ router.T in float32, in which products of two 16-bit floats of one type are exact without a cast."""
    if x.dtype == router.dtype and x.dtype.itemsize == 2:
        return jnp.matmul(x, router.T, preferred_element_type=jnp.float32)
    return jnp.matmul(x.astype(jnp.float32), router.T.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def _keep_best_groups(keys: Float[Array, "tokens experts"], routing: Routing) -> Float[Array, "tokens experts"]:
    """The keys, with -inf for experts outside each token's `topk_groups` best groups (DeepSeek-V2, section 2.2.2)."""
    grouped = keys.reshape(keys.shape[0], routing.num_groups, -1)
    num_best = 1 if routing.group_score == "max" else 2
    group_scores = jax.lax.top_k(grouped, num_best)[0].sum(axis=-1)
    _, best = jax.lax.top_k(group_scores, routing.topk_groups)
    kept = jax.nn.one_hot(best, routing.num_groups, dtype=jnp.bool_).any(axis=1)
    return jnp.where(kept[:, :, None], grouped, -jnp.inf).reshape(keys.shape)


def _route_sparsemixer(logits: Float[Array, "tokens experts"], jitter: float, top_k: int) -> Choice:
    """SparseMixer without its randomness (arXiv 2409.12136): each expert's score is its softmax among those not yet
    chosen whose distance to the best logit is at most 2 * `jitter`, relative to the larger of the two."""
    remaining, experts, scores = logits, [], []
    for _ in range(top_k):
        best, chosen = remaining.max(axis=-1, keepdims=True), remaining.argmax(axis=-1)
        masked = (best - logits) / jnp.maximum(jnp.abs(logits), best) > 2 * jitter
        shares = jax.nn.softmax(jnp.where(masked, -jnp.inf, remaining), axis=-1)
        experts.append(chosen)
        scores.append(jnp.take_along_axis(shares, chosen[:, None], axis=-1)[:, 0])
        remaining = jnp.where(jax.nn.one_hot(chosen, logits.shape[-1], dtype=jnp.bool_), -jnp.inf, remaining)
    return Choice(jnp.stack(experts, axis=1), jnp.stack(scores, axis=1), logits)


def mixing_weights(
    scores: Float[Array, "tokens K"], k: Int[Array, "..."], *, routing: Routing
) -> Float[Array, "tokens K"]:
    """The weights c_k that mix the K expert outputs into the layer's output at `k` <= K, which may be traced.

    `k` is one number, or [tokens, 1].
    """
    weights = jnp.ones_like(scores) if routing.scales_input else scores
    kept = jnp.where(jnp.arange(scores.shape[-1])[None, :] < k, weights, 0.0)
    mass = kept.sum(axis=-1, keepdims=True)
    whole = mass if routing.exponent is None else weights.sum(axis=-1, keepdims=True)
    if routing.renormalize:
        kept = kept / jnp.maximum(whole + routing.epsilon, routing.norm_min)
    if routing.exponent is not None:
        kept = kept * (whole / jnp.maximum(mass, jnp.finfo(jnp.float32).tiny)) ** routing.exponent
    return kept * jnp.float32(routing.scale)
