"""Static descriptions of a decoder layer: routing, activation, norm, rotary embedding and token mixer.

All are hashable, static under `jit`.
"""

import math
from typing import NamedTuple


class Routing(NamedTuple):
    """The rule from router logits to the chosen experts and their mixing weights.

    Scores are `scoring` of the logits over all experts. Selection takes the top k of the scores within the
    `topk_groups` best of `num_groups` groups; a group's score, by `group_score`, is that of its best expert or the sum
    of its best two. A bias per expert is added to the scores for the selection only, or to the logits. Weights are the
    unbiased scores of the chosen experts, divided by their sum (plus `epsilon`, at least `norm_min`) if `renormalize`,
    times `scale`: a softmax over the chosen logits alone is a softmax over all of them, renormalised. If
    `scales_input`, the scores multiply the experts' inputs instead, and their outputs are summed as they are. If
    `scales_output`, each expert's output has a factor of its own besides, which `LayerWeights` include.

    With an `exponent` b, the weights of the k kept of K experts are their weights at K, times (S_K / S_k)^b, where S_j
    is the sum of the j largest scores: the gate exponent of an allocation. Without, they are those of a router whose
    top-k is k: the same as b = 1 if `renormalize`, else as b = 0.

    "sparsemixer" (arXiv 2409.12136) chooses one expert after another, each scored by a softmax over the remaining
    experts whose logits are near the largest, within `jitter`.
    """

    scoring: str = "softmax"  # or "sigmoid", "sqrtsoftplus" (the root of a softplus), or "sparsemixer"
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
    scales_output: bool = False
    exponent: float | None = None


class Activation(NamedTuple):
    """The activation of an expert, between its products.

    Gated experts compute f(gate) * (up + `up_offset`), where f is the function called `name`, or x * sigmoid(alpha x)
    if `alpha` is not 1, and `limit` bounds gate from above and up on both sides; if `limits_output`, f(gate) instead of
    gate. Ungated ones compute f(up).
    """

    name: str = "silu"
    alpha: float = 1.0
    limit: float | None = None
    up_offset: float = 0.0
    limits_output: bool = False


class Norm(NamedTuple):
    """RMSNorm, x / rms(x) * gain; LayerNorm if `centred`, of x minus its mean; plus a bias if there is one.

    The gain is the stored weight plus `offset`.
    """

    eps: float
    centred: bool = False
    offset: float = 0.0


class Rope(NamedTuple):
    """Rotary embedding of queries and keys.

    Pair i of the first 2 * len(frequencies) values of a head is rotated by `frequencies[i]` radians per position and
    multiplied by `scale`. Pairs are neighbours if `interleaved`, else i and i + len(frequencies). All this holds for
    sequences of at most `max_length` tokens.
    """

    frequencies: tuple[float, ...]
    scale: float = 1.0
    interleaved: bool = False
    max_length: int | None = None


class GroupedAttention(NamedTuple):
    """Grouped-query attention, with `num_heads` / `num_kv_heads` queries for each key.

    Scores are `scale` times the products. A query sees the last `window` positions, itself included, or all. `clip`
    bounds queries, keys and values on both sides. Queries and keys are normalised by `norm` if there are gains for it,
    one for each value of a head or of all heads together: before the rotary embedding, or after it if `norm_last`.
    If `gated`, the projection of queries has a head's gate after its query: the sigmoid scales the head's output.

    If `unit`, queries and keys are normalised without gains; if `unit_values`, so are values. With a `chunk`, a query
    sees only the positions of its own chunk of that many. With `growth` (a, b), a query at position p is multiplied by
    1 + a log(1 + floor((p + 1) / b)).
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
    gated: bool = False
    unit: bool = False
    chunk: int | None = None
    growth: tuple[float, float] | None = None
    value_scale: float = 1.0
    unit_values: bool = False
    gate: str = "sigmoid"  # the function of a `gate` among the weights, or "softplus"


class LatentAttention(NamedTuple):
    """DeepSeek's multi-head latent attention, with low-rank keys and values (arXiv 2405.04434, section 2.1).

    A head's queries and keys have `nope_dim` values without and `rope_dim` with rotary embedding; all heads share the
    latter of a key. If `gated`, queries are projected from their low-rank input both normalised and as it is, and a
    head's gate comes after its query: the sigmoid scales the head's output.
    """

    num_heads: int
    nope_dim: int
    rope_dim: int
    scale: float
    norm: Norm
    rope: Rope | None
    window: int | None = None
    gated: bool = False
    gate: str = "sigmoid"  # the function of a `gate` among the weights


Attention = GroupedAttention | LatentAttention


class CompressedAttention(NamedTuple):
    """DeepSeek-V4's attention: keys of one head, which are values too, for the queries of all heads.

    A query sees the last `window` positions, itself included, and with a `rate` an entry for each window of so many
    positions that is complete. The last values of a head are rotated, by `rope`, those of an entry by the position that
    its window begins with, and those of an output back by its own. Outputs of `num_groups` groups of heads are
    projected apart at first. All this holds for sequences of at most `max_length` tokens.
    """

    num_heads: int
    num_groups: int
    scale: float
    norm: Norm
    rope: Rope
    window: int
    rate: int | None = None
    max_length: int | None = None


class GatedDeltaNet(NamedTuple):
    """A layer of gated delta nets (arXiv 2412.06464): `num_heads` of values in `num_groups` of queries and keys.

    Queries, keys and values pass a short convolution and `activation`. Each head's output is normalised, and scaled by
    the function called `gate` of a projection of the input. Where each of the three has its own convolution, as in Kimi
    Delta Attention (arXiv 2510.26692), a decay is of one channel of a key. With a `decay_bound` its logarithm is that
    times a sigmoid, else minus a softplus.
    """

    num_groups: int
    num_heads: int
    key_dim: int
    value_dim: int
    activation: str
    norm: Norm
    gate: str = "silu"
    decay_bound: float | None = None


class Mamba2(NamedTuple):
    """A Mamba-2 layer (arXiv 2405.21060): `num_heads` states of [state_dim, head_dim], read and written by groups.

    All inputs of the recurrence but the steps pass a short convolution and `activation`. The outputs of the heads of a
    group are scaled by SiLU of a gate, and then normalised together.
    """

    num_groups: int
    num_heads: int
    head_dim: int
    state_dim: int
    activation: str
    norm: Norm


class Mamba(NamedTuple):
    """A Mamba layer (arXiv 2312.00752) with Jamba's norms: each channel has `state_dim` values, each with its decay.

    The channels pass a short convolution and `activation`, and are scaled by SiLU of a gate at last.
    """

    state_dim: int
    activation: str
    norm: Norm


class LightningAttention(NamedTuple):
    """Linear attention with a fixed decay for each head (arXiv 2401.04658): exp(-slope) a token.

    Queries, keys and values are `activation` of a projection. All heads' outputs are normalised together, and scaled
    by the sigmoid of a gate.
    """

    slopes: tuple[float, ...]
    activation: str
    norm: Norm


class ShortConvolution(NamedTuple):
    """LFM2's layer: a causal convolution of gated inputs, gated again."""

    channels: int


Recurrence = GatedDeltaNet | Mamba2 | Mamba | LightningAttention | ShortConvolution
Mixer = Attention | CompressedAttention | Recurrence


class Residual(NamedTuple):
    """What follows a token mixer, or an MLP or MoE: `skip` times the residual stream plus `scale` times their output.

    If `normed`, the stream is replaced by the normalised input of the layer first.
    """

    scale: float = 1.0
    skip: float = 1.0
    normed: bool = False


class Streams(NamedTuple):
    """Several residual streams (hyper-connections), which a part of a layer reads a mixture of and writes to all of.

    The streams of a token, normalised together by `norm`, are mapped to logits. A part reads the sigmoid of its logit,
    plus `eps`, of each stream; its output is added `gain` times the sigmoid of another. With `iterations`, the streams
    are mixed before that, by a matrix that these make doubly stochastic (arXiv 2512.24880); without, `eps` is added to
    what is written, too.
    """

    count: int
    norm: Norm
    eps: float
    gain: float = 2.0
    iterations: int | None = None


class NGrams(NamedTuple):
    """Hashes of n-grams, n = 2 up to the number of `multipliers`, as many for each n.

    An n-gram's tokens times their multipliers are joined by exclusive or. Each hash is that modulo one of `sizes`, and
    its rows in the table begin at one of `offsets`. Texts end with the token `end`.
    """

    multipliers: tuple[int, ...]
    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    end: int


class Block(NamedTuple):
    """One decoder layer without its routed experts; equal for most layers of a model.

    `streams` is None where there is one residual stream, which parts of a layer read as it is. `ngrams` are those whose
    embeddings are added to the streams first, if there are any.
    """

    mixer: Mixer | None  # None where a family's layers are either a token mixer, or an MLP or MoE
    norm: Norm
    activation: Activation  # of the dense MLP or the shared expert
    parallel: bool = False  # the MLP or MoE has the token mixer's input for its own, and both outputs are added
    ffn_scale: float = 1.0  # of the dense MLP's or the shared experts' output
    mixer_residual: Residual = Residual()
    ffn_residual: Residual = Residual()
    streams: Streams | None = None
    ngrams: NGrams | None = None
