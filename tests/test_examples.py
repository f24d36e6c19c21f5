"""The examples that users copy from do what they say."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import engine
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from moe_families import find_families
from synthetic import make_profile
from transformers import CONFIG_MAPPING

from lexi_search.artifacts.cost_table import CostTable, StepTime
from lexi_search.artifacts.identity import ModelShape
from lexi_search.solvers.evolution import search
from lexi_search.solvers.problem import pose

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pipeline_stages_are_balanced_and_the_loss_is_the_least_that_allows_it():
    losses = np.array(make_profile(6, 3).losses("squared"))
    fitness, stage = load("pipeline_stages").make_fitness(6, 11, 2, price=float(losses.max()))
    found = search(pose(losses, np.array([11])), fitness=fitness, generations=100)
    sums = [found.top_k[0][stage == index].sum() for index in (0, 1)]
    assert sorted(sums) == [5, 6]
    everything = np.array([k for k in np.ndindex(*[3] * 6) if sum(k) + 6 == 11]) + 1
    balanced = everything[np.abs(everything[:, :3].sum(axis=1) - 5.5) < 1]
    least = losses[np.arange(6), balanced - 1].sum(axis=1).min()
    np.testing.assert_allclose(found.loss[0], least)


@given(
    st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=1, max_size=8),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([1, 2, 4, 8]),
    st.dictionaries(st.sampled_from(["a", "b"]), st.sampled_from([1, 2])),
)
def test_models_are_dealt_cards_of_the_host_that_no_part_of_them_shares(names, gpus, most, fewer):
    there = [str(card) for card in range(gpus)]
    most = min(most, gpus)
    dealt = list(load("benchmarks/serving_models").deal(names, there, most, fewer))
    assert [name for name, _ in dealt] == names
    for name, cards in dealt:
        assert len(set(cards)) == len(cards) == min(most, fewer.get(name, most))
        assert cards == there[int(cards[0]) :][: len(cards)]  # neighbours, and in one order, as locks are taken


def test_a_models_table_has_every_factor_in_its_column_and_says_which_are_unsure():
    table = load("benchmarks/serving_models")
    lines = [
        {"variant": "base", "workload": "1x2x3", "median": 1000.4, "lowest": 990, "highest": 1010, "speedup": 1.0},
        {
            "variant": "mixed k, 50 %",
            "workload": "1x2x3",
            "median": 1500,
            "lowest": 1499,
            "highest": 1501,
            "speedup": 1.5,
        },
        {
            "variant": "uniform k = 4, 75 %",
            "workload": "1x2x3",
            "median": 900,
            "lowest": 700,
            "highest": 910,
            "speedup": 0.9,
        },
    ]
    document = {
        "model": "configs/some-moe",
        "variants": [{"engine": {"workers": 2}}],
        "workloads": ["1x2x3"],
        "summary": lines,
    }
    heads, _, row = table.make_table([document])
    cells = dict(zip(heads.split("|"), row.split("|"), strict=True))
    assert cells[" model "] == " some-moe, 2 cards " and cells[" base [tokens/s] "] == " 1,000 "
    filled = {head.strip(): cell.strip() for head, cell in cells.items() if cell.strip() and "%" in head}
    assert filled == {"mixed 50 %": "1.50", "uniform 75 %": "~0.90"}


def test_a_kernels_table_has_the_base_and_half_of_the_experts_of_every_file_with_kernels():
    table = load("benchmarks/serving_models")

    def record(variant, workload, moe, transfer=0.004):
        seconds = {"moe": moe, "attention": 0.001, "gemm": 0.002, "other": 0.003, "communication": 0.5}
        return {"variant": variant, "workload": workload, "seconds": seconds, "transfer": transfer}

    records = [
        record("base", "16x512x32", 0.9),
        record("base", "16x1024x16", 0.02),
        record("intra-pruned 50 %", "16x1024x16", 0.03),
        record("mixed k, 50 %", "16x1024x16", 0.01, None),
        record("uniform k = 4, 50 %", "16x1024x16", 0.04),
    ]
    document = {"model": "configs/some-moe", "variants": [{"engine": {"workers": 4}}]}
    assert list(table.make_kernels_table([document])) == []
    assert list(table.make_kernels_table([document, {**document, "kernels": records}]))[2:] == [
        "| some-moe, 4 cards | base | 20.0 | 6.0 | 4.0 |",
        "| some-moe, 4 cards | mixed k, 50 % | 10.0 | 6.0 |  |",
    ]


def test_a_pair_of_engines_is_compared_round_by_round_and_answer_by_answer():
    pairs = load("benchmarks/serving_pairs")
    seconds = {"base": [[2.0], [4.0, 8.0, 1.0], [3.0]], "plugin": [[1.0], [2.0], []]}
    runs = [
        {"variant": name, "workload": "1x2x3", "round": index, "seconds": value}
        for name, rounds in seconds.items()
        for index, values in enumerate(rounds)
        for value in values
    ]
    document = {
        "runs": [*runs, {"variant": "base", "workload": "4x5x6", "round": 0, "seconds": 100.0}],
        "variants": [
            {"name": "base", "answers": [[1, 2], [3, 4], [5, 6]]},
            {"name": "plugin", "answers": [[1, 2], [3, 0], [5, 6]]},
        ],
        "summary": [
            {"variant": "base", "workload": "1x2x3", "median": 2.0, "highest": 5.0},
            {"variant": "plugin", "workload": "1x2x3", "median": 3.0, "highest": 4.0},
        ],
        "pairs": [{"variant": "plugin", "against": "base", "workload": "1x2x3"}],
    }
    _, row, whole = pairs.make_rows({"file": document})
    # By round: 2 / 1 and 4 / 2; the third has no run of the one, and the other workload is another row's.
    assert row == ("file", "plugin / base", "1x2x3", 2, "2.000", "2.000", "0.000", "1.500", "0.800", "2 of 3")
    assert whole[:4] == ("all", "plugin / base", "", 2)
    before = {**document, "variants": [{"name": "base"}, {"name": "plugin"}]}
    assert pairs.compare_answers(before, "plugin", "base") == ""
    # Results of `lexi-adapter bench` name no pairs; what is asked for is compared at every workload.
    bench = {**document, "workloads": ["1x2x3"]}
    del bench["pairs"]
    assert list(pairs.make_rows({"file": bench}, [("plugin", "base")]))[1] == row


@pytest.mark.parametrize("folder", ["h100", "h200", "h200_x4", "h200_x4_ep"])
def test_the_serving_tables_of_the_results_are_what_their_files_say(folder):
    table, results = load("benchmarks/serving_models"), EXAMPLES / "benchmarks" / "results" / folder
    documents = [json.loads(path.read_text()) for path in sorted(results.glob("serving_bench_*.json"))]
    written = (EXAMPLES / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    for lines in (list(table.make_table(documents)), list(table.make_kernels_table(documents))):
        assert "\n".join(lines) in written


def test_the_losses_over_speed_in_the_results_are_what_their_files_say():
    figure = load("benchmarks/quality_over_speed")
    points = figure.find_points(
        figure.read_results(figure.LOSSES), figure.find_speedups(figure.read_cost_table(str(figure.TIMES)))
    )
    assert all(len(values) == 5 for values in points.values())
    assert "\n".join(figure.make_table(points)) in (EXAMPLES / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")


def test_times_of_a_mix_are_weighed_by_how_many_steps_there_are():
    figure = load("benchmarks/quality_over_speed")
    steps = {16: StepTime(1.0, {0: (1.0, 3.0)}), 8192: StepTime(8.0, {0: (4.0, 120.0)})}
    speedups = figure.find_speedups(CostTable(ModelShape("olmoe", 1, 4, 2, (0,)), "a device", steps, {}))
    assert speedups == {1: (128 * 4 + 128) / (128 * 2 + 12), 2: 1.0}


def test_the_table_of_families_is_what_the_registries_and_engines_say(tmp_path):
    families = load("families")
    served = {{"deepseek_vl2": "deepseek_vl_v2"}.get(name, name) for name in tiny.FAMILIES} | engine.MORE.keys()
    assert served == families.TESTED and families.UNSERVED.keys() <= set(families.ARCHITECTURES) - served
    assert families.PAPER_ONLY.keys() == set(families.ARCHITECTURES) - set(families.FAMILIES)
    assert families.UNTRIED == set(families.ARCHITECTURES) & set(CONFIG_MAPPING) - set(find_families())
    made = tmp_path / "families.md"
    done = subprocess.run([sys.executable, EXAMPLES / "families.py", "-o", made], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours, theirs = (path.read_text(encoding="utf-8").splitlines() for path in (made, EXAMPLES / "families.md"))
    if ours[2] != theirs[2]:  # another transformers or vLLM than that of the table
        ours, theirs = ([line.split("|")[:5] for line in lines if "|" in line] for lines in (ours, theirs))
    assert ours == theirs
