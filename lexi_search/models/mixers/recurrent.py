"""The token mixer of one layer, described: a recurrence where the layer has the tensors of one, else attention."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from lexi_search.artifacts.codec import short
from lexi_search.errors import InputError
from lexi_search.layers.spec import GatedDeltaNet, Mixer, Norm
from lexi_search.layers.weights import DeltaWeights, MixerWeights
from lexi_search.models.decoder_families import FULL, SLIDING
from lexi_search.models.mixers.attention import LATENTS, describe_grouped, describe_latent
from lexi_search.models.mixers.source import REMEDY, Source

GATES: Mapping[str, None] = MappingProxyType(dict.fromkeys(("silu", "swish", "sigmoid")))


def describe_mixer(source: Source, kind: str) -> tuple[Mixer, MixerWeights]:
    """The description and tensors of a layer whose kind the config calls `kind`.

    Raises:
        InputError: the layer has attention, of a kind that is not known; a tensor that is missing or of wrong shape.
    """
    for module, describe in _RECURRENT.items():
        if source.finder.has(module):
            return describe(source)
    if kind not in (FULL, SLIDING):
        raise InputError(f"{source.config.place}: layer_types {short(kind)} is not known; {REMEDY}")
    return (describe_latent if any(map(source.finder.has, LATENTS)) else describe_grouped)(source, kind)


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


# A module that a layer has -> the description of its kind of recurrence.
_RECURRENT: Mapping[str, Callable[[Source], tuple[Mixer, MixerWeights]]] = MappingProxyType(
    {"linear_attn.in_proj_qkvz": _describe_delta, "linear_attn.in_proj_qkv": _describe_delta}
)
