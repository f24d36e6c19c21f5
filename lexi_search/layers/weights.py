"""The weights of a decoder layer by role, as tuples of arrays or of whatever stands in their place."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtyping import Array, Float

from lexi_search.layers.spec import Norms


class ExpertWeights(NamedTuple):
    """One expert, in the checkpoint's own element type: y = down @ (act(gate @ x) * (up @ x)).

    Where `gate` is None, y = down @ act(up @ x). Each product adds its bias where there is one.
    """

    gate: Float[Array, "width hidden"] | None
    up: Float[Array, "width hidden"]
    down: Float[Array, "hidden width"]
    gate_bias: Float[Array, " width"] | None = None
    up_bias: Float[Array, " width"] | None = None
    down_bias: Float[Array, " hidden"] | None = None


class Affine(NamedTuple):
    """A matrix [out, in], or the gain of a norm, and its bias if there is one."""

    weight: Any
    bias: Any = None


class GroupedWeights(NamedTuple):
    """Of `GroupedAttention`: q [heads * head_dim, hidden], k and v [kv_heads * head_dim, hidden], o the way back.

    A `gate` like q scales what goes into o; `sinks` [heads] are the scores of seeing nothing.
    """

    q: Affine
    k: Affine
    v: Affine
    o: Affine
    q_norm: Affine | None = None
    k_norm: Affine | None = None
    gate: Affine | None = None
    sinks: Any = None


class LatentWeights(NamedTuple):
    """Of `LatentAttention`: queries from x or from q_norm(q_a x), keys and values from kv_norm of a part of kv_a x."""

    q: Affine
    kv_a: Affine
    kv_norm: Affine
    kv: Affine
    o: Affine
    q_a: Affine | None = None
    q_norm: Affine | None = None


class BlockWeights(NamedTuple):
    """One decoder layer.

    `ffn` is the dense MLP, or the shared experts of a MoE layer, whose output `ffn_gate` [1, hidden] scales if there
    is one. `moe` are the router and the experts on the device (`weights.LayerWeights`), None in a dense layer.
    """

    attention: GroupedWeights | LatentWeights
    norms: Norms
    ffn: ExpertWeights | None
    ffn_gate: Affine | None
    moe: Any = None


class EndWeights(NamedTuple):
    """What stands before and after the layers: embedding [vocabulary, hidden], final norm, head [vocabulary, hidden].

    The head is the embedding where both are one tensor.
    """

    embedding: Any
    norm: Affine
    head: Affine


MEMORY_SHARE = 3 / 4  # of a device's memory for layers and a stack of experts; the rest is for passes


class LayerWeights(NamedTuple):
    """One MoE layer: the router, the bias of its selection or None, and the experts.

    `experts[e]` dequantises anew where weights are quantised: take it once per use, and keep few.
    """

    router: Float[Array, "experts hidden"]
    bias: Float[Array, " experts"] | None
    experts: Sequence[ExpertWeights]
