"""Measuring in real vLLM engines: what is changed in a live one is judged by a fresh start and by transformers."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from engine import allocate, compensate, export, make_servable, start
from tiny import build_reference, find_moe_blocks

import lexi_adapter
from lexi_adapter.allocation import read_allocation
from lexi_adapter.engines import worker
from lexi_adapter.engines.measuring import (
    answer_greedily,
    draw_weights,
    read_expert_counts,
    read_prompts,
    switch_layers,
    time_run,
    watch_experts,
)
from lexi_adapter.engines.options import make_options
from lexi_adapter.engines.process import EngineError, start_engines
from lexi_adapter.engines.workload import Workload, draw_prompts
from lexi_adapter.errors import AdapterError
from lexi_adapter.model.variants import Variant
from lexi_search.artifacts.serialisation import to_document

WORKLOAD = Workload(2, 12, 6)
ENGINE = {"dtype": "float32", "enforce_eager": True}
PROMPTS = draw_prompts(WORKLOAD, vocab_size=256, seed=0)  # what answer_greedily asks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_servable("olmoe", tmp_path_factory.mktemp("measuring") / "olmoe")


@pytest.fixture(scope="module")
def engine(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        options = make_options(Variant("base", str(folder)), [WORKLOAD], load_format="auto", parallel={}, **ENGINE)
        with start_engines([("base", options, {})]) as (running,):
            yield running


def answer(model):
    """Greedy tokens of transformers, one forward pass a token."""
    answers = []
    for ids in PROMPTS:
        tokens = list(ids)
        for _ in range(WORKLOAD.output_length):
            with torch.no_grad():
                tokens.append(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax().item())
        answers.append(tokens[len(ids) :])
    return answers


def give(model, top_k):
    for layer, block in find_moe_blocks(model).items():
        block.gate.top_k = top_k[layer]
    return model


def leave_out(model):
    for block in find_moe_blocks(model).values():
        block.forward = torch.zeros_like
    return model


def test_a_live_engine_answers_as_the_model_it_was_made(engine):
    own, mixed = {0: 4, 1: 4, 2: 4}, {0: 1, 1: 3, 2: 2}
    states = (own, mixed, None, own)
    found = [(engine.call(switch_layers, top_k), engine.call(answer_greedily, WORKLOAD)) for top_k in states]
    model = build_reference("olmoe")
    expected = [
        answer(model),
        answer(give(build_reference("olmoe"), mixed)),
        answer(leave_out(build_reference("olmoe"))),
    ]
    assert [answers for _, answers in found] == [*expected, expected[0]]
    assert [top_k for top_k, _ in found] == [own, mixed, mixed, own]
    assert expected[0] != expected[1] != expected[2]


def count_in_transformers(dropped):
    """Layer -> tokens of each expert, from the routers' logits of one forward pass a prompt."""
    counts = {layer: [0] * 16 for layer in range(3)}
    for ids in PROMPTS:
        with torch.no_grad():
            logits = build_reference("olmoe")(
                torch.tensor([ids]), output_router_logits=True, use_cache=False
            ).router_logits
        for layer, scores in enumerate(logits):
            for token in scores:
                ranked = [expert for expert in token.argsort(descending=True).tolist() if expert not in dropped]
                for expert in ranked[:4]:
                    counts[layer][expert] += 1
    return counts


def test_tokens_are_counted_where_transformers_sends_them(engine):
    engine.call(switch_layers, {0: 4, 1: 4, 2: 4})
    engine.call(watch_experts, {})
    engine.call(read_prompts, PROMPTS)
    found = {
        layer: [sum(c) for c in zip(*steps, strict=True)] for layer, steps in engine.call(read_expert_counts).items()
    }
    assert found == count_in_transformers(())
    engine.call(watch_experts, {0: [1, 5]})
    engine.call(read_prompts, PROMPTS)
    found = [sum(count) for count in zip(*engine.call(read_expert_counts)[0], strict=True)]
    assert found == count_in_transformers((1, 5))[0]
    engine.call(watch_experts, {})


def test_a_timed_run_takes_all_prompts_at_once(engine):
    engine.call(switch_layers, {0: 4, 1: 4, 2: 4})
    workload = Workload(2, 12, 3)
    for seed in range(3):
        engine.call(watch_experts, {})
        assert engine.call(time_run, workload, seed) > 0
        assert [sum(step) // 4 for step in engine.call(read_expert_counts)[0]] == [24, 2, 2]
    engine.call(watch_experts, {})


def test_pruned_layers_run_and_come_back(engine):
    own = {0: 4, 1: 4, 2: 4}
    engine.call(switch_layers, own)
    before = engine.call(answer_greedily, WORKLOAD)
    engine.call(switch_layers, own, {"experts": (12, 16)})
    engine.call(watch_experts, {})
    assert engine.call(answer_greedily, WORKLOAD) != before
    # The first layer sees the same tokens; its router now chooses among twelve.
    assert all(sum(step[12:]) == 0 < sum(step) for step in engine.call(read_expert_counts)[0])
    engine.call(switch_layers, own, {})
    assert engine.call(answer_greedily, WORKLOAD) == before


def test_a_compensated_engine_leaves_its_corrections_out_and_takes_them_back(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    path = compensate(allocate(folder), tmp_path / "compensated")
    variant = Variant("compensated", str(folder), allocation=read_allocation(path))
    options = make_options(variant, [WORKLOAD], load_format="auto", parallel={}, **ENGINE)
    top_k = dict(variant.allocation.top_k)
    plain = answer(give(build_reference("olmoe"), top_k))
    corrected = answer(lexi_adapter.apply(build_reference("olmoe"), path))
    with start_engines([("compensated", options, {})]) as (running,):
        assert running.call(answer_greedily, WORKLOAD) == corrected != plain
        for compensated, expected in ((False, plain), (True, corrected), (False, plain)):
            assert running.call(switch_layers, top_k, {}, compensated) == top_k
            assert running.call(answer_greedily, WORKLOAD) == expected
        with pytest.raises(EngineError, match="compensated layers keep the k that they were built for"):
            running.call(switch_layers, dict.fromkeys(top_k, 2), {}, True)
        with pytest.raises(EngineError, match="layer 0 was built with a gate exponent and keeps its k"):
            running.call(switch_layers, top_k)


def test_a_function_that_fails_says_so_and_the_engine_lives_on(engine):
    with pytest.raises(EngineError, match=r"^engine of 'base': there is no k for MoE layers \[1, 2\] of this model"):
        engine.call(switch_layers, {0: 4})
    with pytest.raises(EngineError, match=r"^engine of 'base': layers \[7\] are no MoE layers of this model"):
        engine.call(switch_layers, {0: 4, 1: 4, 2: 4, 7: 4})
    assert len(engine.call(answer_greedily, WORKLOAD)) == 2


def test_a_compiled_k_is_refused_with_what_to_write():
    compiled = SimpleNamespace(vllm_config=SimpleNamespace(compilation_config=SimpleNamespace(mode="compiled")))
    with pytest.raises(
        AdapterError, match="fixed the k of every SimpleNamespace .* --engine '{\"enforce_eager\": true}'"
    ):
        worker._check_switchable(compiled, {0: SimpleNamespace()})


def test_drawn_weights_answer_differently_at_every_k(engine):
    """The last test of this engine: its weights are gone after it."""
    engine.call(draw_weights)
    answers = []
    for k in (4, 3, 2, 1):
        engine.call(switch_layers, dict.fromkeys(range(3), k))
        answers.append(engine.call(answer_greedily, WORKLOAD))
    assert all(first != second for first, second in zip(answers, answers[1:], strict=False))


def run(*arguments):
    done = start(
        sys.executable,
        "-c",
        "from lexi_adapter.cli.main import main; main()",
        *arguments,
        "--engine",
        json.dumps(ENGINE),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_bench_end_to_end(folder, tmp_path):
    allocation = allocate(folder)
    (tmp_path / "allocation.json").write_text(json.dumps(to_document(allocation)))
    exported = str(export(allocation, folder, tmp_path / "exported"))
    output, figure = tmp_path / "bench.json", tmp_path / "bench.svg"
    arguments = ("--allocation", str(tmp_path / "allocation.json"), "--folder", exported, "--in-place", "--rounds", "2")
    arguments += ("--seconds", "0.05")
    arguments += ("--kernels", "--lock", str(tmp_path / "card"))
    table = run("bench", str(folder), "--workload", "2x12x6", *arguments, "-o", str(output), "--plot", str(figure))
    document = json.loads(output.read_text())
    base, in_place, fresh = document["variants"]
    assert in_place["engine"]["top_k"] == fresh["engine"]["top_k"] == {"0": 1, "1": 3, "2": 2}
    assert in_place["answers"] == fresh["answers"] != base["answers"]
    names = [variant["name"] for variant in document["variants"]]
    assert names == ["base", str(tmp_path / "allocation.json"), exported]
    spent = dict.fromkeys(((name, turn) for name in names for turn in (0, 1)), 0.0)
    for one in document["runs"]:
        assert spent[one["variant"], one["round"]] < 0.05
        spent[one["variant"], one["round"]] += one["seconds"]
    assert all(seconds >= 0.05 for seconds in spent.values())
    assert all(line["lowest"] <= line["median"] <= line["highest"] for line in document["summary"])
    assert document["made_by"]["command"].startswith("lexi-adapter bench ") and "base" in table
    assert "milliseconds of kernels" in table
    assert [(record["variant"], record["workload"]) for record in document["kernels"]] == [(n, "2x12x6") for n in names]
    assert all(record["seconds"]["moe"] > 0 and record["busy"] <= record["span"] for record in document["kernels"])
    assert figure.read_bytes().startswith(b"<?xml")


def test_loads_end_to_end(folder, tmp_path):
    (tmp_path / "tokens.json").write_text(json.dumps(PROMPTS))
    output = tmp_path / "loads.json"
    arguments = ("--tokens", str(tmp_path / "tokens.json"), "--drop-experts", "25%", "-o", str(output))
    assert "inter-pruned 25 %" in run("loads", str(folder), *arguments)
    found = json.loads(output.read_text())["loads"]
    assert set(found) == {"base", "inter-pruned 25 %"}
    for layer, counts in count_in_transformers(()).items():
        load = found["base"][str(layer)]
        assert load["experts"] == 16 and found["inter-pruned 25 %"][str(layer)]["experts"] == 12
        assert load["max_over_mean"] == pytest.approx(max(counts) / (24 * 4 / 16))
        assert load["idle"] == counts.count(0) / 16
