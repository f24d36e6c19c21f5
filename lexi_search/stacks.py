"""The decoder layers of one checkpoint described: what each computes outside its experts, and from which tensors."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lexi_search.checkpoint import Checkpoint
from lexi_search.decoders import (
    FAMILIES,
    FULL,
    SLIDING,
    Attention,
    Block,
    Family,
    GroupedAttention,
    LatentAttention,
    Norm,
    Norms,
)
from lexi_search.errors import InputError
from lexi_search.ffn import ACTIVATIONS, ExpertWeights
from lexi_search.models import Config, Model, open_config
from lexi_search.rope import Rope, find_temperature, make_rope, read_parameters
from lexi_search.tensors import Tensors

REMEDY = "use --input paper"
# Module names below `layers.N.`; the first that is there counts.
PROJECTIONS = {
    "q": ("self_attn.q_proj",),
    "k": ("self_attn.k_proj",),
    "v": ("self_attn.v_proj",),
    "o": ("self_attn.o_proj",),
    "q_norm": ("self_attn.q_norm", "self_attn.query_layernorm"),
    "k_norm": ("self_attn.k_norm", "self_attn.key_layernorm"),
    "gate": ("self_attn.gate_proj",),
}
LATENT_PROJECTIONS = {
    "q_a": ("self_attn.q_a_proj",),
    "q_norm": ("self_attn.q_a_layernorm",),
    "q": ("self_attn.q_proj", "self_attn.q_b_proj"),
    "kv_a": ("self_attn.kv_a_proj_with_mqa",),
    "kv_norm": ("self_attn.kv_a_layernorm",),
    "kv": ("self_attn.kv_b_proj",),
    "o": ("self_attn.o_proj",),
}
SINKS = "self_attn.sinks"
LATENT_EPS = 1e-6  # whatever the config says of the other norms
DENSE = ("mlp.",)
SHARED = ("mlp.shared_expert.", "mlp.shared_experts.", "mlp.shared_mlp.", "shared_mlp.")
SHARED_GATES = ("mlp.shared_expert_gate",)
SPLIT = ("gate_proj", "up_proj", "down_proj")  # modules of an MLP
JOINED = ("input_linear", "output_linear")  # gate and up in one
# Beside the weights: buffers that follow from the config, what quantised activations and caches need.
EXPERT = re.compile(r"\.experts\.\d+\.")  # known to `layouts`
LEFT_OUT = ("rotary_emb.inv_freq", ".input_scale", ".input_global_scale", ".k_scale", ".v_scale")


@dataclass(frozen=True)
class Stored:
    """A tensor by its logical name, or some of its rows; stands where its array will stand in a tree of weights."""

    name: str
    rows: tuple[int, int] | None = None


class Affine(NamedTuple):
    """A matrix [out, in], or the gain of a norm, and its bias if there is one: arrays, or where they are stored."""

    weight: Any
    bias: Any = None


class GroupedWeights(NamedTuple):
    """Of `GroupedAttention`: q [heads * head_dim, hidden], k and v [kv_heads * head_dim, hidden], o, norms or None.

    A `gate` [heads * head_dim, hidden] scales what goes into o; `sinks` [heads] are scores of nothing.
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
    """Of `LatentAttention`: queries from x, or from q_norm(q_a x); keys and values from kv_norm(kv_a x)."""

    q: Affine
    kv_a: Affine
    kv_norm: Affine
    kv: Affine
    o: Affine
    q_a: Affine | None = None
    q_norm: Affine | None = None


class BlockWeights(NamedTuple):
    """One decoder layer: arrays, or where they are stored.

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


class Decoder(NamedTuple):
    """Everything that carrying tokens through a checkpoint takes besides the weights and `Model`."""

    blocks: Sequence[Block]  # one for each decoder layer
    tensors: Sequence[BlockWeights]
    ends: EndWeights
    norm: Norm
    embedding_scale: float
    logit_scale: float
    max_length: int | None = None  # of sequences, in tokens; longer ones are computed otherwise


def describe_decoder(checkpoint: Checkpoint, model: Model) -> Decoder:
    """Describe what surrounds the experts of a checkpoint from its config and headers.

    Raises:
        InputError: a family, a feature of its config or a tensor of a layer that is not known; one that is missing.
    """
    identity = model.identity
    config = open_config(checkpoint, identity.top_k_key.rpartition(".")[0])
    if identity.model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        thing = f"what {identity.model_type} computes outside its MoE layers is not known"
        raise InputError(f"{config.place}: {thing}; {REMEDY}; known are {known}")
    if model.activation.name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise InputError(f"{config.place}: hidden_act {model.activation.name!r} is not known; known are {known}")
    family, tensors = FAMILIES[identity.model_type], Tensors(checkpoint)
    stem = identity.router[: identity.router.index("layers.{}")]
    norm = Norm(_resolve(config, family.eps), family.centred)
    residual_scale = _resolve(config, family.residual_scale)
    finder = _Finder(tensors)
    blocks, names = [], []
    for layer, kind in enumerate(_list_kinds(config, family, identity.num_hidden_layers)):
        names.append(_find_block(finder.at(f"{stem}layers.{layer}."), family, moe=layer in model.tensors))
        read = _read_latent if isinstance(names[-1].attention, LatentWeights) else _read_grouped
        attention = read(config, family, tensors, names[-1].attention, norm, kind)
        blocks.append(Block(attention, norm, model.activation, residual_scale))
    _refuse_others(checkpoint, model, tensors, stem, finder.found, family.left_out)
    limits = {block.attention.rope.max_length for block in blocks if block.attention.rope}
    limits.add(_resolve(config, family.max_length))
    return Decoder(
        tuple(blocks),
        tuple(names),
        _find_ends(finder, config, checkpoint, stem),
        norm,
        _resolve(config, family.embedding_scale),
        _resolve(config, family.logit_scale),
        min((limit for limit in limits if limit), default=None),
    )


class _Finder:
    """Looks modules up by their names below a prefix, and remembers which tensors it found."""

    def __init__(self, tensors: Tensors, prefix: str = "", found: set[str] | None = None):
        self.tensors, self.prefix = tensors, prefix
        self.found: set[str] = set() if found is None else found

    def at(self, prefix: str) -> "_Finder":
        return _Finder(self.tensors, prefix, self.found)

    def has(self, module: str) -> bool:
        return f"{self.prefix}{module}.weight" in self.tensors

    def take(self, modules: Sequence[str]) -> Affine | None:
        """The weight and perhaps the bias of the first of `modules` that is there."""
        module = next(filter(self.has, modules), None)
        if module is None:
            return None
        names = [f"{self.prefix}{module}.{part}" for part in ("weight", "bias")]
        there = [name if name in self.tensors else None for name in names]
        self.found.update(filter(None, there))
        return Affine(*(name and Stored(name) for name in there))

    def take_plain(self, name: str) -> Stored | None:
        """The tensor of that very name, if it is there."""
        if self.prefix + name not in self.tensors:
            return None
        self.found.add(self.prefix + name)
        return Stored(self.prefix + name)

    def need(self, modules: Sequence[str]) -> Affine:
        found = self.take(modules)
        if found is None:
            wanted = " or ".join(f"{self.prefix}{module}.weight" for module in modules)
            raise InputError(f"{self.tensors.folder}: tensor {wanted} is missing; is the download complete?")
        return found


def _resolve(config: Config, value: Any) -> Any:
    return value(config) if callable(value) else config.resolve(value)


def _list_kinds(config: Config, family: Family, num_layers: int) -> Sequence[str]:
    kinds = family.kinds(config, num_layers)
    if unknown := [kind for kind in kinds if kind not in (FULL, SLIDING)]:
        raise InputError(f"{config.place}: layer_types {unknown[0]!r} is not known; {REMEDY}")
    if len(kinds) != num_layers:
        raise InputError(f"{config.place}: layer_types is of {len(kinds)} layers, expected {num_layers}")
    return kinds


def _find_block(finder: _Finder, family: Family, *, moe: bool) -> BlockWeights:
    latent = any(map(finder.has, LATENT_PROJECTIONS["kv_a"]))
    kind, modules = (LatentWeights, LATENT_PROJECTIONS) if latent else (GroupedWeights, PROJECTIONS)
    optional = kind._field_defaults
    attention = kind(
        **{role: (finder.take if role in optional else finder.need)(names) for role, names in modules.items()}
    )
    if not latent:
        attention = attention._replace(sinks=finder.take_plain(SINKS))
    norms = Norms(*(name and finder.need([name]) for name in family.norms))
    ffn = _find_ffn(finder, SHARED if moe else DENSE)
    if ffn is None and not moe:
        finder.need([DENSE[0] + SPLIT[0]])
    return BlockWeights(attention, norms, ffn, finder.take(SHARED_GATES) if moe else None)


def _find_ffn(finder: _Finder, stems: Sequence[str]) -> ExpertWeights | None:
    for stem in stems:
        if finder.has(stem + SPLIT[0]):
            gate, up, down = (finder.need([stem + name]) for name in SPLIT)
            return ExpertWeights(gate.weight, up.weight, down.weight, gate.bias, up.bias, down.bias)
        if finder.has(stem + JOINED[0]):
            both, down = (finder.need([stem + name]) for name in JOINED)
            rows = finder.tensors[both.weight.name].shape[0]
            gate, up = (Stored(both.weight.name, part) for part in ((0, rows // 2), (rows // 2, rows)))
            return ExpertWeights(gate, up, down.weight)
    return None


def _refuse_others(
    checkpoint: Checkpoint, model: Model, tensors: Tensors, stem: str, found: set[str], left_out: tuple[str, ...]
) -> None:
    """A tensor of a layer that nobody asked for would be something that is not computed."""
    of_moe = ((moe.router, moe.bias, *(moe.experts.fused or ())) for moe in model.tensors.values())
    names = found.union(*of_moe) - {None}
    known = {part for name in names for part in tensors[name].parts.values()}
    in_layer = re.compile(rf"{re.escape(stem)}layers\.(\d+)\.")
    for name, entry in checkpoint.entries.items():
        layer = in_layer.match(name)
        if layer is None or int(layer[1]) >= model.identity.num_hidden_layers or name in known:
            continue
        if not (name.endswith(LEFT_OUT) or EXPERT.search(name) or name.startswith(left_out, layer.end())):
            raise InputError(f"{entry.file}: what tensor {name} does is not known; {REMEDY}")


def _read_grouped(
    config: Config, family: Family, tensors: Tensors, names: GroupedWeights, norm: Norm, kind: str
) -> Attention:
    num_heads = config.read_count("num_attention_heads")
    num_kv_heads = config.read_count("num_key_value_heads", "num_attention_heads")
    (query_rows, _), (key_rows, _) = (tensors[part.weight.name].shape for part in (names.q, names.k))
    head_dim = query_rows // num_heads
    if head_dim * num_heads != query_rows or head_dim * num_kv_heads != key_rows or num_heads % num_kv_heads:
        heads = f"{num_heads} heads and {num_kv_heads} of keys"
        raise InputError(f"{config.place}: {heads} do not fit {names.q.weight.name} of {query_rows} rows")
    turned = kind == SLIDING or not family.turns_windows_only or not config.values.get("sliding_window")
    return GroupedAttention(
        num_heads,
        num_kv_heads,
        head_dim,
        head_dim**-0.5 if family.scale is None else _resolve(config, family.scale),
        norm,
        _read_rope(config, family, head_dim, kind)[0] if turned else None,
        _read_window(config, kind),
        _resolve(config, family.clip),
        family.norm_last,
    )


def _read_latent(
    config: Config, family: Family, tensors: Tensors, names: LatentWeights, norm: Norm, kind: str
) -> Attention:
    num_heads = config.read_count("num_attention_heads")
    nope_dim, rope_dim = config.read_count("qk_nope_head_dim"), config.read_count("qk_rope_head_dim")
    rows = tensors[names.q.weight.name].shape[0]
    if rows != num_heads * (nope_dim + rope_dim):
        heads = f"{num_heads} heads of {nope_dim} + {rope_dim} values"
        raise InputError(f"{config.place}: {heads} do not fit {names.q.weight.name} of {rows} rows")
    rope, temperature = _read_rope(config, family, rope_dim, kind, latent=True)
    return LatentAttention(
        num_heads,
        nope_dim,
        rope_dim,
        (nope_dim + rope_dim) ** -0.5 * temperature,
        Norm(LATENT_EPS),
        rope,
        _read_window(config, kind),
    )


def _read_rope(config: Config, family: Family, dim: int, kind: str, *, latent: bool = False) -> tuple[Rope, float]:
    """The rotation in layers of that kind, and DeepSeek's factor for scores."""
    parameters = read_parameters(config, theta=family.theta, layer_type=kind)
    if latent:  # what turns are values of their own: all of them do
        parameters = parameters | {"partial_rotary_factor": 1.0}
    interleaved = _resolve(config, family.interleaved_latent if latent else family.interleaved)
    return make_rope(parameters, dim, place=config.place, interleaved=interleaved), find_temperature(parameters)


def _read_window(config: Config, kind: str) -> int | None:
    return config.read_count("sliding_window") if kind == SLIDING else None


def _find_ends(finder: _Finder, config: Config, checkpoint: Checkpoint, stem: str) -> EndWeights:
    embedding, norm = finder.need([f"{stem}embed_tokens"]), finder.need([f"{stem}norm"])
    heads = [f"{parent}lm_head" for parent in _list_parents(stem)]
    told = [values.get("tie_word_embeddings") for values in (config.values, checkpoint.config)]
    if told[0] or (any(told) and finder.take(heads) is None):
        return EndWeights(embedding.weight, norm, embedding)
    return EndWeights(embedding.weight, norm, finder.need(heads) if False in told else finder.take(heads) or embedding)


def _list_parents(stem: str) -> Iterator[str]:
    """`a.b.` -> `a.b.`, `a.`, and the empty string."""
    parts = stem.split(".")[:-1]
    for count in range(len(parts), -1, -1):
        yield "".join(f"{part}." for part in parts[:count])
