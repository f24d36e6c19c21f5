"""One expert's feed-forward network in JAX: its weights, its activation, its product."""

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

ACTIVATIONS: Mapping[str, Any] = MappingProxyType(
    {
        "silu": jax.nn.silu,
        "swish": jax.nn.silu,
        "gelu": partial(jax.nn.gelu, approximate=False),
        "gelu_new": partial(jax.nn.gelu, approximate=True),
        "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
        "relu": jax.nn.relu,
    }
)


class ExpertWeights(NamedTuple):
    """One expert, in the checkpoint's own element type: y = down @ (act(gate @ x) * (up @ x))."""

    gate: Float[Array, "width hidden"]
    up: Float[Array, "width hidden"]
    down: Float[Array, "hidden width"]


def apply_ffn(
    x: Float[Array, "rows hidden"], weights: ExpertWeights, *, activation: str
) -> Float[Array, "rows hidden"]:
    """The expert's output for every row of `x`, in `x`'s element type; the activation itself is float32."""
    gate, up, down = (matrix.astype(x.dtype) for matrix in weights)
    gated = ACTIVATIONS[activation](multiply(x, gate).astype(jnp.float32))
    hidden = gated * multiply(x, up).astype(jnp.float32)
    return multiply(hidden.astype(x.dtype), down)


def multiply(x: Float[Array, "rows inner"], weight: Float[Array, "outer inner"]) -> Float[Array, "rows outer"]:
    """x @ weight.T in their own type, accumulated in float32; float32 operands are never rounded to TF32."""
    return jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())), precision=find_precision(x))


def find_precision(x: Array) -> jax.lax.Precision | None:
    """The precision of a product whose operands are of `x`'s type: float32 stays float32."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
