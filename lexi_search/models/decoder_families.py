"""The decoder of every family outside its MoE layers, as data; without an entry, no model of it runs tokens."""

import math
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

from lexi_search.checkpoint.config import Key
from lexi_search.layers.weights import Norms
from lexi_search.models.families.decoder import (
    POST_NORMS,
    SANDWICH_NORMS,
    Family,
    HyperConnections,
    choose_head_norm,
    choose_layer_rope,
    count_heads_by_kind,
    count_heads_by_layer,
    count_heads_of_all,
    count_heads_of_windows,
    depth_scale,
    find_block_reach,
    find_chunk,
    find_decay_bound,
    find_growth,
    find_offset,
    find_pooled_reach,
    find_sparse_reach,
    has_rotary_embedding,
    is_layer_norm,
    keys_are_values,
    logit_divisor,
    mup_scale,
    norm_eps,
    root_of_size,
    rotates_dense,
    width_scale,
)
from lexi_search.models.families.kinds import (
    attend_after_dense,
    attend_alternately,
    attend_by_longer_types,
    attend_by_pattern,
    attend_by_type,
    attend_in_chunks,
    attend_in_each_sixth,
    attend_in_last_windows,
    attend_in_three_windows,
    attend_in_window,
    attend_in_window_if_used,
    attend_with_plain_head,
    by_type_or_every,
)
from lexi_search.models.families.moe import mean_share

PLAIN = Family("aria")
LLAMA4 = Family(
    "llama4",
    eps=Key("rms_norm_eps", 1e-5),
    interleaved=True,
    norm_last=True,
    unit=Key("use_qk_norm", True),
    growth=find_growth,
    kinds=attend_in_chunks,
    chunk=find_chunk,
    rotates_windows_only=True,
)
QWEN3_MOE = Family("qwen3_moe", kinds=attend_in_window_if_used)
GRANITE = Family(
    "granitemoe",
    scale=Key("attention_multiplier", 1.0),
    embedding_scale=Key("embedding_multiplier", 1.0),
    residual_scale=Key("residual_multiplier", 1.0),
    logit_scale=logit_divisor,
)
DEEPSEEK_V2 = Family("deepseek_v2")
DEEPSEEK_V3 = Family("deepseek_v3", interleaved_latent=Key("rope_interleave", True))
# Sparse attention: an indexer selects the positions that a query attends to: all of them in short sequences.
DEEPSEEK_V32 = DEEPSEEK_V2._replace(
    model_type="deepseek_v32", left_out=("self_attn.indexer.",), max_length=Key("index_topk", 2048)
)
STEP = Family(
    "step3p5",
    eps=Key("rms_norm_eps", 1e-5),
    offset=1.0,
    kinds=attend_by_longer_types,
    heads=count_heads_of_windows,
    layer_rope=choose_layer_rope,
    limits="swiglu_limits_shared",
)
BAILING = Family(
    "bailing_moe",
    attention="attention.",
    embedding="word_embeddings",
    kinds=attend_with_plain_head,
    head_norm=choose_head_norm,
)
BY_TYPE = Family("mellum", kinds=attend_by_type)
GEMMA4 = Family(
    "gemma4",
    norms=Norms(
        attention_input="input_layernorm",
        attention_output="post_attention_layernorm",
        ffn_output="post_feedforward_layernorm",
        dense_input="pre_feedforward_layernorm",
        dense_output="post_feedforward_layernorm_1",
        routed_output="post_feedforward_layernorm_2",
    ),
    kinds=attend_in_each_sixth,
    heads=count_heads_of_all,
    scale=1.0,
    unit_values=True,
    keys_are_values=keys_are_values,
    embedding_scale=root_of_size,
    logit_cap=Key("final_logit_softcapping", math.inf),
    layer_scale="layer_scalar",
)
HY_V4 = DEEPSEEK_V32._replace(
    model_type="hy_v4",
    eps=Key("rms_norm_eps", 1e-5),
    interleaved_latent=False,
    mlp_limit=False,
    streams=HyperConnections(
        mixer="hc_pre.hc_attn_layer.hc_",
        ffn="hc_pre.hc_mlp_layer.hc_",
        last="hc_pre.hc_head.hc_head_",
        gain=Key("hc_magnitude", 2.0),
    ),
)
DEEPSEEK_V4 = Family(
    "deepseek_v4",
    norms=Norms(attention_input="attn_norm", ffn_input="ffn_norm"),
    embedding="embed",
    head="head",
    left_out=("attn.indexer.",),
    streams=HyperConnections(mixer="hc_attn_", ffn="hc_ffn_", last="hc_head_", iterations=Key("hc_sinkhorn_iters", 20)),
)
GLM5_NEXT = Family(
    "glm5_next",
    eps=Key("rms_norm_eps", 1e-5),
    latent_eps=Key("rms_norm_eps", 1e-5),
    rotates=False,
    decay_bound=find_decay_bound,
    left_out=("self_attn.indexer.",),
    max_length=find_pooled_reach,
    streams=HyperConnections(mixer="hc_attn_", ffn="hc_ffn_", iterations=Key("hc_sinkhorn_iters", 20)),
)
QWEN3_NEXT = Family("qwen3_next", offset=1.0, gated=Key("attn_output_gate", True))


QWEN4_EXP = QWEN3_NEXT._replace(
    model_type="qwen4_exp",
    norms=Norms(),
    final_norm=None,
    gated=True,
    # Of the table, as vLLM leaves them out.
    left_out=("self_attn.indexer.", "ple.ple_embedding.hashstats_", "ple.ple_embedding.token_lookup"),
    max_length=find_block_reach,
    streams=HyperConnections(
        mixer="attn_hyper_connection.",
        ffn="mlp_hyper_connection.",
        last="hyper_connection_mixer.",
        count="hc_count",
        eps=0.0,
        gated=True,
    ),
)


_FAMILIES = (
    Family("olmoe", clip=Key("clip_qkv", math.inf)),
    Family("flex_olmo", norms=POST_NORMS),
    Family("mixtral", kinds=attend_in_window),
    Family("phimoe", kinds=attend_in_window, centred=True),
    Family(
        "minicpm",
        embedding_scale=Key("scale_emb", 1.0),
        residual_scale=depth_scale,
        logit_scale=width_scale,
    ),
    Family("qwen2_moe", kinds=attend_alternately),
    QWEN3_MOE,
    Family("qwen3_vl_moe"),
    Family("qwen3_omni_moe"),
    GRANITE,
    GRANITE._replace(model_type="granitemoeshared"),
    Family("hunyuan_v1_moe", norm_last=True),
    Family("ernie4_5_moe", interleaved=True),
    PLAIN,
    PLAIN._replace(model_type="deepseek"),
    PLAIN._replace(model_type="deepseek_ocr2"),
    DEEPSEEK_V2,
    DEEPSEEK_V2._replace(model_type="deepseek_vl_v2"),
    DEEPSEEK_V3,
    DEEPSEEK_V3._replace(model_type="kimi_k2"),
    DEEPSEEK_V3._replace(model_type="kimi_k25"),
    DEEPSEEK_V3._replace(model_type="kimi_vl"),
    DEEPSEEK_V3._replace(model_type="glm4_moe_lite"),
    DEEPSEEK_V3._replace(model_type="mistral4"),
    DEEPSEEK_V3._replace(model_type="mistral3"),
    DEEPSEEK_V3._replace(model_type="axk1", moe_norm="post_mlp_layernorm"),
    DEEPSEEK_V3._replace(model_type="sarvam_mla", interleaved_latent=True),
    DEEPSEEK_V32,
    DEEPSEEK_V32._replace(model_type="glm_moe_dsa"),
    DEEPSEEK_V32._replace(model_type="axk2"),
    HY_V4,
    DEEPSEEK_V4,
    GLM5_NEXT,
    PLAIN._replace(model_type="glm4_moe"),
    PLAIN._replace(model_type="glm4v_moe"),
    PLAIN._replace(model_type="solar_open"),
    STEP,
    STEP._replace(model_type="step3p7"),
    PLAIN._replace(model_type="minimax_m2"),
    PLAIN._replace(model_type="hy_v3"),
    BY_TYPE,
    BY_TYPE._replace(model_type="dots1", kinds=partial(attend_by_type, otherwise=attend_in_last_windows)),
    BY_TYPE._replace(
        model_type="exaone_moe", kinds=by_type_or_every("sliding_window_pattern"), rotates_windows_only=True
    ),
    BY_TYPE._replace(model_type="gpt_oss", kinds=by_type_or_every(2)),
    BY_TYPE._replace(
        model_type="afmoe",
        kinds=by_type_or_every("global_attn_every_n_layers"),
        norms=SANDWICH_NORMS,
        embedding_scale=mup_scale,
        rotates_windows_only=True,
    ),
    BY_TYPE._replace(model_type="laguna", heads=count_heads_by_layer, gate="softplus"),
    Family(
        "cohere2_moe",
        norms=Norms(attention_input="input_layernorm"),
        eps=norm_eps,
        centred=is_layer_norm,
        interleaved=True,
        kinds=attend_after_dense,
        rotates_windows_only=True,
        rotates_dense=rotates_dense,
        parallel=True,
        shared_scale=mean_share,
        logit_scale=Key("logit_scale", 0.0625),
    ),
    GRANITE._replace(model_type="granitemoe_swa", kinds=attend_in_three_windows),
    BAILING,
    BAILING._replace(model_type="bailing_moe_v2"),
    BAILING._replace(model_type="sarvam_moe"),
    QWEN3_NEXT,
    QWEN3_NEXT._replace(model_type="qwen3_5_moe"),
    QWEN3_NEXT._replace(model_type="qwen3_5_moe_text"),
    QWEN4_EXP,
    PLAIN._replace(
        model_type="lfm2_moe",
        norms=Norms(attention_input="operator_norm", ffn_input="ffn_norm"),
        eps=Key("norm_eps", 1e-5),
        final_norm="embedding_norm",
    ),
    GRANITE._replace(model_type="granitemoehybrid", rotates=has_rotary_embedding),
    Family(
        "nemotron_h",
        norms=Norms(attention_input="norm", ffn_input="norm"),
        attention="mixer.",
        embedding="embeddings",
        final_norm="norm_f",
        eps=Key("layer_norm_epsilon", 1e-5),
        rotates=False,
        alternates=True,
        gated_mlp=False,
    ),
    DEEPSEEK_V3._replace(model_type="kimi_linear", rotates=False),
    LLAMA4,
    LLAMA4._replace(model_type="llama4_text"),
    GEMMA4,
    GEMMA4._replace(model_type="gemma4_text"),
    Family(
        "mimo_v2_flash",
        eps=Key("rms_norm_eps", 1e-5),
        kinds=attend_by_pattern,
        heads=count_heads_by_kind,
        value_dim=Key("v_head_dim", 0),
        value_scale=Key("attention_value_scale", 1.0),
    ),
    Family(
        "jamba",
        norms=Norms(attention_input="input_layernorm", ffn_input="pre_ff_layernorm"),
        final_norm="final_layernorm",
        rotates=False,
    ),
    Family(
        "minimax",
        eps=Key("rms_norm_eps", 1e-5),
        kinds=attend_in_window,
        weighs_residuals=True,
        # Buffers, which follow from the numbers of heads and layers.
        left_out=tuple(f"self_attn.{name}" for name in ("slope_rate", "query_decay", "key_decay", "diagonal_decay")),
    ),
    Family("minimax_m3_vl", offset=find_offset, left_out=("self_attn.index_",), max_length=find_sparse_reach),
)
FAMILIES: Mapping[str, Family] = MappingProxyType({family.model_type: family for family in _FAMILIES})
