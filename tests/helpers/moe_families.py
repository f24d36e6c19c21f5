"""A tiny random model of every mixture-of-experts family of the installed transformers."""

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TOP_K_KEYS = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")
EXPERTS, TOP_K = 8, 4
SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    intermediate_size=32,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
    num_experts=EXPERTS,
    num_local_experts=EXPERTS,
    n_routed_experts=EXPERTS,
    moe_num_experts=EXPERTS,
    n_group=2,
    topk_group=1,
    n_shared_experts=1,
    first_k_dense_replace=1,
    kv_lora_rank=8,
    q_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    pad_token_id=0,
    bos_token_id=0,
    eos_token_id=1,
)
ROPE = {"rope_type": "default", "rope_theta": 1e4}
# Settings that a family needs besides.
SETTINGS = {
    "cohere2_moe": {"num_shared_experts": 1},  # whose mean with the routed ones it takes
    "axk1": {"head_dim": 8},
    "deepseek_v3": {"head_dim": 8},
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "num_hash_layers": 1,
        "sliding_window": 8,
        "o_groups": 2,
        "o_lora_rank": 8,
        "index_n_heads": 2,
        "index_head_dim": 8,
    },
    "longcat_flash": {
        "num_layers": 2,
        "head_dim": 8,
        "ffn_hidden_size": 32,
        "expert_ffn_hidden_size": 16,
        "zero_expert_num": 0,
    },
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": EXPERTS,
        "moe_intermediate_size": 16,
        "hidden_size_per_layer_input": 0,
        "global_head_dim": 16,
    },
    "mimo_v2_flash": {"num_key_value_heads": 1},  # its windowed layers have twice as many
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_expand": 2, "layer_types": ["attention"] * 3},
    "hunyuan_v1_moe": {"rope_parameters": ROPE, "head_dim": 16},
    "dots1": {"n_routed_experts": EXPERTS, "moe_intermediate_size": 16, "n_shared_experts": 1},
    "lfm2_moe": {"layer_types": ["full_attention"] * 3, "num_dense_layers": 1},
}


def find_families():
    """Model types of causal language models whose configuration has a top-k; no model code is imported for that."""
    names = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) & set(CONFIG_MAPPING))
    return [name for name in names if find_top_k_key(find_text_class(name))]


def find_text_class(model_type):
    """The class of the language model's configuration."""
    whole = CONFIG_MAPPING[model_type]
    return whole.sub_configs.get("text_config", whole)


def find_top_k_key(config):
    return next((key for key in TOP_K_KEYS if key in dir(config)), None)


def build(model_type, top_k=TOP_K):
    """The family's tiny model, float32, in evaluation mode; its routers have clear preferences, whatever the top_k."""
    text_class, whole_class = find_text_class(model_type), CONFIG_MAPPING[model_type]
    default = text_class()
    default.allow_global_per_layer_attribute_access = True
    sizes = {key: value for key, value in SIZES.items() if getattr(default, key, None) is not None}
    text = text_class(**sizes | {find_top_k_key(text_class): top_k} | SETTINGS.get(model_type, {}))
    config = text if text_class is whole_class else whole_class(text_config=text)
    config._attn_implementation = config.get_text_config()._attn_implementation = "eager"
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    torch.manual_seed(0)
    model = getattr(transformers, names if isinstance(names, str) else names[0])(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim > 1:
                value.normal_(0.0, value.shape[-1] ** -0.5, generator=generator)
    return model
