"""An estimate of step times, where nobody has measured them: the roofline of a named card, and a time for each layer.

A decode step reads every weight that it uses once, so a part of it takes its bytes over the card's bandwidth, or its
FLOPs over the card's rate, whichever is longer. Experts are counted as if every token chose its k of them evenly and
by itself. Nothing here is measured on the user's machine, and `estimate` says so in the table that it makes. Speed-ups
of five models at half of their experts come within 5 % of those in `examples/benchmarks/RESULTS.md`, by a test.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from lexi_search import __version__
from lexi_search.artifacts.cost_table import CostTable, StepTime
from lexi_search.artifacts.identity import ModelIdentity, ModelShape
from lexi_search.checkpoint.config import Key
from lexi_search.checkpoint.dequantise import Plain
from lexi_search.checkpoint.reader import Checkpoint
from lexi_search.models.model import Model

CACHE_BYTES = 2  # of a number in the KV cache
# Milliseconds that a decoder layer takes beyond its roofline, such as between small kernels: what vLLM 0.26 took on an
# H100 for a step of OLMoE-1B-7B with 16 tokens besides its experts, 2.006 ms, less 0.58 ms of roofline, by 16 layers.
LAYER_MS = 0.089
LAYER_MS_SOURCE = "examples/benchmarks/results/h100/serving_latency_olmoe-1b-7b.json"


class Card(NamedTuple):
    """A GPU's bytes per second and dense 16-bit FLOPs per second, and where both figures are from."""

    name: str
    bandwidth: float
    flops: float
    source: str


CARDS = {
    "a100": Card("NVIDIA A100 SXM 80GB", 2.039e12, 312e12, "NVIDIA A100 Tensor Core GPU datasheet"),
    "h100": Card("NVIDIA H100 SXM", 3.35e12, 989.5e12, "NVIDIA H100 datasheet; half its rate with sparsity"),
    "h200": Card("NVIDIA H200 SXM", 4.8e12, 989.5e12, "NVIDIA H200 datasheet; half its rate with sparsity"),
    "b200": Card("NVIDIA B200", 8e12, 2.25e15, "NVIDIA Blackwell architecture brief; half its rate with sparsity"),
    "l4": Card("NVIDIA L4", 0.3e12, 121e12, "NVIDIA L4 datasheet; half its rate with sparsity"),
    "l40s": Card("NVIDIA L40S", 0.864e12, 362.05e12, "NVIDIA L40S datasheet, without sparsity"),
    "rtx4090": Card("NVIDIA GeForce RTX 4090", 1.008e12, 165.2e12, "NVIDIA Ada whitepaper, FP32 accumulation"),
    "mi300x": Card("AMD Instinct MI300X", 5.3e12, 1307.4e12, "AMD Instinct MI300X datasheet"),
}


class Experts(NamedTuple):
    """One layer's routed experts: how many there are, and the bytes and the numbers in the matrices of each."""

    count: int
    size: float
    numbers: float


class ModelSize(NamedTuple):
    """The sizes of a model that a step's time depends on.

    `other_size` and `other_numbers` are the bytes and numbers of all else that a step reads, LM head included;
    `cache_size` and `cache_flops` are the bytes and FLOPs of attention for one token of context, over all layers.
    `hidden_size` is what corrections write to.
    """

    experts: Mapping[int, Experts]
    other_size: float
    other_numbers: float
    cache_size: float
    cache_flops: float
    hidden_size: int


def measure_correction(rank: int, hidden_size: int, experts: int) -> tuple[int, int]:
    """The bytes of one layer's correction B A phi + c, and the numbers in its matrices: `artifacts.compensation`."""
    numbers = rank * (3 * experts + hidden_size)
    return 2 * numbers + 4 * hidden_size, numbers


def count_read(experts: int, top_k: int, tokens: int) -> float:
    """The experts that at least one of `tokens` tokens chooses, in the mean."""
    return experts * -math.expm1(tokens * math.log1p(-top_k / experts)) if top_k < experts else float(experts)


def estimate(
    size: ModelSize, identity: ModelIdentity, card: Card, *, batch: int, context: int, rank: int | None = None
) -> CostTable:
    """The times of a decode step of `batch` sequences, each with `context` tokens behind it, as a cost table.

    With a `rank`, every layer below the model's own k has a correction of it: its bytes and FLOPs count.
    """

    def take(read: float, computed: float) -> float:
        return 1e3 * max(read / card.bandwidth, computed / card.flops)

    other = take(size.other_size, 2 * batch * size.other_numbers)
    other += take(batch * context * size.cache_size, batch * context * size.cache_flops)
    read, numbers = (0, 0) if rank is None else measure_correction(rank, size.hidden_size, identity.num_experts)
    correction = take(read, 2 * batch * numbers)
    layers = {
        layer: tuple(
            take(count_read(experts.count, k, batch) * experts.size, 2 * batch * k * experts.numbers)
            + (correction if k < identity.top_k else 0.0)
            for k in range(1, identity.top_k + 1)
        )
        for layer, experts in size.experts.items()
    }
    origin = {"card": card.name, "bytes_per_second": card.bandwidth, "flops_per_second": card.flops}
    origin |= {"source": card.source, "batch": batch, "context": context}
    origin |= {"layer_ms": LAYER_MS, "layer_ms_source": LAYER_MS_SOURCE}
    origin |= {} if rank is None else {"compensation_rank": rank}
    return CostTable(
        model=ModelShape(**{name: getattr(identity, name) for name in ModelShape.__dataclass_fields__}),
        device=f"estimate for {card.name}, not measured",
        steps={batch: StepTime(other + LAYER_MS * identity.num_hidden_layers, layers)},
        made_by={"lexi_search": __version__, "estimate": origin},
    )


def measure_size(checkpoint: Checkpoint, model: Model) -> ModelSize:
    """The sizes of a checkpoint, as stored, from its headers and config.

    All that lies beside the decoder layers counts as read in every step, but for a token embedding that is not the LM
    head too; layers past `num_hidden_layers` and other parts, such as a vision tower, do not.
    """
    stored, entries = checkpoint.tensors, checkpoint.entries
    stem = model.identity.router.partition("layers.{}")[0]
    experts, routed = {}, set[str]()
    for layer in model.layers:
        tensors = model.tensors[layer]
        names = tensors.experts.fused or tuple(name for each in tensors.experts.separate for name in each)
        parts = {part for name in names for part in stored[name].parts.values()}
        numbers = sum(math.prod(stored[name].shape) for name in names)
        total, count = sum(entries[part].size for part in parts), model.identity.num_experts
        experts[layer] = Experts(count, total / count, numbers / count)
        routed |= parts | set(names)
    tied = not any(_is_head(name) for name in stored)
    kept = {name for name in stored if name not in routed and _is_read(name, stem, model, tied=tied)}
    tables = [stored[name] for name in kept]
    beside = {part for table in tables if table.scheme != Plain() for part in table.parts.values()} - kept
    cache_size, cache_flops = _measure_cache(checkpoint, model)
    return ModelSize(
        experts=experts,
        other_size=sum(entries[name].size for name in (kept | beside) & entries.keys()),
        other_numbers=sum(math.prod(table.shape) for table in tables if len(table.shape) > 1),
        cache_size=cache_size,
        cache_flops=cache_flops,
        hidden_size=model.hidden_size,
    )


def _is_head(name: str) -> bool:
    return name.endswith("lm_head.weight") and "talker" not in name


def _is_read(name: str, stem: str, model: Model, *, tied: bool) -> bool:
    """Whether a decode step reads a tensor as a whole."""
    if not name.startswith(stem):
        return _is_head(name)
    first, _, rest = name.removeprefix(stem).partition(".")
    if first == "layers":
        layer = rest.partition(".")[0]
        return layer.isdecimal() and int(layer) < model.identity.num_hidden_layers and ".ngram_embedding." not in rest
    return tied if "embed" in first or first == "wte" else first == "norm" or _is_head(name)


def _measure_cache(checkpoint: Checkpoint, model: Model) -> tuple[float, float]:
    """The bytes and FLOPs of attention for one token of context, as if every layer kept all of it."""
    config = checkpoint.text_config
    heads = config.resolve(Key("num_attention_heads", 0))
    groups = config.resolve(Key("num_key_value_heads", heads))
    width = config.resolve(Key("head_dim", model.hidden_size // max(heads, 1)))
    latent = config.resolve(Key("kv_lora_rank", 0))
    if latent:  # one vector for all heads: scores over it and its rotary part, values out of it
        rotary = config.resolve(Key("qk_rope_head_dim", 0))
        numbers, products = latent + rotary, heads * (2 * latent + rotary)
    else:
        numbers, products = 2 * groups * width, 2 * heads * width
    layers = model.identity.num_hidden_layers
    return float(layers * numbers * CACHE_BYTES), float(2 * layers * products)
