"""vLLM's internals that this adapter relies on, as data: names, and differences between versions and families.

Written against the sources of vLLM 0.26, 0.32 and 0.33. Standard library only; nothing here imports vLLM.
"""

import re
from collections.abc import Mapping

from lexi_adapter.errors import AdapterError

OLDEST, NEWEST = (0, 26), (0, 33)

# Functions that the plugin replaces or calls: module, and dotted names in it that every version has.
HOOKED: Mapping[str, tuple[str, ...]] = {
    "vllm.config": ("ModelConfig.get_model_arch_config", "VllmConfig.__post_init__"),
    "vllm.transformers_utils.config": ("HFConfigParser.parse",),
    "vllm.model_executor.model_loader.utils": ("initialize_model", "get_model_architecture"),
    "vllm.model_executor.model_loader.default_loader": ("DefaultModelLoader._prepare_weights",),
    "vllm.model_executor.layers.fused_moe.router.base_router": ("BaseRouter._compute_routing",),
    "vllm.model_executor.layers.fused_moe.routed_experts": ("RoutedExperts.forward_monolithic",),
    "vllm.model_executor.layers.fused_moe.fused_moe_method_base": (
        "FusedMoEMethodBase.is_monolithic",
        "FusedMoEMethodBase.topk_indices_dtype",
    ),
    "vllm.model_executor.layers.fused_moe.runner.moe_runner": (
        "MoERunner._apply_quant_method",
        "MoERunner._fused_output_is_reduced",
        "MoERunner.do_naive_dispatch_combine",
    ),
    "vllm.model_executor.layers.fused_moe.experts.triton_moe": ("TritonExperts.moe_sum",),
    "vllm.model_executor.layers.fused_moe.topk_weight_and_reduce": ("TopKWeightAndReduceNoOP.apply",),
    "vllm.model_executor.layers.fused_moe.prepare_finalize.no_dp_ep": ("MoEPrepareAndFinalizeNoDPEPModular.finalize",),
    "vllm.model_executor.models.minicpm": ("MiniCPMMoE.__init__", "MiniCPMMoE.forward"),
    "vllm.v1.worker.worker_base": ("WorkerBase", "WorkerWrapperBase.__getattr__"),
    "vllm.engine.protocol": ("EngineClient.collective_rpc",),
    "vllm.entrypoints.openai.models.serving": ("OpenAIServingModels.show_available_models",),
}

# Loaders beside the default one that read every safetensors file of a folder; the second in 0.26 only.
OTHER_LOADERS = ("RunaiModelStreamerLoader", "BitsAndBytesModelLoader")

# The names of the function that builds a MoE layer: in 0.32 and 0.33, then in 0.26.
FACTORY_MODULE = "vllm.model_executor.layers.fused_moe.layer"
FACTORY_NAMES = ("FusedMoEFactory", "FusedMoE")

# Blocks that route by themselves instead of calling the factory; they take its arguments by the same names.
OWN_BLOCKS = (("vllm.model_executor.models.minicpm", "MiniCPMMoE"),)

# Every attribute in which a built layer holds its top-k, by class. They decide kernels, workspaces and all2all sizes.
HOLDERS: Mapping[str, tuple[str, ...]] = {
    "MoERunner": (
        "router.top_k",
        "moe_config.experts_per_token",
        "routed_experts.top_k",
        "routed_experts.moe_config.experts_per_token",
        "routed_experts.expert_map_manager.top_k",
    ),
    "MiniCPMMoE": ("top_k",),
}

# The experts of every token of the vocabulary, as an argument of the factory and as an attribute of the router made.
# Such a layer keeps its own k.
FIXED_CHOICES, TABLE = "hash_indices_table", "_hash_indices_table"
# Arguments of the factory that replace its routing, by one for which the factory's top-k need not count ...
CUSTOM_ROUTING = ("custom_routing_function", "router", FIXED_CHOICES)
# ... except these functions, by qualified name: they choose as many experts as the factory's top-k says.
ROUTING_AT_TOP_K = frozenset({"token_choice_with_bias", "Gemma4Router.routing_function"})  # Cohere2-MoE, Gemma 4

# Of these, the ones whose weights are not the scores up to one factor a token.
UNPROPORTIONAL_ROUTING = frozenset({"Gemma4Router.routing_function"})

# Router classes whose weights are the scores up to one factor a token, so that a gate exponent can be applied. The
# value says which of the K experts that a router returns on CUDA it would choose at a smaller top-k: the first ones,
# those of the largest weights (where no bias selects), or None where that is not known.
FIRST, LARGEST = "first", "largest"
ROUTERS: Mapping[str, str | None] = {
    "FusedTopKRouter": FIRST,
    "FusedTopKBiasRouter": FIRST,
    "GroupedTopKRouter": LARGEST,
    "CPURouter": None,
    "CustomRoutingRouter": None,
}
ORDERED_SCORES = ("softmax", "sigmoid")  # the scoring functions whose kernels were read for that

# Routers whose choice is that of the largest of a softmax over all experts, by what their attributes have to be then.
SCORED_BY_SOFTMAX: Mapping[str, Mapping[str, tuple]] = {
    "FusedTopKRouter": {"scoring_func": ("softmax",)},
    "GroupedTopKRouter": {
        "scoring_func": ("softmax",),
        "num_expert_group": (None, 0, 1),
        "topk_group": (None, 0, 1),
        "e_score_correction_bias": (None,),
    },
}

# The class that ends the experts' computation with a copy of their output, for the tokens that it began with.
LOCAL_FINALIZE = "MoEPrepareAndFinalizeNoDPEPModular"

# Model types whose class in vLLM has an LM head of its own even where the checkpoint ties it to the embeddings. It is
# then never loaded, and the engine serves noise.
NEVER_TIED = frozenset(
    """afmoe deepseek deepseek_v2 deepseek_v3 deepseek_v32 deepseek_vl_v2 glm4_moe glm_moe_dsa gpt_oss jamba kimi_k2
    minimax_m2 nemotron_h olmoe qwen3_next""".split()
)


def check_version(version: str) -> None:
    """Raise AdapterError unless `version` of vLLM is one that this adapter was written for and tried with."""
    match = re.match(r"(\d+)\.(\d+)", version)
    if not match or not OLDEST <= (int(match[1]), int(match[2])) <= NEWEST:
        raise AdapterError(f"vLLM {version} cannot apply an allocation: {describe_supported()}")


def describe_supported() -> str:
    """The supported versions and the remedy, for messages."""
    oldest, newest = (".".join(map(str, version)) for version in (OLDEST, NEWEST))
    return f"lexi_adapter supports vLLM {oldest} to {newest}; install one of these"
