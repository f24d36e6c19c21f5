"""The scripts that train small models and study what allocations lose, in the parts that need no training."""

import gzip
import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_checkpoint
from torch.nn.functional import cross_entropy

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path += [str(EXAMPLES / "fidelity"), str(EXAMPLES / "train_small_moe")]

import conclusions  # noqa: E402
import domains  # noqa: E402
import families  # noqa: E402
import floors  # noqa: E402
import gaps  # noqa: E402
import judging  # noqa: E402
import pieces  # noqa: E402
import refining  # noqa: E402
import report  # noqa: E402
import routers  # noqa: E402
import run  # noqa: E402
import sections  # noqa: E402
import study  # noqa: E402
import tables  # noqa: E402
import windows  # noqa: E402
import wording  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from views import View, list_cells, read_views  # noqa: E402

from lexi_adapter.model.variants import allocate  # noqa: E402
from lexi_adapter.serving.transformers_patch import apply  # noqa: E402

DOMAINS = {"code": 3, "prose": 2}


def test_windows_to_measure_and_to_judge_on_share_no_token_and_domains_take_turns():
    streams = {name: np.arange(100) + 1000 * i for i, name in enumerate(DOMAINS)}
    measure, judge = windows.cut(streams, measure=5, judge=4, length=10)
    assert measure.domains == ("code", "prose") * 5 and judge.domains == ("code", "prose") * 4
    assert not set(measure.tokens.flatten().tolist()) & set(judge.tokens.flatten().tolist())
    assert judge.tokens[1].tolist() == list(range(1050, 1060))
    assert measure.take_domain("prose").tokens.min() >= 1000
    with pytest.raises(ValueError, match="code has room for 5 windows of 10 to measure on, not 6"):
        windows.cut(streams, measure=6, judge=1, length=10)
    streams["prose"] = np.arange(40)
    assert windows.cut_what_fits(streams, measure=5, judge=4, length=10)[2] == {
        "prose": "prose has room for 2 windows of 10 to measure on, not 5"
    }
    with pytest.raises(ValueError, match="code has room .* prose has room"):
        windows.cut_what_fits(streams, measure=6, judge=1, length=10)


def test_more_windows_to_judge_on_begin_with_the_fewer_and_end_where_the_shortest_domain_does():
    streams = {"code": np.arange(100), "prose": np.arange(1000, 1081)}
    measure, judge = windows.cut(streams, measure=4, judge=2, length=10)
    for asked, got in ((3, 3), (9, 4)):  # prose has room for 4
        more = windows.cut_more(streams, judge=asked, length=10)
        assert len(more.tokens) == len(more.domains) == 2 * got
        assert more.take(4).tokens.equal(judge.tokens) and more.take(4).domains == judge.domains
        assert not set(more.tokens.flatten().tolist()) & set(measure.tokens.flatten().tolist())


def test_every_domain_counts_alike():
    held = windows.Windows(torch.zeros(3, 1), ("code", "prose", "prose"))
    found = held.average(np.array([6.0, 1.0, 3.0]))
    assert found == {"code": 6.0, "prose": 2.0, "mean": 4.0}


@given(st.integers(0, 2**32 - 1))
def test_the_standard_error_is_the_spread_of_the_mean_over_domains(seed):
    random = np.random.default_rng(seed)
    domains = ("code",) * 40 + ("prose",) * 10
    held = windows.Windows(torch.zeros(50, 1), domains)
    values = np.r_[random.normal(0, 1, 40), random.normal(5, 3, 10)]
    resampled = np.c_[values[random.integers(0, 40, (1000, 40))], values[random.integers(40, 50, (1000, 10))]]
    spread = held.average(resampled)["mean"].std()
    assert held.find_error(values) == pytest.approx(spread, rel=0.25)


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4), st.integers(3, 12))
def test_uniform_between_two_k_is_the_mean_over_layers(increases, budget):
    k = [budget // 3 + (layer < budget % 3) for layer in range(3)]
    losses = dict(enumerate(increases, 1))
    assert gaps.interpolate_uniform(losses, budget, 3) == pytest.approx(np.mean([increases[i - 1] for i in k]))


def test_budgets_below_one_expert_a_layer_are_left_out():
    assert gaps.find_budgets((0.25, 0.5, 0.625, 0.75), 12, 2) == {"0.625": 15, "0.75": 18}
    assert gaps.find_closed(0.9, 1.0, 0.8) == pytest.approx(0.5)
    assert gaps.find_closed(0.9, 1.0, 0.95) is None  # too little to gain


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=12))
def test_rank_correlation_is_that_of_counted_ranks(pairs):
    columns = list(zip(*pairs, strict=True))
    ranks = [[sum(b < a for b in column) + sum(b == a for b in column) / 2 for a in column] for column in columns]
    found = tables.correlate(*map(np.array, columns))
    if min(map(np.std, ranks)) == 0:
        assert found is None
    else:
        assert found == pytest.approx(np.corrcoef(*ranks)[0, 1])


def test_a_search_over_whole_allocations_finds_what_the_sum_does_not_know():
    prior = np.array([[3.0, 1.0, 0.0]] * 4)
    truth = prior * np.array([[1.0], [2.0], [0.5], [8.0]])

    def lose(top_k):
        total = tables.predict(truth, top_k)
        return total + 0.1 * total**2  # losses compound

    every = [top_k for top_k in itertools.product((1, 2, 3), repeat=4) if sum(top_k) == 8]
    found = refining.refine(prior, 8, lambda given: [lose(top_k) for top_k in given])
    assert found.fitness == min(map(lose, every)) == lose(found.top_k)
    assert found.history[0] > found.history[-1]
    assert found.evaluated <= len(every)


def test_what_adds_up_is_left_to_the_sum():
    prior = np.array([[3.0, 1.0, 0.0], [5.0, 2.0, 0.0], [4.0, 0.5, 0.0]])
    known = {top_k: tables.predict(prior, top_k) for top_k in ((1, 2, 2), (2, 2, 1))}
    np.testing.assert_allclose(refining.fit(prior, known), prior, atol=1e-12)
    moves = set(refining.make_moves((1, 2, 3), 3))
    assert moves == {(2, 1, 3), (2, 2, 2), (1, 3, 2)}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return judging.load(make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("model") / "tiny"), device="cpu")


def test_the_judge_says_what_a_plain_loop_says(loaded):
    model, identity = loaded
    tokens = torch.randint(0, model.config.vocab_size, (4, 12), generator=torch.Generator().manual_seed(0))
    judge = judging.Judge(loaded, windows.Windows(tokens, ("code", "prose") * 2), batch=3)
    choices = [judging.Choice((1, 2, 1), 0.5), judging.Choice((identity.top_k,) * 3)]
    found, own = judge.judge(choices)
    assert own["increase"]["mean"] == pytest.approx(0, abs=1e-6)

    def find_losses():
        with torch.no_grad():
            return [cross_entropy(model(row[None]).logits[0, :-1], row[1:]).item() for row in tokens]

    base = find_losses()
    np.testing.assert_allclose(judging.find_losses(model, tokens, batch=3), base, rtol=1e-5)
    top_k = dict(zip(identity.moe_layers, choices[0].top_k, strict=True))
    apply(model, replace(allocate(identity, top_k), gate_exponent=0.5))
    moved = [changed - own for changed, own in zip(find_losses(), base, strict=True)]
    assert found["increase"]["code"] == pytest.approx(np.mean(moved[::2]), abs=1e-5)
    assert judge.judge(choices) == [found, own] and judge.count == 2

    # Budget 4 of 3 layers lies a third of the way from k = 1 to k = 2.
    [compared] = judge.compare(choices[:1])
    low, high = judge.judge([judging.Choice((1, 1, 1)), judging.Choice((2, 2, 2))])
    for name, difference in compared.pop("against_uniform").items():
        uniform = low[name]["mean"] + (high[name]["mean"] - low[name]["mean"]) / 3
        assert difference["mean"] == pytest.approx(found[name]["mean"] - uniform, abs=1e-6)
        assert difference["stderr"] > 0
    assert compared == found and judge.count == 4
    [same] = judge.compare([judging.Choice((2, 2, 2))])
    assert same["against_uniform"]["increase"] == {"mean": 0, "stderr": 0}


def test_brute_force_of_one_layer_is_the_judges_answer_for_it(loaded):
    tokens = torch.randint(0, loaded.model.config.vocab_size, (4, 12), generator=torch.Generator().manual_seed(1))
    held = windows.Windows(tokens, ("code", "prose") * 2)
    measured = tables.measure_windows(loaded, held, batch=3)
    k = loaded.identity.top_k
    [alone] = judging.Judge(loaded, held, batch=2).judge([judging.Choice((k, 1, k))])
    assert measured.divergence[1, 0].mean() == pytest.approx(alone["divergence"]["mean"], abs=1e-6)
    table = tables.tabulate(measured, held)["divergence"]
    assert table.shape == (3, k) and not table[:, -1].any()


def test_what_is_held_to_the_floors_is_judged_on_more_windows_beside_uniform_on_the_same(loaded, tmp_path):
    tokens = torch.randint(0, loaded.model.config.vocab_size, (8, 12), generator=torch.Generator().manual_seed(2))
    more = windows.Windows(tokens, ("code", "prose") * 4)
    few, many = (judging.Judge(loaded, held, batch=8) for held in (more.take(4), more))
    k = loaded.identity.top_k
    table = [[float(k - column) * (row + 1) for column in range(1, k + 1)] for row in range(3)]
    names = ("calibrated/relative", "calibrated/rms", "oracle/increase")
    begun = pieces.Study(
        tmp_path, loaded, more.take(4), few, many, 8, tmp_path, {"tables": dict.fromkeys(names, table)}, {}
    )
    planned = {piece.name: piece for piece in study.plan_floors(begun)}
    assert list(planned) == ["floors uniform", "floors oracle/increase", "floors calibrated/relative"]
    assert not list(study.plan_floors(replace(begun, more=few)))
    uniform = planned["floors uniform"].make(begun)
    assert uniform["judged_tokens"] == 96 and few.count == 0
    assert uniform["uniform"]["0.5"][0] == many.compare([judging.Choice((1, 1, 1), 0.5)])[0]
    for cell in planned["floors oracle/increase"].make(begun).values():
        assert cell["plain"] == many.compare([judging.Choice(tuple(cell["top_k"]))])[0]
    assert few.count == 0


def test_a_command_that_fails_is_left_out_in_its_own_words(tmp_path):
    with pytest.raises(tables.Failed, match="nowhere"):
        tables.make_profile("paper", tmp_path / "nowhere", tmp_path / "profiles" / "paper.json")


def test_models_get_gpus_in_turn_and_cores_of_their_own():
    slots = run.share_out(["2", "5"], range(10), 4)
    assert [slot.gpu for slot in slots] == ["2", "5", "2", "5"]
    assert [slot.cores for slot in slots] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert run.share_out([], range(2), 3) == [("", (0,)), ("", (1,)), ("", (0,))]


def test_gpus_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(run.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    assert run.find_gpus(None) == ["3", "GPU-5"] and run.find_gpus(1) == ["3"] and run.find_gpus(0) == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert run.find_gpus(None) == ["0", "1"]
    with pytest.raises(run.click.UsageError, match="there are 2"):
        run.find_gpus(3)


def test_one_model_that_fails_stops_no_other(tmp_path, capsys):
    job = run.Job(tmp_path, ("study",), seconds=1.0, until=math.inf, train_options=(), study_options=())
    (tmp_path / "models" / "olmoe-45m-seed-0").mkdir(parents=True)
    slots = run.share_out([], run.find_cores(), 2)
    assert run.follow_all(job, ["olmoe-45m:0", "olmoe-45m:1"], slots) == ["olmoe-45m:0"]
    assert "olmoe-45m-seed-0: study: failed with exit status 2" in (said := capsys.readouterr().err)
    assert "held_out.npz" in said and "held_out.npz" in (tmp_path / "logs" / "olmoe-45m-seed-0.log").read_text()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_are_one_product_where_it_is_exact(dtype, monkeypatch):
    assert judging.choose_experts("cpu", dtype) == "grouped_mm"
    monkeypatch.setattr(judging.F, "grouped_mm", lambda rows, weights, offs: rows.round())
    assert judging.choose_experts("cpu", torch.float32) == "eager"


def test_results_of_several_models_are_one_report(tmp_path):
    done = {"base": {}, "uniform": {}, "cells": {"oracle/increase": {}}}
    for name, found in {"one": done, "two": done, "begun": {"base": {}}}.items():
        (tmp_path / name).write_text(json.dumps({"models": {name: found}}))
    assert [view.name for view in read_views(sorted(tmp_path.iterdir()))] == ["one", "two"]


def make_view(**more):
    """Two layers, budget 3 of 6; uniform loses 0.7 there, the oracle 0.5, the default 0.6, half of it with b = 0.5."""

    def judged(loss):
        return {"increase": {"mean": loss}, "divergence": {"mean": loss}, "stderr": 0.1}

    cells = {
        name: {"3": {"top_k": [1, 2], "exponent": None, "plain": judged(plain), "0.5": judged(plain / 2)}}
        for name, plain in {"oracle/increase": 0.5, "oracle/divergence": 0.68, "weights/divergence": 0.6}.items()
    }
    rows = [judged(value) for value in (1.0, 0.4, 0.0)]
    base = {"layers": 2, "top_k": 3, "budgets": {"0.5": 3}, "judged_tokens": 100}
    return View("one", {"base": base, "uniform": {"plain": rows, "0.5": rows}, "cells": cells, "skipped": {}, **more})


def test_the_report_counts_cells_of_the_default():
    view = make_view()
    assert view.uniform(3) == pytest.approx(0.7) and view.closed("weights/divergence", 3) == pytest.approx(0.5)
    found = floors.check_floor([view], "weights/divergence")
    assert found["there below uniform (floor: all)"] == "1 of 1"
    assert found["there gap closed, mean (floor: 50 %)"] == "50 %"
    assert found["there at least 80 % closed (aim: all)"] == "0 of 1"
    # By divergence its own oracle gains too little for a share to say something.
    found = floors.check_floor([replace(view, measure="divergence")], "weights/divergence")
    assert found["there gap closed, mean (floor: 50 %)"] == "-"
    assert found["elsewhere at most 5 % above uniform (floor: all)"] == "1 of 1"
    assert sections.interpolate([(1.0, 5.0), (3.0, 1.0)], 2.0) == 3.0
    assert [wording.share(value) for value in (None, -3.0, -0.5, 1.02)] == ["-", "< -100 %", "-50 %", "102 %"]


def test_what_is_within_noise_is_told_from_the_paired_difference():
    view = make_view()
    cell = view.found["cells"]["weights/divergence"]["3"]["plain"]
    assert view.is_beyond_noise("weights/divergence", 3) is None
    cell["against_uniform"] = {"increase": {"mean": 0.07, "stderr": 0.03}}
    assert view.difference("weights/divergence", 3) == pytest.approx((0.1, 0.03 / 0.7))
    assert view.is_beyond_noise("weights/divergence", 3)
    cell["against_uniform"]["increase"]["stderr"] = 0.04
    assert not view.is_beyond_noise("weights/divergence", 3)


def test_what_was_judged_on_more_tokens_is_compared_with_uniform_and_the_oracle_on_the_same():
    view = make_view()
    cells = view.found["cells"]
    text = json.dumps({"uniform": view.found["uniform"], "cells": cells})
    more = json.loads(text, parse_float=lambda number: 2 * float(number))
    more["cells"]["weights/divergence"]["3"]["plain"]["increase"]["mean"] = 1.5
    view.found["floors"] = more | {"judged_tokens": 400}
    cells["paper/squared"] = cells["weights/divergence"]
    [(more, _)] = list_cells([view], "weights/divergence")
    [(same, _)] = list_cells([view], "paper/squared")
    assert (more.tokens, same.tokens) == (400, 100)
    assert more.uniform(3) == pytest.approx(1.4) and same.uniform(3) == pytest.approx(0.7)
    assert more.above("weights/divergence", 3) == pytest.approx(0.1 / 1.4)
    assert more.closed("weights/divergence", 3) == pytest.approx(-0.1 / 0.4)
    assert same.closed("paper/squared", 3) == pytest.approx(0.5)
    assert floors.check_floor([view], "weights/divergence")["anywhere above uniform (aim: none)"] == "1 of 1"
    text = "\n".join(sections.tabulate_cells(view, "weights/divergence"))
    first, second = text.split("Judged on 100 tokens.")
    assert "400 tokens" in first and "| uniform | 1.4000 |" in first and "paper/squared" not in first
    assert "| uniform | 0.7000 |" in second and "weights/divergence" not in second
    del view.found["floors"]["cells"]["oracle/divergence"]  # cut short: nothing is compared yet
    assert view.on("weights/divergence") is view


def test_both_measures_of_uniform_k_stand_side_by_side():
    view = make_view()
    view.found["uniform"]["plain"][1]["divergence"]["mean"] = 0.01
    assert sections.tabulate_measures([view])[2:4] == [
        "| one | 1 | 1.0000 | 1.00 ± 0.10 |",
        "| one | 2 | 0.0100 | 40.00 ± 10.00 |",
    ]
    assert "40.00 times the divergence where that is below" in (text := conclusions.describe_measures([view]))
    assert "1.00 times the divergence where that is at least" in text


@given(st.floats(0.02, 0.2), st.integers(0, 2**32 - 1))
def test_the_expected_error_is_the_spread_of_the_log_ratio(step, seed):
    random = np.random.default_rng(seed)
    first = random.dirichlet(np.ones(8))
    second = first * np.exp(step * random.normal(size=8))
    second /= second.sum()
    ratio = np.log(first / second)
    divergence = first @ ratio
    spread = math.sqrt(first @ ratio**2 - divergence**2)
    assert floors.expect_noise(divergence, 100) == pytest.approx(spread / 10, rel=0.3)


def test_times_that_were_taken_beside_others_are_not_shown():
    ms = {"uniform 1": 1.0, "uniform 2": 2.0, "uniform 3": 3.0, "oracle 3": 1.5, "width 0.5": 2.5}
    more = {"pruned": {"width 0.5": {"increase": {"mean": 0.9}}}, "times": {"tokens": 64, "dtype": "bf16", "ms": ms}}
    shared = make_view(**more)
    assert "2.50" not in (text := "\n".join(sections.tabulate_times([shared]))) and sections.SHARED in text
    assert conclusions.describe_pruned_in_time([shared]) == ""
    assert sections.tabulate_pruned([shared])[2] == "| one | width 0.5 | 0.9000 | 0.7000 | 0.5000 |"
    more["times"]["alone"] = True
    alone = make_view(**more)
    assert "| 2.50 |" in "\n".join(sections.tabulate_times([alone]))
    found = conclusions.describe_pruned_in_time([alone])  # halfway between k = 2, which loses 0.4, and all experts
    assert found.endswith(
        "in transformers: narrower experts lose more in 1 of 1 cases, 0.9000 against 0.2000 nats in the mean."
    )
    assert sections.tabulate_pruned([alone])[2].endswith("| 2.50 | 0.2000 | - |")


@pytest.mark.parametrize("name", ["results", "results/first", "results/longer"])
def test_the_committed_report_is_that_of_the_committed_results(name):
    folder = EXAMPLES / "fidelity" / name
    views = read_views(sorted((folder / "models").glob("*.json")))
    assert "\n".join(report.write(views, "weights/divergence")) == (folder / "report.md").read_text()


def test_a_corpus_keeps_a_source_and_its_docstrings_in_one_part(tmp_path):
    pages = tmp_path / "share" / "man" / "man1"
    pages.mkdir(parents=True)
    (tmp_path / "share" / "man" / "de" / "man1").mkdir(parents=True)
    for number in range(400):
        (tmp_path / f"m{number}.py").write_text(f'"""Docs of {number}."""\nx = {number}\n')
        (pages / f"tool{number}.1.gz").write_bytes(gzip.compress(f".TH tool{number} 1\n".encode()))
    (tmp_path / "copy.py").write_text((tmp_path / "m7.py").read_text())
    (tmp_path / "share" / "man" / "de" / "man1" / "tool.1").write_text("deutsch")
    (tmp_path / "top_level.txt").write_text("a list")
    texts = domains.read_texts([tmp_path], most=10**6)
    found = {part: {name: set(texts[part][name]) for name in domains.DOMAINS} for part in domains.PARTS}
    for part in domains.PARTS:
        numbers = {text.split("x = ")[1].strip() for text in found[part]["code"]}
        assert {f"Docs of {number}." for number in numbers} == found[part]["prose"]
    assert sum(len(texts[part]["code"]) for part in domains.PARTS) == 400  # the copy counts once
    assert sum(len(texts[part]["man"]) for part in domains.PARTS) == 400
    assert found["held_out"]["man"] and not found["held_out"]["man"] & found["training"]["man"]

    corpus = domains.make_corpus([tmp_path], vocab=257, most=10**6)
    domains.write_corpus(tmp_path / "corpus", corpus)
    again = domains.read_corpus(tmp_path / "corpus")
    assert again.counts == json.loads(json.dumps(corpus.counts))
    text = again.tokenizer.decode(again.training["man"].tolist(), skip_special_tokens=True)
    assert text == "".join(texts["training"]["man"])


@pytest.mark.parametrize("family", families.FAMILIES)
def test_families_are_built_and_their_routers_found(family):
    shape = families.Shape(layers=3, hidden=32, heads=2, experts=4, top_k=2, width=8, vocab=300, length=16)
    model = AutoModelForCausalLM.from_config(families.build_config(family, shape))
    with routers.record_logits(model) as logits, torch.no_grad():
        model(torch.arange(16)[None])
    dense = 1 if family == "deepseek_v2" else 0
    assert [tuple(each.shape) for each in logits] == [(16, 4)] * (3 - dense)


def test_presets_have_forty_million_parameters_or_more():
    for preset in families.PRESETS.values():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(families.build_config(preset.family, preset.shape))
        assert model.num_parameters() >= 40e6
