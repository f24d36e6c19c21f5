"""The estimate of step times, against arithmetic by hand and against a cost table that was measured."""

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest
import tiny
from corrections import draw_maps
from safetensors.torch import load_file, save_file

import lexi_search
from lexi_search.allocation.costs import weigh
from lexi_search.allocation.speed_estimate import CARDS, LAYER_MS, Card, Experts, ModelSize, count_read, estimate
from lexi_search.allocation.speed_estimate import measure_size as measure
from lexi_search.artifacts.identity import ModelIdentity
from lexi_search.artifacts.serialisation import read_cost_table
from lexi_search.checkpoint.reader import open_checkpoint
from lexi_search.models.model import describe

ROOT = Path(lexi_search.__file__).parent.parent
MEASURED = ROOT / "examples/benchmarks/results/h100/serving_latency_olmoe-1b-7b.json"
# OLMoE-1B-7B in bfloat16, by hand: 16 layers, hidden size 2048, 64 experts of width 1024, 16 heads of 128.
EXPERT, REST = 3 * 2048 * 1024, 16 * (4 * 2048**2 + 64 * 2048) + 50304 * 2048
OLMOE = ModelSize(
    experts={layer: Experts(64, 2 * EXPERT, EXPERT) for layer in range(16)},
    other_size=2 * REST,
    other_numbers=REST,
    cache_size=16 * 2 * 2048 * 2,
    cache_flops=16 * 4 * 2048,
    hidden_size=2048,
)


def make_identity(layers=16, experts=64, top_k=8):
    name = "model.layers.{}.mlp.gate.weight"
    return ModelIdentity("olmoe", layers, experts, top_k, tuple(range(layers)), name, "num_experts_per_tok", "0" * 64)


@pytest.mark.parametrize(("experts", "top_k", "tokens"), [(8, 2, 1), (8, 2, 5), (16, 15, 3), (64, 8, 16), (4, 4, 2)])
def test_experts_that_are_read_are_those_that_a_simulation_reads(experts, top_k, tokens):
    draw = random.Random(0)
    counts = [len({e for _ in range(tokens) for e in draw.sample(range(experts), top_k)}) for _ in range(4000)]
    assert count_read(experts, top_k, tokens) == pytest.approx(np.mean(counts), rel=0.01)


def test_a_step_is_what_the_arithmetic_says():
    size = ModelSize(
        {0: Experts(4, 3e6, 1e6)}, other_size=8e6, other_numbers=2e6, cache_size=1e3, cache_flops=4e3, hidden_size=1000
    )
    card = Card("slow", bandwidth=1e9, flops=1e12, source="made up")
    step = estimate(size, make_identity(1, 4, 2), card, batch=1, context=1000).steps[1]
    # One token reads its k experts of 3 ms each; all else 8 ms, and 1 MB of cache in 1 ms; far fewer FLOPs than bytes.
    assert step.layers == {0: pytest.approx((3.0, 6.0))}
    assert step.other_ms == pytest.approx(8 + 1 + LAYER_MS)
    step = estimate(size, make_identity(1, 4, 2), card._replace(flops=1e9), batch=100, context=1000).steps[100]
    # 100 tokens: 2 FLOPs a number and token; the cache 4e3 x 100 x 1000 of them.
    assert step.layers == {0: pytest.approx((200.0, 400.0))}
    assert step.other_ms == pytest.approx(400 + 400 + LAYER_MS)


def test_corrections_cost_the_bytes_and_flops_that_serving_them_takes():
    """Judged by the tensors of the file, and by the products that one token needs."""
    identity = make_identity(1, 4, 2)
    size = ModelSize({0: Experts(4, 3e6, 1e6)}, 8e6, 2e6, cache_size=1e3, cache_flops=4e3, hidden_size=1000)
    maps = draw_maps(identity, [(0, 1)], hidden=1000, rank=5)
    (correction,) = maps.values()
    stored, products = sum(part.nbytes for part in correction), correction.A.size + correction.B.size
    for bandwidth, flops, expected in ((1e9, 1e15, 1e3 * stored / 1e9), (1e15, 1e9, 1e3 * 2 * 100 * products / 1e9)):
        card = Card("slow", bandwidth=bandwidth, flops=flops, source="made up")
        plain, table = (estimate(size, identity, card, batch=100, context=10, rank=rank) for rank in (None, 5))
        added = np.subtract(table.steps[100].layers[0], plain.steps[100].layers[0])
        assert added == pytest.approx([expected, 0.0])  # a layer with the model's own k has no correction
        assert table.steps[100].other_ms == plain.steps[100].other_ms
    assert table.made_by["estimate"]["compensation_rank"] == 5
    assert "compensation_rank" not in plain.made_by["estimate"]


def test_it_says_that_it_is_an_estimate_and_where_its_figures_are_from():
    table = estimate(OLMOE, make_identity(), CARDS["h100"], batch=16, context=576)
    assert table.device == "estimate for NVIDIA H100 SXM, not measured"
    assert table.made_by["estimate"]["source"] == CARDS["h100"].source
    cost = weigh(table, make_identity())
    assert cost.estimated and cost.describe()["estimated"] is True
    assert not weigh(read_cost_table(MEASURED), make_identity(), mix={16: 1}).estimated
    assert "estimated" not in weigh(read_cost_table(MEASURED), make_identity(), mix={16: 1}).describe()


def test_it_is_near_what_was_measured_of_olmoe():
    table = estimate(OLMOE, make_identity(), CARDS["h100"], batch=16, context=576)
    ours, truth = (weigh(one, make_identity(), mix={16: 1}) for one in (table, read_cost_table(MEASURED)))
    assert ours.base_ms == pytest.approx(truth.base_ms, rel=0.06)
    for k in range(2, 8):
        uniform = np.full(16, k)
        speedups = [cost.base_ms / cost.time(uniform) for cost in (ours, truth)]
        assert speedups[0] == pytest.approx(speedups[1], rel=0.06), k


# Layers, of them dense, hidden size, experts, their width, k; numbers in a layer's attention, width of its shared
# experts, numbers in its cache and products with it for a token; vocabulary; width of dense layers.
SHAPES = {
    "olmoe-1b-7b": (16, 0, 2048, 64, 1024, 8, 4 * 2048**2, 0, 4096, 4096, 50304, 0),
    "qwen1.5-moe-a2.7b": (24, 0, 2048, 60, 1408, 4, 4 * 2048**2, 5632, 4096, 4096, 151936, 0),
    "deepseek-v2-lite": (27, 1, 2048, 64, 1408, 6, 13762560, 2816, 576, 17408, 102400, 10944),
    "mixtral-8x7b": (32, 0, 4096, 8, 14336, 2, 41943040, 0, 2048, 8192, 32000, 0),
    "minicpm-moe-8x2b": (40, 0, 2304, 8, 5760, 2, 4 * 2304**2, 0, 4608, 4608, 122753, 0),
}


def size_up(layers, dense, hidden, experts, width, top_k, attention, shared, cache, products, words, wide):
    one = 3 * hidden * width
    rest = layers * attention + (layers - dense) * hidden * (3 * shared + experts) + hidden * (words + 3 * dense * wide)
    routed = {layer: Experts(experts, 2 * one, one) for layer in range(dense, layers)}
    return ModelSize(routed, 2 * rest, rest, layers * cache * 2, layers * products * 2, hidden)


@pytest.mark.parametrize(
    ("name", "card", "measured"),
    [  # 16 prompts of 512 tokens and 128 new ones with half of the active experts: examples/benchmarks/RESULTS.md
        ("olmoe-1b-7b", "h100", 1.22),
        ("qwen1.5-moe-a2.7b", "h100", 1.26),
        ("deepseek-v2-lite", "h100", 1.24),
        ("mixtral-8x7b", "h200", 1.15),
        ("minicpm-moe-8x2b", "h200", 1.11),
    ],
)
def test_it_is_within_5_percent_of_measured_throughput(name, card, measured):
    assert f"| {name} | 16x512x128 |" in (ROOT / "examples/benchmarks/RESULTS.md").read_text()
    layers, dense, _, experts, _, top_k, *_ = SHAPES[name]
    identity = dataclasses.replace(make_identity(layers, experts, top_k), moe_layers=tuple(range(dense, layers)))
    cost = weigh(estimate(size_up(*SHAPES[name]), identity, CARDS[card], batch=16, context=576), identity)
    half = cost.time(np.full(layers - dense, top_k // 2))
    assert cost.base_ms / half == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("name", ["olmoe", "mixtral", "qwen2_moe", "deepseek_v2", "qwen3_vl_moe", "kimi_vl"])
def test_every_byte_of_the_language_model_counts_once(name, tmp_path):
    folder = tiny.make_checkpoint(name, tmp_path / name)
    checkpoint = open_checkpoint(folder)
    model = describe(checkpoint)
    size = measure(checkpoint, model)
    language = {name: entry for name, entry in checkpoint.entries.items() if "visual" not in name}
    embedding = sum(entry.size for name, entry in language.items() if "embed_tokens" in name)
    routed = sum(experts.count * experts.size for experts in size.experts.values())
    assert sorted(size.experts) == list(model.layers)
    assert routed + size.other_size + embedding == sum(entry.size for entry in language.values())
    assert size.cache_size > 0 and size.cache_flops > 0


def test_a_tied_head_is_read_as_the_embedding(tmp_path):
    folder = tiny.make_checkpoint("olmoe", tmp_path / "olmoe")
    plain = open_checkpoint(folder)
    untied = measure(plain, describe(plain))
    tensors = load_file(folder / "model.safetensors")
    assert tensors.pop("lm_head.weight").shape == tensors["model.embed_tokens.weight"].shape
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tied = open_checkpoint(folder)
    assert measure(tied, describe(tied)) == untied
