"""The description of one checkpoint's decoder layers: their computation outside the experts, and their tensors."""

import itertools
import re
from collections.abc import Iterator, Sequence

from lexi_search.checkpoint.config import Config, Key
from lexi_search.checkpoint.reader import Checkpoint
from lexi_search.errors import InputError
from lexi_search.layers.decoder import Decoder
from lexi_search.layers.ffn import ACTIVATIONS
from lexi_search.layers.spec import Activation, Block, Mixer, Norm, Recurrence, Residual
from lexi_search.layers.weights import (
    Affine,
    BlockWeights,
    EndWeights,
    ExpertWeights,
    GatedNorm,
    MixerWeights,
    Norms,
)
from lexi_search.models.decoder_families import FAMILIES
from lexi_search.models.families.config import name_sizes_left_out, read_config
from lexi_search.models.families.decoder import Family
from lexi_search.models.finder import Finder, Stored
from lexi_search.models.mixers.ngrams import describe_ngrams
from lexi_search.models.mixers.recurrent import describe_mixer
from lexi_search.models.mixers.source import REMEDY, Source, resolve
from lexi_search.models.mixers.streams import describe_streams, find_connections, find_last_connection
from lexi_search.models.model import Model, read_limit


def find_first_token(checkpoint: Checkpoint, model: Model, vocabulary: int) -> int | None:
    """The config's `bos_token_id`, or its class' default; None for none, or one outside the vocabulary."""
    places = (checkpoint.text_config.values, checkpoint.config, read_config(checkpoint).values)
    token = next((values["bos_token_id"] for values in places if "bos_token_id" in values), None)
    return token if type(token) is int and 0 <= token < vocabulary else None


def count_tokens(checkpoint: Checkpoint, model: Model, decoder: Decoder) -> int:
    """The number of tokens that the embedding, the LM head and tables of experts have, since some may be padded."""
    ends, choices = decoder.ends, (tensors.choices for tensors in model.tensors.values())
    names = (ends.embedding.name, ends.head.weight.name, *filter(None, choices))
    return min(checkpoint.tensors[name].shape[0] for name in names)


DENSE = ("mlp.", "feed_forward.", "mixer.")
SHARED = (
    *("mlp.shared_expert.", "mlp.shared_experts.", "mlp.shared_mlp.", "shared_mlp."),
    *("block_sparse_moe.shared_experts.", "mixer.shared_experts.", "feed_forward.shared_expert.", "share_expert."),
    "ffn.shared_experts.",
)
SHARED_GATES = ("mlp.shared_expert_gate",)
SPLIT = (("gate_proj", "w1", "linear_gate"), ("up_proj", "w3"), ("down_proj", "w2"))  # modules of an MLP
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
    norm = Norm(resolve(config, family.eps), resolve(config, family.centred), resolve(config, family.offset))
    whole = Source(
        finder=finder,
        config=config,
        family=family,
        norm=norm,
        hidden_size=model.hidden_size,
        activation=model.activation.name,
        num_layers=identity.num_hidden_layers,
        streams=describe_streams(config, family, norm),
    )
    blocks, tensors, tables = [], [], {}
    for layer, kind in enumerate(_list_kinds(config, family, identity.num_hidden_layers)):
        moe = layer in model.tensors
        source = whole._replace(finder=finder.at(f"{stem}layers.{layer}."), layer=layer, dense=not moe)
        with name_sizes_left_out(checkpoint):
            mixer, weights = describe_mixer(source, kind) if _has_mixer(source, moe=moe) else (None, None)
        ngrams = describe_ngrams(source, checkpoint)
        if ngrams is not None:
            tables[layer] = ngrams.table
        blocks.append(_describe_block(source, model, mixer)._replace(ngrams=ngrams and ngrams.hashes))
        tensors.append(_find_block(source, weights, moe=moe)._replace(ngrams=ngrams and ngrams.weights))
    _refuse_unused(checkpoint, model, finder, stem, family.left_out)
    parts = (part for block in blocks for part in (block.mixer, getattr(block.mixer, "rope", None)))
    limits = {getattr(part, "max_length", None) for part in parts} | {resolve(config, family.max_length)}
    return Decoder(
        blocks=tuple(blocks),
        tensors=tuple(tensors),
        ends=_find_ends(whole, checkpoint, stem),
        norm=norm,
        embedding_scale=resolve(config, family.embedding_scale),
        logit_scale=resolve(config, family.logit_scale),
        logit_cap=resolve(config, family.logit_cap),
        max_length=min((limit for limit in limits if limit), default=None),
        tables=tables,
    )


def _describe_block(source: Source, model: Model, mixer: Mixer | None) -> Block:
    config, family = source.config, source.family
    scale = 1.0 if source.dense else resolve(config, family.shared_scale)
    activation = _find_activation(model, config, family, source.layer)
    residuals = _list_residuals(config, family, mixer)
    return Block(mixer, source.norm, activation, family.parallel, scale, *residuals, source.streams)


def _list_residuals(config: Config, family: Family, mixer: Mixer | None) -> Iterator[Residual]:
    """Those of the token mixer and of the MLP or MoE."""
    if not family.weighs_residuals:
        return itertools.repeat(Residual(resolve(config, family.residual_scale)), 2)
    names = "linear_attn" if isinstance(mixer, Recurrence) else "full_attn", "mlp"
    factors = ((config.resolve(Key(f"{name}_{part}_factor", 1.0)) for part in ("beta", "alpha")) for name in names)
    return (Residual(scale, skip, normed=True) for scale, skip in factors)


def _find_activation(model: Model, config: Config, family: Family, layer: int) -> Activation:
    """That of the dense MLP or the shared experts."""
    limit = read_limit(config, family.limits, layer)
    if limit:
        return model.activation._replace(limit=limit, limits_output=True)
    return model.activation if family.mlp_limit else model.activation._replace(limit=None)


def _list_kinds(config: Config, family: Family, num_layers: int) -> Sequence[str]:
    kinds = family.kinds(config, num_layers)
    if len(kinds) != num_layers:
        raise InputError(f"{config.place}: layer_types is of {len(kinds)} layers, expected {num_layers}")
    return kinds


def _has_mixer(source: Source, *, moe: bool) -> bool:
    dense = source.finder.has(DENSE[-1] + SPLIT[1][0])
    return not (source.family.alternates and (moe or dense))


def _find_block(source: Source, mixer: MixerWeights | None, *, moe: bool) -> BlockWeights:
    finder, hidden, family = source.finder, source.hidden_size, source.family
    norms, has_ffn = family.norms, mixer is None or not family.alternates
    if moe and family.moe_norm:
        norms = norms._replace(ffn_output=family.moe_norm)
    if mixer is None:
        norms = norms._replace(attention_input=None, attention_output=None)
    if not has_ffn:
        norms = norms._replace(ffn_input=None, ffn_output=None)
    norms = Norms(*(name and _need_norm(finder, name, hidden) for name in norms))
    ffn = _find_ffn(source, SHARED if moe and not norms.dense_input else DENSE) if has_ffn else None
    if ffn is None and not moe and has_ffn:
        finder.need([DENSE[0] + SPLIT[0][0]], (None, hidden))
    gate = finder.take(SHARED_GATES, (1, hidden)) if moe else None
    scale = family.layer_scale and finder.need_tensor(family.layer_scale, (1,))
    connections = find_connections(source)
    return BlockWeights(mixer=mixer, norms=norms, ffn=ffn, ffn_gate=gate, scale=scale, connections=connections)


def _need_norm(finder: Finder, name: str, hidden: int) -> Affine | GatedNorm:
    """The gains of a norm, with the two matrices of its gate where it has one (A.X-K2)."""
    first = finder.take([f"{name}.W_down"], (None, hidden))
    if first is None:
        return finder.need([name], (hidden,))
    second = finder.need([f"{name}.W_up"], (hidden, *finder.get_shape(first.weight)[:1]))
    return GatedNorm(finder.need([f"{name}.norm"], (hidden,)), (first, second))


def _find_ffn(source: Source, stems: Sequence[str]) -> ExpertWeights | None:
    finder, hidden = source.finder, source.hidden_size
    for stem in stems:
        gate_names, up_names, down_names = ([stem + name for name in names] for names in SPLIT)
        if any(map(finder.has, gate_names if source.family.gated_mlp else up_names)):
            up = finder.need(up_names, (None, hidden))
            width = finder.get_shape(up.weight)[0]
            gate = finder.need(gate_names, (width, hidden)) if source.family.gated_mlp else Affine(None)
            down = finder.need(down_names, (hidden, width))
            return ExpertWeights(
                gate=gate.weight,
                up=up.weight,
                down=down.weight,
                gate_bias=gate.bias,
                up_bias=up.bias,
                down_bias=down.bias,
            )
        if finder.has(stem + JOINED[0]):
            gate_up = finder.need([stem + JOINED[0]], (None, hidden))
            width = finder.get_shape(gate_up.weight)[0] // 2
            down = finder.need([stem + JOINED[1]], (hidden, width))
            gate, up = (Stored(gate_up.weight.name, rows) for rows in ((0, width), (width, 2 * width)))
            return ExpertWeights(gate=gate, up=up, down=down.weight)
    return None


def _refuse_unused(checkpoint: Checkpoint, model: Model, finder: Finder, stem: str, left_out: tuple[str, ...]) -> None:
    """Raise InputError for a layer's tensor that no description uses: the model does something unknown with it."""
    of_moe = (moe.names for moe in model.tensors.values())
    names = finder.used.union(*of_moe)
    known = {part for name in names for part in finder.tensors[name].parts.values()}
    in_layer = re.compile(rf"{re.escape(stem)}layers\.(\d{{1,9}})\.")
    for name, entry in checkpoint.entries.items():
        layer = in_layer.match(name)
        if layer is None or int(layer[1]) >= model.identity.num_hidden_layers or name in known:
            continue
        if not (name.endswith(LEFT_OUT) or EXPERT.search(name) or name.startswith(left_out, layer.end())):
            raise InputError(f"{entry.file}: what tensor {name} does is not known; {REMEDY}")


def _find_ends(source: Source, checkpoint: Checkpoint, stem: str) -> EndWeights:
    """Embedding, final norm and LM head: a tensor of its own where there is one, even if the config says tied.

    So do vLLM and transformers 5. Without that tensor the LM head is the embedding, unless the config says otherwise.
    """
    finder, config, family, hidden_size = source.finder, source.config, source.family, source.hidden_size
    embedding = finder.need([stem + family.embedding], (None, hidden_size))
    shape = finder.get_shape(embedding.weight)
    norm = None if family.final_norm is None else finder.need([stem + family.final_norm], (hidden_size,))
    heads = [f"{parent}{family.head}" for parent in _list_parents(stem)]
    # Of the language model's config, and of the whole config around it, which may differ.
    tied = [values.get("tie_word_embeddings", False) for values in (config.values, checkpoint.config)]
    head = finder.take(heads, shape)
    if head is None and False in tied and True not in tied:
        head = finder.need(heads, shape)
    connection = find_last_connection(source._replace(finder=finder.at(stem)))
    return EndWeights(embedding.weight, norm, head or embedding, connection)


def _list_parents(stem: str) -> Iterator[str]:
    """The prefix and its parents: `a.b.` -> `a.b.`, `a.`, and the empty string."""
    parts = stem.split(".")[:-1]
    for count in range(len(parts), -1, -1):
        yield "".join(f"{part}." for part in parts[:count])
