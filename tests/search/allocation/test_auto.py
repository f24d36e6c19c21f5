"""`lexi-search auto` from end to end: its targets, runs that were cut short, what is never replaced, the report."""

import dataclasses
import hashlib
import itertools
import json
import os
import re
import shutil
import xml.etree.ElementTree as ElementTree
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tiny
from command_line import list_warnings, refuse, run, succeed, write
from synthetic import make_allocation, make_cost_table

import lexi_search
from lexi_search.allocation import auto, export, speed_estimate
from lexi_search.allocation.auto import prepare_checkpoint
from lexi_search.allocation.baselines import list_contenders, spread_evenly
from lexi_search.allocation.costs import weigh
from lexi_search.allocation.targets import Target
from lexi_search.artifacts.files import read_json_object
from lexi_search.artifacts.serialisation import read_allocation, read_profile, sha256
from lexi_search.checkpoint.reader import open_checkpoint
from lexi_search.cli.commands.auto import CARDS
from lexi_search.cli.report.facts import state
from lexi_search.errors import InputError
from lexi_search.models.model import describe
from lexi_search.solvers.robust import CAUTION, shrink

SETTINGS = {"batch": 2, "length": 16, "samples": 64}
OPTIONS = [word for name, value in SETTINGS.items() for word in (f"--{name}", value)]
OPTIONS += ["--compensation", "full"]  # on text of so few tokens a gate exponent alone may lose less
BY_TABLE = ["--compensation", "none"]  # the optimum of the profile's table is taken, never even k in its place
FILES = {"allocation.json", "estimate.json", "judged.json", "profile-paper.json", "profile.json"}
CORRECTIONS = {"allocation.safetensors", "profile.safetensors"}
REPORTS = {"report.html", "report.md"}
LAYERS, TOP_K = 3, 4


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return tiny.make_checkpoint("olmoe", tmp_path_factory.mktemp("models") / "olmoe")


@pytest.fixture(scope="module")
def finished(weights, tmp_path_factory):
    """A folder in which the command has run to its end."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("JAX_COMPILATION_CACHE_DIR", "")
        result = run("auto", weights, "--budget", "58%", "-o", "served/", *OPTIONS)
        assert result.exit_code == 0 and list_warnings(result.stderr) == []
        (folder / "said").write_text(result.stdout)
        (folder / "told").write_text(result.stderr)
    return folder


@pytest.fixture
def again(finished, folder):
    """The working directory of a test, with a copy of what the finished run left."""
    shutil.copytree(finished, folder, symlinks=True, dirs_exist_ok=True)
    return folder


@pytest.fixture
def measured(weights, folder, finished):
    """A cost table for the model."""
    identity = read_profile(finished / "served.lexi/profile.json").model
    return write(folder / "cost.json", make_cost_table(LAYERS, TOP_K, num_experts=identity.num_experts))


def read_all(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def list_all(profile):
    """Every allocation, with its loss."""
    table = np.array(profile.losses("divergence"))
    for top_k in itertools.product(range(1, TOP_K + 1), repeat=LAYERS):
        yield top_k, sum(table[layer, k - 1] for layer, k in enumerate(top_k))


def read_top_k(name="served.lexi/allocation.json"):
    return tuple(k for _, k in sorted(read_allocation(name).top_k.items()))


def test_a_budget_leads_to_a_folder_and_a_report(finished, weights):
    place = finished / "served.lexi"
    assert set(os.listdir(place)) == FILES | CORRECTIONS | REPORTS
    profile, allocation = read_profile(place / "profile.json"), read_allocation(place / "allocation.json")
    assert allocation.budget == 7  # 58 % of 12 to the nearest
    losses = {top_k: loss for top_k, loss in list_all(profile) if sum(top_k) == 7}
    chosen = read_top_k(place / "allocation.json")
    assert (allocation.loss, allocation.optimal_loss) == pytest.approx((losses[chosen], min(losses.values())))
    table, errors = (np.array(rows("divergence")) for rows in (profile.losses, profile.errors))
    shrunk = shrink(table, errors, floor=CAUTION.floor)
    best = min(losses, key=lambda top_k: sum(shrunk[layer, k - 1] for layer, k in enumerate(top_k)))
    assert chosen == ((2, 2, 3) if "fallback" in allocation.made_by else best)
    assert allocation.made_by["profile_sha256"] == sha256(profile)
    config = read_json_object(finished / "served/config.json")
    assert config["lexi_allocation"]["top_k"] == {str(layer): k for layer, k in allocation.top_k.items()}
    served = dataclasses.replace(allocation.compensation, file="lexi_compensation.safetensors")
    assert config["lexi_allocation"]["compensation"] == dataclasses.asdict(served)
    data = (finished / "served" / served.file).read_bytes()
    assert data == (place / "allocation.safetensors").read_bytes()
    assert hashlib.sha256(data).hexdigest() == served.sha256
    assert os.readlink(finished / "served/model.safetensors") == str(weights / "model.safetensors")
    assert (finished / "said").read_text().splitlines()[-1] == "report: served.lexi/report.html and report.md"
    told = (finished / "told").read_text().splitlines()
    assert told[-1] == "next: vllm serve served/"
    assert told[-2].startswith(f"done: 7 of {LAYERS * TOP_K} experts a token, 2.33 instead of 4 a layer")


def test_the_report_says_what_compensation_does_and_sums_no_losses_that_were_not_measured(finished):
    report = (finished / "served.lexi/report.md").read_text()
    place = finished / "served.lexi"
    profile, allocation = read_profile(place / "profile.json"), read_allocation(place / "allocation.json")
    exponent, rank = profile.settings.gate_exponent, profile.settings.compensation_rank
    assert f"Compensation: gate exponent {exponent:g} and corrections of rank {rank}, to make up for dropped" in report
    assert f"{len(allocation.corrected)} of them in allocation.safetensors" in report
    rows = [line.split("|")[1:-1] for line in report.splitlines() if line.startswith("| ")]
    (head,) = [row for row in rows if "loss, whole model" in "".join(row)]
    column = [name.strip() for name in head].index("loss, layers summed")
    summed = {row[0].strip(): row[column].strip() for row in rows if len(row) == len(head)}
    # Without its corrections nothing is known of an allocation's layers: the profile was measured with them.
    assert summed["k = 2 and 3 spread evenly"] == summed["the paper's method"] == ""
    assert float(summed["this allocation"]) <= float(summed["k = 2 and 3 spread evenly, compensated alike"])
    assert 'class="paper"' not in (place / "report.html").read_text()  # nor is there a place for it beside the front
    judged = {row["name"]: row["divergence"] for row in read_json_object(place / "judged.json")["judged"]}
    less = 100 * (1 - judged["this allocation"] / judged["k = 2 and 3 spread evenly, compensated alike"])
    same = read_top_k(place / "allocation.json") == (2, 2, 3)
    assert same or f"({abs(less):.0f} % {'less' if less >= 0 else 'more'} than under that compensated alike)" in report


def test_the_same_command_again_measures_and_writes_nothing(again, weights, monkeypatch):
    before = {path: path.lstat().st_mtime_ns for path in sorted(again.rglob("*")) if path.is_file()}
    monkeypatch.setattr(auto, "measure_variants", None)
    monkeypatch.setattr("lexi_search.profiling.session.profile_layers", None)
    output = succeed("auto", weights, "--budget", "k=2.33", "-o", "served/", *OPTIONS)
    assert output == (again / "said").read_text()
    assert {path: path.lstat().st_mtime_ns for path in before} == before
    assert [path for path in sorted(again.rglob("*")) if path.is_file()] == list(before)


def test_figures_of_the_report_are_those_of_the_files(finished):
    place = finished / "served.lexi"
    profile, allocation = read_profile(place / "profile.json"), read_allocation(place / "allocation.json")
    judged = read_json_object(place / "judged.json")
    page, text = (place / "report.html").read_text(), (place / "report.md").read_text()
    table = np.array(profile.losses("divergence"))
    even = spread_evenly(7, LAYERS)
    paper = np.array(read_profile(place / "profile-paper.json").losses("frobenius"))
    of_paper = min(
        (sum(paper[layer, k - 1] for layer, k in enumerate(top_k)), top_k)
        for top_k, _ in list_all(profile)
        if sum(top_k) == 7
    )[1]
    variants = [tuple(variant["top_k"]) for variant in judged["variants"]]
    assert variants == [read_top_k(place / "allocation.json"), even, even, of_paper]
    exponent = profile.settings.gate_exponent
    assert [variant["gate_exponent"] for variant in judged["variants"]] == [exponent, None, exponent, None]
    divergence = np.array(judged["divergence"])
    for row, top_k in enumerate(variants):
        loss = sum(table[layer, k - 1] for layer, k in enumerate(top_k))
        mean, error = divergence[row].mean(), divergence[row].std(ddof=1) / divergence.shape[1] ** 0.5
        assert judged["judged"][row]["divergence"] == pytest.approx(mean)
        paired = divergence[0] - divergence[row]
        summed = [f"{loss:.4g}"] if judged["variants"][row]["gate_exponent"] is not None else []
        stated = [*summed, state(mean, error)]
        if row:
            more = "more" if paired.mean() > 0 else "less"
            stated.append(f"{state(abs(paired.mean()), paired.std(ddof=1) / len(paired) ** 0.5)} {more}")
        for figure in stated:
            assert f"<td>{figure}</td>" in page
            assert f"| {figure} |" in text
    for layer, k in allocation.top_k.items():
        assert f"<small>{layer}</small><b>{k}</b>" in page
        assert f"**{table[layer, k - 1]:.3g}**" in text
        for other in range(1, TOP_K + 1):
            assert f"layer {layer}, k = {other}: {table[layer, other - 1]:.3g}" in page


def test_the_text_to_judge_by_is_another_one_than_the_profiles(finished):
    judged = read_json_object(finished / "served.lexi/judged.json")
    assert judged["seed"] == read_profile(finished / "served.lexi/profile.json").settings.seed + 1


def test_a_speed_up_is_reached_with_the_least_loss(again, weights, measured):
    speedup = 1.25
    options = ["--cost", measured, "--mix", "16:100,4096:1", "--target-speedup", speedup, "--force"]
    succeed("auto", weights, *options, "-o", "served", *OPTIONS)
    profile, table = read_profile("served.lexi/profile.json"), make_cost_table(LAYERS, TOP_K)

    def take(top_k):
        return sum(
            count * (step.other_ms + sum(step.layers[layer][k - 1] for layer, k in enumerate(top_k)))
            for step, count in ((table.steps[16], 100), (table.steps[4096], 1))
        )

    limit = take((TOP_K,) * LAYERS) / speedup
    least = min(loss for top_k, loss in list_all(profile) if take(top_k) <= limit)
    assert take(read_top_k()) <= limit
    assert read_allocation("served.lexi/allocation.json").loss == pytest.approx(least)
    assert "estimate" not in Path("served.lexi/report.md").read_text().lower()
    assert "a device, for steps: 100 of 16 tokens, 1 of 4096 tokens" in Path("served.lexi/report.md").read_text()


@pytest.mark.parametrize("limit", ["30%", "0.02"])
def test_a_largest_loss_leads_to_the_fastest_allocation_within_it(folder, weights, measured, limit):
    options = ["--cost", measured, "--mix", "16", "--max-loss", limit, "--no-judge", "--no-paper"]
    succeed("auto", weights, *options, "-o", "served", *OPTIONS, *BY_TABLE)
    profile, step = read_profile("served.lexi/profile.json"), make_cost_table(LAYERS, TOP_K).steps[16]
    largest = sum(row[0] for row in profile.losses("divergence"))
    most = 0.3 * largest if limit == "30%" else 0.02

    def take(top_k):
        return sum(step.layers[layer][k - 1] for layer, k in enumerate(top_k))

    fastest = min(take(top_k) for top_k, loss in list_all(profile) if loss <= most)
    assert read_allocation("served.lexi/allocation.json").loss <= most
    assert take(read_top_k()) == pytest.approx(fastest)
    assert f"at most {most:.4g} nats per token" in Path("served.lexi/report.md").read_text()


def test_an_estimate_is_called_one_everywhere(again, weights):
    options = ["--target-speedup", "1.0001", "--card", "l4", "--concurrency", 2, "--force"]
    output = run("auto", weights, *options, "-o", "served", *OPTIONS).output  # stdout and stderr
    allocation = read_allocation("served.lexi/allocation.json")
    assert allocation.made_by["cost"]["estimated"] is True
    assert allocation.made_by["cost"]["speedup"] >= 1.0001
    assert "an estimated 1.0" in output and "times as fast (estimate)" in output
    for name in REPORTS:
        text = Path("served.lexi", name).read_text()
        assert "an estimated 1.0" in text and "times as fast (estimate)" in text
        assert "not measured" in text if name == "report.html" else "nothing was timed" in text


def find_luminance(colour):
    """Of a colour in hexadecimal digits, as WCAG defines it."""
    digits = colour.removeprefix("#")
    digits = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
    parts = (int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4))
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def test_the_values_of_the_heatmap_can_be_read(finished, monkeypatch):
    page = (finished / "served.lexi/report.html").read_text()
    cells = re.findall(r'<rect [^>]*fill="(#\w+)">.*?</rect>\s*<text [^>]*class="cell" fill="(#\w+)"', page)
    assert len(cells) == LAYERS * TOP_K
    for ground, ink in cells:
        dark, light = sorted(map(find_luminance, (ground, ink)))
        assert (light + 0.05) / (dark + 0.05) >= 4.2, (ground, ink)


def test_an_estimate_counts_the_corrections_of_what_has_them(finished, weights):
    place = finished / "served.lexi"
    rank = read_profile(place / "profile.json").settings.compensation_rank
    assert read_json_object(place / "estimate.json")["made_by"]["estimate"]["compensation_rank"] == rank
    text = (place / "report.md").read_text()
    assert "Speed-ups count their bytes and FLOPs, as an estimate" in text
    checkpoint = open_checkpoint(str(weights))
    model = describe(checkpoint)
    size, card, top_k = (
        speed_estimate.measure_size(checkpoint, model),
        speed_estimate.CARDS["h100"],
        np.array((2, 2, 3)),
    )
    tables = [
        speed_estimate.estimate(size, model.identity, card, batch=16, context=1024, rank=one) for one in (None, rank)
    ]
    plain, corrected = (weigh(table, model.identity) for table in tables)
    assert plain.time(top_k) < corrected.time(top_k) and plain.base_ms == corrected.base_ms
    profile, allocation = read_profile(place / "profile.json"), read_allocation(place / "allocation.json")
    even = spread_evenly(7, LAYERS)
    by_name = {one.name: one for one in list_contenders(profile, allocation, corrected, plain=plain)}
    assert by_name["k = 2 and 3 spread evenly"].ms == pytest.approx(plain.time(np.array(even)), rel=1e-12)
    alike = by_name["k = 2 and 3 spread evenly, compensated alike"]
    assert alike.ms == pytest.approx(corrected.time(np.array(even)), rel=1e-12)


def test_what_to_choose_otherwise_is_another_budget_and_a_rank_too_large_is_said(again, weights):
    options = ["--budget", "50%", "--force", "--no-judge", "--no-paper", "--rank", 1000]
    done = run("auto", weights, *options, "-o", "other", *OPTIONS)
    assert "--rank 1000: corrections of this model have at most 48" in done.stderr
    (line,) = [
        line for line in Path("other.lexi/report.md").read_text().splitlines() if "--force" in line and "auto" in line
    ]
    assert "--budget 75%" in line


def test_cards_are_those_of_the_estimate():
    assert CARDS == tuple(speed_estimate.CARDS)


class Interrupter:
    """An observer that stops the run at the first layer that it hears of."""

    def open(self, partials, layers):
        pass

    def plan(self, plan):
        pass

    def advance_pass(self, layer):
        raise KeyboardInterrupt

    finish_layer = advance_pass


@pytest.mark.parametrize("stage", ["profile", "paper", "judge", "export", "report"])
def test_a_run_that_was_cut_short_goes_on(finished, folder, weights, stage, monkeypatch):
    later = {"profile": FILES - {"estimate.json"}, "paper": FILES - {"estimate.json", "profile.json"}}
    missing = later.get(stage, {"judged.json"} if stage == "judge" else set())
    shutil.copytree(finished / "served.lexi", "served.lexi")
    for name in missing | REPORTS:
        os.remove(f"served.lexi/{name}")

    @contextmanager
    def listen(step):
        yield Interrupter() if step == stage else None

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if stage == "export":
            patch.setattr(export, "write_folder", stop)
        outcome = prepare_checkpoint(str(weights), "served", Target("budget", 7), listen=listen, **SETTINGS)
        assert stage == "report"
        raise KeyboardInterrupt
    assert stage == "report" or not os.path.exists("served")
    if stage == "report":
        assert outcome.job.folder == Path("served.lexi")
    output = run("auto", weights, "--budget", 7, "-o", "served", *OPTIONS)
    assert output.exit_code == 0, output.output
    expected = read_all(finished / "served.lexi")
    for name, data in read_all(folder / "served.lexi").items():
        assert data.replace(b"served</", b"served/</") == expected[name] or name in REPORTS, name
    assert read_json_object("served/config.json") == read_json_object(finished / "served/config.json")


def test_an_interruption_is_one_line_that_says_how_to_go_on(again, weights, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    os.remove("served.lexi/judged.json")
    monkeypatch.setattr(auto, "measure_variants", stop)
    result = run("auto", weights, "--budget", 7, "-o", "served/", *OPTIONS)
    assert result.exit_code == 130
    assert result.stderr == ("Error: interrupted; what is finished is kept, and the same command goes on from there\n")
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give exactly one of --budget, --target-speedup, --max-loss, not none"),
        (["--budget", "7", "--max-loss", "2%"], "not --budget and --max-loss"),
        (["--budget", "12"], "--budget 12 is outside 3 to 11, what allocations smaller than the model's own, 12, have"),
        (["--budget", "10%"], "--budget 1 is outside 3 to 11"),
        (["--budget", "seven"], "--budget 'seven' is not understood; write a sum"),
        (["--target-speedup", "0.5"], "--target-speedup 0.5 is not above 1 and at most 1."),
        (["--target-speedup", "nan"], "--target-speedup nan is not above 1 and at most 1."),
        (["--target-speedup", "9"], "by the estimate for NVIDIA H100 SXM, not measured"),
        (["--max-loss", "-1"], "--max-loss '-1' is not understood"),
        (["--max-loss", "2", "--cost", "c", "--card", "l4"], "--card is for an estimate, and --cost is measured"),
        (["--max-loss", "2", "--mix", "16"], "--mix needs --cost"),
    ],
)
def test_targets_that_cannot_be_are_refused_before_anything_is_measured(folder, weights, options, message):
    assert message in refuse("auto", weights, "-o", "served", *options)


def test_the_nearest_reachable_speed_up_is_within_reach(again, weights):
    message = refuse("auto", weights, "--target-speedup", 9, "-o", "other", *OPTIONS)
    nearest = re.search(r"at most ([\d.]+)", message)[1]
    succeed("auto", weights, "--target-speedup", nearest, "-o", "served", "--force", "--no-judge", *OPTIONS)


def test_the_nearest_reachable_loss_is_within_reach(folder, weights):
    for limit, pattern in (("1e-9", r"loses is ([\de.-]+)"), ("0.0001%", r", ([\de.-]+%) of what one expert")):
        options = ["-o", "served", "--force", "--no-judge", "--no-paper", *OPTIONS, *BY_TABLE]
        result = run("auto", weights, "--max-loss", limit, *options)
        assert result.exit_code == 2
        nearest = re.search(pattern, result.stderr)[1]
        succeed("auto", weights, "--max-loss", nearest, *options)
        assert sum(read_top_k()) == LAYERS * TOP_K - 1


def test_another_target_replaces_nothing_without_force_and_never_the_profile(again, weights):
    before = read_all(again)
    message = refuse("auto", weights, "--budget", 8, "-o", "served/", *OPTIONS)
    assert message.startswith("served.lexi/allocation.safetensors is there with other content; --force replaces it")
    assert read_all(again) == before
    succeed("auto", weights, "--budget", 8, "-o", "served/", "--force", *OPTIONS)
    after = read_all(again)
    assert sum(read_json_object("served/config.json")["lexi_allocation"]["top_k"].values()) == 8
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {
        f"served.lexi/{name}" for name in ("allocation.json", "allocation.safetensors", "judged.json", *REPORTS)
    } | {
        "served/config.json",
        "served/lexi_compensation.safetensors",
        "served/lexi-export.json",
    }


def test_other_settings_never_replace_a_profile(again, weights):
    before = read_all(again)
    message = refuse("auto", weights, "--budget", 7, "-o", "served", "--force", *OPTIONS, "--seed", 5)
    assert message.startswith("served.lexi/profile.json is the profile of another run, whose settings.seed is 0, not 5")
    assert read_all(again) == before


@pytest.mark.parametrize("name", ["profile.json", "profile-paper.json", "allocation.json"])
def test_files_of_another_model_are_refused_even_with_force(again, weights, name):
    write(again / "served.lexi" / name, make_allocation())
    before = read_all(again)
    message = refuse("auto", weights, "--budget", 7, "-o", "served", "--force", *OPTIONS)
    assert message == f"served.lexi/{name} is of another model than {weights}; choose another -o"
    assert read_all(again) == before


def test_what_users_changed_is_not_replaced(again, weights):
    Path("served.lexi/report.md").write_text("my notes")
    message = refuse("auto", weights, "--budget", 7, "-o", "served/", *OPTIONS)
    assert message == ("served.lexi/report.md is there with other content; --force replaces it, or choose another -o")
    Path("served/config.json").write_text("{}")
    message = refuse("auto", weights, "--budget", 7, "-o", "served/", "--force", *OPTIONS)
    assert "config.json there is not as the earlier export left it" in message


def test_an_export_by_hand_and_other_folders_are_refused_at_once(again, weights):
    shutil.rmtree("served.lexi")
    message = refuse("auto", weights, "--budget", 7, "-o", "served/", *OPTIONS)
    assert message == "cannot write served/: an earlier export is there; --force replaces it"
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("precious")
    message = refuse("auto", weights, "--budget", 7, "-o", "mine", "--force", *OPTIONS)
    assert message.endswith("mine: not empty and no earlier export; choose another name or remove it")
    Path("file.lexi").write_text("precious")
    assert "not a folder" in refuse("auto", weights, "--budget", 7, "-o", "file", *OPTIONS)


def test_the_models_own_folder_is_no_output(folder, weights):
    for output in (weights, weights / "served", weights.parent):
        assert "overlaps the model folder" in refuse("auto", weights, "--budget", 7, "-o", output)
    other = Path(shutil.copytree(weights, folder / "served.lexi"))
    assert "served.lexi: it overlaps the model folder" in refuse("auto", other, "--budget", 7, "-o", "served")


def test_two_runs_to_one_place_are_kept_apart(again, weights):
    with auto._claim(auto.Job(str(weights), "served", Path("served.lexi"), *[None] * 7)):
        result = run("auto", weights, "--budget", 7, "-o", "served/", *OPTIONS)
    assert result.exit_code == 2
    assert "another run is writing served.lexi; wait for it to end" in result.stderr


def test_without_comparison_and_judgement_less_is_measured_and_said(folder, weights):
    succeed("auto", weights, "--budget", 7, "-o", "served", "--no-paper", "--no-judge", *OPTIONS)
    assert set(os.listdir("served.lexi")) == FILES - {"judged.json", "profile-paper.json"} | CORRECTIONS | REPORTS
    text = Path("served.lexi/report.md").read_text()
    assert "paper's method" not in text
    assert "the whole model was not measured" in text


def test_on_the_papers_input_losses_have_no_nats(folder, weights):
    options = ["--input", "paper", "--batch", 2, "--length", 16, "--samples", 256]
    output = succeed("auto", weights, "--budget", 7, "-o", "served", *options)
    assert set(os.listdir("served.lexi")) == FILES - {"judged.json", "profile-paper.json"} | REPORTS
    assert "nats per token" not in output + Path("served.lexi/report.html").read_text()


def test_a_gate_exponent_is_part_of_what_is_judged_and_served(folder, weights):
    options = ["--compensation", "exponent", "--gate-exponent", "0.5", "--no-paper"]
    succeed("auto", weights, "--budget", 7, "-o", "served", *OPTIONS, *options)
    assert read_json_object("served/config.json")["lexi_allocation"]["gate_exponent"] == 0.5
    variants = read_json_object("served.lexi/judged.json")["variants"]
    assert [variant["gate_exponent"] for variant in variants] == [0.5, None, 0.5]
    report = Path("served.lexi/report.md").read_text()
    assert "Compensation: gate exponent 0.5, to make up for dropped experts" in report and "corrections" not in report


class Parser(HTMLParser):
    """Checks that tags are balanced, and collects them with their attributes."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing_whatever_the_model_is_called(finished, folder, weights):
    name = "<b>m&\"|`*' x"
    os.symlink(weights, folder / name)
    shutil.copytree(finished / "served.lexi", "served.lexi")
    succeed("auto", name, "--budget", 7, "-o", "served", "--force", *OPTIONS)
    page = Path("served.lexi/report.html").read_text()
    parser = Parser()
    parser.feed(page)
    assert not parser.open
    tags = {tag for tag, _ in parser.seen}
    assert {"svg", "style", "table", "pre"} <= tags
    assert not tags & {"b", "script", "link", "img", "iframe"} - {"b"}
    assert "<b>m" not in page and "&lt;b&gt;m&amp;" in page
    assert not [names for _, names in parser.seen if {"src", "href"} & names.keys()]
    assert not re.search(r"https?:|url\(|@import", page)
    for drawing in re.findall(r"<svg.*?</svg>", page):
        ElementTree.fromstring(drawing)
    for string in re.findall(r'"([^"]*)"', re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]):
        assert "\n" not in string
    text = Path("served.lexi/report.md").read_text()
    assert text.startswith("# \\<b\\>m\\&\"\\|\\`\\*' x: k of each layer\n")
    assert json.loads(Path("served.lexi/judged.json").read_text())


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (0.18866, 0.00411, "0.1887 ± 0.0041"),
        (1.2067, 0.00469, "1.2067 ± 0.0047"),
        (12.3, 3.21, "12.3 ± 3.2"),
        (1234.5, 321.0, "1234 ± 321"),
        (0.0, 0.0, "0.0000 ± 0.0000"),
    ],
)
def test_a_number_has_the_digits_of_its_error(value, stderr, text):
    assert state(value, stderr) == text


@pytest.mark.parametrize(("budget", "layers"), [(7, 3), (40, 8), (39, 8), (100, 61), (16, 16)])
def test_an_even_spread_keeps_the_budget(budget, layers):
    top_k = spread_evenly(budget, layers)
    assert sum(top_k) == budget and len(top_k) == layers
    assert max(top_k) - min(top_k) <= 1
    halves = sum(top_k[: layers // 2]), sum(top_k[-(layers // 2) :])
    assert abs(halves[0] - halves[1]) <= 1 + max(top_k) * (layers % 2)


def test_it_is_there_for_programs():
    assert lexi_search.prepare_checkpoint is prepare_checkpoint
    assert lexi_search.Target is Target
    with pytest.raises(InputError, match="no such folder; links need the model on this machine"):
        prepare_checkpoint("nowhere/there", "served", Target("budget", 7))
