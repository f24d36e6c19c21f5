"""What defaults of several families are made of."""

from typing import Any


def list_defaults(*, k: int, heads: int | None = None, kv_heads: int | None = None, **more: Any) -> dict[str, Any]:
    """A family's defaults; only the default input reads numbers of heads."""
    named = {"num_experts_per_tok": k, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return {key: value for key, value in named.items() if value is not None} | more


def list_latent(nope: int, rope: int, value: int) -> dict[str, int]:
    return {"qk_nope_head_dim": nope, "qk_rope_head_dim": rope, "v_head_dim": value}


GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
MISTRAL4_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 128.0,
    "original_max_position_embeddings": 8192,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}
MELLUM_ROPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 5e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
LAGUNA_ROPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
}
MIMO_ROPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.334},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.334},
}
