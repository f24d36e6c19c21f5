"""The token mixer of one layer, described: a recurrence where the layer has the tensors of one, else attention."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

from lexi_search.errors import InputError
from lexi_search.layers.ffn import ACTIVATIONS
from lexi_search.layers.spec import GatedDeltaNet, LightningAttention, Mamba, Mamba2, Mixer, Norm, ShortConvolution
from lexi_search.layers.weights import (
    ChannelDeltaWeights,
    ConvolutionWeights,
    DeltaWeights,
    LightningWeights,
    Mamba2Weights,
    MambaWeights,
    MixerWeights,
)
from lexi_search.models.mixers.attention import describe_attention
from lexi_search.models.mixers.compressed import describe_compressed
from lexi_search.models.mixers.source import Source

LIGHTNING_EPS = 1e-6  # of its norm, whatever the config says for others
GATES: Mapping[str, None] = MappingProxyType(dict.fromkeys(("silu", "swish", "sigmoid")))


def describe_mixer(source: Source, kind: str) -> tuple[Mixer, MixerWeights]:
    """The description and tensors of a layer whose kind the config calls `kind`.

    Raises:
        InputError: a kind of attention that is not known; a tensor that is missing or of wrong shape.
    """
    for module, describe in _RECURRENT.items():
        if source.finder.has(module):
            return describe(source)
    return describe_attention(source, kind)


def _describe_delta(source: Source) -> tuple[GatedDeltaNet, DeltaWeights]:
    finder, config = source.finder.at_module("linear_attn."), source.config
    groups, heads, key_dim, value_dim = map(
        config.read_count,
        ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
    )
    if heads % groups:
        raise InputError(f"{config.place}: {heads} linear_num_value_heads are no multiple of {groups} of keys")
    keys, values = groups * key_dim, heads * value_dim
    rows = {"in_proj_qkv": 2 * keys + values, "in_proj_z": values, "in_proj_b": heads, "in_proj_a": heads}
    if finder.has("in_proj_qkvz"):
        rows = {"in_proj_qkvz": 2 * (keys + values), "in_proj_ba": 2 * heads}
    weights = DeltaWeights(
        inputs=tuple(finder.need([name], (count, source.hidden_size)) for name, count in rows.items()),
        conv=finder.need(["conv1d"], (2 * keys + values, 1, None)),
        decay_rate=finder.need_tensor("A_log", (heads,)),
        decay_bias=finder.need_tensor("dt_bias", (heads,)),
        norm=finder.need(["norm"], (value_dim,)),
        o=finder.need(["out_proj"], (source.hidden_size, values)),
    )
    mixer = GatedDeltaNet(
        num_groups=groups,
        num_heads=heads,
        key_dim=key_dim,
        value_dim=value_dim,
        activation=source.activation,
        norm=Norm(source.norm.eps),
        gate=config.read_choice("output_gate_type", GATES),  # as vLLM has it; transformers knows one
    )
    return mixer, weights


def _describe_channel_delta(source: Source) -> tuple[GatedDeltaNet, ChannelDeltaWeights]:
    finder, hidden, family = source.finder.at_module("self_attn."), source.hidden_size, source.family
    rates = finder.need(["b_proj"], (None, hidden))
    heads = finder.get_shape(rates.weight)[0]
    norm = finder.need(["o_norm"], (None,))
    dim = finder.get_shape(norm.weight)[0]
    width = heads * dim
    first = {name: finder.need([f"{name}_a_proj"], (None, hidden)) for name in "fg"}
    ranks = {name: finder.get_shape(part.weight)[0] for name, part in first.items()}
    decay, gate = ((first[name], finder.need([f"{name}_b_proj"], (width, ranks[name]))) for name in "fg")
    weights = ChannelDeltaWeights(
        inputs=tuple(finder.need([f"{name}_proj"], (width, hidden)) for name in "qkv"),
        convs=tuple(finder.need([f"{name}_conv1d"], (width, 1, None)) for name in "qkv"),
        rates=rates,
        decay=decay,
        gate=gate,
        decay_rate=finder.need_tensor("A_log", (heads,) if family.decay_bound else (1, 1, heads, 1)),
        decay_bias=finder.need_tensor("dt_bias", (width,)),
        norm=norm,
        o=finder.need(["o_proj"], (hidden, width)),
    )
    bound = family.decay_bound(source.config) if family.decay_bound else None
    mixer = GatedDeltaNet(heads, heads, dim, dim, source.activation, Norm(source.norm.eps), "sigmoid", bound)
    return mixer, weights


def _describe_mamba2(source: Source, stem: str) -> tuple[Mamba2, Mamba2Weights]:
    finder, config, hidden = source.finder.at_module(stem), source.config, source.hidden_size
    heads = config.read_count("mamba_n_heads", "mamba_num_heads")
    groups = config.read_count("mamba_n_groups", "n_groups")
    state = config.read_count("mamba_d_state", "ssm_state_size")
    o = finder.need(["out_proj"], (hidden, None))
    width = finder.get_shape(o.weight)[1]
    if width % heads or heads % groups:
        thing = f"{heads} heads and {groups} groups of Mamba-2"
        raise InputError(f"{config.place}: {thing} do not fit {o.weight.name} of {width} columns")
    channels = width + 2 * groups * state
    weights = Mamba2Weights(
        input=finder.need(["in_proj"], (width + channels + heads, hidden)),
        conv=finder.need(["conv1d"], (channels, 1, None)),
        decay_rate=finder.need_tensor("A_log", (heads,)),
        step_bias=finder.need_tensor("dt_bias", (heads,)),
        skip=finder.need_tensor("D", (heads,)),
        norm=finder.need(["norm"], (width,)),
        o=o,
    )
    activation = config.read_choice("mamba_hidden_act", dict.fromkeys((source.activation, *ACTIVATIONS)))
    return Mamba2(groups, heads, width // heads, state, activation, Norm(source.norm.eps)), weights


def _describe_mamba(source: Source) -> tuple[Mamba, MambaWeights]:
    finder, hidden = source.finder.at_module("mamba."), source.hidden_size
    decay_rate = finder.need_tensor("A_log", (None, None))
    channels, state = finder.get_shape(decay_rate)
    steps = finder.need(["dt_proj"], (channels, None))
    rank = finder.get_shape(steps.weight)[1]
    steps = steps._replace(bias=finder.need_tensor("dt_proj.bias", (channels,)))
    widths = {"dt_layernorm": rank, "b_layernorm": state, "c_layernorm": state}
    weights = MambaWeights(
        input=finder.need(["in_proj"], (2 * channels, hidden)),
        conv=finder.need(["conv1d"], (channels, 1, None)),
        selection=finder.need(["x_proj"], (rank + 2 * state, channels)),
        norms=tuple(finder.need([name], (width,)) for name, width in widths.items()),
        steps=steps,
        decay_rate=decay_rate,
        skip=finder.need_tensor("D", (channels,)),
        o=finder.need(["out_proj"], (hidden, channels)),
    )
    return Mamba(state, source.activation, Norm(source.norm.eps)), weights


def _describe_lightning(source: Source) -> tuple[LightningAttention, LightningWeights]:
    finder, config, hidden = source.finder.at_module("self_attn."), source.config, source.hidden_size
    heads = config.read_count("num_attention_heads")
    norm = finder.need(["norm"], (None,))
    width = finder.get_shape(norm.weight)[0]
    if width % heads:
        raise InputError(f"{config.place}: {heads} heads do not fit {norm.weight.name} of {width} values")
    weights = LightningWeights(
        qkv=finder.need(["qkv_proj"], (3 * width, hidden)),
        gate=finder.need(["output_gate"], (width, hidden)),
        norm=norm,
        o=finder.need(["out_proj"], (hidden, width)),
    )
    # ALiBi's slopes, less steep in later layers.
    depth = 1 - source.layer / (source.num_layers - 1 + 1e-5) + 1e-5
    slopes = tuple(2.0 ** (-8 * (head + 1) / heads) * depth for head in range(heads))
    return LightningAttention(slopes, source.activation, Norm(LIGHTNING_EPS)), weights


def _describe_convolution(source: Source) -> tuple[ShortConvolution, ConvolutionWeights]:
    finder, hidden = source.finder.at_module("conv."), source.hidden_size
    weights = ConvolutionWeights(
        input=finder.need(["in_proj"], (3 * hidden, hidden)),
        conv=finder.need(["conv"], (hidden, 1, None)),
        o=finder.need(["out_proj"], (hidden, hidden)),
    )
    return ShortConvolution(hidden), weights


# A module that a layer has -> the description of its kind of recurrence, or of an attention of its own.
_RECURRENT: Mapping[str, Callable[[Source], tuple[Mixer, MixerWeights]]] = MappingProxyType(
    {
        "linear_attn.in_proj_qkvz": _describe_delta,
        "linear_attn.in_proj_qkv": _describe_delta,
        "self_attn.f_a_proj": _describe_channel_delta,
        "self_attn.qkv_proj": _describe_lightning,
        "mamba.x_proj": _describe_mamba,
        "mamba.in_proj": partial(_describe_mamba2, stem="mamba."),
        "mixer.in_proj": partial(_describe_mamba2, stem="mixer."),
        "conv.in_proj": _describe_convolution,
        "attn.wkv": describe_compressed,
    }
)
