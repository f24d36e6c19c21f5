"""One feed-forward network (an expert or a dense MLP) in JAX: its activation and its products."""

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lexi_search.layers.spec import Activation
from lexi_search.layers.weights import ExpertWeights

ACTIVATIONS: Mapping[str, Any] = MappingProxyType(
    {
        "silu": jax.nn.silu,
        "swish": jax.nn.silu,
        "gelu": partial(jax.nn.gelu, approximate=False),
        "gelu_new": partial(jax.nn.gelu, approximate=True),
        "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
        "sigmoid": jax.nn.sigmoid,
        "relu": jax.nn.relu,
        "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    }
)


def apply_ffn(
    x: Float[Array, "rows hidden"], weights: ExpertWeights, *, activation: Activation
) -> Float[Array, "rows hidden"]:
    """The expert's output for every row of `x`, in `x`'s element type; the activation itself is float32."""
    hidden = compute_hidden(x, weights, activation=activation)
    output = _project(hidden.astype(x.dtype), weights.down, weights.down_bias)
    return output if weights.output is None else _project(output, weights.output, None)


def compute_hidden(
    x: Float[Array, "rows hidden"], weights: ExpertWeights, *, activation: Activation
) -> Float[Array, "rows width"]:
    """The hidden channels, which `down` multiplies, for every row of `x`; float32."""
    if weights.input is not None:
        x = _project(x, weights.input, None)
    up = _project(x, weights.up, weights.up_bias).astype(jnp.float32)
    if weights.gate is None:
        return _activate(up, activation)
    gate = _project(x, weights.gate, weights.gate_bias).astype(jnp.float32)
    limit = activation.limit if activation.limits_output else weights.limit
    if activation.limit is not None and not activation.limits_output:
        gate, up = jnp.minimum(gate, activation.limit), jnp.clip(up, -activation.limit, activation.limit)
    gate = _activate(gate, activation)
    if limit is not None:
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * (up + activation.up_offset)


def _activate(x: Float[Array, "rows width"], activation: Activation) -> Float[Array, "rows width"]:
    if activation.alpha != 1.0:
        return x * jax.nn.sigmoid(activation.alpha * x)
    return ACTIVATIONS[activation.name](x)


def _project(
    x: Float[Array, "rows inner"], matrix: Float[Array, "outer inner"], bias: Float[Array, " outer"] | None
) -> Float[Array, "rows outer"]:
    product = multiply(x, matrix.astype(x.dtype))
    return product if bias is None else product + bias.astype(x.dtype)[None, :]


def multiply(x: Float[Array, "rows inner"], weight: Float[Array, "outer inner"]) -> Float[Array, "rows outer"]:
    """x @ weight.T in their own type, accumulated in float32; float32 operands are never rounded to TF32."""
    return jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())), precision=find_precision(x))


def find_precision(x: Array) -> jax.lax.Precision | None:
    """The precision of a product whose operands are of `x`'s type: float32 stays float32."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
