"""The description of one checkpoint's decoder layers: their computation outside the experts, and their tensors."""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lexi_search.artifacts.codec import short
from lexi_search.checkpoint.config import LARGEST_FLOAT, Config
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
from lexi_search.models.config_defaults import name_sizes_left_out, read_config
from lexi_search.models.decoder_families import FAMILIES, FULL, SLIDING, Family
from lexi_search.models.finder import Finder, Stored
from lexi_search.models.model import Model
from lexi_search.models.rope import find_temperature, make_rope, read_parameters


def find_first_token(checkpoint: Checkpoint, model: Model, vocabulary: int) -> int | None:
    """The config's `bos_token_id`, or its class' default; None for none, or one outside the vocabulary."""
    places = (checkpoint.text_config.values, checkpoint.config, read_config(checkpoint).values)
    token = next((values["bos_token_id"] for values in places if "bos_token_id" in values), None)
    return token if type(token) is int and 0 <= token < vocabulary else None


def count_tokens(checkpoint: Checkpoint, decoder: Decoder) -> int:
    """The number of tokens that both the embedding and the LM head have, since one of them may be padded."""
    stored, ends = checkpoint.tensors, decoder.ends
    return min(stored[tensor.name].shape[0] for tensor in (ends.embedding, ends.head.weight))


# Module names below `layers.N.`; the first one present counts.
QUERIES, KEYS = ("self_attn.q_proj",), ("self_attn.k_proj",)
VALUES, OUTPUTS = ("self_attn.v_proj",), ("self_attn.o_proj",)
QUERY_NORMS = ("self_attn.q_norm", "self_attn.query_layernorm")
KEY_NORMS = ("self_attn.k_norm", "self_attn.key_layernorm")
GATES, SINKS = ("self_attn.gate_proj",), "self_attn.sinks"
LATENT_QUERIES, LOW_RANK_QUERIES = ("self_attn.q_proj", "self_attn.q_b_proj"), ("self_attn.q_a_proj",)
LOW_RANK_QUERY_NORMS = ("self_attn.q_a_layernorm",)
LATENTS, LATENT_NORMS = ("self_attn.kv_a_proj_with_mqa",), ("self_attn.kv_a_layernorm",)
LATENT_KEYS_VALUES = ("self_attn.kv_b_proj",)
LATENT_EPS = 1e-6  # of the norms of latents, whatever the config says for others
DENSE = ("mlp.",)
SHARED = ("mlp.shared_expert.", "mlp.shared_experts.", "mlp.shared_mlp.", "shared_mlp.")
SHARED_GATES = ("mlp.shared_expert_gate",)
SPLIT = ("gate_proj", "up_proj", "down_proj")  # modules of an MLP
JOINED = ("input_linear", "output_linear")  # gate and up as one tensor
# Tensors that a layer's output does not depend on: buffers that follow from the config, scales of activations and
# caches.
LEFT_OUT = (
    *("rotary_emb.inv_freq", "input_scale", ".input_global_scale", ".activation_scale"),
    # Those of caches and queries, under every name that vLLM maps to its own.
    *(".kv_scale", ".k_scale", ".v_scale", ".q_scale", ".k_zero_point", ".v_zero_point", ".q_zero_point"),
    *(".q.scale", ".k_cache.scale", ".v_cache.scale", ".q_proj.output_scale", ".k_proj.output_scale"),
    *(".v_proj.output_scale", ".self_attn.prob_output_scale"),
)
EXPERT = re.compile(r"\.experts\.\d+\.")  # checked by `moe_tensors`
REMEDY = "use lexi-search profile --input paper, which takes the MoE layers alone"


class _Source(NamedTuple):
    """The inputs to the description of one layer."""

    finder: Finder
    config: Config
    family: Family
    norm: Norm
    hidden_size: int


def describe_decoder(checkpoint: Checkpoint, model: Model) -> Decoder:
    """The description of everything but the experts of a checkpoint, from its config and headers.

    Raises:
        InputError: an unknown family, feature of its config, or tensor of a layer; a tensor that is missing or of wrong
            shape.
    """
    identity = model.identity
    config = read_config(checkpoint)
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
        source = _Source(
            finder=finder.at(f"{stem}layers.{layer}."),
            config=config,
            family=family,
            norm=norm,
            hidden_size=model.hidden_size,
        )
        latent = any(map(source.finder.has, LATENTS))
        with name_sizes_left_out(checkpoint):
            attention, weights = (_describe_latent if latent else _describe_grouped)(source, kind)
        blocks.append(Block(attention, norm=norm, activation=model.activation, residual_scale=residual_scale))
        tensors.append(_find_block(source, weights, moe=layer in model.tensors))
    _refuse_unused(checkpoint, model, finder, stem, family.left_out)
    limits = {block.attention.rope.max_length for block in blocks if block.attention.rope}
    limits.add(_resolve(config, family.max_length))
    return Decoder(
        blocks=tuple(blocks),
        tensors=tuple(tensors),
        ends=_find_ends(finder, config, checkpoint, stem, model.hidden_size),
        norm=norm,
        embedding_scale=_resolve(config, family.embedding_scale),
        logit_scale=_resolve(config, family.logit_scale),
        max_length=min((limit for limit in limits if limit), default=None),
    )


def _resolve(config: Config, value: Any) -> Any:
    """The value of a `Key` or of a function of the config; InputError where that is no finite number."""
    if not callable(value):
        return config.resolve(value)
    try:
        found = value(config)
    except ArithmeticError:
        found = math.inf
    if not abs(found) <= LARGEST_FLOAT:
        name = value.__name__.strip("_").replace("_", " ")
        raise InputError(f"{config.place}: the {name} is not finite; {REMEDY}")
    return found


def _list_kinds(config: Config, family: Family, num_layers: int) -> Sequence[str]:
    kinds = family.kinds(config, num_layers)
    if unknown := [kind for kind in kinds if kind not in (FULL, SLIDING)]:
        raise InputError(f"{config.place}: layer_types {short(unknown[0])} is not known; {REMEDY}")
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
        q=q,
        k=finder.need(KEYS, (kv_heads * dim, hidden)),
        v=finder.need(VALUES, (kv_heads * dim, hidden)),
        o=finder.need(OUTPUTS, (hidden, rows)),
        q_norm=_take_gains(finder, QUERY_NORMS, (dim, rows)),
        k_norm=_take_gains(finder, KEY_NORMS, (dim, kv_heads * dim)),
        gate=finder.take(GATES, (rows, hidden)),
        sinks=finder.take_tensor(SINKS, (heads,)),
    )
    rotates = kind == SLIDING or not family.rotates_windows_only or not config.values.get("sliding_window")
    attention = GroupedAttention(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        scale=dim**-0.5 if family.scale is None else _resolve(config, family.scale),
        norm=source.norm,
        rope=_read_rope(source, dim, kind)[0] if rotates else None,
        window=_read_window(config, kind),
        clip=_resolve(config, family.clip),
        norm_last=family.norm_last,
    )
    return attention, weights


def _take_gains(finder: Finder, modules: Sequence[str], extents: tuple[int, int]) -> Affine | None:
    """The gains of a norm of queries or keys: of one head, the same for all, or of all heads together."""
    gains = finder.take(modules, (None,))
    per_head = gains is None or finder.get_shape(gains.weight) == extents[:1]
    return gains if per_head else finder.take(modules, extents[1:])


def _describe_latent(source: _Source, kind: str) -> tuple[LatentAttention, LatentWeights]:
    finder, config, hidden = source.finder, source.config, source.hidden_size
    heads = config.read_count("num_attention_heads")
    nope_dim, rope_dim, value_dim = map(config.read_count, ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    q_a = finder.take(LOW_RANK_QUERIES, (None, hidden))
    width = finder.get_shape(q_a.weight)[0] if q_a else hidden
    kv_norm = finder.need(LATENT_NORMS, (None,))
    [rank] = finder.get_shape(kv_norm.weight)
    weights = LatentWeights(
        q=finder.need(LATENT_QUERIES, (heads * (nope_dim + rope_dim), width)),
        kv_a=finder.need(LATENTS, (rank + rope_dim, hidden)),
        kv_norm=kv_norm,
        kv=finder.need(LATENT_KEYS_VALUES, (heads * (nope_dim + value_dim), rank)),
        o=finder.need(OUTPUTS, (hidden, heads * value_dim)),
        q_a=q_a,
        q_norm=finder.need(LOW_RANK_QUERY_NORMS, (width,)) if q_a else None,
    )
    rope, temperature = _read_rope(source, rope_dim, kind, latent=True)
    attention = LatentAttention(
        num_heads=heads,
        nope_dim=nope_dim,
        rope_dim=rope_dim,
        scale=(nope_dim + rope_dim) ** -0.5 * temperature,
        norm=Norm(LATENT_EPS),
        rope=rope,
        window=_read_window(config, kind),
    )
    return attention, weights


def _read_rope(source: _Source, dim: int, kind: str, *, latent: bool = False) -> tuple[Rope, float]:
    """The rotary embedding in layers of that kind, and DeepSeek's factor on attention scores."""
    config, family = source.config, source.family
    parameters = read_parameters(config, layer_type=kind)
    if latent:  # the rotary embedding has values of its own, and rotates all of them
        parameters = {**parameters, "partial_rotary_factor": 1.0, "rotary_dim": None}
    interleaved = _resolve(config, family.interleaved_latent if latent else family.interleaved)
    rope = make_rope(parameters, dim, place=config.place, interleaved=interleaved)
    return rope, find_temperature(parameters, place=config.place)


def _read_window(config: Config, kind: str) -> int | None:
    return config.read_count("sliding_window") if kind == SLIDING else None


def _find_block(source: _Source, attention: GroupedWeights | LatentWeights, *, moe: bool) -> BlockWeights:
    finder, hidden = source.finder, source.hidden_size
    norms = Norms(*(name and finder.need([name], (hidden,)) for name in source.family.norms))
    ffn = _find_ffn(finder, SHARED if moe else DENSE, hidden)
    if ffn is None and not moe:
        finder.need([DENSE[0] + SPLIT[0]], (None, hidden))
    gate = finder.take(SHARED_GATES, (1, hidden)) if moe else None
    return BlockWeights(attention=attention, norms=norms, ffn=ffn, ffn_gate=gate)


def _find_ffn(finder: Finder, stems: Sequence[str], hidden_size: int) -> ExpertWeights | None:
    for stem in stems:
        if finder.has(stem + SPLIT[0]):
            gate = finder.need([stem + SPLIT[0]], (None, hidden_size))
            width = finder.get_shape(gate.weight)[0]
            up = finder.need([stem + SPLIT[1]], (width, hidden_size))
            down = finder.need([stem + SPLIT[2]], (hidden_size, width))
            return ExpertWeights(
                gate=gate.weight,
                up=up.weight,
                down=down.weight,
                gate_bias=gate.bias,
                up_bias=up.bias,
                down_bias=down.bias,
            )
        if finder.has(stem + JOINED[0]):
            gate_up = finder.need([stem + JOINED[0]], (None, hidden_size))
            width = finder.get_shape(gate_up.weight)[0] // 2
            down = finder.need([stem + JOINED[1]], (hidden_size, width))
            gate, up = (Stored(gate_up.weight.name, rows) for rows in ((0, width), (width, 2 * width)))
            return ExpertWeights(gate=gate, up=up, down=down.weight)
    return None


def _refuse_unused(checkpoint: Checkpoint, model: Model, finder: Finder, stem: str, left_out: tuple[str, ...]) -> None:
    """Raise InputError for a layer's tensor that no description uses: the model does something unknown with it."""
    of_moe = ((moe.router, moe.bias, *(moe.experts.fused or ())) for moe in model.tensors.values())
    names = finder.used.union(*of_moe) - {None}
    known = {part for name in names for part in finder.tensors[name].parts.values()}
    in_layer = re.compile(rf"{re.escape(stem)}layers\.(\d{{1,9}})\.")
    for name, entry in checkpoint.entries.items():
        layer = in_layer.match(name)
        if layer is None or int(layer[1]) >= model.identity.num_hidden_layers or name in known:
            continue
        if not (name.endswith(LEFT_OUT) or EXPERT.search(name) or name.startswith(left_out, layer.end())):
            raise InputError(f"{entry.file}: what tensor {name} does is not known; {REMEDY}")


def _find_ends(finder: Finder, config: Config, checkpoint: Checkpoint, stem: str, hidden_size: int) -> EndWeights:
    """Embedding, final norm and LM head: a tensor of its own where there is one, even if the config says tied.

    So do vLLM and transformers 5. Without that tensor the LM head is the embedding, unless the config says otherwise.
    """
    embedding = finder.need([f"{stem}embed_tokens"], (None, hidden_size))
    shape, norm = finder.get_shape(embedding.weight), finder.need([f"{stem}norm"], (hidden_size,))
    heads = [f"{parent}lm_head" for parent in _list_parents(stem)]
    # Of the language model's config, and of the whole config around it, which may differ.
    tied = [values.get("tie_word_embeddings", False) for values in (config.values, checkpoint.config)]
    head = finder.take(heads, shape)
    if head is None and False in tied and True not in tied:
        head = finder.need(heads, shape)
    return EndWeights(embedding.weight, norm, head or embedding)


def _list_parents(stem: str) -> Iterator[str]:
    """The prefix and its parents: `a.b.` -> `a.b.`, `a.`, and the empty string."""
    parts = stem.split(".")[:-1]
    for count in range(len(parts), -1, -1):
        yield "".join(f"{part}." for part in parts[:count])
