"""The MoE layers of every family, as data."""

from collections.abc import Mapping
from types import MappingProxyType

from lexi_search.checkpoint.config import Key
from lexi_search.layers.spec import Activation, Routing
from lexi_search.layers.weights import Scales
from lexi_search.models.families.moe import (
    BIASED,
    PLAIN,
    SIGMOID,
    SIGMOID_OR_SOFTMAX,
    SOFTMAX_OR_SIGMOID,
    SWIGLU_OAI,
    Architecture,
    mean_share,
)

FFN_WIDTH = ("intermediate_size",)
ROUTED = ("n_routed_experts", "num_experts", "num_local_experts")
GROUPS = {"num_groups": Key("n_group", 1), "topk_groups": Key("topk_group", 1)}

QWEN2_MOE = Architecture("qwen2_moe", routing=Routing(renormalize=Key("norm_topk_prob", False)))
QWEN3_NEXT = Architecture("qwen3_next", routing=Routing(renormalize=Key("norm_topk_prob", True)))
MIXTRAL = Architecture(
    "mixtral",
    routers=("block_sparse_moe.gate", "mlp.gate"),
    routing=Routing(renormalize=True),
    width=FFN_WIDTH,
)
GRANITE = MIXTRAL._replace(
    model_type="granitemoe",
    routers=("block_sparse_moe.router.layer", "block_sparse_moe.router"),
)
DEEPSEEK_V2 = Architecture(
    "deepseek_v2",
    num_experts=ROUTED,
    routing=Routing(renormalize=Key("norm_topk_prob", False), scale=Key("routed_scaling_factor", 1.0)),
    choices={
        "topk_method": {
            "greedy": {},
            "group_limited_greedy": GROUPS,
            "noaux_tc": GROUPS | {"group_score": "top2", "bias": "selection"},
        },
        "scoring_func": SOFTMAX_OR_SIGMOID,
    },
    shared_experts=("n_shared_experts",),
)
DEEPSEEK_V3 = DEEPSEEK_V2._replace(model_type="deepseek_v3", routing=SIGMOID, choices=BIASED)
CLAMPED = DEEPSEEK_V3._replace(
    model_type="hy_v4", activation=Activation(Key("hidden_act", "silu"), limit=Key("swiglu_limit", 10.0))
)
DEEPSEEK_V4 = CLAMPED._replace(
    model_type="deepseek_v4",
    routers=("ffn.gate", "mlp.gate"),
    routing=SIGMOID._replace(
        scoring="sqrtsoftplus", scale=Key("routed_scaling_factor", 1.5), num_groups=1, topk_groups=1
    ),
    choices={
        "topk_method": {"noaux_tc": {}},
        "scoring_func": {"sqrtsoftplus": {}, "sigmoid": {"scoring": "sigmoid"}, "softmax": {"scoring": "softmax"}},
    },
)
MISTRAL4 = DEEPSEEK_V3._replace(
    model_type="mistral4", routing=SIGMOID._replace(scoring="softmax", bias=None), choices=PLAIN
)
GPT_OSS = Architecture(
    "gpt_oss",
    routers=("mlp.router",),
    routing=Routing(renormalize=True, bias="logits"),
    activation=SWIGLU_OAI,
    interleaved=True,
    width=FFN_WIDTH,
)
GEMMA4 = Architecture(
    "gemma4",
    routers=("router.proj",),
    top_k=("top_k_experts",),
    routing=Routing(renormalize=True, scales_output=True),
    activation=Activation(Key("hidden_activation", "gelu_pytorch_tanh")),
    choices={},
    differing=True,
    scales=Scales("router.scale", "pre_feedforward_layernorm_2.weight", "router.per_expert_scale"),
)
LLAMA4 = Architecture(
    "llama4_text",
    routers=("feed_forward.router",),
    routing=Routing(scoring="sigmoid", scales_input=True),
    choices={},
    width=FFN_WIDTH,
    bound=("feed_forward.shared_expert",),
)
MINIMAX_M2 = Architecture(
    "minimax_m2",
    routers=("block_sparse_moe.gate", "mlp.gate"),
    routing=SIGMOID._replace(renormalize=True, scale=1.0),
    choices=BIASED,
    width=FFN_WIDTH,
)
STEP = Architecture(
    "step3p5",
    routers=("moe.gate",),
    num_experts=("n_routed_experts", "moe_num_experts"),
    top_k=("num_experts_per_tok", "moe_top_k"),
    routing=SIGMOID._replace(
        renormalize=Key("norm_expert_weight", True),
        scale=Key("moe_router_scaling_factor", 1.0),
        num_groups=1,
        topk_groups=1,
    ),
    choices={"moe_router_activation": {"sigmoid": {}}, "use_moe_router_bias": {True: {}}},
    limits="swiglu_limits",
    differing=True,
)
BAILING = Architecture(
    "bailing_moe",
    routing=DEEPSEEK_V2.routing._replace(**GROUPS),
    choices={
        "score_function": SOFTMAX_OR_SIGMOID,
        "moe_router_enable_expert_bias": {False: {}, True: {"bias": "selection", "group_score": "top2"}},
    },
    width=("moe_intermediate_size", "moe_shared_expert_intermediate_size"),
    shared_experts=("num_shared_experts", "n_shared_experts"),
)

_FAMILIES = (
    QWEN2_MOE,
    QWEN2_MOE._replace(model_type="olmoe", width=FFN_WIDTH),
    QWEN2_MOE._replace(model_type="flex_olmo", width=FFN_WIDTH),
    QWEN2_MOE._replace(model_type="qwen3_moe"),
    QWEN3_NEXT,
    QWEN3_NEXT._replace(model_type="mellum"),
    QWEN3_NEXT._replace(model_type="qwen3_5_moe_text", routing=Routing(renormalize=True)),
    QWEN3_NEXT._replace(model_type="qwen3_5_moe", routing=Routing(renormalize=True)),
    QWEN3_NEXT._replace(model_type="qwen3_vl_moe"),
    QWEN3_NEXT._replace(model_type="qwen4_exp"),
    QWEN3_NEXT._replace(model_type="qwen3_omni_moe"),
    MIXTRAL,
    MIXTRAL._replace(model_type="minimax"),
    MIXTRAL._replace(model_type="minicpm", routers=("mlp.gate",)),  # its MoE variant
    GRANITE,
    GRANITE._replace(model_type="granitemoeshared"),
    GRANITE._replace(model_type="granitemoehybrid"),
    GRANITE._replace(model_type="granitemoe_swa"),
    Architecture(
        "phimoe",
        routers=("block_sparse_moe.gate", "mlp.router"),
        routing=Routing(scoring="sparsemixer", jitter=Key("router_jitter_noise", 0.01)),
        choices={},
        width=FFN_WIDTH,
    ),
    Architecture("jamba", routers=("feed_forward.router",), width=FFN_WIDTH, bound=("feed_forward.gate_proj",)),
    Architecture(
        "hunyuan_v1_moe",
        routers=("mlp.gate.wg",),
        top_k=("moe_topk", "num_experts_per_tok"),
        routing=Routing(renormalize=True),
        width=("intermediate_size", "moe_intermediate_size"),
        bound=("mlp.shared_mlp", "mlp.gate_proj"),
    ),
    Architecture(
        "ernie4_5_moe",
        num_experts=("moe_num_experts", "num_experts"),
        top_k=("moe_k", "num_experts_per_tok"),
        routing=Routing(renormalize=True, bias="selection", epsilon=0.0, norm_min=Key("moe_norm_min", 1e-12)),
        shared_experts=("moe_num_shared_experts",),
    ),
    Architecture(
        "aria",
        routers=("mlp.router",),
        num_experts=("moe_num_experts",),
        top_k=("moe_topk",),
        routing=Routing(renormalize=True),
        width=FFN_WIDTH,
        shared_experts=("moe_num_shared_experts",),
    ),
    Architecture(
        "cohere2_moe",
        routing=Routing(scale=mean_share),
        choices={
            "expert_selection_fn": {
                "softmax": {"renormalize": True},
                "sigmoid": {"scoring": "sigmoid", "renormalize": Key("norm_topk_prob", True)},
            },
            "shared_expert_combination_strategy": {"average": {}, "sum": {}},
        },
        width=FFN_WIDTH,
        shared_experts=("num_shared_experts",),
        bound=("mlp.gate_proj",),
    ),
    DEEPSEEK_V2._replace(
        model_type="deepseek",  # DeepSeek-MoE, whose router knows neither groups nor a scale
        routing=QWEN2_MOE.routing,
        choices={"topk_method": {"greedy": {}}, "scoring_func": {"softmax": {}}},
    ),
    DEEPSEEK_V2,
    DEEPSEEK_V2._replace(model_type="deepseek_vl_v2"),
    DEEPSEEK_V2._replace(model_type="deepseek_ocr2"),
    DEEPSEEK_V3,
    DEEPSEEK_V3._replace(model_type="deepseek_v32"),
    DEEPSEEK_V3._replace(model_type="kimi_k2"),
    DEEPSEEK_V3._replace(model_type="kimi_k25"),
    DEEPSEEK_V3._replace(model_type="kimi_vl"),
    DEEPSEEK_V3._replace(
        model_type="kimi_linear",
        num_experts=("num_experts",),
        routers=("block_sparse_moe.gate", "mlp.gate"),
        top_k=("num_experts_per_token", "num_experts_per_tok"),
        routing=SIGMOID._replace(renormalize=Key("moe_renormalize", True), num_groups=Key("num_expert_group", 1)),
        choices={"moe_router_activation_func": SIGMOID_OR_SOFTMAX},
        shared_experts=("num_shared_experts",),
    ),
    DEEPSEEK_V3._replace(model_type="axk1"),
    DEEPSEEK_V3._replace(model_type="axk2"),
    DEEPSEEK_V3._replace(model_type="glm4_moe"),
    DEEPSEEK_V3._replace(model_type="glm4_moe_lite"),
    DEEPSEEK_V3._replace(model_type="glm_moe_dsa"),
    DEEPSEEK_V3._replace(model_type="glm4v_moe"),
    DEEPSEEK_V3._replace(
        model_type="dots1",
        routing=SIGMOID._replace(renormalize=Key("norm_topk_prob", False)),
        choices={"topk_method": {"noaux_tc": {}}},  # its checkpoints repeat that value as scoring_func
    ),
    DEEPSEEK_V3._replace(model_type="exaone_moe", num_experts=("num_experts",), shared_experts=("num_shared_experts",)),
    DEEPSEEK_V3._replace(model_type="solar_open"),
    DEEPSEEK_V3._replace(model_type="mimo_v2_flash"),
    CLAMPED,
    CLAMPED._replace(model_type="glm5_next"),
    DEEPSEEK_V4,
    MISTRAL4,
    MISTRAL4._replace(model_type="mistral3"),  # around it: Mistral Small 4
    DEEPSEEK_V3._replace(
        model_type="nemotron_h",
        routers=("mixer.gate",),
        activation=Activation(Key("mlp_hidden_act", "relu2")),
        choices=BIASED,
        latent="moe_latent_size",
        shared_experts=(),
    ),
    STEP,
    STEP._replace(model_type="step3p7"),
    MINIMAX_M2,
    MINIMAX_M2._replace(
        model_type="minimax_m3_vl",
        routing=MINIMAX_M2.routing._replace(scale=Key("routed_scaling_factor", 2.0)),
        activation=SWIGLU_OAI,
    ),
    MINIMAX_M2._replace(
        model_type="hy_v3",
        routers=("mlp.router.gate", "mlp.gate"),
        routing=MINIMAX_M2.routing._replace(scale=Key("router_scaling_factor", 1.0)),
        width=("moe_intermediate_size", "expert_hidden_dim"),
        shared_experts=("num_shared_experts",),
    ),
    MINIMAX_M2._replace(
        model_type="afmoe",
        routers=("mlp.router.gate",),
        routing=SIGMOID._replace(
            renormalize=Key("route_norm", True),
            scale=Key("route_scale", 1.0),
        ),
        choices={"score_func": SIGMOID_OR_SOFTMAX},
        width=("moe_intermediate_size",),
        shared_experts=("num_shared_experts",),
    ),
    MINIMAX_M2._replace(
        model_type="laguna",
        routers=("mlp.gate",),
        routing=MINIMAX_M2.routing._replace(scale=Key("moe_routed_scaling_factor", 1.0)),
        width=("moe_intermediate_size",),
        choices={"moe_router_logit_softcapping": {0.0: {}}, "moe_apply_router_weight_on_input": {False: {}}},
    ),
    Architecture(
        "lfm2_moe",
        routers=("feed_forward.gate",),
        routing=SIGMOID._replace(epsilon=1e-6, num_groups=1, topk_groups=1, bias=None),
        choices={"use_expert_bias": {True: {"bias": "selection"}, False: {}}},
    ),
    BAILING,
    BAILING._replace(model_type="bailing_moe_v2"),
    BAILING._replace(model_type="sarvam_moe"),
    BAILING._replace(  # Ling 2.5 and 3
        model_type="bailing_hybrid",
        routing=SIGMOID,
        choices={
            "score_function": {"sigmoid": {}},
            "moe_router_enable_expert_bias": {True: {}},
            "expert_swiglu_limit_list": {None: {}},
        },
    ),
    BAILING._replace(
        model_type="sarvam_mla",
        routing=SIGMOID._replace(scale=Key("routed_scaling_factor", 2.5)),
        choices={
            "score_function": SIGMOID_OR_SOFTMAX,
            "moe_router_enable_expert_bias": {True: {}, False: {"bias": None}},
        },
    ),
    GPT_OSS,
    GEMMA4,
    GEMMA4._replace(model_type="gemma4_text"),
    LLAMA4,
    LLAMA4._replace(model_type="llama4"),
)
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType({family.model_type: family for family in _FAMILIES})
