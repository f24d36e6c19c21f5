"""What a family says of its MoE layers: config keys, router names, routing rules and activations.

A family is one `Architecture`: which config keys hold its sizes, what its router module is called, how its router
turns logits into weights, and what its experts compute. Tensor layouts are shared by all families, and `moe_tensors`
recognises them in the checkpoint.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from lexi_search.checkpoint.config import Config, Key
from lexi_search.layers.spec import Activation, Routing
from lexi_search.layers.weights import Scales

SIGMOID = Routing(
    scoring="sigmoid",
    renormalize=Key("norm_topk_prob", True),
    scale=Key("routed_scaling_factor", 1.0),
    num_groups=Key("n_group", 1),
    topk_groups=Key("topk_group", 1),
    group_score="top2",
    bias="selection",
)
SWIGLU_OAI = Activation("silu", alpha=Key("swiglu_alpha", 1.702), limit=Key("swiglu_limit", 7.0), up_offset=1.0)
SOFTMAX_OR_SIGMOID = MappingProxyType({"softmax": {"scoring": "softmax"}, "sigmoid": {"scoring": "sigmoid"}})
SIGMOID_OR_SOFTMAX = MappingProxyType(dict(reversed(SOFTMAX_OR_SIGMOID.items())))
PLAIN = MappingProxyType({"topk_method": {"greedy": {}}, "scoring_func": SOFTMAX_OR_SIGMOID})
BIASED = MappingProxyType({"topk_method": {"noaux_tc": {}}, "scoring_func": SIGMOID_OR_SOFTMAX})


def mean_share(config: Config) -> float:
    """The factor of routed experts whose output and that of shared ones are averaged (Cohere); 1 where they are not."""
    average = config.values.get("shared_expert_combination_strategy") in (None, "average")
    return 0.5 if average and config.resolve(Key("num_shared_experts", 0)) else 1.0


class Architecture(NamedTuple):
    """One family. Any field of its `routing` and `activation` may be a `Key` of the config instead of a value, and its
    scale a function of the config.

    `choices` maps further config keys to their known values, the default first, and each value to the fields of
    `routing` that it sets. Any other value is refused.
    """

    model_type: str
    routers: tuple[str, ...] = ("mlp.gate",)  # module names of the router below `layers.N.`, all that are in use
    num_experts: tuple[str, ...] = ("num_experts", "num_local_experts")  # config keys; the first one present counts
    top_k: tuple[str, ...] = ("num_experts_per_tok",)
    routing: Routing = Routing()
    activation: Activation = Activation(Key("hidden_act", "silu"))
    choices: Mapping[str, Mapping[Any, Mapping[str, Any]]] = PLAIN
    interleaved: bool = False  # rows of gate and up alternate, where both are one tensor
    width: tuple[str, ...] = ("moe_intermediate_size",)  # config keys of an expert's width: all that are present
    shared_experts: tuple[str, ...] = ()  # config keys of the number of shared experts, each as wide as `width` says
    bound: tuple[str, ...] = ()  # other modules below `layers.N.` whose width the same keys give
    differing: bool = False  # layers have other sizes of attention, by the config's `per_layer_config`
    latent: str | None = None  # config key of the size of the space that the experts work in
    limits: str | None = None  # config key of a list of the limits of each layer's experts
    scales: Scales | None = None  # tensors below `layers.N.`, which then has the experts itself, not in a block
