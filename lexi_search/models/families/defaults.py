"""What a family's own configuration class fills in where config.json leaves a key out, as data.

The classes are those that vLLM takes for the `model_type`: transformers' (5.19), or its own where it has one, as for
Kimi-Linear, whose `routed_scaling_factor` is 1.0 there and 2.446 in transformers. A key is listed for each family that
reads it where the class' default is not what the family's other tables say. Left out are numbers of layers and experts
and the hidden size: the tensors show them, and a config without them is refused by name.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from lexi_search.models.families.default_parts import (
    GPT_OSS_ROPE,
    LAGUNA_ROPE,
    MELLUM_ROPE,
    MIMO_ROPE,
    MISTRAL4_ROPE,
    list_defaults,
    list_latent,
)

ROPES = ("rope_parameters", "rope_scaling")  # the new name and the old
SIZES = (
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
    *("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    *("mamba_n_heads", "mamba_num_heads", "mamba_n_groups", "n_groups", "mamba_d_state", "ssm_state_size"),
    *("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
)
TOP_K = ("moe_topk", "moe_k", "top_k_experts", "num_experts_per_token", "num_experts_per_tok", "moe_top_k")


LATENT = list_latent(128, 64, 128)
GROUPED_ROUTING = {"n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5}
DEEPSEEK_V2 = LATENT | dict(num_attention_heads=32, max_position_embeddings=2048, bos_token_id=1, n_shared_experts=2)
DEEPSEEK_V3 = (
    list_defaults(k=8, heads=128, max_position_embeddings=4096, bos_token_id=0, n_shared_experts=1)
    | LATENT
    | GROUPED_ROUTING
)
LINEAR = dict(
    linear_num_key_heads=16,
    linear_num_value_heads=32,
    linear_key_head_dim=128,
    linear_value_head_dim=128,
)
QWEN3_NEXT = (
    list_defaults(k=10, heads=16, kv_heads=2, partial_rotary_factor=0.25, max_position_embeddings=32768) | LINEAR
)
GRANITE = list_defaults(k=2, heads=32, max_position_embeddings=2048, bos_token_id=1)
GLM4 = list_defaults(
    k=8,
    heads=96,
    kv_heads=8,
    rms_norm_eps=1e-5,
    partial_rotary_factor=0.5,
    max_position_embeddings=131072,
    n_shared_experts=1,
)
GLM_LATENT = list_latent(192, 64, 256) | dict(
    rms_norm_eps=1e-5, max_position_embeddings=202752, bos_token_id=0, n_shared_experts=1
)
MIXTRAL = list_defaults(
    k=2, heads=32, kv_heads=8, rms_norm_eps=1e-5, rope_theta=1e6, max_position_embeddings=131072, bos_token_id=1
)

MISTRAL4 = list_latent(64, 64, 128) | list_defaults(
    k=4,
    heads=32,
    rope_parameters=MISTRAL4_ROPE,
    max_position_embeddings=1048576,
    bos_token_id=1,
    n_shared_experts=1,
)
STEP = list_defaults(k=8, heads=64, kv_heads=8, max_position_embeddings=128000)
GEMMA4 = dict(
    num_attention_heads=8,
    num_key_value_heads=4,
    rope_parameters={
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    },
    sliding_window=512,
    max_position_embeddings=131072,
    bos_token_id=2,
    tie_word_embeddings=True,
)
LLAMA4 = list_defaults(
    k=1,
    heads=40,
    kv_heads=8,
    rope_theta=5e5,
    attention_chunk_size=8192,
    max_position_embeddings=131072,
    bos_token_id=1,
)

DEFAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "olmoe": list_defaults(k=8, heads=16, rms_norm_eps=1e-5, max_position_embeddings=4096),
        "flex_olmo": list_defaults(k=5, heads=32, rope_theta=5e5, max_position_embeddings=4096),
        "mixtral": MIXTRAL,
        "phimoe": MIXTRAL,
        "minimax": MIXTRAL,
        # Of the classes on the hub, beside the weights:
        "minicpm": {"tie_word_embeddings": True},
        "bailing_moe": list_defaults(k=2, norm_topk_prob=True),
        "bailing_moe_v2": list_defaults(k=2, norm_topk_prob=True) | GROUPED_ROUTING,
        "qwen2_moe": list_defaults(k=4, heads=16, kv_heads=16, sliding_window=4096, max_position_embeddings=32768),
        "qwen3_moe": list_defaults(k=8, heads=32, kv_heads=4, sliding_window=4096, max_position_embeddings=32768),
        "qwen3_next": QWEN3_NEXT,
        "qwen4_exp": list_defaults(k=10, heads=16, kv_heads=2, hc_count=4, max_position_embeddings=32768) | LINEAR,
        "qwen3_5_moe": QWEN3_NEXT | {"num_experts_per_tok": 8},
        "qwen3_5_moe_text": QWEN3_NEXT | {"num_experts_per_tok": 8},
        "qwen3_vl_moe": list_defaults(
            k=4, heads=16, kv_heads=16, rope_theta=5e5, max_position_embeddings=128000, tie_word_embeddings=True
        ),
        "qwen3_omni_moe": list_defaults(k=8, heads=28, kv_heads=4, rope_theta=1e6, max_position_embeddings=32768),
        "mellum": list_defaults(
            k=8, heads=32, kv_heads=4, sliding_window=1024, rope_parameters=MELLUM_ROPE, max_position_embeddings=131072
        ),
        "granitemoe": GRANITE,
        "granitemoeshared": GRANITE,
        "granitemoehybrid": GRANITE | dict(mamba_n_heads=128, mamba_n_groups=1, mamba_d_state=256),
        "granitemoe_swa": GRANITE | dict(sliding_window=128),
        "jamba": list_defaults(k=2, heads=32, kv_heads=8, bos_token_id=1),
        "hunyuan_v1_moe": dict(
            moe_topk=1,
            num_attention_heads=32,
            rms_norm_eps=1e-5,
            max_position_embeddings=2048,
            bos_token_id=1,
        ),
        "ernie4_5_moe": dict(
            moe_k=6,
            moe_num_shared_experts=2,
            num_attention_heads=20,
            num_key_value_heads=4,
            rms_norm_eps=1e-5,
            rope_theta=5e5,
            max_position_embeddings=131072,
            bos_token_id=1,
            tie_word_embeddings=True,
        ),
        "aria": dict(
            moe_topk=2,
            moe_num_shared_experts=2,
            num_attention_heads=32,
            max_position_embeddings=2048,
            bos_token_id=1,
        ),
        "cohere2_moe": list_defaults(
            k=2,
            heads=64,
            sliding_window=4096,
            sliding_window_pattern=4,
            prefix_dense_sliding_window_pattern=1,
            max_position_embeddings=8192,
            bos_token_id=5,
            tie_word_embeddings=True,
        ),
        "deepseek_v2": DEEPSEEK_V2,
        "deepseek_vl_v2": DEEPSEEK_V2,
        "deepseek_v3": DEEPSEEK_V3,
        "deepseek_v32": DEEPSEEK_V3,
        "kimi_k2": DEEPSEEK_V3,
        "kimi_k25": DEEPSEEK_V3,
        "kimi_vl": DEEPSEEK_V2 | {"topk_method": "greedy", "norm_topk_prob": False},  # vLLM's class
        "deepseek_ocr2": dict(num_attention_heads=32, max_position_embeddings=2048, bos_token_id=1, n_shared_experts=2),
        "axk2": list_latent(64, 32, 64)
        | list_defaults(
            k=8,
            heads=32,
            max_position_embeddings=131072,
            bos_token_id=163691,
            n_shared_experts=1,
            routed_scaling_factor=2.5,
        ),
        "axk1": DEEPSEEK_V3 | dict(num_attention_heads=64, max_position_embeddings=32768, bos_token_id=163691),
        "glm4_moe": GLM4,
        "glm4v_moe": GLM4 | {"max_position_embeddings": 65536},
        "glm4_moe_lite": GLM_LATENT | list_defaults(k=4, heads=20, routed_scaling_factor=1.8),
        "glm_moe_dsa": GLM_LATENT | list_defaults(k=8, heads=64, routed_scaling_factor=2.5),
        "dots1": dict(
            num_attention_heads=32,
            num_key_value_heads=32,
            sliding_window=4096,
            max_window_layers=62,
            max_position_embeddings=2048,
        ),
        "exaone_moe": list_defaults(
            k=8,
            heads=32,
            kv_heads=32,
            rms_norm_eps=1e-5,
            sliding_window=4096,
            sliding_window_pattern=4,
            max_position_embeddings=2048,
            bos_token_id=1,
            num_shared_experts=1,
            routed_scaling_factor=2.5,
        ),
        "solar_open": list_defaults(
            k=8,
            heads=64,
            kv_heads=8,
            rms_norm_eps=1e-5,
            rope_theta=1e6,
            max_position_embeddings=131072,
            n_shared_experts=1,
        ),
        "mimo_v2_flash": list_defaults(
            k=8,
            heads=64,
            kv_heads=4,
            v_head_dim=128,
            rms_norm_eps=1e-5,
            sliding_window=128,
            attention_value_scale=0.707,
            rope_parameters=MIMO_ROPE,
            max_position_embeddings=131072,
            bos_token_id=1,
        ),
        "deepseek_v4": list_defaults(k=6, hc_mult=4, head_dim=512, bos_token_id=0)
        | dict(index_topk=512, sliding_window=128, max_position_embeddings=1048576),
        "hy_v4": list_latent(192, 64, 256)
        | list_defaults(
            k=8,
            heads=32,
            hc_mult=4,
            max_position_embeddings=262144,
            bos_token_id=120000,
            n_shared_experts=1,
            routed_scaling_factor=2.827,
        ),
        "glm5_next": list_latent(256, 0, 256)
        | list_defaults(k=8, heads=64, n_shared_experts=1, routed_scaling_factor=2.5, linear_lower_bound=-5.0)
        | dict(hc_mult=4, index_topk=2048, index_kpool=16, max_position_embeddings=1048576),
        "mistral4": MISTRAL4,
        "mistral3": MISTRAL4,
        "nemotron_h": list_defaults(
            k=2,
            heads=32,
            kv_heads=8,
            bos_token_id=1,
            max_position_embeddings=4096,
            mamba_num_heads=128,
            n_groups=8,
            ssm_state_size=128,
            mamba_hidden_act="silu",
        ),
        "step3p5": STEP,
        "step3p7": STEP,
        "minimax_m2": list_defaults(
            k=8, heads=48, kv_heads=8, rope_theta=5e6, max_position_embeddings=196608, bos_token_id=200034
        ),
        "minimax_m3_vl": list_defaults(
            k=4, heads=64, kv_heads=4, rope_theta=5e6, rotary_dim=64, max_position_embeddings=524288
        ),
        "hy_v3": list_defaults(
            k=8,
            heads=64,
            kv_heads=8,
            rms_norm_eps=1e-5,
            rope_theta=11158840.0,
            max_position_embeddings=131072,
            num_shared_experts=1,
            router_scaling_factor=2.826,
        ),
        "afmoe": list_defaults(
            k=6,
            heads=16,
            rms_norm_eps=1e-5,
            sliding_window=1024,
            global_attn_every_n_layers=4,
            max_position_embeddings=16384,
            num_shared_experts=2,
        ),
        "laguna": list_defaults(
            k=8, heads=48, kv_heads=8, sliding_window=512, rope_parameters=LAGUNA_ROPE, max_position_embeddings=131072
        ),
        "lfm2_moe": list_defaults(
            k=4,
            heads=32,
            kv_heads=8,
            rope_theta=1e6,
            max_position_embeddings=128000,
            bos_token_id=1,
            tie_word_embeddings=True,
        ),
        "kimi_linear": dict(num_attention_heads=32, bos_token_id=1),  # vLLM's class
        "gpt_oss": list_defaults(
            k=4,
            heads=64,
            kv_heads=8,
            rms_norm_eps=1e-5,
            rope_theta=1.5e5,
            rope_parameters=GPT_OSS_ROPE,
            sliding_window=128,
            max_position_embeddings=131072,
        ),
        "gemma4": GEMMA4,
        "gemma4_text": GEMMA4,
        "llama4": LLAMA4,
        "llama4_text": LLAMA4,
    }
)
