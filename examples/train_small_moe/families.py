"""The model families that can be trained here, and shapes of them, as data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from transformers import AutoConfig, PreTrainedConfig

AUX_LOSS_COEFFICIENT = 0.01


class Shape(NamedTuple):
    """What any of the families is made from; `width` is that of one routed expert."""

    layers: int = 8
    hidden: int = 128
    heads: int = 4
    experts: int = 32
    top_k: int = 8
    width: int = 32
    vocab: int = 2048
    length: int = 1024

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


@dataclass(frozen=True)
class Family:
    """The config keys in which a transformers `model_type` differs from the others.

    `multiples` gives a key's value as a multiple of a size of `Shape`.
    """

    num_experts: str
    width: str
    fixed: Mapping[str, object] = field(default_factory=dict)
    multiples: Mapping[str, tuple[str, float]] = field(default_factory=dict)


PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
WINDOW = 128  # tokens that layers see whose attention is not full

FAMILIES = {
    "olmoe": Family("num_experts", "intermediate_size", {"norm_topk_prob": False}),
    "mixtral": Family("num_local_experts", "intermediate_size"),
    "qwen2_moe": Family(
        "num_experts",
        "moe_intermediate_size",
        {"norm_topk_prob": False},
        {"shared_expert_intermediate_size": ("width", 4)},
    ),
    "qwen3_moe": Family("num_experts", "moe_intermediate_size", {"norm_topk_prob": True}),
    "deepseek_v2": Family(
        "n_routed_experts",
        "moe_intermediate_size",
        {
            "first_k_dense_replace": 1,
            "n_shared_experts": 2,
            "norm_topk_prob": False,
            "q_lora_rank": None,
            "routed_scaling_factor": 1.0,
            "topk_method": "greedy",
        },
        {
            "intermediate_size": ("width", 8),
            "kv_lora_rank": ("head_dim", 2),
            "qk_nope_head_dim": ("head_dim", 1),
            "qk_rope_head_dim": ("head_dim", 0.5),
            "v_head_dim": ("head_dim", 1),
        },
    ),
    "glm4_moe": Family(
        "n_routed_experts",
        "moe_intermediate_size",
        {
            "first_k_dense_replace": 1,
            "n_group": 1,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_nextn_predict_layers": 0,
            "routed_scaling_factor": 1.0,
            "topk_group": 1,
        },
        {"intermediate_size": ("width", 8)},
    ),
    "gpt_oss": Family(
        "num_local_experts", "intermediate_size", {"rope_parameters": PLAIN_ROPE, "sliding_window": WINDOW}
    ),
    "granitemoe": Family(
        "num_local_experts",
        "intermediate_size",
        {"attention_multiplier": 0.125, "embedding_multiplier": 4.0, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    ),
    "ernie4_5_moe": Family(
        "moe_num_experts",
        "moe_intermediate_size",
        {"moe_layer_start_index": 1, "moe_num_shared_experts": 2},
        {"intermediate_size": ("width", 8)},
    ),
}


class Preset(NamedTuple):
    """A family at one shape, with the schedule that suits it."""

    family: str
    shape: Shape
    batch: int = 64
    learning_rate: float = 2e-3


def _medium(**sizes: int) -> Shape:
    return Shape(**{"layers": 12, "hidden": 256, "experts": 32, "width": 128, "vocab": 8192, "length": 512} | sizes)


# The number is that of the parameters, in millions.
PRESETS = {
    "olmoe-45m": Preset("olmoe", _medium(top_k=8)),
    "mixtral-45m": Preset("mixtral", _medium(experts=8, top_k=2, width=512)),
    "qwen2-moe-50m": Preset("qwen2_moe", _medium(top_k=4)),
    "qwen3-moe-45m": Preset("qwen3_moe", _medium(top_k=8)),
    "deepseek-v2-45m": Preset("deepseek_v2", _medium(top_k=6)),
    "glm4-moe-45m": Preset("glm4_moe", _medium(top_k=8)),
    "gpt-oss-45m": Preset("gpt_oss", _medium(top_k=4)),
    "granite-moe-45m": Preset("granitemoe", _medium(top_k=8)),
    "ernie4.5-moe-45m": Preset("ernie4_5_moe", _medium(top_k=6)),
    "olmoe-180m": Preset("olmoe", _medium(top_k=8, hidden=512, heads=8, layers=24), learning_rate=1e-3),
}


def build_config(family: str, shape: Shape) -> PreTrainedConfig:
    """A transformers config of the family; the end of a text is token 0."""
    keys = FAMILIES[family]
    multiples = {key: int(getattr(shape, size) * factor) for key, (size, factor) in keys.multiples.items()}
    config = {
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "head_dim": shape.head_dim,
        "num_experts_per_tok": shape.top_k,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.length,
        "tie_word_embeddings": False,  # as on the hub; vLLM reads no tied OLMoE output layer
        "router_aux_loss_coef": AUX_LOSS_COEFFICIENT,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,  # the embedding of a padding token is zero, and stays so
        keys.num_experts: shape.experts,
        keys.width: shape.width,
    }
    return AutoConfig.for_model(family, **config | keys.fixed | multiples)
