"""The attention of one layer, described from its tensors and the config: grouped-query or latent."""

import itertools
from collections.abc import Sequence

from lexi_search.artifacts.codec import short
from lexi_search.checkpoint.config import Config, Key
from lexi_search.errors import InputError
from lexi_search.layers.spec import GroupedAttention, LatentAttention, Norm, Rope
from lexi_search.layers.weights import Affine, GroupedWeights, LatentWeights
from lexi_search.models.families.kinds import CHUNKED, FULL, SLIDING
from lexi_search.models.finder import Finder, Stored
from lexi_search.models.mixers.rope import find_temperature, make_rope, read_parameters
from lexi_search.models.mixers.source import REMEDY, Source, resolve

# Module names below that of attention; the first one present counts.
QUERIES, KEYS, VALUES, OUTPUTS = ("q_proj",), ("k_proj",), ("v_proj",), ("o_proj", "out_proj", "dense")
QUERY_NORMS = ("q_norm", "query_layernorm", "q_layernorm")
KEY_NORMS = ("k_norm", "key_layernorm", "k_layernorm")
FUSED_INPUTS = "query_key_value"  # queries, keys and values, one after the other
GATES, SINKS = ("gate_proj", "g_proj", "linear_gate"), ("sinks", "attention_sink_bias", "learnable_sink_param")
LATENT_QUERIES, LOW_RANK_QUERIES = ("q_proj", "q_b_proj"), ("q_a_proj",)
LOW_RANK_QUERY_NORMS = ("q_a_layernorm",)
LATENTS, LATENT_NORMS = ("kv_a_proj_with_mqa",), ("kv_a_layernorm",)
LATENT_KEYS_VALUES = ("kv_b_proj",)


def describe_attention(
    source: Source, kind: str
) -> tuple[GroupedAttention, GroupedWeights] | tuple[LatentAttention, LatentWeights]:
    """The attention of a layer whose kind the config calls `kind`.

    Raises:
        InputError: that kind is not known; a tensor that is missing or of wrong shape.
    """
    if kind not in (FULL, SLIDING) and not (kind == CHUNKED and source.family.chunk):
        raise InputError(f"{source.config.place}: layer_types {short(kind)} is not known; {REMEDY}")
    source = source._replace(finder=source.finder.at_module(source.family.attention))
    return (_describe_latent if any(map(source.finder.has, LATENTS)) else _describe_grouped)(source, kind)


def _describe_grouped(source: Source, kind: str) -> tuple[GroupedAttention, GroupedWeights]:
    finder, config, family, hidden = source.finder, source.config, source.family, source.hidden_size
    heads, kv_heads = family.heads(config, kind, source.layer)
    gated = resolve(config, family.gated)
    fused = finder.take([FUSED_INPUTS], (None, hidden))
    q = finder.need(QUERIES, (None, hidden)) if fused is None else None
    rows, parts = finder.get_shape((q or fused).weight)[0], heads * (1 + gated) + (2 * kv_heads if fused else 0)
    if rows % parts or heads % kv_heads:
        thing = f"{heads} heads and {kv_heads} of keys"
        raise InputError(f"{config.place}: {thing} do not fit {(q or fused).weight.name} of {rows} rows")
    dim = rows // parts
    rows = heads * dim
    value_dim = resolve(config, family.value_dim) or dim
    values = KEYS if family.keys_are_values and family.keys_are_values(config, kind) else VALUES
    if fused is None:
        k, v = finder.need(KEYS, (kv_heads * dim, hidden)), finder.need(values, (kv_heads * value_dim, hidden))
    else:
        q, k, v = _split(fused, (rows, kv_heads * dim, kv_heads * dim))
    weights = GroupedWeights(
        q=q,
        k=k,
        v=v,
        o=finder.need(OUTPUTS, (hidden, heads * value_dim)),
        q_norm=_take_gains(finder, QUERY_NORMS, (dim, rows)),
        k_norm=_take_gains(finder, KEY_NORMS, (dim, kv_heads * dim)),
        gate=_take_gate(finder, rows, heads, hidden),
        sinks=_take_sinks(finder, heads),
    )
    windows = config.values.get("sliding_window") or family.chunk
    unrotated = kind == FULL and family.rotates_windows_only and windows
    rotates = not unrotated or bool(source.dense and family.rotates_dense and family.rotates_dense(config))
    attention = GroupedAttention(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        scale=dim**-0.5 if family.scale is None else resolve(config, family.scale),
        norm=family.head_norm(config) if family.head_norm else source.norm,
        rope=_read_rope(source, dim, kind)[0] if rotates else None,
        window=_read_window(config, kind),
        clip=resolve(config, family.clip),
        norm_last=family.norm_last,
        gated=gated,
        unit=rotates and resolve(config, family.unit),
        chunk=family.chunk(config) if kind == CHUNKED else None,
        growth=family.growth(config) if family.growth and not rotates else None,
        value_scale=resolve(config, family.value_scale),
        unit_values=family.unit_values,
        gate=family.gate,
    )
    return attention, weights


def _split(fused: Affine, extents: Sequence[int]) -> list[Affine]:
    """Some rows each of a matrix and its bias, one after the other."""
    ends = list(itertools.accumulate(extents))
    ranges = [(end - extent, end) for end, extent in zip(ends, extents, strict=True)]
    return [Affine(*(part and Stored(part.name, rows) for part in fused)) for rows in ranges]


def _take_gate(finder: Finder, rows: int, heads: int, hidden: int) -> Affine | None:
    """The projection to the gates of a head's values, or to one for each head."""
    gate = finder.take(GATES, (None, hidden))
    per_head = gate is not None and finder.get_shape(gate.weight)[0] == heads
    return gate if per_head else finder.take(GATES, (rows, hidden))


def _take_sinks(finder: Finder, heads: int) -> Stored | None:
    return next((sinks for name in SINKS if (sinks := finder.take_tensor(name, (heads,)))), None)


def _take_gains(finder: Finder, modules: Sequence[str], extents: tuple[int, int]) -> Affine | None:
    """The gains of a norm of queries or keys: of one head, the same for all, or of all heads together."""
    gains = finder.take(modules, (None,))
    per_head = gains is None or finder.get_shape(gains.weight) == extents[:1]
    return gains if per_head else finder.take(modules, extents[1:])


def _describe_latent(source: Source, kind: str) -> tuple[LatentAttention, LatentWeights]:
    finder, config, hidden = source.finder, source.config, source.hidden_size
    heads = config.read_count("num_attention_heads")
    nope_dim, value_dim = map(config.read_count, ("qk_nope_head_dim", "v_head_dim"))
    unrotated = config.values.get("qk_rope_head_dim") == 0 and not resolve(config, source.family.rotates)
    rope_dim = 0 if unrotated else config.read_count("qk_rope_head_dim")
    q_a = finder.take(LOW_RANK_QUERIES, (None, hidden))
    width = finder.get_shape(q_a.weight)[0] if q_a else hidden
    kv_norm = finder.need(LATENT_NORMS, (None,))
    [rank] = finder.get_shape(kv_norm.weight)
    dim = nope_dim + rope_dim
    gated = q_a is not None and finder.get_shape(finder.need(LATENT_QUERIES, (None, None)).weight)[1] == 2 * width
    weights = LatentWeights(
        q=finder.need(LATENT_QUERIES, (heads * (dim + gated * value_dim), width * (1 + gated))),
        kv_a=finder.need(LATENTS, (rank + rope_dim, hidden)),
        kv_norm=kv_norm,
        kv=finder.need(LATENT_KEYS_VALUES, (heads * (nope_dim + value_dim), rank)),
        o=finder.need(OUTPUTS, (hidden, heads * value_dim)),
        q_a=q_a,
        q_norm=finder.need(LOW_RANK_QUERY_NORMS, (width,)) if q_a else None,
        gate=_take_gate(finder, heads * value_dim, heads, hidden),
        sinks=_take_sinks(finder, heads),
    )
    rope, temperature = _read_rope(source, rope_dim, kind, latent=True)
    attention = LatentAttention(
        num_heads=heads,
        nope_dim=nope_dim,
        rope_dim=rope_dim,
        scale=dim**-0.5 * temperature,
        norm=Norm(resolve(config, source.family.latent_eps)),
        rope=rope,
        window=_read_window(config, kind),
        gated=gated,
    )
    return attention, weights


def _read_rope(source: Source, dim: int, kind: str, *, latent: bool = False) -> tuple[Rope | None, float]:
    """The rotary embedding in layers of that kind, if any, and DeepSeek's factor on attention scores."""
    config, family = source.config, source.family
    if not resolve(config, family.rotates):
        return None, 1.0
    if family.layer_rope is not None:
        config = family.layer_rope(config, kind, source.layer)
    if isinstance(bases := config.values.get("layer_rope_theta"), list):
        if len(bases) != source.num_layers:
            raise InputError(f"{config.place}: layer_rope_theta is of {len(bases)} layers, not of {source.num_layers}")
        if not bases[source.layer]:
            return None, 1.0
        parameters = read_parameters(config, layer_type=kind, theta=bases[source.layer])
    else:
        parameters = read_parameters(config, layer_type=kind)
    if kind == SLIDING and config.values.get("swa_rope_theta") is not None:
        parameters = {**parameters, "rope_theta": config.resolve(Key("swa_rope_theta", parameters["rope_theta"]))}
    if latent:  # the rotary embedding has values of its own, and rotates all of them
        parameters = {**parameters, "partial_rotary_factor": 1.0, "rotary_dim": None}
    interleaved = resolve(config, family.interleaved_latent if latent else family.interleaved)
    rope = make_rope(parameters, dim, place=config.place, interleaved=interleaved)
    return rope, find_temperature(parameters, place=config.place)


def _read_window(config: Config, kind: str) -> int | None:
    return config.read_count("sliding_window") if kind == SLIDING else None
