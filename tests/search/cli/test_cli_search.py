"""`lexi-search search` and `front` as users meet them: what they print and write, and what they refuse."""

import csv
import dataclasses
import inspect
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from command_line import list_warnings, refuse, run, succeed, write
from synthetic import make_allocation, make_cost_table, make_profile

from lexi_search.artifacts import serialisation
from lexi_search.cli.main import main


def sum_losses(table, allocation):
    return sum(row[allocation.top_k[layer] - 1] for layer, row in enumerate(table))


def test_search_one_budget_writes_a_file(folder):
    profile = make_profile()
    output = succeed("search", write(folder / "profile.json", profile), "--budget", 9)
    allocation = serialisation.read_allocation("allocation.json")
    assert allocation.budget == 9
    assert allocation.model == profile.model
    assert allocation.made_by["profile_sha256"] == serialisation.sha256(profile)
    assert allocation.loss == pytest.approx(
        sum(profile.losses("frobenius")[i][allocation.top_k[i] - 1] for i in range(4))
    )
    header, row, last = output.splitlines()[1:]
    assert header.split() == "budget share % average k loss optimum gap % sure % k per layer".split()
    figures = [f"{allocation.loss:.6g}", f"{allocation.optimal_loss:.6g}", "0"]
    *cells, sure = row.split()[:7]
    assert [*cells, *row.split()[7:]] == ["9", "56.25", "2.25", *figures, *map(str, allocation.top_k.values())]
    assert 0 < int(sure) <= 100
    assert last == "allocation.json"


def test_search_many_budgets_writes_a_folder(folder):
    output = succeed("search", write(folder / "p", make_profile()), "--budgets", "4:16:4", "--budget", "7", "--json")
    rows = json.loads(output)
    assert [row["budget"] for row in rows] == [4, 7, 8, 12, 16]
    assert sorted(os.listdir("allocations")) == sorted(f"allocation-{b}.json" for b in (4, 7, 8, 12, 16))
    for row in rows:
        allocation = serialisation.read_allocation(row["file"])
        assert row["top_k"] == {str(layer): k for layer, k in allocation.top_k.items()}
        assert (row["loss"], row["optimal_loss"]) == (allocation.loss, allocation.optimal_loss)
        assert row["average_k"] == row["budget"] / 4
        assert row["gap"] == 0
    table = make_profile().losses("frobenius")
    uniform = {k * 4: pytest.approx(sum(row[k - 1] for row in table)) for k in (1, 2, 3, 4)}
    assert {row["budget"]: row["uniform_loss"] for row in rows} == uniform | {7: None}
    assert [row["uniform_k"] for row in rows] == [1, None, 2, 3, 4]
    assert all(row["loss"] <= row["uniform_loss"] for row in rows if row["uniform_k"])
    assert all(set(row["share"]) == set("0123") and 0 <= row["regret"] for row in rows)


def test_search_of_a_range_with_one_budget_still_writes_a_folder(folder):
    succeed("search", write(folder / "p", make_profile()), "--budgets", "8:8:1", "-o", "out")
    assert os.listdir("out") == ["allocation-8.json"]


def test_search_has_the_same_bytes_with_the_same_seed(folder):
    write(folder / "p", make_profile(12, 8))
    for name in "ab":
        succeed("search", "p", "--budget", "40", "-o", name, "--seed", "3")
    assert Path("a").read_bytes() == Path("b").read_bytes()


def test_search_keeps_to_bounds_and_losses(folder):
    profile = make_profile(6, 4)
    write(folder / "p", profile)
    succeed("search", "p", "--budget", "15", "--min-k", "2", "--max-k", "3", "--loss", "squared")
    allocation = serialisation.read_allocation("allocation.json")
    assert set(allocation.top_k.values()) == {2, 3}
    assert allocation.made_by["loss"] == "squared"
    assert allocation.loss == pytest.approx(sum_losses(profile.losses("squared"), allocation))


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "no budget given; add --budget B or --budgets START:STOP:STEP"),
        (["--budget", "3"], "budget 3 is outside 4..16"),
        (["--budget", "17"], "budget 17 is outside 4..16"),
        (["--budget", "8", "--budget", "99"], "budget 99 is outside 4..16"),
        (["--budgets", "4:20:4"], "budget 20 is outside 4..16"),
        (["--budget", "6", "--min-k", "2"], "budget 6 is outside 8..16"),
        (["--budget", "14", "--max-k", "3"], "budget 14 is outside 4..12"),
        (["--budget", "8", "--max-k", "5"], "max_k=5 must be an integer in 1..4"),
        (["--budget", "8", "--min-k", "0"], "min_k=0 must be an integer in 1..4"),
        (
            ["--budgets", "8:4:1"],
            "--budgets '8:4:1' does not rise; write START:STOP:STEP, such as 64:128:8 or 25%:75%:5%",
        ),
        (["--budgets", "8"], "--budgets '8' is not understood"),
        (["--budgets", "8:99999999999:1"], "--budgets 8:99999999999:1: '99999999999' is not understood"),
        (["--budget", "8", "--protect", "0:99999999999"], "--protect '0:99999999999' is not understood"),
        (["--budgets", "4:8:0"], "--budgets '4:8:0' does not rise"),
        (["--budget", "8", "-o", "absent/a.json"], "cannot write absent/a.json: No such file or directory"),
        (["--budget", "8", "-o", "."], "cannot write .: not a regular file"),
        (["--budgets", "8:9:1", "-o", "absent/out"], "cannot write absent/out: No such file or directory"),
        (["--budgets", "8:9:1", "-o", "p"], "cannot write p: not a folder; choose another name"),
        (["--budgets", "8:9:1", "-o", "/proc/1"], "cannot write /proc/1/file: "),
    ],
)
def test_search_refuses(folder, options, message):
    write(folder / "p", make_profile())
    assert message in refuse("search", "p", *options)


def test_search_refuses_other_files(folder):
    write(folder / "a", make_allocation())
    assert "expected 'lexi-profile'" in refuse("search", "a", "--budget", "8")
    assert "cannot read absent: No such file or directory" in refuse("search", "absent", "--budget", "8")
    document = serialisation.to_document(make_profile()) | {"version": 2}
    (folder / "p").write_text(json.dumps(document))
    assert "its format version is 2, lexi-search 0.1.0 reads 1; make the file again" in refuse(
        "search", "p", "--budget", 8
    )


def test_search_defaults_are_the_librarys():
    from lexi_search.solvers.evolution import search

    defaults = {name: parameter.default for name, parameter in inspect.signature(search).parameters.items()}
    for option in main.commands["search"].params:
        if option.name in ("population", "generations", "mutation_rate", "restarts", "seed"):
            assert option.default == defaults.pop(option.name), option.name
    assert set(defaults) == {"problem", "tournament", "fitness", "optimum"}


# --- methods, constraints, uncertainty, history


def test_exact_gives_the_optimum_that_evolution_is_judged_by(folder):
    write(folder / "p", make_profile(12, 8))
    for method in ("evolution", "exact"):
        succeed("search", "p", "--budget", "40", "--method", method, "-o", method)
    evolved, exact = (serialisation.read_allocation(name) for name in ("evolution", "exact"))
    assert exact.gap == 0 and exact.loss == evolved.optimal_loss
    assert exact.made_by["method"] == "exact" and "population" not in exact.made_by
    assert evolved.made_by["method"] == "evolution" and evolved.made_by["seed"] == 0


@pytest.mark.parametrize("method", ["evolution", "exact"])
def test_constraints(folder, method):
    layers = (1, 2, 3, 5, 6, 7, 9, 10)
    write(folder / "p", make_profile(12, 8, moe_layers=layers))
    options = ["--allowed-k", "1,2,4,8", "--protect", "10", "--bounds", "1:3=2:4", "--group", "5:6", "--group", "7:9"]
    succeed("search", "p", "--budget", "37", "--method", method, *options)
    allocation = serialisation.read_allocation("allocation.json")
    k = allocation.top_k
    assert set(k.values()) <= {1, 2, 4, 8} and k[10] == 8
    assert all(2 <= k[layer] <= 4 for layer in (1, 2, 3)) and k[5] == k[6] and k[7] == k[9]
    assert allocation.budget <= 37
    assert allocation.made_by["groups"] == [[5, 6], [7, 9]] and allocation.made_by["allowed_k"] == [1, 2, 4, 8]
    assert allocation.made_by["min_k"] == {str(layer): {1: 2, 2: 2, 3: 2, 10: 8}.get(layer, 1) for layer in layers}
    succeed("search", "p", "--budget", "37", "--method", method, "--group-size", "3")
    k = [k for _, k in sorted(serialisation.read_allocation("allocation.json").top_k.items())]
    assert len(set(k[:3])) == len(set(k[3:6])) == len(set(k[6:])) == 1


def test_a_noisy_profile_leads_to_a_warning(folder):
    profile = make_profile(6, 4)
    write(folder / "p", profile)
    document = serialisation.to_document(profile)
    for layer in document["layers"].values():
        layer["frobenius_stderr"] = [value / 2 for value in layer["frobenius"]]
    (folder / "noisy").write_text(json.dumps(document))
    succeed("search", "p", "--budget", "12")
    result = run("search", "noisy", "--budget", "12", "--budget", "24", "--json")
    assert result.exit_code == 0
    assert result.stderr.startswith("the profile is too noisy for budget 12: ") and result.stderr.count("\n") == 1
    middle, full = json.loads(result.stdout)
    assert middle["regret"] > 0.01 and min(middle["share"].values()) < 0.9
    assert full["regret"] == 0 and set(full["share"].values()) == {1.0}
    assert "share" not in json.loads(succeed("search", "noisy", "--budget", "12", "--resamples", "0", "--json"))[0]


def test_a_warning_of_noise_never_promises_more_than_the_whole_loss(folder):
    """Losses cannot get smaller by more than 100 %, whatever the noise."""
    document = serialisation.to_document(make_profile(6, 4))
    for layer in document["layers"].values():
        layer["frobenius_stderr"] = [value * 4 for value in layer["frobenius"]]
    (folder / "noisy").write_text(json.dumps(document))
    said = run("search", "noisy", "--budget", "50%").stderr
    share = float(re.search(r"led to losses ([^ ]+) % smaller", said)[1])
    assert 0 < share <= 100 and "e+" not in said


def test_budgets_are_sums_shares_or_averages(folder):
    write(folder / "p", make_profile(8, 4))
    shown = json.loads(
        succeed("search", "p", *sum((["--budget", text] for text in ("50%", "k=3", "16")), []), "--json")
    )
    assert [row["budget"] for row in shown] == [16, 24]
    succeed("search", "p", "--budgets", "25%:75%:12.5%", "-o", "out")
    assert sorted(os.listdir("out")) == [f"allocation-{budget}.json" for budget in (12, 16, 20, 24, 8)]
    assert "--budget 101%: a share is of the model's own budget, 32" in refuse("search", "p", "--budget", "101%")


def test_a_search_says_what_it_found_and_what_to_type_next(folder):
    write(folder / "p", make_profile(8, 4))
    said = run("search", "p", "--budget", "50%", "--history", "h.json").stderr.splitlines()
    assert said[0].startswith("done: budget 16 of 32 (50 %, 2.00 experts per layer on average): k from ")
    assert said[1:] == [
        "next: lexi-search plot h.json -o history.png",
        "next: lexi-search plot p allocation.json",
        "next: lexi-search export allocation.json --to vllm --model WEIGHTS -o served",
    ]
    assert run("search", "p", "--budget", "50%", "--json").stderr == ""


def test_history(folder):
    write(folder / "p", make_profile(6, 4))
    succeed("search", "p", "--budgets", "8:20:4", "--generations", "30", "--history", "h.json")
    history = json.loads(Path("h.json").read_text())
    assert (history["format"], history["loss"], history["model"]["model_type"]) == (
        "lexi-history",
        "frobenius",
        "olmoe",
    )
    assert list(history["budgets"]) == ["12", "16", "20", "8"]
    for budget, values in history["budgets"].items():
        assert len(values["best"]) == len(values["mean"]) == 30
        assert all(a >= b for a, b in zip(values["best"], values["best"][1:], strict=False))
        loss = serialisation.read_allocation(f"allocations/allocation-{budget}.json").loss
        assert values["best"][-1] == pytest.approx(loss, rel=1e-5)


# --- costs


def time_of(table, mix, top_k):
    """Milliseconds of a mix of steps under an allocation: plain loops."""
    total = 0.0
    for tokens, count in mix.items():
        step = table.steps[tokens]
        total += count * (step.other_ms + sum(step.layers[layer][k - 1] for layer, k in top_k.items()))
    return total


@pytest.mark.parametrize("method", ["evolution", "exact"])
def test_a_target_in_time_or_speed_is_kept(folder, method):
    profile, table = make_profile(6, 4), make_cost_table(6, 4)
    write(folder / "p", profile)
    write(folder / "cost", table)
    mix = {16: 100.0, 4096: 2.0}
    base = time_of(table, mix, dict.fromkeys(range(6), 4))
    options = ["--cost", "cost", "--mix", "16:100,4096:2", "--method", method]
    targets = ["--target-speedup", "1.1", "--target-speedup", "1.25", "--target-ms", repr(base * 0.85)]
    rows = json.loads(succeed("search", "p", *options, *targets, "--json"))
    assert [Path(row["file"]).name for row in rows] == [
        f"allocation-{base * 0.85!r}ms.json",
        "allocation-1.1x.json",
        "allocation-1.25x.json",
    ]
    for row, limit in zip(rows, (base * 0.85, base / 1.1, base / 1.25), strict=True):
        allocation = serialisation.read_allocation(row["file"])
        assert row["ms"] == pytest.approx(time_of(table, mix, allocation.top_k)) and row["ms"] <= limit * (1 + 1e-9)
        assert row["speedup"] == pytest.approx(base / row["ms"])
        paid = allocation.made_by["cost"]
        assert paid["mix"] == {"16": 100.0, "4096": 2.0} and paid["table_sha256"] == serialisation.sha256(table)
        assert (paid["ms"], paid["speedup"]) == (row["ms"], row["speedup"])
        assert row["loss"] <= row["uniform_loss"]
        assert row["gap"] == pytest.approx(0, abs=1e-3) if method == "evolution" else row["gap"] == 0
    _, header, first, second, *_ = succeed(
        "search", "p", *options, "--target-speedup", "1.2", "--target-ms", repr(base)
    ).splitlines()
    assert header.split()[0] == "target" and "ms" in header and "speed-up" in header
    assert (first.split()[0], second.split()[0]) == (f"{base!r}ms", "1.2x")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--budget", "8", "--target-ms", "3"], "give budgets in experts or targets of time, not both"),
        (["--target-ms", "3"], "--target-ms and --target-speedup need --cost, which `lexi-adapter latency` measures"),
        (["--budget", "8", "--cost", "cost"], "with --cost a budget is a time; give --target-ms or --target-speedup"),
        (["--target-ms", "3", "--cost", "cost"], "cost: the cost table has steps of 16, 4096 tokens; say by --mix"),
        (["--target-ms", "3", "--cost", "cost", "--mix", "8"], "no step of 8 tokens; it has 16, 4096"),
        (["--target-ms", "3", "--cost", "cost", "--mix", "16:x"], "--mix '16:x' is not understood"),
        (["--target-ms", "3", "--cost", "cost", "--mix", "16:-1"], "a mix needs a positive number of steps"),
        (["--target-ms", "0.1", "--cost", "cost", "--mix", "16"], "--target-ms 0.1 is out of reach: the fastest k"),
        (["--target-speedup", "9", "--cost", "cost", "--mix", "16"], "--target-speedup 9 is out of reach"),
        (["--target-speedup", "-1", "--cost", "cost", "--mix", "16"], "--target-speedup -1 must be above 0"),
        (["--target-speedup", "nan", "--cost", "cost", "--mix", "16"], "--target-speedup nan must be above 0"),
        (["--target-ms", "3", "--cost", "other"], "other: the cost table has num_hidden_layers 5, the profile 4"),
        (["--target-ms", "3", "--cost", "p"], "p: its format is 'lexi-profile', expected 'lexi-cost'"),
        (["--target-ms", "3", "--cost", "absent"], "cannot read absent: No such file or directory"),
        (["--budget", "8", "--mix", "16"], "--mix needs --cost, the table whose steps it mixes"),
        (["--budget", "8", "--method", "exact", "--history", "h"], "--history is of generations"),
        (["--budget", "8", "--bounds", "0:1"], "--bounds '0:1' is not understood; write LAYERS=LOW:HIGH"),
        (["--budget", "8", "--bounds", "9=1:2"], "--bounds '9' names a layer that is no MoE layer; those are 0, 1, 2"),
        (["--budget", "8", "--protect", "0,x"], "--protect '0,x' is not understood"),
        (["--budget", "8", "--protect", "0,7"], "--protect '0,7' names a layer that is no MoE layer"),
        (["--budget", "6", "--protect", "0"], "budget 6 is outside 7..16"),
        (["--budget", "8", "--allowed-k", "1,x"], "--allowed-k '1,x' is not understood; write 1,2,4,8"),
        (["--budget", "8", "--allowed-k", "1,6"], "allowed_k has 6; the losses cover k in 1..4"),
        (["--budget", "8", "--group", "0:1", "--group-size", "2"], "--group and --group-size say the same thing twice"),
        (["--budget", "8", "--group", "0:1", "--group", "1:2"], "layer 1 is in two groups; put them together"),
    ],
)
def test_search_refuses_constraints_and_costs(folder, options, message):
    write(folder / "p", make_profile())
    write(folder / "cost", make_cost_table())
    write(folder / "other", make_cost_table(5, 4))
    assert message in refuse("search", "p", *options)


# --- front


def read_rows(name):
    with open(name, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("cost", [[], ["--cost", "cost", "--mix", "16"]])
def test_front_writes_every_pareto_point_in_each_form(folder, cost):
    profile, table = make_profile(4, 4), make_cost_table()
    write(folder / "p", profile)
    write(folder / "cost", table)
    succeed("front", "p", *cost, "-o", "f.json", "-o", "f.csv", "-o", "f.png", "-o", "f.svg")
    assert sorted(os.listdir()) == ["cost", "f.csv", "f.json", "f.png", "f.svg", "p"]
    assert Path("f.png").read_bytes().startswith(b"\x89PNG") and b"<svg" in Path("f.svg").read_bytes()
    document = json.loads(Path("f.json").read_text())
    assert (document["format"], document["loss"], document["error"]) == ("lexi-front", "frobenius", 0)
    points = document["points"]
    losses = profile.losses("frobenius")
    expected = {}
    for top_k in np.ndindex(4, 4, 4, 4):
        price = time_of(table, {16: 1}, {layer: k + 1 for layer, k in enumerate(top_k)}) if cost else sum(top_k) + 4
        expected[top_k] = (price, sum(losses[layer][k] for layer, k in enumerate(top_k)))
    found = [(point["ms"] if cost else point["budget"], point["loss"]) for point in points]
    for price, loss in found:  # nothing that there is beats a point of the front
        assert not any(p < price - 1e-9 and v < loss + 1e-9 for p, v in expected.values())
        assert not any(p < price + 1e-9 and v < loss - 1e-9 for p, v in expected.values())
    for p, v in expected.values():  # and everything there is is matched by some point
        assert any(price <= p + 1e-9 and loss <= v + 1e-9 for price, loss in found)
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in zip(found, found[1:], strict=False))
    rows = read_rows("f.csv")
    assert [float(row["loss"]) for row in rows] == [point["loss"] for point in points]
    assert [{key[6:]: int(v) for key, v in row.items() if key.startswith("top_k_")} for row in rows] == [
        point["top_k"] for point in points
    ]
    succeed("front", "p", *cost, "--points", "3", "-o", "g.csv")
    assert [read_rows("g.csv")[i] for i in (0, -1)] == [rows[0], rows[-1]] and len(read_rows("g.csv")) == 3


def test_a_front_of_equal_layers_has_no_dominated_point_as_written(folder):
    """Sums of the same times in another order differ in their last digits."""
    write(folder / "p", make_profile(12, 4))
    table = make_cost_table(12, 4)
    step = dataclasses.replace(table.steps[16], layers=dict.fromkeys(range(12), (0.1, 0.2, 0.3, 0.7)))
    write(folder / "cost", dataclasses.replace(table, steps={16: step}))
    for options in ([], ["--group", "0:2", "--group", "5:9"]):
        succeed("front", "p", "--cost", "cost", *options)
        points = json.loads(Path("front.json").read_text())["points"]
        assert len(points) > 20
        for a, b in zip(points, points[1:], strict=False):
            assert b["ms"] - a["ms"] > 1e-9 and b["loss"] < a["loss"]


def test_targets_that_are_nearly_equal_are_kept_apart(folder):
    write(folder / "p", make_profile(6, 4))
    write(folder / "cost", make_cost_table(6, 4))
    options = ["--cost", "cost", "--mix", "16", "--target-speedup", "1.1000001", "--target-speedup", "1.1000002"]
    succeed("search", "p", *options)
    assert sorted(os.listdir("allocations")) == ["allocation-1.1000001x.json", "allocation-1.1000002x.json"]


def test_front_chooses(folder):
    profile, table = make_profile(6, 4), make_cost_table(6, 4)
    write(folder / "p", profile)
    write(folder / "cost", table)
    points = json.loads(Path(succeed("front", "p").splitlines()[-1]).read_text())["points"]
    largest = points[0]["loss"]

    def choose(*options):
        succeed("front", "p", *options)
        allocation = serialisation.read_allocation("front-allocation.json")
        assert allocation.gap == 0 and allocation.made_by["method"] == "exact"
        return allocation

    chosen = choose("--max-loss", "30%")
    assert chosen.budget == next(point["budget"] for point in points if point["loss"] <= 0.3 * largest)
    assert choose("--max-loss", repr(largest)).budget == 6
    assert choose("--max-loss", "0").budget == 24
    assert 6 < choose("--knee").budget < 24
    timed = ["--cost", "cost", "--mix", "4096"]
    base = time_of(table, {4096: 1}, dict.fromkeys(range(6), 4))
    for options in (["--target-speedup", "1.2"], ["--target-ms", repr(base / 1.2)]):
        allocation = choose(*timed, *options)
        ms = time_of(table, {4096: 1}, allocation.top_k)
        assert ms <= base / 1.2 and allocation.made_by["cost"]["ms"] == pytest.approx(ms)
        succeed("search", "p", *timed, "--target-speedup", "1.2", "--method", "exact", "-o", "exact.json")
        assert serialisation.read_allocation("exact.json").loss == allocation.loss
    assert choose(*timed, "--knee", "--group-size", "6").budget % 6 == 0


@pytest.mark.parametrize(
    "options, message",
    [
        (["--knee", "--max-loss", "3"], "choose by one of --target-speedup, --target-ms, --max-loss and --knee"),
        (["--target-speedup", "1.2"], "a time or a speed-up needs measured costs; give --cost"),
        (["--cost", "cost", "--mix", "16", "--target-speedup", "0"], "a time or a speed-up must be above 0"),
        (["--cost", "cost", "--mix", "16", "--target-ms", "nan"], "a time or a speed-up must be above 0"),
        (["--max-loss", "x"], "--max-loss 'x' is not understood"),
        (["--max-loss", "-1"], "--max-loss '-1' is not understood"),
        (["--max-loss", "1", "--max-k", "1"], "every allocation loses more than 1; the least is "),
        (["--cost", "cost", "--mix", "16", "--target-speedup", "9"], "no allocation is that fast; the fastest takes"),
        (["-o", "front.txt"], "--output front.txt: name a file in .json, .csv, .png, .svg or .pdf"),
        (["-o", "absent/f.json"], "cannot write absent/f.json: No such file or directory"),
        (["--knee", "--allocation", "absent/a"], "cannot write absent/a: No such file or directory"),
    ],
)
def test_front_refuses(folder, options, message):
    write(folder / "p", make_profile())
    write(folder / "cost", make_cost_table())
    assert message in refuse("front", "p", *options)


def test_constraints_may_be_given_in_parts_and_must_agree(folder):
    write(folder / "p", make_profile(4, 4))
    for options in (["--protect", "0", "--protect", "3"], ["--protect", "0,3", "--bounds", "0=4:4"]):
        succeed("search", "p", "--budget", 11, *options)
        top_k = serialisation.read_allocation("allocation.json").top_k
        assert (top_k[0], top_k[3]) == (4, 4)
    succeed("search", "p", "--budget", 9, "--allowed-k", "1", "--allowed-k", "3")
    assert set(serialisation.read_allocation("allocation.json").top_k.values()) <= {1, 3}
    for options, said in (
        (["--protect", "0", "--bounds", "0:1=1:3"], "--bounds 0:1=1:3 and --protect 0 disagree about layer 0"),
        (["--bounds", "2=1:3", "--bounds", "1:3=1:2"], "--bounds 2=1:3 and --bounds 1:3=1:2 disagree about layer 2"),
        (["--bounds", "0=2:9"], "--bounds '0=2:9': LOW:HIGH must rise within 1:4"),
        (["--bounds", "0=3:2"], "--bounds '0=3:2': LOW:HIGH must rise within 1:4"),
    ):
        assert said in refuse("search", "p", "--budget", 9, *options)


def test_no_input_is_overwritten_and_no_file_written_twice(folder):
    write(folder / "p", make_profile())
    write(folder / "a.json", make_allocation())
    kept = {name: (folder / name).read_bytes() for name in ("p", "a.json")}
    os.symlink("p", folder / "link")
    for command in (
        ("search", "p", "--budget", 9, "-o", "p"),
        ("search", "p", "--budget", 9, "-o", "link"),
        ("search", "p", "--budget", 9, "--history", "p"),
        ("search", "p", "--budget", 9, "-o", "x", "--history", "./x"),
        ("front", "p", "--knee", "-o", "f.json", "--allocation", "f.json"),
        ("front", "p", "--knee", "--allocation", "p"),
        ("export", "a.json", "--to", "json", "-o", "a.json"),
        ("export", "a.json", "--to", "transformers", "-o", "a.json"),
    ):
        assert "the same command reads" in refuse(*command)
    assert {name: (folder / name).read_bytes() for name in kept} == kept


def test_a_search_that_stops_short_is_not_blamed_on_the_profile(folder):
    profile = make_profile(8, 8)
    write(folder / "p", profile)
    result = run("search", "p", "--budget", 32, "--population", 2, "--generations", 1)
    assert serialisation.read_allocation("allocation.json").gap > 0.01 and list_warnings(result.stderr) == []


def test_a_front_says_which_point_was_chosen_where_nothing_is_bold(folder):
    write(folder / "p", make_profile())
    title = succeed("front", "p", "--knee").splitlines()[0]
    chosen = serialisation.read_allocation("front-allocation.json")
    assert title.endswith(f"chosen: budget {chosen.budget}, loss {chosen.loss:.6g}")
