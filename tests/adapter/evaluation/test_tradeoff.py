"""`lexi-adapter tradeoff`: results joined, in the formats that `eval` and `bench` write."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from results import make_quality, make_speed

from lexi_adapter.cli.main import main
from lexi_adapter.errors import AdapterError
from lexi_adapter.evaluation import evaluate, results, tradeoff
from lexi_adapter.speed import throughput


def test_variants_are_matched_by_name_or_by_k():
    quality, speed = make_quality(), make_speed()
    expected = {"base": "base", "mine.json": "./mine.json", "uniform k = 2": "uniform k = 2, 50 %", "pruned": "pruned"}
    assert tradeoff.match(quality, speed) == expected
    assert "mine.json" not in tradeoff.match(quality, make_speed(overrides={"num_experts": 3}))
    panels = tradeoff.join(quality, speed)
    assert [(panel.task, panel.metric, panel.workload) for panel in panels] == [
        ("perplexity a.txt", "perplexity", "16x8x8"),
        ("perplexity a.txt", "perplexity", "1x8x8"),
        ("passkey 100", "accuracy", "16x8x8"),
        ("passkey 100", "accuracy", "1x8x8"),
    ]
    points = [(p.variant, p.kind, p.throughput, p.value) for p in panels[0].points]
    assert points == [
        ("base", "base", 100, 0),
        ("mine.json", "allocation", 101, 1),
        ("uniform k = 2", "uniform", 102, 2),
        ("pruned", "folder", 103, 3),
    ]
    (panel,) = tradeoff.join(quality, speed, tasks=["passkey 100"], workloads=["1x8x8"])
    assert [point.value for point in panel.points] == [20, 21, 22, 23]


@pytest.mark.parametrize("key, value", [("gate_exponent", 0.5), ("compensation", "0f" * 32)])
def test_another_compensation_is_another_model(key, value):
    quality, speed = make_quality(), make_speed()
    quality["variants"][1][key] = value
    assert "mine.json" not in tradeoff.match(quality, speed)
    speed["variants"][1][key] = value
    assert tradeoff.match(quality, speed)["mine.json"] == "./mine.json"
    speed["variants"][1] |= {"name": "mine.json", key: None}
    what = key.replace("_", " ")
    with pytest.raises(AdapterError, match=f"'mine.json' ran with another {what} in eval than in bench"):
        tradeoff.match(quality, speed)


def test_the_same_k_with_and_without_compensation_are_two_methods():
    names = ("base", "mine.json", "uniform k = 2, compensated", "uniform k = 2, no compensation")
    quality, speed = make_quality(names), make_speed(names)
    for variant in quality["variants"][2:]:
        variant["top_k"] = {"0": 2, "1": 2}
    methods = {}
    for variant in speed["variants"][2:]:
        variant["engine"]["top_k"] = {"0": 2, "1": 2}
        name = variant["name"]
        methods[name] = tradeoff.describe(name, name, quality, speed)
    assert methods == {
        names[2]: ("uniform k, compensated", "50 %"),
        names[3]: ("uniform k, no compensation", "50 %"),
    }


def test_one_name_for_two_sets_of_k_is_refused():
    for other in ({"0": 1, "1": 2}, {"0": 1, "1": 3, "2": 3}, {"0": 1}):
        speed = make_speed(names=("base", "mine.json"))
        speed["variants"][1]["engine"]["top_k"] = other
        with pytest.raises(AdapterError, match="'mine.json' ran with top-k .* in eval, but .* in bench; measure"):
            tradeoff.join(make_quality(), speed)


def test_results_that_are_not_finished_together_are_refused():
    speed = make_speed()
    speed["summary"] = [line for line in speed["summary"] if line["workload"] == "16x8x8"]
    with pytest.raises(AdapterError, match="no variant was measured by both 'perplexity a.txt' and '1x8x8'; finish"):
        tradeoff.join(make_quality(), speed)


@pytest.mark.parametrize(
    ("kind", "path", "value", "flaw"),
    [
        ("eval", ["model"], None, "model is missing"),
        ("eval", ["variants"], None, "variants is missing"),
        ("eval", ["variants", 1, "name"], ["a"], r"variants\[1\].name is \['a'\]"),
        ("eval", ["variants", 1, "top_k"], {"0": [1]}, r"variants\[1\].top_k is {'0': \[1\]}"),
        ("eval", ["summary"], [], r"summary is \[\]"),
        ("eval", ["summary", 0], 5, r"summary\[0\] is 5"),
        ("eval", ["summary", 0, "value"], "1.5", r"summary\[0\].value is '1.5'"),
        ("eval", ["summary", 0, "value"], float("inf"), r"summary\[0\].value is inf"),
        ("eval", ["summary", 0, "stderr"], -1.0, r"summary\[0\].stderr is -1.0"),
        ("bench", ["summary"], None, "summary is missing"),
        ("bench", ["summary"], [], r"summary is \[\]"),
        ("bench", ["summary", 0, "median"], float("nan"), r"summary\[0\].median is nan"),
        ("bench", ["summary", 0, "median"], 1.0, r"summary\[0\] is {'variant': 'base'"),
        ("bench", ["workloads"], [], r"workloads is \[\]"),
        ("bench", ["workloads"], "16x8x8", "workloads is '16x8x8'"),
        ("bench", ["variants", 0, "engine"], None, r"variants\[0\].engine is missing"),
        ("bench", ["variants", 0, "overrides"], None, r"variants\[0\].overrides is missing"),
    ],
)
def test_results_that_are_not_whole_are_refused(folder, kind, path, value, flaw):
    documents = {"eval": make_quality(), "bench": make_speed()}
    *parents, last = path
    place = documents[kind]
    for parent in parents:
        place = place[parent]
    place[last] = value
    for name, document in documents.items():
        Path(f"{name}.json").write_text(json.dumps(document))
    result = run("eval.json", "bench.json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.fullmatch(
        f"Error: {kind}.json is not whole: {flaw}.*; make one with lexi-adapter {kind}\n", result.stderr
    )
    assert not Path("tradeoff.png").exists()


def run(*arguments):
    return CliRunner().invoke(main, ["tradeoff", *arguments], catch_exceptions=False)


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.pdf", b"%PDF")])
def test_figure_and_table(folder, name, start):
    Path("eval.json").write_text(json.dumps(make_quality()))
    Path("bench.json").write_text(json.dumps(make_speed()))
    result = run("eval.json", "bench.json", "-o", name)
    assert result.exit_code == 0, result.output
    assert Path(name).read_bytes().startswith(start)
    assert result.stderr.splitlines() == [
        "without throughput, and so left out: alone",
        f"done: {name}; fastest at 16x8x8: pruned, perplexity 3",
        "next: lexi-search export mine.json --to vllm --model here -o served/",
    ]
    assert all(word in result.stdout for word in ("pruned", "16x8x8", "passkey 100"))


def test_options_choose_variants_as_they_name_them_to_eval_and_bench(folder):
    Path("eval.json").write_text(json.dumps(make_quality()))
    Path("bench.json").write_text(json.dumps(make_speed()))
    for options, shown in {
        (): {"base", "mine.json", "uniform k = 2", "pruned"},
        ("--allocation", "mine.json"): {"base", "mine.json"},
        ("--allocation", "./mine.json"): {"base", "mine.json"},  # by its name in bench
        ("--uniform-k", "2", "--folder", "pruned"): {"base", "uniform k = 2", "pruned"},
        ("--budget-share", "50%"): {"base", "uniform k = 2"},
    }.items():
        result = run("eval.json", "bench.json", *options)
        assert result.exit_code == 0, result.output
        names = {"base", "mine.json", "uniform k = 2", "pruned"}
        assert {name for name in names if name in result.stdout} == shown, options
    result = run("eval.json", "bench.json", "--uniform-k", "3")
    assert result.exit_code == 2 and "fewer than two variants of those named are in both files" in result.stderr


def test_points_are_labelled_by_budget_and_those_of_one_search_are_one_method():
    quality, speed = make_quality(), make_speed()
    (panel, *_) = tradeoff.join(quality, speed)
    assert [(point.method, point.label) for point in panel.points] == [
        ("base", "base"),
        ("mine.json", "50 %"),
        ("uniform k", "50 %"),
        ("pruned", "pruned"),
    ]
    for document, key in ((quality, "eval"), (speed, "bench")):
        text = json.dumps(document).replace("./mine.json", "mine.json").replace("mine.json", "found/a-40.5.json")
        assert key and (panel := json.loads(text))
        document |= panel
    (panel, *_) = tradeoff.join(quality, speed)
    assert (panel.points[1].method, panel.points[1].label) == ("found/a-*.json", "50 %")


def test_refusals(folder):
    Path("eval.json").write_text(json.dumps(make_quality()))
    Path("bench.json").write_text(json.dumps(make_speed()))
    Path("text").write_text("{")
    Path("deep").write_text("[" * 100_000)
    for arguments, message in {
        (
            "bench.json",
            "bench.json",
        ): "bench.json is not a lexi-eval file of version 1; make one with lexi-adapter eval",
        ("eval.json", "eval.json"): "eval.json is not a lexi-bench file",
        ("eval.json", "nowhere"): "cannot read nowhere",
        ("text", "bench.json"): "text is not JSON",
        ("deep", "bench.json"): "deep is not JSON",
        ("eval.json", "bench.json", "--task", "x"): "no task 'x' in the results, which have perplexity a.txt, passkey",
        ("eval.json", "bench.json", "--workload", "x"): "no workload 'x'",
        ("eval.json", "bench.json", "-o", "a.bmp"): "no figure as a.bmp",
        ("eval.svg", "bench.json", "-o", "eval.svg"): "cannot write eval.svg: the same command reads or writes it",
        ("eval.json", "bench.svg", "-o", "bench.svg"): "cannot write bench.svg: the same command reads or writes it",
    }.items():
        result = run(*arguments)
        assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1
    with pytest.raises(AdapterError, match="fewer than two variants are in both files; bench has 'other'"):
        tradeoff.join(make_quality(), make_speed(names=("other",)))


def test_results_are_read_in_the_formats_in_which_they_are_written():
    formats = {(module.FORMAT, module.VERSION) for module in (evaluate, throughput)}
    assert formats == {(file_format, results.VERSION) for file_format in results.SHAPES}
