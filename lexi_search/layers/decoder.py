"""The forward pass of a decoder without its experts: embedding, token mixers, residual stream, logits.

A layer is `attend`, then the experts on the input that it returns, which the caller computes (`moe` has every k from
one pass), then `finish`. Hidden states keep their element type; those of a model of several residual streams have an
axis for them. Several variants of a model go through as more sequences.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lexi_search.errors import InputError
from lexi_search.layers.ffn import apply_ffn, find_precision
from lexi_search.layers.mixers.attention import apply_affine, normalise
from lexi_search.layers.mixers.attention import attend as attend_causally
from lexi_search.layers.mixers.compressed import attend_compressed
from lexi_search.layers.mixers.ngrams import add_ngrams
from lexi_search.layers.mixers.recurrent import recur
from lexi_search.layers.mixers.streams import Shares, read, write
from lexi_search.layers.spec import Attention, Block, CompressedAttention, Mixer, NGrams, Norm, Residual, Streams
from lexi_search.layers.weights import (
    Affine,
    BlockWeights,
    Connection,
    EndWeights,
    GatedConnection,
    GatedNorm,
    MixerWeights,
    NGramWeights,
)

Hidden = Float[Array, "sequences length *streams hidden"]


class Decoder(NamedTuple):
    """The description of a decoder: everything that a forward pass needs besides the weights and the MoE layers'."""

    blocks: Sequence[Block]  # one for each decoder layer
    tensors: Sequence[BlockWeights]  # their stored tensors, in the place of arrays
    ends: EndWeights
    norm: Norm
    embedding_scale: float
    logit_scale: float
    logit_cap: float = math.inf  # logits are cap * tanh(logits / cap)
    max_length: int | None = None  # of sequences, in tokens; a model computes longer ones in another way
    tables: Mapping[int, Sequence[str]] = MappingProxyType({})  # layer -> parts of its table of n-grams, by their names

    @property
    def streams(self) -> Streams | None:
        """The residual streams; None for a plain one."""
        return self.blocks[0].streams

    @property
    def num_streams(self) -> int:
        return self.streams.count if self.streams else 1


def embed(
    decoder: Decoder, ends: EndWeights, tokens: Int[Array | np.ndarray, "sequences length"], *, dtype: str
) -> Hidden:
    """The hidden states before the first layer, in `dtype`.

    Raises:
        InputError: sequences longer than the attention here is exact for.
    """
    length = tokens.shape[1]
    if decoder.max_length is not None and length > decoder.max_length:
        raise InputError(
            f"sequences of {length} tokens are longer than {decoder.max_length}, up to which this is exact"
        )
    hidden = ends.embedding[tokens].astype(dtype) * jnp.asarray(decoder.embedding_scale, dtype)
    if decoder.streams is None:
        return hidden
    return jnp.broadcast_to(hidden[:, :, None], (*tokens.shape, decoder.num_streams, hidden.shape[-1]))


def attend(
    block: Block,
    weights: BlockWeights,
    hidden: Hidden,
    ngrams: Float[Array, "sequences length width"] | None = None,
) -> tuple[Hidden, Float[Array, "tokens hidden"]]:
    """The hidden states after the token mixer, and the normalised input of the layer's MLP or MoE for every token.

    `ngrams` are the embeddings of those that end at each position, where the layer adds them.
    """
    if ngrams is not None:
        hidden = _add_ngrams(weights.ngrams, hidden, ngrams, norm=block.norm, ngrams=block.ngrams)
    return _attend(weights._replace(moe=None, ngrams=None), hidden, block=block)


def finish(
    block: Block,
    weights: BlockWeights,
    hidden: Hidden,
    x: Float[Array, "tokens hidden"],
    routed: Float[Array, "tokens hidden"] | None,
) -> Hidden:
    """The hidden states after the layer, from the results of `attend` and the output of the routed experts, if any.

    The dense MLP or the shared experts, which every token passes, are computed here.
    """
    return _finish(weights._replace(moe=None, ngrams=None), hidden, x, routed, block=block)


def read_logits(
    decoder: Decoder, ends: EndWeights, hidden: Float[Array, "*rows_and_streams hidden"]
) -> Float[Array, "*rows vocabulary"]:
    """The logits of the next token, float32, from the hidden states after the last layer."""
    return _read_logits(ends._replace(embedding=None), hidden, **_list_traits(decoder))


def read_log_probabilities(
    decoder: Decoder, ends: EndWeights, hidden: Float[Array, "*rows_and_streams hidden"]
) -> Float[Array, "*rows vocabulary"]:
    """Log-probabilities of the next token, float32; one program with the logits, which are not kept beside them."""
    return _read_log_probabilities(ends._replace(embedding=None), hidden, **_list_traits(decoder))


def _list_traits(decoder: Decoder) -> dict[str, Any]:
    """What the end of a model has besides weights: static arguments of `_read_logits`."""
    scale, cap = decoder.logit_scale, decoder.logit_cap
    return {"norm": decoder.norm, "scale": scale, "cap": cap, "streams": decoder.streams}


@partial(jax.jit, static_argnames=("norm", "ngrams"))
def _add_ngrams(
    weights: NGramWeights,
    hidden: Hidden,
    embeddings: Float[Array, "sequences length width"],
    *,
    norm: Norm,
    ngrams: NGrams,
) -> Hidden:
    return add_ngrams(hidden, embeddings, weights, norm=norm, ngrams=ngrams)


@partial(jax.jit, static_argnames="block")
def _attend(weights: BlockWeights, hidden: Hidden, *, block: Block) -> tuple[Hidden, Float[Array, "tokens hidden"]]:
    of_mixer, of_ffn = weights.connections or (None, None)
    if block.mixer is not None:
        own, shares = _open(hidden, of_mixer, block)
        normed = _normalise(own, weights.norms.attention_input, block)
        output = _mix(normed, weights.mixer, block.mixer)
        output = _normalise(output, weights.norms.attention_output, block)
        if shares is not None:
            hidden = write(hidden, output, shares)
        else:
            hidden = _add(normed if block.mixer_residual.normed else hidden, output, block.mixer_residual)
    own, _ = _open(hidden, of_ffn, block)
    x = _normalise(own, weights.norms.ffn_input, block)
    if weights.norms.dense_input is not None:
        x = normalise(own, None, norm=block.norm)
    if block.parallel:
        x = normed
    return x if block.ffn_residual.normed else hidden, x.reshape(-1, x.shape[-1])


def _open(
    hidden: Hidden, connection: Connection | GatedConnection | None, block: Block
) -> tuple[Float[Array, "sequences length hidden"], Shares | None]:
    """What a part of a layer reads, and its shares of several residual streams, if there are."""
    return (hidden, None) if connection is None else read(hidden, connection, streams=block.streams)


def _mix(
    x: Float[Array, "sequences length hidden"], weights: MixerWeights, mixer: Mixer
) -> Float[Array, "sequences length hidden"]:
    """The token mixer's output for every position."""
    if isinstance(mixer, Attention):
        return attend_causally(x, weights, attention=mixer)
    if isinstance(mixer, CompressedAttention):
        return attend_compressed(x, weights, attention=mixer)
    return recur(x, weights, mixer=mixer)


@partial(jax.jit, static_argnames="block")
def _finish(
    weights: BlockWeights,
    hidden: Hidden,
    x: Float[Array, "tokens hidden"],
    routed: Float[Array, "tokens hidden"] | None,
    *,
    block: Block,
) -> Hidden:
    output = jnp.zeros(x.shape, jnp.float32) if routed is None else routed.astype(jnp.float32)
    output = _normalise(output, weights.norms.routed_output, block)
    if weights.ffn is not None:
        norms = weights.norms
        own = x if norms.dense_input is None else x * norms.dense_input.weight.astype(x.dtype)[None, :]
        common = _normalise(apply_ffn(own, weights.ffn, activation=block.activation), norms.dense_output, block)
        if weights.ffn_gate is not None:
            common = common * jax.nn.sigmoid(apply_affine(x, weights.ffn_gate))
        output = output + common.astype(jnp.float32) * jnp.float32(block.ffn_scale)
    output = _normalise(output.astype(hidden.dtype), weights.norms.ffn_output, block)
    output = output.reshape(*hidden.shape[:2], -1)
    if weights.connections is not None:
        _, shares = _open(hidden, weights.connections[1], block)
        return write(hidden, output, shares)
    hidden = _add(hidden, output, block.ffn_residual)
    return hidden if weights.scale is None else hidden * weights.scale.astype(hidden.dtype).reshape(1, 1, 1)


@partial(jax.jit, static_argnames=("norm", "scale", "cap", "streams"))
def _read_logits(
    ends: EndWeights,
    hidden: Float[Array, "*rows_and_streams hidden"],
    *,
    norm: Norm,
    scale: float,
    cap: float,
    streams: Streams | None,
) -> Float[Array, "*rows vocabulary"]:
    if streams is not None:
        if ends.connection is None:
            hidden = hidden.astype(jnp.float32).mean(axis=-2).astype(hidden.dtype)
        else:
            hidden, _ = read(hidden, ends.connection, streams=streams)
    normed = hidden if ends.norm is None else normalise(hidden, ends.norm, norm=norm)
    head = ends.head.weight.astype(normed.dtype)
    logits = jnp.einsum(
        "...h,vh->...v", normed, head, precision=find_precision(normed), preferred_element_type=jnp.float32
    )
    if ends.head.bias is not None:
        logits = logits + ends.head.bias.astype(jnp.float32).reshape((1,) * (logits.ndim - 1) + (-1,))
    logits = logits * jnp.float32(scale)
    return logits if cap == math.inf else jnp.tanh(logits / cap) * jnp.float32(cap)


@partial(jax.jit, static_argnames=("norm", "scale", "cap", "streams"))
def _read_log_probabilities(
    ends: EndWeights, hidden: Float[Array, "*rows_and_streams hidden"], **traits: Any
) -> Float[Array, "*rows vocabulary"]:
    return jax.nn.log_softmax(_read_logits(ends, hidden, **traits), axis=-1)


def _normalise(
    x: Float[Array, "*rows hidden"], weights: Affine | GatedNorm | None, block: Block
) -> Float[Array, "*rows hidden"]:
    if not isinstance(weights, GatedNorm):
        return x if weights is None else normalise(x, weights, norm=block.norm)
    normed = normalise(x, weights.gains, norm=block.norm)
    first, second = weights.gate
    gate = apply_affine(jax.nn.silu(apply_affine(normed, first)), second).astype(jnp.float32)
    return (normed * jax.nn.sigmoid(gate)).astype(normed.dtype)


def _add(hidden: Float[Array, "*rows hidden"], output: Float[Array, "*rows hidden"], residual: Residual) -> Array:
    skip, scale = (jnp.asarray(factor, hidden.dtype) for factor in (residual.skip, residual.scale))
    return hidden * skip + output * scale
