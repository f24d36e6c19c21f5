"""The scripts that train small models and study what allocations lose, in the parts that need no training."""

import csv
import gzip
import itertools
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
from command_line import succeed
from corrections import draw_maps
from hypothesis import given
from hypothesis import strategies as st
from synthetic import make_profile
from tiny import make_checkpoint
from torch.nn.functional import cross_entropy

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path += [str(EXAMPLES / "fidelity"), str(EXAMPLES / "train_small_moe")]

import background  # noqa: E402
import domains  # noqa: E402
import families  # noqa: E402
import judge  # noqa: E402
import judging  # noqa: E402
import records  # noqa: E402
import report  # noqa: E402
import routers  # noqa: E402
import run  # noqa: E402
import study  # noqa: E402
import tables  # noqa: E402
import windows  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from lexi_adapter.model.variants import allocate  # noqa: E402
from lexi_adapter.serving.transformers_patch import apply  # noqa: E402
from lexi_search.artifacts.allocation import Allocation  # noqa: E402
from lexi_search.artifacts.compensation import write_maps  # noqa: E402
from lexi_search.artifacts.serialisation import read_profile, write_allocations, write_profile  # noqa: E402

DOMAINS = {"code": 3, "prose": 2}


def test_windows_to_measure_and_to_judge_on_share_no_token_and_domains_take_turns():
    streams = {name: np.arange(100) + 1000 * i for i, name in enumerate(DOMAINS)}
    measure, judge = windows.cut(streams, measure=5, judge=4, length=10)
    assert measure.domains == ("code", "prose") * 5 and judge.domains == ("code", "prose") * 4
    assert not set(measure.tokens.flatten().tolist()) & set(judge.tokens.flatten().tolist())
    assert judge.tokens[1].tolist() == list(range(1050, 1060))
    assert measure.tokens[1::2].min() >= 1000
    with pytest.raises(ValueError, match="code has room for 5 windows of 10 to measure on, not 6"):
        windows.cut(streams, measure=6, judge=1, length=10)
    streams["prose"] = np.arange(40)
    assert windows.cut_what_fits(streams, measure=5, judge=4, least=4, length=10)[2] == {
        "prose": "prose has room for 2 windows of 10 to measure on, not 5"
    }
    with pytest.raises(ValueError, match="code has room .* prose has room"):
        windows.cut_what_fits(streams, measure=6, judge=1, least=1, length=10)


def test_more_windows_to_judge_on_begin_with_the_fewer_and_end_where_the_shortest_domain_does():
    streams = {"code": np.arange(100), "prose": np.arange(1000, 1081)}
    _, judge = windows.cut(streams, measure=4, judge=2, length=10)
    for asked, got in ((3, 3), (9, 4)):  # prose has room for 4
        measure, more, short = windows.cut_what_fits(streams, measure=4, judge=asked, least=2, length=10)
        assert len(more.tokens) == len(more.domains) == 2 * got and not short
        assert more.tokens[:4].equal(judge.tokens) and more.domains[:4] == judge.domains
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
    assert records.interpolate_uniform(losses, budget, 3) == pytest.approx(np.mean([increases[i - 1] for i in k]))


def test_budgets_below_one_expert_a_layer_are_left_out():
    assert records.find_budgets((0.25, 0.5, 0.625, 0.75), 12, 2) == {0.625: 15, 0.75: 18}
    assert records.find_closed(0.9, 1.0, 0.8) == pytest.approx(0.5)
    assert records.find_closed(0.9, 1.0, 0.95) is None  # too little to gain


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return judging.load(make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("model") / "tiny"), device="cpu")


def test_tables_are_compared_by_what_whole_allocations_lose(tmp_path, monkeypatch):
    """The tables are those of profiles with that background."""
    monkeypatch.chdir(tmp_path)
    folder = make_checkpoint("olmoe", tmp_path / "model")
    streams = {name: np.random.default_rng(seed).integers(3, 250, 400) for name, seed in DOMAINS.items()}
    np.savez(folder / "held_out.npz", **streams)
    size = ("--batch", 2, "--length", 16, "--samples", 64)
    for k in (2, 4):
        succeed("profile", folder, *size, "--background-k", k, "-o", f"{k}.json")
    options = ["--background", "2", "--background", "4", "--judge", "4", "--random", "6", "-o", "found.json"]
    background.main([str(folder), "2.json", *options], standalone_mode=False)
    found = json.loads(Path("found.json").read_text())
    for k in (2, 4):
        table = read_profile(f"{k}.json").losses("divergence")
        np.testing.assert_allclose(found["tables"][str(k)], table, rtol=1e-3, atol=1e-6)
    assert [(row["share"], row["background_k"]) for row in found["rows"]] == [(0.5, 2), (0.5, 4), (0.75, 2), (0.75, 4)]
    for row in found["rows"]:
        assert row["own correlation"] > 0.5 and row["own error"] < 1.5 and row["held-out gain"] < 1
    drawn = background.draw_allocations(2, 4, 3, 50, np.random.default_rng(0))
    assert {sum(top_k) for top_k in drawn} == {6} and {k for top_k in drawn for k in top_k} == {1, 2, 3, 4}


def test_the_judge_says_what_a_plain_loop_says(loaded, monkeypatch):
    model, identity = loaded
    asked, judge_allocations = [], judging.judge_allocations

    def count(model, tokens, allocations, **options):
        asked.extend(allocations)
        return judge_allocations(model, tokens, allocations, **options)

    monkeypatch.setattr(judging, "judge_allocations", count)
    tokens = torch.randint(0, model.config.vocab_size, (4, 12), generator=torch.Generator().manual_seed(0))
    judge = judging.Judge(loaded, windows.Windows(tokens, ("code", "prose") * 2), batch=3)
    choices = [judging.Choice((1, 2, 1), 0.5), judging.Choice((identity.top_k,) * 3)]
    found, own = judge.judge([("mixed", choices[0]), ("own", choices[1])])
    assert own.increase == pytest.approx(0, abs=1e-6) and own.method == "own" and own.tokens == 48
    assert (found.method, found.exponent, found.budget, found.top_k) == ("mixed", 0.5, 4, (1, 2, 1))

    def find_losses():
        with torch.no_grad():
            return [cross_entropy(model(row[None]).logits[0, :-1], row[1:]).item() for row in tokens]

    def run_as(top_k, exponent):
        top_k = dict(zip(identity.moe_layers, top_k, strict=True))
        apply(model, replace(allocate(identity, top_k), gate_exponent=exponent))
        moved = np.subtract(find_losses(), base)
        apply(model, allocate(identity, dict.fromkeys(identity.moe_layers, identity.top_k)))
        return moved

    base = find_losses()
    np.testing.assert_allclose(judging.find_losses(model, tokens, batch=3), base, rtol=1e-5)
    moved, low, high = run_as(*choices[0][:2]), run_as((1, 1, 1), None), run_as((2, 2, 2), None)
    assert found.increase == pytest.approx(np.mean(moved), abs=1e-5)

    def spread(values):  # of the mean of two domains' means
        return np.sqrt(sum(np.var(values[first::2], ddof=1) / 2 for first in (0, 1))) / 2

    # Budget 4 of 3 layers lies a third of the way from k = 1 to k = 2.
    assert found.increase_error == pytest.approx(spread(moved), abs=1e-5)
    assert found.increase_difference_error == pytest.approx(spread(moved - (low + (high - low) / 3)), abs=1e-5)
    assert found.divergence > 0 and found.divergence_difference_error > 0
    known = len(asked)
    assert judge.judge([("mixed", choices[0]), ("own", choices[1])]) == [found, own] and len(asked) == known == 4
    [same] = judge.judge([("uniform", judging.Choice((2, 2, 2)))])
    assert same.increase_difference_error == same.divergence_difference_error == 0 and len(asked) == known


def test_the_judge_applies_the_corrections_of_a_profile(loaded, tmp_path):
    """As the adapter does with the file of an allocation; and uniform k beside it has the same ones."""
    model, identity = loaded
    known = {name: value for name, value in asdict(identity).items() if name != "top_k"}
    profile = make_profile(3, identity.top_k, **known)
    pairs = [(layer, k) for layer in identity.moe_layers for k in range(1, identity.top_k)]
    maps = draw_maps(identity, pairs, hidden=model.config.hidden_size)
    named = write_maps(tmp_path / "p.safetensors", maps, profile.model)
    settings = replace(profile.settings, gate_exponent=0.5, compensation_rank=named.rank)
    write_profile(tmp_path / "p.json", replace(profile, settings=settings, compensation=named))
    tokens = torch.randint(0, model.config.vocab_size, (4, 12), generator=torch.Generator().manual_seed(2))
    judge = judging.Judge(loaded, windows.Windows(tokens, ("code", "prose") * 2), batch=3)
    choice = judging.Choice((1, 2, 1), 0.5, tmp_path / "p.json")
    [found] = judge.judge([("mixed", choice)])
    base, losses = judging.find_losses(model, tokens, batch=4), {}
    for k in (choice.top_k, (1, 1, 1), (2, 2, 2)):
        top_k = dict(zip(identity.moe_layers, k, strict=True))
        allocation = Allocation(profile.model, top_k, sum(k), 0.0, 0.0, {}, 0.5)
        write_allocations([tmp_path / "a.json"], [allocation], maps)
        apply(model, tmp_path / "a.json")
        losses[k] = judging.find_losses(model, tokens, batch=4) - base
    apply(model, allocate(identity, dict.fromkeys(identity.moe_layers, identity.top_k)))
    assert found.increase == pytest.approx(losses[choice.top_k].mean(), abs=1e-5) and abs(found.increase) > 1e-4
    excess = judge.subtract("mixed", choice)
    even = losses[1, 1, 1] + (losses[2, 2, 2] - losses[1, 1, 1]) / 3
    assert excess.increase == pytest.approx((losses[choice.top_k] - even).mean(), abs=1e-5)
    [plain] = judge.judge([("mixed", choice._replace(profile=None))])
    assert plain.increase != pytest.approx(found.increase, abs=1e-5)


def test_brute_force_of_one_layer_is_the_judges_answer_for_it(loaded):
    tokens = torch.randint(0, loaded.model.config.vocab_size, (4, 12), generator=torch.Generator().manual_seed(1))
    held = windows.Windows(tokens, ("code", "prose") * 2)
    measured = tables.measure_windows(loaded, held, batch=3)
    k = loaded.identity.top_k
    [alone] = judging.Judge(loaded, held, batch=2).judge([("one layer", judging.Choice((k, 1, k)))])
    assert measured["divergence"][1, 0].mean() == pytest.approx(alone.divergence, abs=1e-6)
    table = tables.tabulate(measured, held)["divergence"]
    assert table.shape == (3, k) and not table[:, -1].any()


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
    for name in ("models/olmoe-45m-seed-0", "logs"):
        (tmp_path / name).mkdir(parents=True)
    slots = run.share_out([], run.find_cores(), 2)

    def step(model, slot):
        return model == "olmoe-45m:1" or run.follow(model, slot, work=tmp_path, training=(), studying=())

    assert run.follow_all(step, ["olmoe-45m:0", "olmoe-45m:1"], slots) == ["olmoe-45m:0"]
    assert "olmoe-45m-seed-0: study: failed with exit status 2" in (said := capsys.readouterr().err)
    assert "held_out.npz" in said and "held_out.npz" in (tmp_path / "logs" / "olmoe-45m-seed-0.log").read_text()


def test_experts_are_one_product_where_it_is_exact(monkeypatch):
    assert judging.choose_experts("cpu") == "grouped_mm"
    monkeypatch.setattr(judging.F, "grouped_mm", lambda rows, weights, offs: rows.bfloat16().float())
    assert judging.choose_experts("cpu") == "eager"


def make_row(method, budget, loss, *, exponent=None, tokens=100, error=0.01, top_k=()):
    return records.Row(method, exponent, budget, tokens, loss, 0.1, error, loss, 0.1, error, top_k)


def make_results(name="one", **changed):
    """Two layers, budget 3 of 6; uniform loses 0.7 there, half of it with b = 0.5, the oracle 0.5, the default 0.6."""
    rows = [make_row("uniform", 2 * k, loss, top_k=(k, k)) for k, loss in enumerate((1.0, 0.4, 0.0), 1)]
    rows += [
        make_row("uniform with exponent 0.5", 2 * k, loss, exponent=0.5, top_k=(k, k))
        for k, loss in enumerate((0.5, 0.2, 0.0), 1)
    ]
    losses = {"oracle/increase": 0.5, "oracle/divergence": 0.68, "weights/divergence": 0.6} | changed
    rows += [make_row(method, 3, loss, top_k=(1, 2)) for method, loss in losses.items()]
    return records.Results({"model": name, "layers": "2", "top_k": "3"}, rows)


def test_results_are_read_as_they_were_written(tmp_path):
    written = make_results()
    written = records.Results(written.facts | {"command": "run.py --work a: b"}, written.rows)
    records.write_results(tmp_path / "one.csv", written)
    assert records.read_results(tmp_path / "one.csv") == written
    with (tmp_path / "one.csv").open() as file:
        rows = list(csv.DictReader(line for line in file if line[0] != "#"))
    assert [float(row["increase"]) for row in rows] == [row.increase for row in written.rows]
    assert rows[-1]["top_k"] == "1 2" and rows[0]["exponent"] == "" and rows[3]["exponent"] == "0.5"
    (tmp_path / "other.csv").write_text("# model: one\nmethod,loss\n")
    with pytest.raises(records.click.UsageError, match="other.csv holds no table of study.py"):
        records.read_results(tmp_path / "other.csv")


def test_results_of_several_models_are_one_report():
    found = report.gather([make_results("one"), make_results("two")], "increase")
    assert [(cell.model, cell.budget) for cell in found["weights/divergence"]] == [("one", 3), ("two", 3)]
    text = report.write([make_results("one"), make_results("two", **{"paper/squared": 0.9})])
    assert "| paper/squared | 100 | +29 % | +29 % | 1 of 1 |" in text
    assert "| weights/divergence | 100 | -14 % | -14 % | 0 of 2 |" in text


def test_a_cell_is_compared_with_uniform_k_and_the_oracle():
    cells = {method: cell for method, cell in report.list_cells(make_results(), "increase")}
    default = cells["weights/divergence"]
    assert default.uniform == pytest.approx(0.7) and default.oracle == 0.5
    assert default.above == pytest.approx(-1 / 7) and default.closed == pytest.approx(0.5)
    assert cells["uniform with exponent 0.5"].above == pytest.approx(-0.5)
    assert "uniform" not in cells
    # By divergence its own oracle gains too little for a share to say something.
    cells = {method: cell for method, cell in report.list_cells(make_results(), "divergence")}
    assert cells["weights/divergence"].oracle == 0.68 and cells["weights/divergence"].closed is None
    assert [report.percent(value) for value in (None, -0.5, 1.02)] == ["-", "-50 %", "102 %"]


def test_what_is_within_noise_is_told_from_the_paired_difference():
    for error, beyond in ((0.03, "1 of 1"), (0.04, "0 of 1"), (None, "-")):
        cell = report.Cell("one", 3, 0.5, 100, loss=0.77, error=error, uniform=0.7, oracle=None)
        assert report.summarise([cell])[2:4] == ["1 of 1", beyond]


def test_what_was_judged_on_more_tokens_is_compared_with_uniform_and_the_oracle_on_the_same():
    few = make_results(**{"paper/squared": 0.6})
    more = [row._replace(tokens=400, increase=2 * row.increase) for row in few.rows if row.method != "paper/squared"]
    more = [row._replace(increase=1.5) if row.method == "weights/divergence" else row for row in more]
    cells = dict(report.list_cells(records.Results(few.facts, [*more, *few.rows]), "increase"))
    assert len(list(report.list_cells(records.Results(few.facts, [*more, *few.rows]), "increase"))) == len(cells)
    wide, same = cells["weights/divergence"], cells["paper/squared"]
    assert (wide.tokens, same.tokens) == (400, 100)
    assert wide.uniform == pytest.approx(1.4) and same.uniform == pytest.approx(0.7)
    assert wide.above == pytest.approx(0.1 / 1.4) and wide.closed == pytest.approx(-0.1 / 0.4)
    assert same.closed == pytest.approx(0.5)


def test_a_study_makes_what_is_missing_and_leaves_out_what_fails(tmp_path, monkeypatch, capsys):
    made = []

    def make(name):
        made.append(name)
        if name == "paper" and len(made) < 4:
            raise tables.Failed("no profile of model")
        return [make_row(f"{name}/squared" if name == "paper" else name, 3, 0.5)]

    names = ("uniform", "paper", "pruned/experts 25%")
    monkeypatch.setattr(study, "list_parts", lambda begun: {name: lambda name=name: make(name) for name in names})
    begun = study.Study(tmp_path / "model", *[None] * 4)
    facts = {"model": "one", "layers": "2", "top_k": "3"} | dict.fromkeys(study.SETTINGS, "1")
    assert study.run(begun, tmp_path / "one.csv", facts) == ["paper"]
    assert "paper: left out: no profile of model" in capsys.readouterr().out
    assert study.run(begun, tmp_path / "one.csv", facts) == [] and made == [*names, "paper"]
    assert study.run(begun, tmp_path / "one.csv", facts) == [] and len(made) == 4
    found = records.read_results(tmp_path / "one.csv").rows
    assert [row.method for row in found] == ["uniform", "pruned/experts 25%", "paper/squared"]
    with pytest.raises(ValueError, match="one.csv was made with another judged_tokens; name another -o"):
        study.run(begun, tmp_path / "one.csv", facts | {"judged_tokens": "2"})


def test_every_allocation_of_a_study_meets_its_budget_with_the_least_sum(loaded, tmp_path):
    tokens = torch.randint(0, loaded.model.config.vocab_size, (4, 12), generator=torch.Generator().manual_seed(2))
    held = windows.Windows(tokens, ("code", "prose") * 2)
    begun = study.Study(tmp_path, loaded, held, judging.Judge(loaded, held, batch=4), tmp_path)
    k = loaded.identity.top_k
    table = np.random.default_rng(0).random((3, k))
    rows = study.judge_tables(begun, {"some/table": table}, 0.5)
    assert [row.budget for row in rows] == list(begun.budgets.values()) and {row.exponent for row in rows} == {0.5}
    for row in rows:
        every = [each for each in itertools.product(range(1, k + 1), repeat=3) if sum(each) == row.budget]
        assert row.top_k == min(every, key=lambda top_k: sum(table[layer, j - 1] for layer, j in enumerate(top_k)))
    uniform = study.judge_uniform(begun)
    assert len(uniform) == k * (1 + len(study.EXPONENTS)) and {row.method for row in uniform[:k]} == {"uniform"}


def test_the_judge_of_one_model_judges_the_optimum_of_every_loss_of_a_profile(loaded):
    tokens = torch.randint(0, loaded.model.config.vocab_size, (4, 12), generator=torch.Generator().manual_seed(3))
    profile = make_profile(3, loaded.identity.top_k)
    with_windows = judging.Judge(loaded, windows.Windows(tokens, ("code", "prose") * 2), batch=4)
    rows = judge.judge_profiles(with_windows, {Path("weights.json"): profile}, [4])
    assert [row.top_k for row in rows[:2]] == [(1, 1, 1), (2, 2, 2)]  # the budget lies between
    assert [row.method for row in rows[2:]] == [f"weights/{kind}" for kind in profile.loss_kinds]
    for row, kind in zip(rows[2:], profile.loss_kinds, strict=True):
        sums = {each: sum(profile.losses(kind)[i][k - 1] for i, k in enumerate(each)) for each in FOUR_OVER_THREE}
        assert row.budget == 4 and sums[row.top_k] == min(sums.values())


def test_a_model_that_gains_from_fewer_experts_is_in_the_report_too(tmp_path):
    odd = make_results()
    odd = records.Results(odd.facts, [row._replace(increase=-row.increase) for row in odd.rows])
    assert "| one | 3 | -0.7000 | +0.1000 | +0 % | -0.0 ± 1.4 % | - |" in report.write([odd])
    report.draw(report.gather([odd, make_results("two")], "increase"), tmp_path / "losses.png")
    assert (tmp_path / "losses.png").stat().st_size > 0


FOUR_OVER_THREE = [(2, 1, 1), (1, 2, 1), (1, 1, 2)]


def test_the_judge_of_one_model_prints_uniform_k_between_two_k():
    rows = [make_row("uniform", 2 * k, loss, top_k=(k, k)) for k, loss in ((1, 1.0), (2, 0.4))]
    rows += [make_row("weights/divergence", 3, 0.6, exponent=0.5, top_k=(1, 2))]
    heads, uniform, default = (line.split() for line in judge.list_lines(rows, [3], 2))
    assert uniform == ["uniform", "3", "0.7000", "0.7000"]
    assert default == ["weights/divergence", "0.5", "3", "0.6000", "0.6000", "1", "2"]
    assert heads[-3:] == ["k", "per", "layer"]


ROUNDS = ("first", "second", "longer")


@pytest.mark.parametrize("name", ROUNDS)
def test_the_committed_report_is_that_of_the_committed_results(name):
    folder = EXAMPLES / "fidelity" / "results" / name
    models = [records.read_results(file) for file in sorted(folder.glob("*.csv"))]
    assert report.write(models) == (folder / "report.md").read_text()


# What README's table says: mean, worst, cells above uniform k, of how many.
TOLD = {
    "paper/frobenius": ((175, 758, 18, 19), (270, 918, 20, 20)),
    "paper/squared": ((66, 301, 17, 19), (79, 220, 17, 20)),
    "weights/divergence": ((-22, 15, 2, 19), (-7, 6, 3, 20)),
    "oracle/increase": ((-20, 15, 2, 19), (-7, 5, 2, 20)),
    "weights+b/divergence": ((-43, -5, 0, 19), (-19, 4, 2, 20)),
}


@pytest.mark.parametrize("method", TOLD)
def test_the_committed_results_hold_what_the_readme_says(method):
    """Counted here by a loop over the files as text, not by the code of the report."""
    for name, told in zip(("second", "longer"), TOLD[method], strict=True):
        above = []
        for file in (EXAMPLES / "fidelity" / "results" / name).glob("*.csv"):
            rows = list(csv.DictReader(line for line in file.read_text().splitlines() if line[0] != "#"))
            most = max(int(row["tokens"]) for row in rows if row["method"] == method)
            rows = [row for row in rows if int(row["tokens"]) == most]
            uniform = {int(row["budget"]): float(row["increase"]) for row in rows if row["method"] == "uniform"}
            for row in rows:
                if row["method"] == method:
                    even = np.interp(int(row["budget"]), list(uniform), list(uniform.values()))
                    above.append(float(row["increase"]) / even - 1)
        counted = (round(100 * fmean(above)), round(100 * max(above)), sum(each > 0 for each in above), len(above))
        assert counted == told


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
    dense = 1 if family in ("deepseek_v2", "glm4_moe", "ernie4_5_moe") else 0
    assert [tuple(each.shape) for each in logits] == [(16, 4)] * (3 - dense)


def test_presets_have_forty_million_parameters_or_more():
    for preset in families.PRESETS.values():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(families.build_config(preset.family, preset.shape))
        assert model.num_parameters() >= 40e6
