"""Commands that make, carry and use corrections: what lies beside what, and that nothing else is written over."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import transformers
from command_line import list_warnings, refuse, run, succeed, write
from synthetic import make_allocation

import lexi_adapter
from lexi_adapter.model.compensation import check_compensation
from lexi_search.allocation import export
from lexi_search.artifacts import serialisation
from lexi_search.artifacts.compensation import format_maps
from lexi_search.checkpoint.reader import open_checkpoint
from lexi_search.models.model import describe
from lexi_search.profiling.divergence import open_run
from lexi_search.profiling.forward.sampling import draw_tokens

QUICK = ["--batch", 2, "--length", 16, "--samples", 64]
EXPONENT = 0.25
LAYERS, TOP_K, RANK = 3, 4, 4
EXPORTED = "lexi_compensation.safetensors"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return tiny.make_checkpoint("olmoe", tmp_path_factory.mktemp("models") / "olmoe")


@pytest.fixture(scope="module")
def made(weights, tmp_path_factory):
    """A folder with profile.json and profile.safetensors."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("JAX_COMPILATION_CACHE_DIR", "")
        done = run("profile", weights, *QUICK, "--rank", RANK, "--gate-exponent", EXPONENT)
        assert done.exit_code == 0 and list_warnings(done.stderr) == []
        assert f"gate exponent {EXPONENT:g} and corrections of rank {RANK}" in done.stderr
    assert sorted(os.listdir(folder)) == ["profile.json", "profile.safetensors"]
    return folder


@pytest.fixture
def place(made, folder):
    """The working directory, with the profile in it."""
    shutil.copytree(made, folder, dirs_exist_ok=True)
    return folder


def read_profile(name="profile.json"):
    profile = serialisation.read_profile(name)
    return profile, serialisation.read_profile_maps(name, profile)


def search(*options):
    """As `succeed`, but a profile of so little text may be told to be noisy."""
    done = run("search", *options)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_profile_holds_every_layer_and_k_and_names_its_file(place):
    profile, maps = read_profile()
    assert list(maps) == [(layer, k) for layer in range(LAYERS) for k in range(1, TOP_K)]
    assert (profile.settings.gate_exponent, profile.settings.compensation_rank) == (EXPONENT, RANK)
    assert profile.compensation.file == "profile.safetensors"
    for A, B, c in maps.values():
        assert (A.shape, B.shape, c.shape) == ((RANK, 48), (64, RANK), (64,))


def test_a_rank_that_no_correction_can_have_is_said(weights, folder):
    done = run("profile", weights, *QUICK, "--rank", 1000, "--gate-exponent", EXPONENT)
    assert done.exit_code == 0 and read_profile()[0].settings.compensation_rank == 48
    line = "--rank 1000: corrections of this model have at most 48, by its experts and hidden size, and have that"
    assert list_warnings(done.stderr) == [line]


def test_an_allocation_lies_beside_the_corrections_that_it_uses(place):
    _, maps = read_profile()
    search("profile.json", "--budget", 7, "-o", "a.json")
    allocation = serialisation.read_allocation("a.json")
    used = {key: maps[key] for key in allocation.corrected}
    assert Path("a.safetensors").read_bytes() == format_maps(used, allocation.model)
    assert allocation.compensation.file == "a.safetensors" and allocation.gate_exponent == EXPONENT
    assert allocation.made_by["compensation_rank"] == RANK
    served = lexi_adapter.allocation.read_allocation("a.json")
    assert check_compensation(served, hidden=64) == os.path.getsize("a.safetensors")
    search("profile.json", "--budget", LAYERS * TOP_K, "-o", "whole.json")  # corrects nothing, and names nothing
    assert serialisation.read_allocation("whole.json").compensation is None and not Path("whole.safetensors").exists()
    before = Path("a.json").read_bytes(), Path("a.safetensors").read_bytes()
    search("profile.json", "--budget", 7, "-o", "a.json")  # again
    assert (Path("a.json").read_bytes(), Path("a.safetensors").read_bytes()) == before


def test_several_budgets_share_one_file(place):
    _, maps = read_profile()
    search("profile.json", "--budgets", "5:12:1", "-o", "several")
    files = sorted(Path("several").glob("*.json"))
    assert sorted(os.listdir("several")) == sorted([*(file.name for file in files), "compensation.safetensors"])
    allocations = [serialisation.read_allocation(file) for file in files]
    used = {key for allocation in allocations for key in allocation.corrected}
    expected = format_maps({key: maps[key] for key in used}, allocations[0].model)
    assert Path("several/compensation.safetensors").read_bytes() == expected
    assert len(files) == 8 and sum(allocation.compensation is None for allocation in allocations) == 1
    for file, allocation in zip(files, allocations, strict=True):
        read = serialisation.read_allocation_maps(file, allocation)
        assert set(read or ()) == set(allocation.corrected)
        check_compensation(lexi_adapter.allocation.read_allocation(file))


def test_a_point_of_a_front_has_its_corrections(place):
    _, maps = read_profile()
    succeed("front", "profile.json")
    assert sorted(os.listdir()) == ["front.json", "profile.json", "profile.safetensors"]
    succeed("front", "profile.json", "--max-loss", "60%", "--allocation", "chosen.json")
    allocation = serialisation.read_allocation("chosen.json")
    read = serialisation.read_allocation_maps("chosen.json", allocation)
    assert allocation.corrected and read.keys() == set(allocation.corrected)
    assert all(np.array_equal(read[key].B, maps[key].B) for key in read)


def test_what_is_served_loses_what_judge_says(place, weights):
    """The exported folder in transformers, under the allocation's file, on the text that `judge` samples."""
    search("profile.json", "--budget", 7, "-o", "a.json")
    rows = json.loads(succeed("judge", weights, "a.json", "--profile", "profile.json", *QUICK, "--json"))
    assert {row["name"] for row in rows} == {
        "a.json",
        *(f"k = {k} in every layer{how}" for k in (2, 3) for how in ("", ", compensated")),
    }
    found = {row["name"]: row["divergence"] for row in rows}
    succeed("export", "a.json", "--to", "transformers", "--model", weights, "-o", "out")
    checkpoint = open_checkpoint(weights)
    tokens = draw_tokens(open_run(checkpoint, describe(checkpoint), "float32"), sequences=4, length=16, seed=1)

    def read(folder, file=None):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        if file is not None:
            lexi_adapter.apply(model, file)
        with torch.no_grad():
            logits = model(torch.as_tensor(np.asarray(tokens)).long(), use_cache=False).logits
        return logits.double().log_softmax(-1).numpy()

    own, profile = read(weights), serialisation.read_profile("profile.json")
    maps = serialisation.read_profile_maps("profile.json", profile)
    uniform = dataclasses.replace(
        serialisation.read_allocation("a.json"), top_k=dict.fromkeys(range(LAYERS), 2), budget=2 * LAYERS
    )
    serialisation.write_allocations(["u.json"], [uniform], maps)
    for name, folder, file in (("a.json", "out", "a.json"), ("k = 2 in every layer, compensated", weights, "u.json")):
        other = read(folder, file)
        expected = (np.exp(own) * (own - other)).sum(-1).mean()
        assert found[name] == pytest.approx(expected, rel=5e-3)


def test_exports_carry_the_file(place, weights):
    search("profile.json", "--budgets", "6:8:1", "-o", "several")
    name = "several/allocation-7.json"
    allocation = serialisation.read_allocation(name)
    maps = serialisation.read_allocation_maps(name, allocation)
    command = ["export", name, "--to", "vllm", "--model", weights, "-o", "out"]
    assert succeed(*command) == "vllm serve out\n"
    data = format_maps({key: maps[key] for key in allocation.corrected}, allocation.model)
    assert Path("out", EXPORTED).read_bytes() == data and not Path("out", EXPORTED).is_symlink()
    config = json.loads(Path("out/config.json").read_text())
    served = lexi_adapter.allocation.read_allocation(config["lexi_allocation"], folder="out")
    assert served.compensation.file == EXPORTED and check_compensation(served) == len(data)
    assert "--force replaces it" in refuse(*command)
    other = ["export", "several/allocation-8.json", *command[2:]]
    succeed(*other, "--force")
    assert Path("out", EXPORTED).read_bytes() != data
    succeed(*command, "--force", "--copy")
    assert Path("out", EXPORTED).read_bytes() == data and not any(path.is_symlink() for path in Path("out").iterdir())
    succeed("export", name, "--to", "transformers", "--model", weights, "-o", "loaded")
    assert Path("loaded", EXPORTED).read_bytes() == data
    assert open_checkpoint("loaded").entries.keys() == open_checkpoint(weights).entries.keys()
    Path("out", EXPORTED).write_bytes(data + b"x")
    message = f"{EXPORTED} there is not as the earlier export left it"
    assert message in refuse(*other, "--force")


def test_an_export_is_known_again_however_large_its_corrections_are(place, weights, monkeypatch):
    search("profile.json", "--budget", 7, "-o", "a.json")
    monkeypatch.setattr("lexi_search.checkpoint.folder.LARGE", 1)
    allocation, files = export.carry(serialisation.read_allocation("a.json"), "a.json")
    overrides = export.make_vllm_overrides(allocation, export.read_config(str(weights)))
    export.write_folder("out", str(weights), overrides, files=files)
    assert export.holds_folder("out", str(weights), overrides, files=files)
    for other in ({}, {EXPORTED: files[EXPORTED] + b"x"}):
        assert not export.holds_folder("out", str(weights), overrides, files=other)
    os.rename(f"out/{EXPORTED}", "elsewhere")
    os.symlink(place / "elsewhere", f"out/{EXPORTED}")
    assert not export.holds_folder("out", str(weights), overrides, files=files)


def test_a_command_for_the_hub_names_the_allocation_in_its_place(place, weights, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place / "cache"))
    source = place / "cache" / "models--owner--name" / "snapshots" / ("0" * 40)
    (source.parent.parent / "refs").mkdir(parents=True)
    (source.parent.parent / "refs" / "main").write_text("0" * 40)
    shutil.copytree(weights, source)
    search("profile.json", "--budget", 7, "-o", "a.json")
    for model in ("owner/name", weights):
        line = succeed("export", "a.json", "--to", "vllm", "--model", model)
        overrides = json.loads(line.partition("--hf-overrides ")[2].strip().strip("'"))
        assert overrides["lexi_allocation"] == str(place / "a.json")
        assert overrides["architectures"] == ["LexiOlmoeForCausalLM"] and "per_layer_config" in overrides


def test_what_the_k_alone_cannot_say_is_refused(place, weights):
    search("profile.json", "--budget", 7, "-o", "a.json")
    for form in ("json", "csv", "transformers"):
        assert "gate exponent" in refuse("export", "a.json", "--to", form)


def test_a_file_that_is_lost_or_exchanged_ends_every_command(place, weights):
    search("profile.json", "--budget", 7, "-o", "a.json")
    search("profile.json", "--budget", 8, "-o", "b.json")
    shutil.copy("b.safetensors", "a.safetensors")
    uses = [
        ("judge", weights, "a.json"),
        ("export", "a.json", "--to", "vllm", "--model", weights, "-o", "out"),
        ("show", "a.json"),
    ]
    for command in uses:
        assert refuse(*command).startswith("a.safetensors is not the file that a.json names (its SHA-256 is ")
    os.remove("a.safetensors")
    for command in uses:
        assert refuse(*command).startswith("a.safetensors, which a.json names, cannot be read (No such file or dir")
    os.remove("profile.safetensors")
    for command in (
        ("search", "profile.json", "--budget", 7, "-o", "c.json"),
        ("front", "profile.json", "--knee"),
        ("merge", "profile.json", "-o", "c.json"),
        ("show", "profile.json"),
        ("judge", weights, "b.json", "--profile", "profile.json"),
    ):
        assert refuse(*command).startswith("profile.safetensors, which profile.json names, cannot be read")


def test_show_says_how_large_the_corrections_are(place):
    search("profile.json", "--budget", 7, "-o", "a.json")
    products = RANK * (48 + 64)
    for file, count in (("profile.json", 9), ("a.json", len(serialisation.read_allocation("a.json").corrected))):
        told = run("show", file).stderr
        size = os.path.getsize(file.replace(".json", ".safetensors"))
        assert f"; {count} corrections of rank {RANK} in {file[:-5]}.safetensors, {size / 1e3:.3g} kB, at most " in told
        assert f"at most {products} products a token and layer" in told
    shown = json.loads(run("show", "a.json", "--json").stdout)
    named = dataclasses.asdict(serialisation.read_allocation("a.json").compensation)
    assert shown["gate_exponent"] == EXPONENT
    assert shown["compensation"] == named | {"corrections": count, "bytes": size, "products": products}
    write(place / "plain.json", make_allocation(LAYERS, TOP_K))
    shown = json.loads(run("show", "plain.json", "--json").stdout)
    assert shown["gate_exponent"] is shown["compensation"] is None


def test_profiles_that_cannot_be_judged_with_are_refused(place, weights):
    search("profile.json", "--budget", 7, "-o", "a.json")
    profile, _ = read_profile()
    part = {layer: loss for layer, loss in profile.layers.items() if layer}
    write(place / "part.json", dataclasses.replace(profile, layers=part))
    plain = dataclasses.replace(profile.settings, gate_exponent=None, compensation_rank=None)
    write(place / "plain.json", dataclasses.replace(profile, settings=plain, compensation=None))
    judge = ("judge", weights, "a.json", *QUICK, "--profile")
    assert refuse(*judge, "part.json") == "part.json lacks layers, the first is 0; merge its parts first"
    assert "plain.json is no profile of" in refuse(*judge, "plain.json")


WAYS = {"symlink": os.symlink, "hard link": os.link}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "command",
    [
        ["search", "profile.json", "--budget", 7, "-o", "other.json"],
        ["search", "profile.json", "--budget", 7, "-o", "other"],
        ["search", "profile.json", "--budgets", "7:8:1", "-o", "folder"],
        ["search", "profile.json", "--budget", 7, "-o", "new.json", "--history", "other.safetensors"],
        ["front", "profile.json", "--knee", "--allocation", "other.json"],
        ["merge", "profile.json", "-o", "other.json"],
    ],
)
def test_corrections_that_are_read_are_never_written_over(place, command, way):
    Path("folder").mkdir()
    for name in ("other.safetensors", "folder/compensation.safetensors"):
        WAYS[way](os.path.abspath("profile.safetensors"), name)
    for force in ([], ["--force"]):
        before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
        assert "the same command reads" in refuse(*command, *force)
        assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


def test_a_name_that_leads_to_what_is_read_is_refused(place, weights):
    for command in (["search", "profile.json", "--budget", 7], ["merge", "profile.json"]):
        for name in ("profile", "profile.json"):
            assert "the same command reads" in refuse(*command, "-o", name)
    model = shutil.copytree(weights, place / "model")
    assert "it is a file of" in refuse("profile", model, *QUICK, "-o", "model/model.json")
    message = refuse("search", "profile.json", "--budget", 7, "-o", "a.json", "--history", "a.safetensors")
    assert "cannot write a.safetensors: the same command reads or writes it as another file" in message


def test_other_files_are_replaced_by_force_only(place, weights):
    Path("a.safetensors").write_text("mine")
    Path("several").mkdir()
    Path("several/compensation.safetensors").write_text("mine")
    for command, file in (
        (["search", "profile.json", "--budget", 7, "-o", "a.json"], "a.safetensors"),
        (["search", "profile.json", "--budgets", "7:8:1", "-o", "several"], "several/compensation.safetensors"),
        (["front", "profile.json", "--knee", "--allocation", "a.json"], "a.safetensors"),
        (["merge", "profile.json", "-o", "a.json"], "a.safetensors"),
        (["profile", weights, *QUICK, "-o", "a.json"], "a.safetensors"),
    ):
        assert refuse(*command) == (
            f"cannot write {file}: there is another file; choose another name, or replace it with --force"
        )
    search("profile.json", "--budget", 7, "-o", "a.json", "--force")
    assert serialisation.read_allocation_maps("a.json", serialisation.read_allocation("a.json"))


def test_names_that_no_file_of_corrections_can_have_are_refused_before_anything_is_read(folder, weights, monkeypatch):
    monkeypatch.setattr("lexi_search.profiling.session.draw_samples", None)
    for name in (".hidden.json", "two\nlines.json"):
        assert "expected the bare name of a .safetensors file" in refuse("profile", weights, *QUICK, "-o", name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--compensation", "none", "--gate-exponent", "0.5"], "--gate-exponent is a part of compensation"),
        (["--compensation", "none", "--rank", "4"], "--rank is of corrections, which --compensation none has none of"),
        (["--compensation", "exponent", "--rank", "4"], "which --compensation exponent has none of"),
        (["--compensation", "full", "--input", "paper"], "is found on a text; leave --input paper out"),
        (["--compensation", "exponent", "--input", "paper"], "is found on a text"),
        (["--rank", "4", "--input", "paper"], "which --compensation none has none of"),
    ],
)
def test_options_that_contradict_each_other_are_refused(folder, weights, options, message):
    assert message in refuse("profile", weights, *QUICK, *options)


def test_a_family_that_cannot_be_compensated_is_not_and_that_is_said(folder):
    model = tiny.make_checkpoint("phimoe", folder / "model")
    for compensation in ("full", "exponent"):
        message = refuse("profile", "model", *QUICK, "--compensation", compensation)
        assert message.startswith(f"--compensation {compensation}: this family's gate weights are not the scores up to")
    shutil.move(model, "w")
    done = run("profile", "w", *QUICK)
    assert done.exit_code == 0 and "; without compensation, as this family's gate weights" in done.stderr
    profile = serialisation.read_profile("profile.json")
    assert (profile.settings.gate_exponent, profile.settings.compensation_rank) == (None, None)
    done = run("profile", "w", *QUICK, "--compensation", "none", "-o", "none.json")
    assert "without compensation" not in done.stderr
    assert Path("none.json").read_bytes() == Path("profile.json").read_bytes()
    assert sorted(os.listdir()) == ["none.json", "profile.json", "w"]
