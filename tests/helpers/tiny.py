"""Tiny random checkpoints of every family, in the layout of those on the hub; the common source for all tests."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

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
VISION = dict(
    depth=1,
    num_hidden_layers=1,
    hidden_size=32,
    embed_dim=32,
    intermediate_size=32,
    num_heads=2,
    num_attention_heads=2,
    out_hidden_size=64,
    patch_size=14,
    image_size=28,
    deepstack_visual_indexes=[0],
    num_position_embeddings=16,
    projector_hidden_size=64,
)
OCR2_VISION = dict(
    sam_config=VISION | dict(patch_size=16, image_size=64, output_channels=32, downsample_channels=[32, 32]),
    encoder_config=VISION | dict(vocab_size=8, num_key_value_heads=2),
)
DEEPSEEK_MOE = COMMON | dict(
    intermediate_size=96,
    moe_intermediate_size=32,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_shared_experts=2,
    mlp_layer_types=["dense", "sparse", "sparse"],
)


def with_vision(text, vision=VISION, **more):
    return dict(text_config=text, vision_config=vision, **more)


# One entry per family: its transformers class and settings. DeepSeek-MoE, DeepSeek-VL2 and MiniCPM-MoE have no class
# there: their language models are, under other names, that of DeepSeek-OCR-2, DeepSeek-V2 and (with neutral scales)
# Mixtral.
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
    "deepseek": ("DeepseekOcr2 ForConditionalGeneration", with_vision(DEEPSEEK_MOE, OCR2_VISION)),
    "deepseek_v2": ("DeepseekV2", DEEPSEEK),
    "deepseek_vl2": (
        "DeepseekV2",
        DEEPSEEK | dict(topk_method="greedy", n_group=1, topk_group=1, routed_scaling_factor=1.0),
    ),
    "minicpm": ("Mixtral", MIXTRAL),
}

PLAIN = COMMON | dict(num_hidden_layers=2, head_dim=32, intermediate_size=32, num_experts_per_tok=4)
QWEN = PLAIN | dict(
    num_experts=16,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=32,
    linear_num_value_heads=2,
    linear_num_key_heads=2,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
)
LOCAL = PLAIN | dict(num_local_experts=16)
GLM = PLAIN | dict(
    moe_intermediate_size=32,
    n_routed_experts=16,
    n_shared_experts=1,
    first_k_dense_replace=0,
    n_group=4,
    topk_group=2,
    norm_topk_prob=True,
    routed_scaling_factor=1.5,
)
MLA = GLM | dict(kv_lora_rank=32, q_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32)
INDEXED = MLA | dict(index_n_heads=2, index_head_dim=32, index_topk=8)
GRANITE = LOCAL | dict(
    shared_intermediate_size=32, layer_types=["attention"] * 2, mamba_n_heads=2, mamba_d_head=64, mamba_n_groups=1
)
ARIA = LOCAL | dict(moe_num_experts=16, moe_topk=4, moe_num_shared_experts=1)
STEP = PLAIN | dict(
    n_routed_experts=16,
    num_local_experts=16,
    moe_intermediate_size=32,
    share_expert_dim=48,
    mlp_layer_types=["sparse"] * 2,
    moe_router_scaling_factor=1.5,
    swiglu_limits=[0.5, None],
)
GEMMA4 = PLAIN | dict(
    num_experts=16,
    top_k_experts=4,
    enable_moe_block=True,
    moe_intermediate_size=32,
    hidden_size_per_layer_input=0,
    global_head_dim=64,
    layer_types=["sliding_attention", "full_attention"],
)
DEEPSEEK_V4 = PLAIN | dict(
    num_hidden_layers=3,
    num_key_value_heads=1,
    q_lora_rank=32,
    qk_rope_head_dim=16,
    moe_intermediate_size=32,
    n_routed_experts=16,
    num_hash_layers=1,
    swiglu_limit=0.5,
    sliding_window=16,
    o_groups=2,
    o_lora_rank=16,
    index_n_heads=2,
    index_head_dim=16,
    index_topk=8,
)
LLAMA4 = LOCAL | dict(num_experts_per_tok=1, intermediate_size_mlp=64, moe_layers=[1], interleave_moe_layer_step=2)
LLAMA4_VISION = VISION | dict(
    vision_output_dim=64, pixel_shuffle_ratio=0.5, projector_input_dim=64, projector_output_dim=64
)

# The families that are only described and computed, not served in the tests: the names of the config and of the model,
# where they are not those of one `ForCausalLM`, and the settings.
ALL_FAMILIES = FAMILIES | {
    "flex_olmo": ("FlexOlmo", PLAIN | dict(num_experts=16)),
    "qwen3_next": ("Qwen3Next", QWEN),
    "qwen3_5_moe": ("Qwen3_5Moe ForConditionalGeneration", with_vision(QWEN)),
    "qwen3_5_moe_text": ("Qwen3_5MoeText Qwen3_5MoeForCausalLM", QWEN),
    "qwen3_vl_moe": ("Qwen3VLMoe ForConditionalGeneration", with_vision(QWEN)),
    "qwen3_omni_moe": ("Qwen3Moe", QWEN),
    "qwen4_exp": ("Qwen4Exp ForConditionalGeneration", with_vision(QWEN)),
    "mellum": ("Mellum", QWEN),
    "minimax": ("MiniMax", LOCAL),
    "granitemoe": ("GraniteMoe", LOCAL),
    "granitemoeshared": ("GraniteMoeShared", GRANITE),
    "granitemoehybrid": ("GraniteMoeHybrid", GRANITE),
    "granitemoe_swa": ("GraniteMoeSWA", LOCAL),
    "phimoe": ("Phimoe", LOCAL | dict(num_experts_per_tok=2, router_jitter_noise=0.1)),
    "jamba": (
        "Jamba",
        PLAIN
        | dict(
            num_experts=16, attn_layer_period=1, attn_layer_offset=0, expert_layer_period=2, use_mamba_kernels=False
        ),
    ),
    "hunyuan_v1_moe": ("HunYuanMoEV1", PLAIN | dict(num_experts=16, moe_topk=[4, 4])),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        PLAIN | dict(moe_intermediate_size=32, moe_num_experts=16, moe_k=4, moe_norm_min=0.4, moe_layer_start_index=0),
    ),
    "aria": (
        "Aria ForConditionalGeneration",
        with_vision(ARIA | dict(model_type="aria_text"), VISION | dict(model_type="idefics3_vision")),
    ),
    "cohere2_moe": ("Cohere2Moe", PLAIN | dict(num_experts=16, num_shared_experts=1, first_k_dense_replace=0)),
    "deepseek_v3": ("DeepseekV3", MLA),
    "deepseek_v32": ("DeepseekV32", INDEXED),
    "kimi_k2": ("DeepseekV3", MLA | dict(n_group=1, topk_group=1)),
    "kimi_k25": ("Kimi_K25 ForConditionalGeneration", with_vision(MLA | dict(n_group=1, topk_group=1))),
    "kimi_vl": ("DeepseekV3", MLA | dict(n_group=1, topk_group=1)),
    "kimi_linear": ("KimiLinear", MLA | dict(num_experts=16, num_expert_group=4, linear_num_heads=2)),
    "glm4_moe": ("Glm4Moe", GLM | dict(n_group=1, topk_group=1)),
    "glm4_moe_lite": ("Glm4MoeLite", MLA),
    "glm_moe_dsa": ("GlmMoeDsa", INDEXED),
    "glm4v_moe": ("Glm4vMoe ForConditionalGeneration", with_vision(GLM)),
    "dots1": ("Dots1", GLM | dict(norm_topk_prob=False)),
    "exaone_moe": (
        "ExaoneMoe",
        GLM | dict(num_experts=16, num_shared_experts=1, mlp_layer_types=["sparse"] * 2),
    ),
    "solar_open": ("SolarOpen", GLM),
    "mimo_v2_flash": ("MiMoV2Flash", GLM),
    "deepseek_v4": ("DeepseekV4", DEEPSEEK_V4),
    "hy_v4": ("HYV4", GLM | dict(swiglu_limit=0.5)),
    "glm5_next": (
        "Glm5Next ForConditionalGeneration",
        with_vision(
            INDEXED
            | dict(
                qk_rope_head_dim=0,
                index_kpool=1,
                linear_num_heads=2,
                linear_head_dim=16,
                swiglu_limit=0.5,
                mlp_layer_types=["dense", "sparse"],
            ),
            VISION | dict(projection_intermediate_size=32),
        ),
    ),
    "mistral4": ("Mistral4", MLA),
    "mistral3": (
        "Mistral3 ForConditionalGeneration",
        with_vision(MLA | dict(model_type="mistral4"), VISION | dict(model_type="pixtral", head_dim=16)),
    ),
    "axk1": ("AXK1", MLA),
    "axk2": ("AXK2", INDEXED | dict(gated_norm_rank=8, mlp_layer_types=["sparse"] * 2)),
    "deepseek_ocr2": (
        "DeepseekOcr2 ForConditionalGeneration",
        with_vision(DEEPSEEK_MOE | dict(routed_scaling_factor=1.5), OCR2_VISION),
    ),
    "sarvam_moe": ("Glm4Moe", GLM),
    "bailing_hybrid": ("Glm4Moe", GLM),
    "sarvam_mla": ("DeepseekV3", MLA | dict(n_group=1, topk_group=1)),
    "nemotron_h": (
        "NemotronH",
        MLA
        | dict(
            num_hidden_layers=3,
            hybrid_override_pattern="*EE",
            moe_shared_expert_intermediate_size=32,
            mamba_num_heads=2,
            mamba_head_dim=32,
            n_groups=1,
        ),
    ),
    "step3p5": ("Step3p7 ForConditionalGeneration", with_vision(STEP, VISION | dict(head_dim=16))),
    "step3p7": ("Step3p7 ForConditionalGeneration", with_vision(STEP, VISION | dict(head_dim=16))),
    "minimax_m2": ("MiniMaxM2", LOCAL),
    "minimax_m3_vl": (
        "MiniMaxM3VL MiniMaxM3SparseForConditionalGeneration",
        with_vision(LOCAL | dict(shared_intermediate_size=32, swiglu_limit=0.5)),
    ),
    "hy_v3": ("HYV3", QWEN | dict(num_local_experts=16, num_shared_experts=1, first_k_dense_replace=0)),
    "afmoe": ("Afmoe", QWEN | dict(num_dense_layers=0, route_scale=1.5)),
    "laguna": ("Laguna", QWEN | dict(moe_routed_scaling_factor=1.5)),
    "lfm2_moe": ("Lfm2Moe", QWEN | dict(num_dense_layers=0, layer_types=["full_attention"] * 2)),
    "bailing_moe": ("Qwen3Moe", QWEN | dict(norm_topk_prob=True)),
    "bailing_moe_v2": ("Glm4Moe", GLM),
    "gpt_oss": ("GptOss", LOCAL | dict(swiglu_limit=0.5)),
    "gemma4": ("Gemma4 ForConditionalGeneration", with_vision(GEMMA4, VISION | dict(head_dim=16))),
    "gemma4_text": ("Gemma4Text Gemma4ForCausalLM", GEMMA4),
    "llama4": ("Llama4 ForConditionalGeneration", with_vision(LLAMA4, LLAMA4_VISION)),
    "llama4_text": ("Llama4Text Llama4ForCausalLM", LLAMA4),
}
ROUTERS = (
    "mlp.gate.weight",
    "feed_forward.gate.weight",
    "mixer.gate.weight",
    "router.weight",
    "router.gate.weight",
    "router.proj.weight",
    "gate.wg.weight",
)
SCALES = ("router.scale", "router.per_expert_scale", "pre_feedforward_layernorm_2.weight")
BIASES = ("e_score_correction_bias", "expert_bias", "router.bias")


def build_reference(family: str, *, seed: int = 0, **changes):
    """The family's tiny model, built by transformers: float32, evaluation mode, routers with clear preferences.

    `changes` are of the language model's settings.
    """
    name, settings = ALL_FAMILIES[family]
    if "text_config" in settings:
        changes = {"text_config": settings["text_config"] | changes}
    name, _, model_name = name.partition(" ")
    config = getattr(transformers, f"{name}Config")(**(settings | changes))
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model_name = model_name or "ForCausalLM"
    model = getattr(transformers, name + model_name if model_name.startswith("For") else model_name)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if (
                value.ndim > 1
            ):  # a fan-in scale: at transformers' 0.02 the experts' outputs would vanish beside the residual
                value.normal_(0.0, value.shape[-1] ** -0.5, generator=generator)
            if key.endswith(ROUTERS):
                value.mul_(2.0)
            if key.endswith(SCALES):
                value.uniform_(0.5, 1.5, generator=generator)
        for key, value in (*model.named_parameters(), *model.named_buffers()):
            if key.endswith(BIASES):
                value.uniform_(0.0, 0.3, generator=generator)
            if key.endswith("tid2eid"):
                shares = torch.rand(len(value), config.n_routed_experts, generator=generator)
                value.copy_(shares.argsort()[:, : value.shape[1]])
    return model


def make_checkpoint(family: str, folder: Path, *, seed: int = 0, shard_size: str = "5GB", **changes) -> Path:
    """Write the family's tiny checkpoint into `folder`, as on the hub: `config.json` and safetensors shards."""
    return save_checkpoint(family, build_reference(family, seed=seed, **changes), folder, shard_size=shard_size)


def save_checkpoint(family: str, model, folder: Path, *, shard_size: str = "5GB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard_size)
    if family in REWRITES:
        _rewrite(folder, *REWRITES[family])
    if family in CONFIGURATIONS:
        (folder / f"configuration_{family}.py").write_text(CONFIGURATION.format(family, CONFIGURATIONS[family]))
    return folder


def find_moe_blocks(model) -> dict[int, torch.nn.Module]:
    """Decoder-layer index -> MoE block (the module that holds a router and experts) with a k to choose."""
    named = ((re.fullmatch(r"(.*\.)?layers\.(\d+)(\.\w+)?", name), module) for name, module in model.named_modules())
    return {
        int(match[2]): module if match[3] else ScaledBlock(module)
        for match, module in named
        if match and hasattr(module, "experts") and (hasattr(module, "gate") or hasattr(module, "router"))
        if not getattr(module, "is_hash", False)
    }


class ScaledBlock(torch.nn.Module):
    """The router and the experts of a Gemma 4 layer, which has them beside its dense MLP, as a block of their own."""

    def __init__(self, layer):
        super().__init__()
        self.router, self.experts, self.norm = layer.router, layer.experts, layer.pre_feedforward_layernorm_2

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        _, weights, chosen = self.router(rows)
        return self.experts(self.norm(rows), chosen, weights).reshape(x.shape)


def read_config(folder: Path) -> SimpleNamespace:
    return SimpleNamespace(**json.loads((folder / "config.json").read_text()))


def _rewrite(folder, rename, reconfigure):
    tensors = {rename(k): v for k, v in load_file(folder / "model.safetensors").items()}
    tensors.pop(None, None)
    save_file(_join_inputs(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(reconfigure(config), indent=2))


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


def _nest(model_type, *path):
    """A config that keeps this one under `path`."""

    def reconfigure(config):
        for key in reversed(path):
            config = {key: config}
        return {"model_type": model_type} | config

    return reconfigure


def _retype(model_type, **more):
    return lambda config: config | {"model_type": model_type} | more


def _kimi_vl_config(config):
    return _nest("kimi_vl", "text_config")(config | {"topk_method": "noaux_tc", "scoring_func": "sigmoid"})


def _omni_config(config):
    return _nest("qwen3_omni_moe", "thinker_config", "text_config")(
        {"num_experts" if key == "num_local_experts" else key: value for key, value in config.items()}
    )


def _name_dense(key):
    """transformers 5.19 gives the MLP of dense layers the name of MoE layers."""
    return re.sub(r"block_sparse_moe\.(?=(gate|up|gate_up|down)_proj)", "mlp.", key)


DEEPSEEK_V4_NAMES = {"model.embed_tokens": "embed", "model.hc_head.hc_": "hc_head_", "attn.norm": "attn.kv_norm"}
DEEPSEEK_V4_NAMES |= {"model.": ""}


def _deepseek_v4_name(key):
    """transformers 5.19 does not undo all of what it makes of the hub's names."""
    return re.sub("|".join(map(re.escape, DEEPSEEK_V4_NAMES)), lambda match: DEEPSEEK_V4_NAMES[match[0]], key)


def _deepseek_v4_config(config):
    rates = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
    ratios = [rates[kind] for kind in config.pop("layer_types")]
    hashed = config.pop("mlp_layer_types").count("hash_moe")
    for key in ("compress_rates", "partial_rotary_factor"):
        del config[key]
    scaling = config.pop("rope_parameters")["compress"]
    if (kind := scaling.pop("rope_type")) != "default":
        for key in ("rope_theta", "partial_rotary_factor", "attention_factor"):
            del scaling[key]
        config["rope_scaling"] = scaling | {"type": kind}
    return config | {"compress_ratios": ratios, "num_hash_layers": hashed, "topk_method": "noaux_tc"}


def _deepseek_name(key):
    """None for what only the whole of DeepSeek-OCR-2 has; its language model is written with the names on the hub."""
    return key if re.match(r"lm_head\.|model\.(embed_tokens|layers|norm)\.", key) else None


def _deepseek_config(config):
    text = config["text_config"]
    kinds = text.pop("mlp_layer_types")
    for key in ("head_dim", "mlp_bias", "n_group", "routed_scaling_factor", "topk_group", "topk_method"):
        del text[key]  # the hub's config has none
    return text | {
        "architectures": ["DeepseekForCausalLM"],
        "model_type": "deepseek",
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig"},
        "dtype": config["dtype"],
        "first_k_dense_replace": kinds.index("sparse"),
        "moe_layer_freq": 1,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
    }


def _gemma4_config(config):
    """The hub's names for what transformers writes of layers that attend to all."""
    text = config.get("text_config", config)
    own = next(iter(text.pop("per_layer_config").values()))
    text["global_head_dim"] = own["head_dim"]
    text["num_global_key_value_heads"] = own.get("num_key_value_heads")
    return config


def _step3p5_name(key):
    return None if "vi" in key.split(".")[0] else key


def _step3p5_config(config):
    """The language model's part alone, by the hub's keys; lists go on with entries of prediction layers."""
    text = config["text_config"]
    text["moe_num_experts"], text["moe_top_k"] = text.pop("n_routed_experts"), text.pop("num_experts_per_tok")
    text["num_attention_groups"] = text.pop("num_key_value_heads")
    text["attention_other_setting"] = {
        "attention_type": "sliding_attention",
        "num_attention_heads": text.pop("num_sliding_attention_heads"),
        "num_attention_groups": text["num_attention_groups"],
        "head_dim": text["head_dim"],
    }
    sparse = [str(layer) for layer, kind in enumerate(text.pop("mlp_layer_types")) if kind == "sparse"]
    text |= {"moe_layers_enum": ",".join(sparse), "use_head_wise_attn_gate": True, "moe_router_activation": "sigmoid"}
    rope = text.pop("rope_parameters")
    text["layer_types"] = [*text["layer_types"], "sliding_attention"]
    text["rope_theta"] = [rope.get(kind, {}).get("rope_theta", 1e4) for kind in text["layer_types"]]
    text["partial_rotary_factors"] = [rope.get(k, {}).get("partial_rotary_factor", 1.0) for k in text["layer_types"]]
    text.pop("per_layer_config", None)
    return text | {"architectures": ["Step3p5ForCausalLM"], "model_type": "step3p5", "dtype": config["dtype"]}


BAILING = dict(num_experts=16, score_function="sigmoid", moe_router_enable_expert_bias=True, use_rmsnorm=True)
BAILING_NAMES = {"self_attn.o_proj": "attention.dense", "self_attn.q_norm": "attention.query_layernorm"}
BAILING_NAMES |= {"self_attn.k_norm": "attention.key_layernorm", "embed_tokens": "word_embeddings"}
BAILING_NAMES |= {"self_attn.": "attention.", "e_score_correction_bias": "expert_bias"}


def _bailing_name(key):
    return re.sub("|".join(map(re.escape, BAILING_NAMES)), lambda match: BAILING_NAMES[match[0]], key)


def _join_inputs(tensors):
    """Queries, keys and values of one layer as one tensor, where modules are called `attention`."""
    for query in [key for key in tensors if ".attention.q_proj." in key]:
        parts = [tensors.pop(query.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        tensors[query.replace("q_proj", "query_key_value")] = torch.cat(parts)
    return tensors


MODEL_TYPES = {"deepseek_vl2": "deepseek_vl_v2"}  # where a name here is not the config's
# The changes that turn transformers' checkpoint into the hub's: functions of a tensor's name, whose None drops the
# tensor, and of the config.
REWRITES = {
    "deepseek": (_deepseek_name, _deepseek_config),
    "deepseek_vl2": (lambda key: f"language.{key}", _vl2_config),
    "minicpm": (lambda key: key.replace(".block_sparse_moe.", ".mlp."), _minicpm_config),
    "qwen3_omni_moe": (lambda key: f"thinker.{key}", _omni_config),
    "deepseek_v4": (_deepseek_v4_name, _deepseek_v4_config),
    "kimi_k2": (str, _retype("kimi_k2", topk_method="noaux_tc", scoring_func="sigmoid")),
    # transformers 5.19 writes the vision tower's word for layers into the language model's names.
    "kimi_k25": (lambda key: key.replace("language_model.model.blocks.", "language_model.model.layers."), dict),
    "kimi_linear": (_name_dense, dict),
    "minimax_m3_vl": (_name_dense, dict),
    "gemma4": (str, _gemma4_config),
    "step3p5": (_step3p5_name, _step3p5_config),
    "kimi_vl": (lambda key: f"language_model.{key}", _kimi_vl_config),
    "bailing_moe": (_bailing_name, _retype("bailing_moe", use_rmsnorm=True, use_qk_norm=True)),
    "sarvam_moe": (_bailing_name, _retype("sarvam_moe", **BAILING)),
    "bailing_hybrid": (_bailing_name, _retype("bailing_hybrid", **BAILING)),
    "sarvam_mla": (str, _retype("sarvam_mla", num_experts=16, num_shared_experts=1)),
    "bailing_moe_v2": (_bailing_name, _retype("bailing_moe_v2", **BAILING)),
}

# What transformers needs beside a config whose model_type it does not know, so that vLLM can read it.
CONFIGURATIONS = {"deepseek": "DeepseekConfig", "minicpm": "MiniCPMConfig"}
CONFIGURATION = """from transformers.configuration_utils import PretrainedConfig


class {1}(PretrainedConfig):
    model_type = "{0}"
    keys_to_ignore_at_inference = ["past_key_values"]
"""


def write_tokenizer(folder, text, *, size=256, bos=True):
    """A byte-level BPE of so many tokens, `<s>` and `</s>` among them, which puts the first before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    learned = trainers.BpeTrainer(vocab_size=size, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([text], learned)
    if bos:
        special = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    tokenizer.enable_truncation(8)  # as some checkpoints have it: it is not for this
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
