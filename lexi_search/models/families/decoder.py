"""What a family says of its decoder: attention, norms, windows and multipliers outside the MoE layer.

Properties that the tensors
show (biases, norms of queries and keys, low-rank queries, shared experts, dense layers) are not listed here:
`decoder_stack` reads them from the checkpoint. So are layers with a recurrence in the place of attention (`mixers`).
"""

import math
from collections import ChainMap
from collections.abc import Callable
from typing import Any, NamedTuple

from lexi_search.artifacts.codec import short
from lexi_search.checkpoint.config import Config, Key
from lexi_search.errors import InputError
from lexi_search.layers.spec import Norm
from lexi_search.layers.weights import Norms
from lexi_search.models.families.kinds import FULL, SLIDING, Kinds, attend_to_all

PRE_NORMS = Norms(attention_input="input_layernorm", ffn_input="post_attention_layernorm")
POST_NORMS = Norms(attention_output="post_attention_layernorm", ffn_output="post_feedforward_layernorm")
SANDWICH_NORMS = Norms("input_layernorm", "post_attention_layernorm", "pre_mlp_layernorm", "post_mlp_layernorm")


def count_heads(config: Config, kind: str, layer: int) -> tuple[int, int]:
    """The heads of queries, and of keys and values."""
    return config.read_count("num_attention_heads"), config.read_count("num_key_value_heads", "num_attention_heads")


def count_heads_by_kind(config: Config, kind: str, layer: int) -> tuple[int, int]:
    """The same where layers with windows have other numbers: twice as many of keys, if the config has none (MiMo)."""
    heads, kv_heads = count_heads(config, kind, layer)
    if kind != SLIDING:
        return heads, kv_heads
    heads = config.read_count("swa_num_attention_heads", "num_attention_heads")
    named = config.values.get("swa_num_key_value_heads") is not None
    return heads, config.read_count("swa_num_key_value_heads") if named else 2 * kv_heads


def count_heads_of_all(config: Config, kind: str, layer: int) -> tuple[int, int]:
    """The same where layers that attend to all may have another number of keys' heads (Gemma 4)."""
    heads, kv_heads = count_heads(config, kind, layer)
    if kind != FULL:
        return heads, kv_heads
    layers = config.values.get("per_layer_config")  # as transformers writes it, for these layers only
    given = next(iter(layers.values()), None) if isinstance(layers, dict) else None
    if isinstance(given, dict):
        own_config = config._replace(values={"num_key_value_heads": kv_heads} | given)
        return heads, own_config.read_count("num_key_value_heads")
    own = keys_are_values(config, kind) and config.values.get("num_global_key_value_heads") is not None
    return heads, config.read_count("num_global_key_value_heads") if own else kv_heads


def count_heads_by_layer(config: Config, kind: str, layer: int) -> tuple[int, int]:
    """The same where each layer may have its own number of queries' heads (Laguna)."""
    heads, kv_heads = count_heads(config, kind, layer)
    given = config.values.get("num_attention_heads_per_layer")
    if given is None:
        return heads, kv_heads
    if not isinstance(given, list) or not layer < len(given):
        raise InputError(
            f"{config.place}: num_attention_heads_per_layer is {short(given)}, expected one for each layer"
        )
    own = config._replace(values={"num_attention_heads_per_layer": given[layer]})
    return own.read_count("num_attention_heads_per_layer"), kv_heads


def count_heads_of_windows(config: Config, kind: str, layer: int) -> tuple[int, int]:
    """The same where layers with windows have numbers of their own, by the hub's keys or transformers' (Step)."""
    values = config.values
    own = values.get("attention_other_setting") if kind == SLIDING else None
    own = own if isinstance(own, dict) else {}
    if kind == SLIDING and values.get("num_sliding_attention_heads") is not None:
        own = {"num_attention_heads": values["num_sliding_attention_heads"]} | own
    config = config._replace(values=ChainMap(own, values))
    return config.read_count("num_attention_heads"), config.read_count("num_attention_groups", "num_key_value_heads")


def choose_layer_rope(config: Config, kind: str, layer: int) -> Config:
    """The config with a base and a share for lists of them, and no scaling where it is of other layers (Step)."""
    values = config.values
    own: dict[str, Any] = {}
    for key, name in (("rope_theta", "rope_theta"), ("partial_rotary_factors", "partial_rotary_factor")):
        if isinstance(given := values.get(key), list):
            if layer >= len(given):
                raise InputError(f"{config.place}: {key} is {short(given)}, expected a number for each layer")
            own[name] = given[layer]
    only = values.get("yarn_only_types")
    if isinstance(only, list) and only and kind not in only:
        own["rope_scaling"] = None
    return config._replace(values=ChainMap(own, values))


def keys_are_values(config: Config, kind: str) -> bool:
    """Whether layers of that kind have keys for values (Gemma 4)."""
    return kind == FULL and config.resolve(Key("attention_k_eq_v", False))


class HyperConnections(NamedTuple):
    """The residual streams of a family. Names are of tensors, but for their ends: `fn`, `base` and `scale`.

    If `gated`, they are of modules, with the tensors of a `GatedConnection`.
    """

    mixer: str  # below `layers.N.`
    ffn: str  # likewise, of the MLP or MoE
    last: str | None = None  # beside `layers`; None: the mean of the streams is what the final norm reads
    count: str = "hc_mult"  # config key
    eps: Any = Key("hc_eps", 1e-6)
    gain: Any = 2.0
    iterations: Any = None  # where streams are mixed
    gated: bool = False


class Family(NamedTuple):
    """One family. Any number may be a `Key` of the config or a function of the config instead of a value."""

    model_type: str
    norms: Norms = PRE_NORMS  # module names below `layers.N.`
    attention: str = "self_attn."  # likewise
    embedding: str = "embed_tokens"  # modules beside `layers`
    final_norm: str | None = "norm"
    head: str = "lm_head"
    eps: Any = Key("rms_norm_eps", 1e-6)
    centred: Any = False  # norms that subtract the mean
    offset: Any = 0.0  # of the gains of norms, which are stored without it
    gated: Any = False  # the projection of queries has their gates as well
    norm_last: bool = False  # queries and keys are normalised after the rotary embedding
    interleaved: Any = False  # the rotary embedding rotates pairs of neighbours
    interleaved_latent: Any = True  # the same in latent attention
    latent_eps: Any = 1e-6  # of the norms of latents
    scale: Any = None  # of attention scores; None: head_dim ** -0.5
    clip: Any = math.inf  # of queries, keys and values
    unit: Any = False  # queries and keys are normalised without gains where they are rotated
    growth: Callable[[Config], tuple[float, float] | None] | None = None  # of queries without rotary embedding
    head_norm: Callable[[Config], Norm] | None = None  # of queries and keys, where it is not that of layers
    gate: str = "sigmoid"  # the function of gates that have a projection of their own
    value_scale: Any = 1.0
    unit_values: bool = False  # values are normalised without gains
    keys_are_values: Callable[[Config, str], bool] | None = None  # in layers of a kind, before they are normalised
    value_dim: Any = 0  # of a head's values; 0: that of its keys
    heads: Callable[[Config, str, int], tuple[int, int]] = count_heads
    chunk: Callable[[Config], int | None] | None = None  # of attention in chunks
    kinds: Kinds = attend_to_all
    rotates: Any = True  # attention has a rotary embedding
    rotates_windows_only: bool = False  # where there are windows, full attention has no rotary embedding ...
    rotates_dense: Callable[[Config], bool] | None = None  # ... but in layers without experts
    layer_rope: Callable[[Config, str, int], Config] | None = None  # the config as a layer's rotary embedding reads it
    decay_bound: Callable[[Config], float | None] | None = None  # of linear attention's logarithms of decays
    parallel: bool = False  # the MLP or MoE has the input of attention for its own
    shared_scale: Any = 1.0  # of the output of shared experts
    alternates: bool = False  # a layer is a token mixer, or else an MLP or MoE
    gated_mlp: bool = True
    left_out: tuple[str, ...] = ()  # modules below `layers.N.` without effect on up to `max_length` tokens
    max_length: Any = None
    embedding_scale: Any = 1.0
    residual_scale: Any = 1.0  # of the outputs of attention and of MLP or MoE
    weighs_residuals: bool = False  # by factors in the config; residuals are the layer's normalised input (MiniMax)
    logit_scale: Any = 1.0
    logit_cap: Any = math.inf
    moe_norm: str | None = None  # the norm below `layers.N.` of what a MoE and its shared experts return
    limits: str | None = None  # config key of a list of the limits of each layer's dense MLP or shared experts
    mlp_limit: bool = True  # the limit of experts holds for dense MLPs and shared experts, too
    streams: HyperConnections | None = None  # where there are several
    layer_scale: str | None = None  # the tensor below `layers.N.` that multiplies the hidden states after the layer


def depth_scale(config: Config) -> float:
    return config.resolve(Key("scale_depth", 1.0)) / math.sqrt(config.count_layers())


def width_scale(config: Config) -> float:
    return config.resolve(Key("dim_model_base", 1.0)) / config.read_count("hidden_size")


def is_layer_norm(config: Config) -> bool:
    return config.values.get("rms_norm_eps") is None


def norm_eps(config: Config) -> float:
    return config.resolve(Key("layer_norm_eps" if is_layer_norm(config) else "rms_norm_eps", 1e-5))


def rotates_dense(config: Config) -> bool:
    return config.resolve(Key("prefix_dense_sliding_window_pattern", 1)) == 1


def choose_head_norm(config: Config) -> Norm:
    """That of queries and keys in Ling, as vLLM has it."""
    rms = config.resolve(Key("use_rmsnorm", False))
    return Norm(config.resolve(Key("rms_norm_eps", 1e-6)) if rms else 1e-6, centred=not rms)


def logit_divisor(config: Config) -> float:
    return 1 / config.resolve(Key("logits_scaling", 1.0))


def root_of_size(config: Config) -> float:
    return math.sqrt(config.read_count("hidden_size"))


def mup_scale(config: Config) -> float:
    return root_of_size(config) if config.resolve(Key("mup_enabled", False)) else 1.0


def has_rotary_embedding(config: Config) -> bool:
    return config.values.get("position_embedding_type") == "rope"


def find_offset(config: Config) -> float:
    return 1.0 if config.resolve(Key("use_gemma_norm", True)) else 0.0


def find_sparse_reach(config: Config) -> int:
    """The tokens up to which MiniMax-M3's choice of blocks of keys leaves none out."""
    given = config.values.get("sparse_attention_config")
    given = given if isinstance(given, dict) else {}
    section = config._replace(values=given, place=f"{config.place}, sparse_attention_config")
    blocks = section.resolve(Key("sparse_topk_blocks", config.resolve(Key("index_topk_blocks", 16))))
    return blocks * section.resolve(Key("sparse_block_size", config.resolve(Key("index_block_size", 128))))


def find_growth(config: Config) -> tuple[float, float] | None:
    if not config.values.get("attn_temperature_tuning", True):  # a number in older configs
        return None
    period = config.resolve(Key("floor_scale", 8192.0))
    if period <= 0:
        raise InputError(f"{config.place}: floor_scale is {period}, expected a number above 0")
    return config.resolve(Key("attn_scale", 0.1)), period


def find_chunk(config: Config) -> int | None:
    named = config.values.get("attention_chunk_size") is not None
    return config.read_count("attention_chunk_size") if named else None


def find_block_reach(config: Config) -> int | None:
    """The tokens up to which Qwen4-Exp's choice of blocks of keys leaves none out."""
    if config.values.get("indexer_budget") is None:  # of a model whose layers are all linear
        return None
    block = config.read_count("indexer_compress_ratio")
    return config.read_count("indexer_budget") // block * block + block - 1


def find_pooled_reach(config: Config) -> int:
    """The tokens up to which GLM-5-Next's choice of pools of keys leaves none out."""
    pool = config.read_count("index_kpool")
    if pool > 1:
        config.read_choice("index_kpool_always_select_tail", {True: None})
    return config.read_count("index_topk") // pool * pool + pool - 1


def find_decay_bound(config: Config) -> float | None:
    """GLM-5-Next's, of the config or of a section of it, as its class reads them."""
    given = config.values.get("linear_attn_config")
    given = given if isinstance(given, dict) else {}
    key = "linear_lower_bound"
    bound = given.get("gate_lower_bound", config.values.get(key))
    if bound is None:
        return -5.0 if given and given.get("safe_gate", True) else None
    bound = config._replace(values={key: bound}).resolve(Key(key, -5.0))
    if bound > 0:
        raise InputError(f"{config.place}: {key} is {bound}, expected at most 0")
    return bound
