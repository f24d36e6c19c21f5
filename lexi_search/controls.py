"""The control variate of Stage 1: what a token's routing alone says about how far its output will move.

c = ||c_k - c_K||^2, the squared change of the mixing weights from k to K experts, whatever the experts are. Were their
outputs orthogonal and of one length, d = ||y_k - y_K||^2 would be c times the square of that length. So c and d go
together, and the mean of c, over many more tokens than anybody would send through experts, tells where the mean of d
lies (`moments.estimate`).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lexi_search.architectures import Routing
from lexi_search.moe import mixing_changes

# Tokens that go through the router only are drawn as those of this many layers further on.
OTHERS = 1 << 20


@partial(jax.jit, static_argnames=("routing", "size"))
def sum_controls(
    scores: Float[Array, "tokens K"], distances: Float[Array, "tokens K"], *, routing: Routing, size: int
) -> Float[Array, "iterations 3 K"]:
    """Sums of c, c^2 and c d over each iteration of `size` tokens, float32; `distances` are the tokens' d."""
    change = mixing_changes(scores, routing=routing)
    control = (change * change).sum(axis=-1)
    terms = jnp.stack([control, control * control, control * distances], axis=1)
    return terms.reshape(-1, size, *terms.shape[1:]).sum(axis=1)
