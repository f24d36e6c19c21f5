"""What differs between MoE families, as data.

A family is one `Architecture` below: where its config keeps the numbers, what its router tensor is called, and how its
router turns logits into weights. Tensor layouts are shared by all families and found by looking at the checkpoint.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Routing(NamedTuple):
    """How router logits become the chosen experts and their mixing weights; hashable, static under `jit`.

    Scores are `scoring` of the logits over all experts. Selection takes the top k of the scores (plus the bias, where
    the checkpoint has one) within the `topk_groups` best of `num_groups` groups, a group being judged by `group_score`:
    its best expert or the sum of its best two. Weights are the unbiased scores of the chosen experts, divided by
    their sum if `renormalize`, times `scale`.
    """

    scoring: str = "softmax"  # or "sigmoid"
    renormalize: bool = False
    scale: float = 1.0
    num_groups: int = 1
    topk_groups: int = 1
    group_score: str = "max"  # or "top2"


class Activation(NamedTuple):
    """What an expert does between its products; hashable, static under `jit`.

    Gated experts compute f(gate) * (up + `up_offset`), where f is the function called `name`, or x * sigmoid(alpha x)
    if that is "silu", and `limit` bounds gate from above and up on both sides. Ungated ones compute f(up).
    """

    name: str = "silu"
    alpha: float = 1.0
    limit: float | None = None
    up_offset: float = 0.0


class Selection(NamedTuple):
    """One value of a config's `topk_method`: whether experts are chosen by group, and with a bias per expert."""

    group_score: str | None = None
    bias: bool = False


class Architecture(NamedTuple):
    """One family. A string where `renormalize` or `scale` is expected names the config key that holds the value."""

    model_type: str
    routers: tuple[str, ...]  # module names of the router below `layers.N.`, old and new
    num_experts: tuple[str, ...] = ("num_experts", "num_local_experts")  # config keys, the first that is there counts
    top_k: tuple[str, ...] = ("num_experts_per_tok",)
    text_config: str | None = None  # where a multimodal config keeps the language model's
    renormalize: bool | str = False
    scale: float | str = 1.0
    selections: Mapping[str, Selection] = {"greedy": Selection()}


DEEPSEEK_V2 = Architecture(
    model_type="deepseek_v2",
    routers=("mlp.gate",),
    num_experts=("n_routed_experts", "num_local_experts"),
    renormalize="norm_topk_prob",
    scale="routed_scaling_factor",
    selections={
        "greedy": Selection(),
        "group_limited_greedy": Selection(group_score="max"),
        "noaux_tc": Selection(group_score="top2", bias=True),
    },
)

ARCHITECTURES: Mapping[str, Architecture] = {
    architecture.model_type: architecture
    for architecture in (
        Architecture(model_type="olmoe", routers=("mlp.gate",), renormalize="norm_topk_prob"),
        Architecture(
            model_type="mixtral",
            routers=("block_sparse_moe.gate", "mlp.gate"),
            renormalize=True,
        ),
        Architecture(model_type="qwen2_moe", routers=("mlp.gate",), renormalize="norm_topk_prob"),
        Architecture(model_type="qwen3_moe", routers=("mlp.gate",), renormalize="norm_topk_prob"),
        DEEPSEEK_V2,
        DEEPSEEK_V2._replace(model_type="deepseek_vl_v2", text_config="language_config"),
        Architecture(model_type="minicpm", routers=("mlp.gate",), renormalize=True),  # its MoE variant
    )
}
