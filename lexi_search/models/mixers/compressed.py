"""The attention of one layer of DeepSeek-V4, described from its tensors and the config."""

from collections import ChainMap

from lexi_search.checkpoint.config import Config, Key
from lexi_search.errors import InputError
from lexi_search.layers.spec import CompressedAttention, Norm, Rope
from lexi_search.layers.weights import CompressedWeights, CompressorWeights
from lexi_search.models.finder import Finder
from lexi_search.models.mixers.rope import make_rope, read_parameters
from lexi_search.models.mixers.source import Source

MAIN, COMPRESSED = "main", "compress"  # rotary embeddings as transformers calls them


def describe_compressed(source: Source) -> tuple[CompressedAttention, CompressedWeights]:
    """The attention of a layer; most of what its tensors show is not read from the config.

    Raises:
        InputError: a tensor that is missing or of wrong shape.
    """
    finder, config, hidden = source.finder.at_module("attn."), source.config, source.hidden_size
    dim = config.read_count("head_dim")
    q_a, kv = finder.need(["wq_a"], (None, hidden)), finder.need(["wkv"], (dim, hidden))
    rank = finder.get_shape(q_a.weight)[0]
    sinks = finder.need_tensor("attn_sink", (None,))
    [heads] = finder.get_shape(sinks)
    o_a = finder.need(["wo_a"], (None, None))
    rows, columns = finder.get_shape(o_a.weight)
    groups, rest = divmod(heads * dim, columns)
    if rest or not groups or heads % groups or rows % groups:
        thing = f"{heads} heads of {dim} values"
        raise InputError(f"{config.place}: {thing} do not fit {o_a.weight.name} of shape [{rows}, {columns}]")
    compressor = _find_compressor(finder, dim, hidden)
    weights = CompressedWeights(
        q_a=q_a,
        q_norm=finder.need(["q_norm"], (rank,)),
        q=finder.need(["wq_b"], (heads * dim, rank)),
        kv=kv,
        kv_norm=finder.need(["kv_norm"], (dim,)),
        o_a=o_a,
        o=finder.need(["wo_b"], (hidden, rows)),
        sinks=sinks,
        compressor=compressor,
    )
    rate, max_length = None, None
    if compressor is not None:
        rate, width = finder.get_shape(compressor.bias)
        if width > dim:  # where windows overlap, an indexer chooses entries: all of them in short sequences
            max_length = (config.read_count("index_topk") + 1) * rate - 1
    attention = CompressedAttention(
        num_heads=heads,
        num_groups=groups,
        scale=dim**-0.5,
        norm=Norm(source.norm.eps),
        rope=_read_rope(config, dim, MAIN if compressor is None else COMPRESSED),
        window=config.read_count("sliding_window"),
        rate=rate,
        max_length=max_length,
    )
    return attention, weights


def _find_compressor(finder: Finder, dim: int, hidden: int) -> CompressorWeights | None:
    finder = finder.at_module("compressor.")
    if not finder.has("wkv"):
        return None
    values = finder.need(["wkv"], (None, hidden))
    width = finder.get_shape(values.weight)[0]
    if width not in (dim, 2 * dim):
        finder.need(["wkv"], (dim, hidden))
    return CompressorWeights(
        values=values,
        gates=finder.need(["wgate"], (width, hidden)),
        bias=finder.need_tensor("ape", (None, width)),
        norm=finder.need(["norm"], (dim,)),
    )


def _read_rope(config: Config, dim: int, kind: str) -> Rope:
    """That of layers with a window alone, or with entries: of parameters for each, or of the latter's scaling."""
    values = config.values
    given = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not (isinstance(given, dict) and all(isinstance(given.get(each), dict) for each in (MAIN, COMPRESSED))):
        base = config.resolve(Key("compress_rope_theta", 160000.0) if kind == COMPRESSED else Key("rope_theta", 1e4))
        share = config.resolve(Key("partial_rotary_factor", config.resolve(Key("qk_rope_head_dim", dim // 8)) / dim))
        scaling = given if kind == COMPRESSED else {}
        own = {"rope_parameters": scaling, "rope_scaling": None, "partial_rotary_factor": share}
        parameters = {**read_parameters(config._replace(values=ChainMap(own, values)), theta=base), "rotary_dim": None}
    else:
        parameters = read_parameters(config._replace(values=ChainMap({"rope_theta": None}, values)), layer_type=kind)
    if parameters["rope_type"] == "yarn":
        parameters = {**parameters, "attention_factor": parameters.get("attention_factor") or 1.0}
    return make_rope(parameters, dim, place=config.place, interleaved=True)
