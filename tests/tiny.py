"""Tiny random checkpoints of every family, in the layout that the hub's own have; one common source for all tests."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from safetensors.torch import load_file, save_file

COMMON = dict(
    vocab_size=256,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=128,
    tie_word_embeddings=False,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)
DEEPSEEK = COMMON | dict(
    num_hidden_layers=4,
    intermediate_size=96,
    moe_intermediate_size=32,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_shared_experts=2,
    first_k_dense_replace=1,
    routed_scaling_factor=1.5,
    topk_method="group_limited_greedy",
    n_group=4,
    topk_group=2,
    norm_topk_prob=False,
    kv_lora_rank=32,
    q_lora_rank=None,
    qk_nope_head_dim=32,
    qk_rope_head_dim=32,
    v_head_dim=32,
    head_dim=32,
)
MIXTRAL = COMMON | dict(intermediate_size=96, num_local_experts=8, num_experts_per_tok=4, sliding_window=None)

# One entry a family: the transformers class that makes it and its settings. DeepSeek-VL2 and MiniCPM-MoE have no class
# there: their language models are DeepSeek-V2 and (with neutral scales) Mixtral under other names.
FAMILIES = {
    "olmoe": (
        "Olmoe",
        COMMON | dict(intermediate_size=32, num_experts=16, num_experts_per_tok=4, norm_topk_prob=False),
    ),
    "mixtral": ("Mixtral", MIXTRAL),
    "qwen2_moe": (
        "Qwen2Moe",
        COMMON
        | dict(
            intermediate_size=96,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=64,
            num_experts=12,
            num_experts_per_tok=4,
            norm_topk_prob=False,
            decoder_sparse_step=1,
            mlp_only_layers=[1],
        ),
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        COMMON
        | dict(
            intermediate_size=96,
            moe_intermediate_size=32,
            num_experts=16,
            num_experts_per_tok=4,
            norm_topk_prob=True,
            head_dim=32,
        ),
    ),
    "deepseek_v2": ("DeepseekV2", DEEPSEEK),
    "deepseek_vl2": (
        "DeepseekV2",
        DEEPSEEK | dict(topk_method="greedy", n_group=1, topk_group=1, routed_scaling_factor=1.0),
    ),
    "minicpm": ("Mixtral", MIXTRAL),
}


def build_reference(family: str, *, seed: int = 0, **changes):
    """The family's tiny model as transformers builds it, float32, in evaluation mode, with routers that prefer."""
    name, settings = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**(settings | changes))
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if (
                value.ndim > 1
            ):  # a fan-in scale: at transformers' 0.02 the experts' outputs would vanish beside the residual
                value.normal_(0.0, value.shape[-1] ** -0.5, generator=generator)
            if key.endswith("mlp.gate.weight"):
                value.mul_(2.0)
    return model


def make_checkpoint(family: str, folder: Path, *, seed: int = 0, shard_size: str = "5GB", **changes) -> Path:
    """Write the family's tiny checkpoint into `folder`, as on the hub: `config.json` and safetensors shards."""
    model = build_reference(family, seed=seed, **changes)
    model.save_pretrained(folder, max_shard_size=shard_size)
    if family == "deepseek_vl2":
        _rewrite(folder, _rename_to_vl2, _vl2_config)
    if family == "minicpm":
        _rewrite(folder, _rename_to_minicpm, _minicpm_config)
        (folder / "configuration_minicpm.py").write_text(MINICPM_CONFIGURATION)
    return folder


def find_moe_blocks(model) -> dict[int, torch.nn.Module]:
    """Decoder-layer index -> MoE block (the module that holds a router called `gate`)."""
    return {i: layer.mlp for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "gate")}


def read_config(folder: Path) -> SimpleNamespace:
    return SimpleNamespace(**json.loads((folder / "config.json").read_text()))


def _rewrite(folder, rename, reconfigure):
    tensors = {rename(k): v for k, v in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(reconfigure(config), indent=2))


def _rename_to_vl2(key):
    return f"language.{key}"


def _vl2_config(config):
    text = {k: v for k, v in config.items() if k != "architectures"} | {"architectures": ["DeepseekV2ForCausalLM"]}
    return {
        "architectures": ["DeepseekVLV2ForCausalLM"],
        "model_type": "deepseek_vl_v2",
        "candidate_resolutions": [[384, 384]],
        "tile_tag": "2D",
        "global_view_pos": "head",
        "dtype": config.get("dtype", "float32"),
        "language_config": text,
        "vision_config": {
            "model_type": "vision",
            "layers": 1,
            "width": 64,
            "heads": 2,
            "patch_size": 16,
            "image_size": 384,
        },
        "projector_config": {"model_type": "mlp_projector", "input_dim": 64, "n_embed": text["hidden_size"]},
    }


def _rename_to_minicpm(key):
    return key.replace(".block_sparse_moe.", ".mlp.")


def _minicpm_config(config):
    config = {k: v for k, v in config.items() if k not in ("num_local_experts", "rope_parameters")}
    return config | {
        "architectures": ["MiniCPMForCausalLM"],
        "model_type": "minicpm",
        "auto_map": {"AutoConfig": "configuration_minicpm.MiniCPMConfig"},
        "num_experts": MIXTRAL["num_local_experts"],
        "rope_theta": 1e6,
        "rope_scaling": None,
        # Neutral values: the residual, embedding and logit scales of MiniCPM all become 1.
        "scale_emb": 1,
        "scale_depth": config["num_hidden_layers"] ** 0.5,
        "dim_model_base": config["hidden_size"],
    }


MINICPM_CONFIGURATION = """from transformers.configuration_utils import PretrainedConfig


class MiniCPMConfig(PretrainedConfig):
    model_type = "minicpm"
    keys_to_ignore_at_inference = ["past_key_values"]
"""
