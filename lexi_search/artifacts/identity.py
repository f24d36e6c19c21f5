"""The model that a profile or an allocation belongs to, and the shape of the one that a cost table belongs to."""

from dataclasses import dataclass

from lexi_search.artifacts.codec import require, short


@dataclass(frozen=True)
class ModelIdentity:
    """The model that a file belongs to. It is compared before an allocation is applied to a model.

    `moe_layers` are the decoder-layer indices that have a router, ascending. `top_k` is the model's own k. `router` is
    the name pattern of the router tensors with one {} for the layer, `top_k_key` the dotted path of k in config.json,
    `router_sha256` the SHA-256 over the stored bytes of the router tensors in the order of `moe_layers`.
    """

    model_type: str
    num_hidden_layers: int
    num_experts: int
    top_k: int
    moe_layers: tuple[int, ...]
    router: str
    top_k_key: str
    router_sha256: str

    def __post_init__(self) -> None:
        require(self.model_type, "model_type is empty")
        require(self.top_k_key, "top_k_key is empty")
        require(self.num_hidden_layers >= 1, f"num_hidden_layers is {self.num_hidden_layers}, at least 1 expected")
        require(
            1 <= self.top_k <= self.num_experts,
            f"top_k is {self.top_k}, expected between 1 and num_experts = {self.num_experts}",
        )
        require(self.moe_layers, "moe_layers is empty")
        ascending = all(a < b for a, b in zip(self.moe_layers, self.moe_layers[1:], strict=False))
        require(
            ascending and 0 <= self.moe_layers[0] and self.moe_layers[-1] < self.num_hidden_layers,
            f"moe_layers {short(list(self.moe_layers))} must ascend within 0..{self.num_hidden_layers - 1}",
        )
        require(self.router.count("{}") == 1, f"router {self.router!r} must hold exactly one {{}}")
        is_sha256 = len(self.router_sha256) == 64 and set(self.router_sha256) <= set("0123456789abcdef")
        require(is_sha256, f"router_sha256 {self.router_sha256!r} is not 64 lower-case hex digits")


@dataclass(frozen=True)
class ModelShape:
    """The part of a model's identity that a cost table has: times depend on shapes, not on weights."""

    model_type: str
    num_hidden_layers: int
    num_experts: int
    top_k: int
    moe_layers: tuple[int, ...]
