"""The weights of a decoder, by role, as tuples of arrays: of one MoE layer, of one decoder layer, and of both ends.

`models` builds the same tuples with other leaves in the place of arrays: names of modules, or stored tensors.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, Int

# The share of a device's memory for weights: layers as stored, and a copy of one layer's experts. The rest is for
# activations.
MEMORY_SHARE = 3 / 4


def find_memory() -> int | None:
    """Bytes that JAX has on the first of the local devices; None where it does not tell, as on a CPU."""
    memory = jax.local_devices()[0].memory_stats()
    return memory["bytes_limit"] if memory else None


class Affine(NamedTuple):
    """A matrix [out, in], or the gain of a norm, and its bias if there is one."""

    weight: Any
    bias: Any = None


class GatedNorm(NamedTuple):
    """The gains of a norm whose output y is multiplied by sigmoid(gate[1] @ silu(gate[0] @ y))."""

    gains: Affine
    gate: tuple[Affine, Affine]


class Connection(NamedTuple):
    """What maps the residual streams of a token to the logits of a part's shares of them: `scale` * (matrix) + `base`.

    The matrix is [rows, streams * hidden]; rows are of what is read, of what is written, and of how streams are mixed,
    [streams * streams], as far as there are any. `scale` has a factor for each kind.
    """

    weight: Any
    base: Any
    scale: Any


class GatedConnection(NamedTuple):
    """What a part reads of several residual streams, channel by channel (Qwen4-Exp), and the logits of what it writes.

    It reads the mean of the streams, each normalised with gains of its own, times sigmoid(up silu(down streams / n)).
    Logits are `written` [streams, streams * hidden] of them, likewise divided; there is none at the model's end.
    """

    norm: Affine
    down: Affine
    up: Affine
    written: Affine | None


class NGramWeights(NamedTuple):
    """What an embedding of n-grams is mapped by: to keys for all residual streams, and to a value.

    Norms are of each stream, of the keys, the streams, and the gated values before their convolution.
    """

    key: Affine
    value: Affine
    key_norm: Affine
    query_norm: Affine
    conv_norm: Affine
    conv: Affine


class ExpertWeights(NamedTuple):
    """One expert or dense MLP, in the checkpoint's own element type: y = down @ (act(gate @ x) * (up @ x)).

    Where `gate` is None, y = down @ act(up @ x). Each product adds its bias where there is one. A `limit`, a number,
    bounds act(gate @ x) from above and up @ x on both sides. Where experts work in a latent space, `input` maps x
    there, and `output` y back.
    """

    gate: Float[Array, "width hidden"] | None
    up: Float[Array, "width hidden"]
    down: Float[Array, "hidden width"]
    gate_bias: Float[Array, " width"] | None = None
    up_bias: Float[Array, " width"] | None = None
    down_bias: Float[Array, " hidden"] | None = None
    limit: Float[Array, ""] | None = None
    input: Float[Array, "latent outer"] | None = None
    output: Float[Array, "outer latent"] | None = None


@runtime_checkable
class Experts(Protocol):
    """A sequence of experts, of which each access may read or dequantise one: a check of its type looks at none."""

    def __len__(self) -> int: ...

    def __getitem__(self, expert: int, /) -> ExpertWeights: ...


class Scales(NamedTuple):
    """Factors that a MoE layer has besides: of the router's input and of the experts' [hidden], of their outputs [E].

    The layer's input is then normalised without gains. The router's input is divided by the root of its size, too.
    """

    router: Any
    experts: Any
    outputs: Any


class LayerWeights(NamedTuple):
    """One MoE layer: the router, the bias of its selection or logits (or None), and the experts.

    `choices` has the experts of every token of the vocabulary, where the layer looks them up.

    Where weights are quantised, each access `experts[e]` dequantises again; do not keep many. A layer with `Scales` has
    them multiplied into these weights.
    """

    router: Float[Array, "experts hidden"]
    bias: Float[Array, " experts"] | None
    experts: Experts
    choices: Int[Array, "vocabulary K"] | None = None


class GroupedWeights(NamedTuple):
    """The weights of `GroupedAttention`: q [heads * head_dim, hidden], k and v [kv_heads * head_dim, hidden], o.

    The output projection o is [hidden, heads * head_dim]. A `gate` of q's shape, or with a row for each head, scales
    its input; `sinks` [heads] are attention scores of an extra position without a value.
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
    """Those of `LatentAttention`: queries from x or q_norm(q_a x), keys and values from kv_norm of a part of kv_a x.

    If attention is gated, q projects [q_norm(q_a x), q_a x] to each head's query and gate. `gate` and `sinks` are as in
    `GroupedWeights`.
    """

    q: Affine
    kv_a: Affine
    kv_norm: Affine
    kv: Affine
    o: Affine
    q_a: Affine | None = None
    q_norm: Affine | None = None
    gate: Affine | None = None
    sinks: Any = None


class CompressorWeights(NamedTuple):
    """What makes an entry of a window of positions: projections to values and to the logits of their shares, [head] or,
    where windows overlap, [2 * head] rows; a bias of the logits for each position of a window, and a norm."""

    values: Affine
    gates: Affine
    bias: Any
    norm: Affine


class CompressedWeights(NamedTuple):
    """Those of `CompressedAttention`: queries from q_norm(q_a x), keys from kv_norm(kv x), outputs by o_a and then o.

    The projection o_a is [groups * rank, heads * head_dim / groups]. `sinks` are as in `GroupedWeights`.
    """

    q_a: Affine
    q_norm: Affine
    q: Affine
    kv: Affine
    kv_norm: Affine
    o_a: Affine
    o: Affine
    sinks: Any
    compressor: CompressorWeights | None


class DeltaWeights(NamedTuple):
    """Those of `GatedDeltaNet`: `inputs` are projections to qkv, gate, rates and decays, or two grouped by key head.

    The latter are [groups * (query, key, values, gates)] and [groups * (rates, decays)]. `conv` is
    [channels, 1, width]; `decay_rate` and `decay_bias` have one value for each head, `norm` one for each of a head's.
    """

    inputs: tuple[Affine, ...]
    conv: Affine
    decay_rate: Any
    decay_bias: Any
    norm: Affine
    o: Affine


class ChannelDeltaWeights(NamedTuple):
    """Those of `GatedDeltaNet` where each channel of a key has its decay.

    `inputs` project to queries, keys and values, each with its convolution in `convs`. `decay` and `gate` are products
    of two matrices each. `decay_rate` is [heads], perhaps with axes of 1 around, `decay_bias` [heads * key].
    """

    inputs: tuple[Affine, Affine, Affine]
    convs: tuple[Affine, Affine, Affine]
    rates: Affine
    decay: tuple[Affine, Affine]
    gate: tuple[Affine, Affine]
    decay_rate: Any
    decay_bias: Any
    norm: Affine
    o: Affine


class Mamba2Weights(NamedTuple):
    """Those of `Mamba2`: `input` projects to gate, inputs of the recurrence, and steps; `skip` is its D, [heads]."""

    input: Affine
    conv: Affine
    decay_rate: Any
    step_bias: Any
    skip: Any
    norm: Affine
    o: Affine


class MambaWeights(NamedTuple):
    """Those of `Mamba`: `input` projects to channels and their gates, `selection` these to steps, keys and queries.

    The latter are normalised, and `steps` projects steps to channels. `decay_rate` is [channels, state_dim].
    """

    input: Affine
    conv: Affine
    selection: Affine
    norms: tuple[Affine, Affine, Affine]
    steps: Affine
    decay_rate: Any
    skip: Any
    o: Affine


class LightningWeights(NamedTuple):
    """Those of `LightningAttention`: `qkv` are [heads * (query, key, value)]."""

    qkv: Affine
    gate: Affine
    norm: Affine
    o: Affine


class ConvolutionWeights(NamedTuple):
    """Those of `ShortConvolution`: `input` projects to both gates and the values, three times as many as channels."""

    input: Affine
    conv: Affine
    o: Affine


RecurrenceWeights = (
    DeltaWeights | ChannelDeltaWeights | Mamba2Weights | MambaWeights | LightningWeights | ConvolutionWeights
)
MixerWeights = GroupedWeights | LatentWeights | CompressedWeights | RecurrenceWeights


class Norms(NamedTuple):
    """The norms before and after the token mixer, and before and after the MLP or MoE; None where a family has none.

    Each is an `Affine` or a `GatedNorm`.

    Where a dense MLP stands beside the routed experts, with norms of its own, `dense_input` is the gain of its input
    (the layer's is normalised without one), `dense_output` and `routed_output` are norms before the sum of the two.
    """

    attention_input: Any = None
    attention_output: Any = None
    ffn_input: Any = None
    ffn_output: Any = None
    dense_input: Any = None
    dense_output: Any = None
    routed_output: Any = None


class BlockWeights(NamedTuple):
    """One decoder layer.

    `ffn` is the dense MLP, or the shared experts of a MoE layer, whose output `ffn_gate` [1, hidden] scales if there
    is one. `moe` is the `LayerWeights` of a MoE layer, on the device; None in a dense layer. `scale` [1] multiplies the
    hidden states after the layer, if there is one. Where there are several residual streams, `connections` are those of
    the token mixer and of the MLP or MoE; `ngrams` adds to them first, if there is one.
    """

    mixer: MixerWeights | None
    norms: Norms
    ffn: ExpertWeights | None
    ffn_gate: Affine | None
    moe: Any = None
    scale: Any = None
    connections: tuple[Connection, Connection] | tuple[GatedConnection, GatedConnection] | None = None
    ngrams: NGramWeights | None = None


class EndWeights(NamedTuple):
    """Embedding [vocabulary, hidden], final norm and LM head [vocabulary, hidden].

    The LM head is the embedding where both are one tensor. `connection` is to several residual streams; without one,
    their mean is taken. There may be no norm after it.
    """

    embedding: Any
    norm: Affine | None
    head: Affine
    connection: Connection | GatedConnection | None = None
