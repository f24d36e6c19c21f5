"""Static descriptions of a layer, hashable under `jit`: routing, activation, norms, rotary embedding and attention."""

import math
from typing import Any, NamedTuple


class Routing(NamedTuple):
    """How router logits become the chosen experts and their mixing weights; hashable, static under `jit`.

    Scores are `scoring` of the logits over all experts. Selection takes the top k of the scores within the
    `topk_groups` best of `num_groups` groups, a group being judged by `group_score`: its best expert or the sum of its
    best two. A bias per expert is added to the scores for the selection only, or to the logits. Weights are the
    unbiased scores of the chosen experts, divided by their sum (plus `epsilon`, at least `norm_min`) if `renormalize`,
    times `scale`: a softmax over the chosen logits alone is a softmax over all of them, renormalised. If
    `scales_input`, the scores multiply the experts' inputs instead, and their outputs are summed as they are.

    With an `exponent` b, the k of K experts weigh what they weigh at K times (S_K / S_k)^b, where S_j is the sum of the
    j largest scores: the gate exponent of an allocation. Without, as a router that is told to choose k would have it,
    which is b = 1 if `renormalize` and 0 if not.

    "sparsemixer" (arXiv 2409.12136) chooses one expert after another, each scored by a softmax over the experts that
    are left and whose logits are near the largest, as `jitter` says.
    """

    scoring: str = "softmax"  # or "sigmoid", or "sparsemixer"
    renormalize: bool = False
    scale: float = 1.0
    num_groups: int = 1
    topk_groups: int = 1
    group_score: str = "max"  # or "top2"
    bias: str | None = None  # or "selection", or "logits"
    epsilon: float = 1e-20  # sigmoid scores may all underflow; DeepSeek's guard
    norm_min: float = 0.0
    jitter: float = 0.0
    scales_input: bool = False
    exponent: float | None = None


class Activation(NamedTuple):
    """What an expert does between its products; hashable, static under `jit`.

    Gated experts compute f(gate) * (up + `up_offset`), where f is the function called `name`, or x * sigmoid(alpha x)
    if `alpha` is not 1, and `limit` bounds gate from above and up on both sides. Ungated ones compute f(up).
    """

    name: str = "silu"
    alpha: float = 1.0
    limit: float | None = None
    up_offset: float = 0.0


class Norm(NamedTuple):
    """x / rms(x) * gain, of x less its mean if `centred`, plus a bias if there is one; static under `jit`."""

    eps: float
    centred: bool = False


class Norms(NamedTuple):
    """The four places of a norm in a layer, of which a family uses some: around attention, around the MLP or MoE."""

    attention_input: Any = None
    attention_output: Any = None
    ffn_input: Any = None
    ffn_output: Any = None


class Rope(NamedTuple):
    """How queries and keys are turned; hashable, static under `jit`.

    Pair i of the first 2 * len(frequencies) values of a head turns by `frequencies[i]` radians a position, and becomes
    `scale` times as long. Pairs are neighbours if `interleaved`, else i and i + len(frequencies). In sequences longer
    than `max_length` tokens it would be otherwise.
    """

    frequencies: tuple[float, ...]
    scale: float = 1.0
    interleaved: bool = False
    max_length: int | None = None


class GroupedAttention(NamedTuple):
    """Attention with `num_heads` / `num_kv_heads` queries to each key; hashable, static under `jit`.

    Scores are `scale` times the products. A query sees the last `window` positions, itself included, or all. `clip`
    bounds queries, keys and values on both sides. Queries and keys are normalised by `norm` if there are gains for it:
    one for each value of a head, or one for each value of all heads together, before or after they are turned.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    norm: Norm
    rope: Rope | None
    window: int | None = None
    clip: float = math.inf
    norm_last: bool = False


class LatentAttention(NamedTuple):
    """DeepSeek's attention through low-rank keys and values (arXiv 2405.04434, section 2.1); static under `jit`.

    A head's queries and keys are `nope_dim` values that stay, then `rope_dim` that turn; heads share a key's latter.
    """

    num_heads: int
    nope_dim: int
    rope_dim: int
    scale: float
    norm: Norm
    rope: Rope
    window: int | None = None


Attention = GroupedAttention | LatentAttention


class Block(NamedTuple):
    """What one decoder layer computes outside its experts; hashable, static under `jit`, equal in most layers."""

    attention: Attention
    norm: Norm
    activation: Activation  # of the dense MLP or the shared expert
    residual_scale: float = 1.0
