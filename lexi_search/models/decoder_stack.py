"""The decoder layers of one checkpoint described: what each computes outside its experts, and from which tensors."""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lexi_search.checkpoint.config import Config
from lexi_search.checkpoint.reader import Checkpoint
from lexi_search.errors import InputError
from lexi_search.layers.decoder import Decoder
from lexi_search.layers.ffn import ACTIVATIONS
from lexi_search.layers.spec import Block, GroupedAttention, LatentAttention, Norm, Rope
from lexi_search.layers.weights import (
    Affine,
    BlockWeights,
    EndWeights,
    ExpertWeights,
    GroupedWeights,
    LatentWeights,
    Norms,
)
from lexi_search.models.decoder_families import FAMILIES, FULL, SLIDING, Family
from lexi_search.models.finder import Finder, Stored
from lexi_search.models.model import Model
from lexi_search.models.rope import find_temperature, make_rope, read_parameters


def find_first_token(checkpoint: Checkpoint, model: Model, vocabulary: int) -> int | None:
    """The token that texts begin with, by the config; None where it names none that the embedding has."""
    values = checkpoint.open_config(model.config_path).values
    token = values.get("bos_token_id", checkpoint.config.get("bos_token_id"))
    return token if type(token) is int and 0 <= token < vocabulary else None


def count_tokens(checkpoint: Checkpoint, decoder: Decoder) -> int:
    """The size of the vocabulary: tokens that embedding and LM head both have, for one of them may be padded."""
    stored, ends = checkpoint.tensors, decoder.ends
    return min(stored[tensor.name].shape[0] for tensor in (ends.embedding, ends.head.weight))


# Module names below `layers.N.`; the first that is there counts.
QUERIES, KEYS = ("self_attn.q_proj",), ("self_attn.k_proj",)
VALUES, OUTPUTS = ("self_attn.v_proj",), ("self_attn.o_proj",)
QUERY_NORMS = ("self_attn.q_norm", "self_attn.query_layernorm")
KEY_NORMS = ("self_attn.k_norm", "self_attn.key_layernorm")
GATES, SINKS = ("self_attn.gate_proj",), "self_attn.sinks"
LATENT_QUERIES, NARROW_QUERIES = ("self_attn.q_proj", "self_attn.q_b_proj"), ("self_attn.q_a_proj",)
NARROW_QUERY_NORMS = ("self_attn.q_a_layernorm",)
LATENTS, LATENT_NORMS = ("self_attn.kv_a_proj_with_mqa",), ("self_attn.kv_a_layernorm",)
LATENT_KEYS_VALUES = ("self_attn.kv_b_proj",)
LATENT_EPS = 1e-6  # of its norms, whatever the config says of the others
DENSE = ("mlp.",)
SHARED = ("mlp.shared_expert.", "mlp.shared_experts.", "mlp.shared_mlp.", "shared_mlp.")
SHARED_GATES = ("mlp.shared_expert_gate",)
SPLIT = ("gate_proj", "up_proj", "down_proj")  # modules of an MLP
JOINED = ("input_linear", "output_linear")  # gate and up in one
# What a layer's output does not depend on: buffers that follow from the config, scales of activations and caches.
LEFT_OUT = ("rotary_emb.inv_freq", ".input_scale", ".input_global_scale", ".k_scale", ".v_scale")
EXPERT = re.compile(r"\.experts\.\d+\.")  # known to `layouts`
REMEDY = "use lexi-search profile --input paper, which takes the MoE layers alone"


class _Source(NamedTuple):
    """What a layer's description is read from."""

    finder: Finder
    config: Config
    family: Family
    norm: Norm
    hidden_size: int


def describe_decoder(checkpoint: Checkpoint, model: Model) -> Decoder:
    """Describe what surrounds the experts of a checkpoint from its config and headers.

    Raises:
        InputError: a family, a feature of its config or a tensor of a layer that is not known; one that is missing or
            of wrong shape.
    """
    identity = model.identity
    config = checkpoint.open_config(model.config_path)
    if identity.model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        thing = f"what {identity.model_type} computes outside its MoE layers is not known"
        raise InputError(f"{config.place}: {thing}; {REMEDY}; known are {known}")
    if model.activation.name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise InputError(f"{config.place}: hidden_act {model.activation.name!r} is not known; known are {known}")
    family, finder = FAMILIES[identity.model_type], Finder(checkpoint.tensors)
    stem = identity.router[: identity.router.index("layers.{}")]
    norm = Norm(_resolve(config, family.eps), family.centred)
    residual_scale = _resolve(config, family.residual_scale)
    blocks, tensors = [], []
    for layer, kind in enumerate(_list_kinds(config, family, identity.num_hidden_layers)):
        source = _Source(finder.at(f"{stem}layers.{layer}."), config, family, norm, model.hidden_size)
        latent = any(map(source.finder.has, LATENTS))
        attention, weights = (_describe_latent if latent else _describe_grouped)(source, kind)
        blocks.append(Block(attention, norm, model.activation, residual_scale))
        tensors.append(_find_block(source, weights, moe=layer in model.tensors))
    _refuse_others(checkpoint, model, finder, stem, family.left_out)
    limits = {block.attention.rope.max_length for block in blocks if block.attention.rope}
    limits.add(_resolve(config, family.max_length))
    return Decoder(
        tuple(blocks),
        tuple(tensors),
        _find_ends(finder, config, checkpoint, stem, model.hidden_size),
        norm,
        _resolve(config, family.embedding_scale),
        _resolve(config, family.logit_scale),
        min((limit for limit in limits if limit), default=None),
    )


def _resolve(config: Config, value: Any) -> Any:
    return value(config) if callable(value) else config.resolve(value)


def _list_kinds(config: Config, family: Family, num_layers: int) -> Sequence[str]:
    kinds = family.kinds(config, num_layers)
    if unknown := [kind for kind in kinds if kind not in (FULL, SLIDING)]:
        raise InputError(f"{config.place}: layer_types {unknown[0]!r} is not known; {REMEDY}")
    if len(kinds) != num_layers:
        raise InputError(f"{config.place}: layer_types is of {len(kinds)} layers, expected {num_layers}")
    return kinds


def _describe_grouped(source: _Source, kind: str) -> tuple[GroupedAttention, GroupedWeights]:
    finder, config, family, hidden = source.finder, source.config, source.family, source.hidden_size
    heads = config.read_count("num_attention_heads")
    kv_heads = config.read_count("num_key_value_heads", "num_attention_heads")
    q = finder.need(QUERIES, (None, hidden))
    rows = finder.get_shape(q.weight)[0]
    if rows % heads or heads % kv_heads:
        thing = f"{heads} heads and {kv_heads} of keys"
        raise InputError(f"{config.place}: {thing} do not fit {q.weight.name} of {rows} rows")
    dim = rows // heads
    weights = GroupedWeights(
        q,
        finder.need(KEYS, (kv_heads * dim, hidden)),
        finder.need(VALUES, (kv_heads * dim, hidden)),
        finder.need(OUTPUTS, (hidden, rows)),
        _take_gains(finder, QUERY_NORMS, (dim, rows)),
        _take_gains(finder, KEY_NORMS, (dim, kv_heads * dim)),
        finder.take(GATES, (rows, hidden)),
        finder.take_tensor(SINKS, (heads,)),
    )
    turned = kind == SLIDING or not family.turns_windows_only or not config.values.get("sliding_window")
    attention = GroupedAttention(
        heads,
        kv_heads,
        dim,
        dim**-0.5 if family.scale is None else _resolve(config, family.scale),
        source.norm,
        _read_rope(source, dim, kind)[0] if turned else None,
        _read_window(config, kind),
        _resolve(config, family.clip),
        family.norm_last,
    )
    return attention, weights


def _take_gains(finder: Finder, modules: Sequence[str], extents: tuple[int, int]) -> Affine | None:
    """Those of every head alike, or of all heads together."""
    gains = finder.take(modules, (None,))
    alike = gains is None or finder.get_shape(gains.weight) == extents[:1]
    return gains if alike else finder.take(modules, extents[1:])


def _describe_latent(source: _Source, kind: str) -> tuple[LatentAttention, LatentWeights]:
    finder, config, hidden = source.finder, source.config, source.hidden_size
    heads = config.read_count("num_attention_heads")
    nope_dim, rope_dim, value_dim = map(config.read_count, ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    q_a = finder.take(NARROW_QUERIES, (None, hidden))
    width = finder.get_shape(q_a.weight)[0] if q_a else hidden
    kv_norm = finder.need(LATENT_NORMS, (None,))
    [rank] = finder.get_shape(kv_norm.weight)
    weights = LatentWeights(
        finder.need(LATENT_QUERIES, (heads * (nope_dim + rope_dim), width)),
        finder.need(LATENTS, (rank + rope_dim, hidden)),
        kv_norm,
        finder.need(LATENT_KEYS_VALUES, (heads * (nope_dim + value_dim), rank)),
        finder.need(OUTPUTS, (hidden, heads * value_dim)),
        q_a,
        finder.need(NARROW_QUERY_NORMS, (width,)) if q_a else None,
    )
    rope, temperature = _read_rope(source, rope_dim, kind, latent=True)
    scale = (nope_dim + rope_dim) ** -0.5 * temperature
    window = _read_window(config, kind)
    return LatentAttention(heads, nope_dim, rope_dim, scale, Norm(LATENT_EPS), rope, window), weights


def _read_rope(source: _Source, dim: int, kind: str, *, latent: bool = False) -> tuple[Rope, float]:
    """The rotation in layers of that kind, and DeepSeek's factor for scores."""
    config, family = source.config, source.family
    parameters = read_parameters(config, theta=family.theta, layer_type=kind)
    if latent:  # what turns are values of their own: all of them do
        parameters = {**parameters, "partial_rotary_factor": 1.0, "rotary_dim": None}
    interleaved = _resolve(config, family.interleaved_latent if latent else family.interleaved)
    rope = make_rope(parameters, dim, place=config.place, interleaved=interleaved)
    return rope, find_temperature(parameters)


def _read_window(config: Config, kind: str) -> int | None:
    return config.read_count("sliding_window") if kind == SLIDING else None


def _find_block(source: _Source, attention: GroupedWeights | LatentWeights, *, moe: bool) -> BlockWeights:
    finder, hidden = source.finder, source.hidden_size
    norms = Norms(*(name and finder.need([name], (hidden,)) for name in source.family.norms))
    ffn = _find_ffn(finder, SHARED if moe else DENSE, hidden)
    if ffn is None and not moe:
        finder.need([DENSE[0] + SPLIT[0]], (None, hidden))
    return BlockWeights(attention, norms, ffn, finder.take(SHARED_GATES, (1, hidden)) if moe else None)


def _find_ffn(finder: Finder, stems: Sequence[str], hidden_size: int) -> ExpertWeights | None:
    for stem in stems:
        if finder.has(stem + SPLIT[0]):
            gate = finder.need([stem + SPLIT[0]], (None, hidden_size))
            width = finder.get_shape(gate.weight)[0]
            up = finder.need([stem + SPLIT[1]], (width, hidden_size))
            down = finder.need([stem + SPLIT[2]], (hidden_size, width))
            return ExpertWeights(gate.weight, up.weight, down.weight, gate.bias, up.bias, down.bias)
        if finder.has(stem + JOINED[0]):
            both = finder.need([stem + JOINED[0]], (None, hidden_size))
            width = finder.get_shape(both.weight)[0] // 2
            down = finder.need([stem + JOINED[1]], (hidden_size, width))
            gate, up = (Stored(both.weight.name, rows) for rows in ((0, width), (width, 2 * width)))
            return ExpertWeights(gate, up, down.weight)
    return None


def _refuse_others(checkpoint: Checkpoint, model: Model, finder: Finder, stem: str, left_out: tuple[str, ...]) -> None:
    """A tensor of a layer that nobody asked for would be something that is not computed."""
    of_moe = ((moe.router, moe.bias, *(moe.experts.fused or ())) for moe in model.tensors.values())
    names = finder.found.union(*of_moe) - {None}
    known = {part for name in names for part in finder.tensors[name].parts.values()}
    in_layer = re.compile(rf"{re.escape(stem)}layers\.(\d+)\.")
    for name, entry in checkpoint.entries.items():
        layer = in_layer.match(name)
        if layer is None or int(layer[1]) >= model.identity.num_hidden_layers or name in known:
            continue
        if not (name.endswith(LEFT_OUT) or EXPERT.search(name) or name.startswith(left_out, layer.end())):
            raise InputError(f"{entry.file}: what tensor {name} does is not known; {REMEDY}")


def _find_ends(finder: Finder, config: Config, checkpoint: Checkpoint, stem: str, hidden_size: int) -> EndWeights:
    """The head is a tensor of its own, unless the config says or its absence tells that it is the embedding."""
    embedding = finder.need([f"{stem}embed_tokens"], (None, hidden_size))
    shape, norm = finder.get_shape(embedding.weight), finder.need([f"{stem}norm"], (hidden_size,))
    heads = [f"{parent}lm_head" for parent in _list_parents(stem)]
    # The language model's config, and around it that of the whole, which may differ.
    told = [values.get("tie_word_embeddings") for values in (config.values, checkpoint.config)]
    head = None if told[0] else finder.take(heads, shape)
    if head is None and False in told and True not in told:
        head = finder.need(heads, shape)
    return EndWeights(embedding.weight, norm, head or embedding)


def _list_parents(stem: str) -> Iterator[str]:
    """`a.b.` -> `a.b.`, `a.`, and the empty string."""
    parts = stem.split(".")[:-1]
    for count in range(len(parts), -1, -1):
        yield "".join(f"{part}." for part in parts[:count])
