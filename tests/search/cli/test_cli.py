"""`lexi-search` as users meet it: what it prints and writes, what it refuses, and that it leaves nothing behind."""

import io
import json
import os
import pty
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from command_line import list_warnings, refuse, run, succeed, write
from safetensors.numpy import load_file, save_file
from synthetic import make_allocation, make_maps, make_profile

import lexi_search
from lexi_search.artifacts import serialisation
from lexi_search.artifacts.profile import ProfileSettings
from lexi_search.cli.console import print_table
from lexi_search.cli.main import main
from lexi_search.cli.options import parse_budgets, parse_layers
from lexi_search.cli.tables import list_judgements, tabulate_judgements
from lexi_search.errors import InputError
from lexi_search.profiling.divergence import Judgement
from lexi_search.profiling.forward.variants import Variant

FAST = ["--input", "paper", "--batch", "2", "--length", "32", "--relative-error", "0.2"]
CALL = [sys.executable, "-c", "from lexi_search.cli.main import main; main()"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.make_checkpoint("olmoe", tmp_path_factory.mktemp("checkpoint") / "olmoe")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_no_number_is_cut_however_narrow_the_terminal(folder, monkeypatch):
    write(folder / "p", make_profile(6, 10))
    for command in (("show", "p", "--absolute"), ("search", "p", "--budget", "30"), ("front", "p")):
        plain = succeed(*command)
        monkeypatch.setenv("COLUMNS", "40")
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdout", terminal := Terminal())
            with pytest.raises(SystemExit, match="0"):
                main([*command])
        shown = terminal.getvalue()
        assert "\u2026" not in shown
        numbers = [word for line in plain.splitlines()[2:4] for word in line.split()]
        assert set(numbers) <= set(re.sub(r"\x1b\[[0-9;]*m", "", shown).split())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_output_that_finds_no_room_is_one_line(folder):
    write(folder / "p", make_profile())
    with open("/dev/full", "w") as full:
        done = subprocess.run([*CALL, "show", "p"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: cannot go on: No space left on device") and done.stderr.count("\n") == 1


def test_a_closed_stdout_loses_nothing(folder):
    write(folder / "p", make_profile())
    program = " ".join(map(shlex.quote, [*CALL, "search", "p", "--budget", "9"]))
    done = subprocess.run(f"{program} >&-", shell=True, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, list_warnings(done.stderr)) == (0, [])
    assert serialisation.read_allocation("allocation.json").budget == 9


# --- profile


def test_profile_writes_the_file_and_says_where(folder, checkpoint):
    assert succeed("profile", checkpoint, *FAST) == "profile.json\n"
    profile = serialisation.read_profile("profile.json")
    assert tuple(profile.layers) == profile.model.moe_layers == (0, 1, 2)
    assert profile.model.model_type == "olmoe"
    assert profile.settings == ProfileSettings("paper", 0, 2, 32, "float32", 0.2, 2**20)
    assert profile.made_by.keys() == {"lexi_search", "weights_sample_sha256"}
    assert profile.made_by["lexi_search"] == lexi_search.__version__
    assert os.listdir() == ["profile.json"]


def test_profile_has_the_same_bytes_with_the_same_seed_only(folder, checkpoint):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        succeed("profile", checkpoint, *FAST, "--seed", seed, "-o", name)
    first, again, other = (Path(name).read_bytes() for name in "abc")
    assert first == again != other


def test_profile_of_some_layers_has_what_the_whole_has(folder, checkpoint):
    succeed("profile", checkpoint, *FAST, "-o", "whole")
    succeed("profile", checkpoint, *FAST, "-o", "part", "--layers", "1:2")
    whole, part = serialisation.read_profile("whole"), serialisation.read_profile("part")
    assert part.layers == {layer: whole.layers[layer] for layer in (1, 2)}
    message = refuse("search", "part", "--budget", "6")
    assert message == (
        "the profile lacks 1 of the model's 3 MoE layers, the first is 0; an allocation needs them all, "
        "so profile without --layers, or merge the parts"
    )


def damage(folder, **changes):
    """Rewrite the shard with tensors replaced, or left out where the new value is None."""
    shard = folder / "model.safetensors"
    tensors = {name: changes.get(name, value) for name, value in load_file(shard).items()}
    save_file({name: value for name, value in tensors.items() if value is not None}, shard, {"format": "pt"})


def expert_names(folder):
    return sorted(name for name in load_file(folder / "model.safetensors") if "layers.1." in name and "experts" in name)


def remove_config(folder):
    (folder / "config.json").unlink()


def spoil_config(folder):
    (folder / "config.json").write_text("{")


def truncate_shard(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def lengthen_header(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(data)) + data[8:])


def remove_expert(folder):
    damage(folder, **{expert_names(folder)[-1]: None})


def reshape_expert(folder):
    name = expert_names(folder)[-1]
    damage(folder, **{name: load_file(folder / "model.safetensors")[name][..., :-1].copy()})


def reduce_k(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 1}))


def rename_model(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))


@pytest.mark.parametrize(
    "spoil, words",
    [
        (shutil.rmtree, ["no such folder"]),
        (remove_config, ["config.json", "No such file"]),
        (spoil_config, ["config.json", "not JSON"]),
        (truncate_shard, ["model.safetensors", "truncated"]),
        (lengthen_header, ["model.safetensors", "header"]),
        (remove_expert, ["layers.1.", "experts", "missing"]),
        (reshape_expert, ["layers.1.", "experts", "shape"]),
        (reduce_k, ["num_experts_per_tok is 1"]),
        (rename_model, ["'llama' is not known", "mixtral", "qwen3_moe"]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_profile_refuses_a_damaged_checkpoint(folder, checkpoint, spoil, words):
    spoil(Path(shutil.copytree(checkpoint, folder / "model")))
    message = refuse("profile", "model", *FAST)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "options, message",
    [
        (["--layers", "2:1"], "--layers '2:1' is not understood; write 0:15 (both ends included), 3, or 0,2,5"),
        (["--layers", "7"], "layer 7 is no MoE layer; those are 0, 1, 2"),
        (["--batch", "0"], "batch is 0, at least 1 expected"),
        (["--length", "-1"], "length is -1, at least 1 expected"),
        (["--samples", "0"], "max_samples is 0, at least 1 expected"),
        (["--samples", "63"], "at most 63 samples allow no iteration of batch 2 x length 32; raise the cap"),
        (["--relative-error", "nan"], "relative_error is nan, a finite number of at least 0 expected"),
        (["-o", "absent/profile.json"], "/absent); make that folder first"),
        (["-o", "."], "cannot write .: not a regular file"),
        (["-o", "/proc/profile.json"], "cannot write /proc/profile.json: No such file or directory"),
    ],
)
def test_profile_refuses_options(folder, checkpoint, options, message):
    assert message in refuse("profile", checkpoint, *FAST, *options)


def test_output_is_checked_before_the_long_computation(folder, monkeypatch):
    assert "cannot write absent/p.json" in refuse("profile", "no-such-model", "-o", "absent/p.json")

    def deny(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "open", deny)
    assert "cannot write profile.json: Read-only file system" in refuse("profile", "no-such-model")


def test_a_read_only_file_system_is_refused(folder, checkpoint):
    """/sys/kernel is one that even root cannot write to."""
    assert "cannot write /sys/kernel/profile.json: " in refuse("profile", checkpoint, "-o", "/sys/kernel/profile.json")


# --- show, plot, export


def test_show_a_profile(folder):
    profile = make_profile(3, 3)
    write(folder / "p", profile)
    title, header, *rows = succeed("show", "p", "--absolute", "--loss", "rms").splitlines()
    assert title == "olmoe: rms loss of each layer at each k, in units of the layer's output"
    assert header.split() == ["layer", "k=1", "k=2", "k=3", "samples", "error", "%"]
    for layer, row in enumerate(rows):
        values = [f"{value:.4g}" for value in profile.layers[layer].rms]
        assert row.split() == [str(layer), *values, "48", "0.50"]
    title, _, *rows = succeed("show", "p").splitlines()
    assert title == "olmoe: frobenius loss of each layer at each k, relative to the largest"
    assert max(row.split()[1] for row in rows) == "1.000"
    for options in ([], ["--absolute"], ["--loss", "squared"]):
        kind = "squared" if "squared" in options else "frobenius"
        table = profile.losses(kind, normalised="--absolute" not in options)
        assert json.loads(succeed("show", "p", "--json", *options)) == {
            str(i): list(row) for i, row in enumerate(table)
        }


def test_show_an_allocation(folder):
    write(folder / "a", make_allocation(3, 3))
    lines = succeed("show", "a").splitlines()
    assert lines[0] == "olmoe: budget 6 of 9 (66.7 %, 2.00 experts per layer on average), loss 1.5, optimum 1.25"
    assert [line.split() for line in lines[2:]] == [["0", "1", "#.."], ["1", "2", "##."], ["2", "3", "###"]]
    assert json.loads(succeed("show", "a", "--json")) == {
        "budget": 6,
        "average_k": 2.0,
        "loss": 1.5,
        "optimal_loss": 1.25,
        "gap": pytest.approx(0.2),
        "top_k": {"0": 1, "1": 2, "2": 3},
        "gate_exponent": None,
        "compensation": None,
    }


def test_wide_tables_are_not_folded_in_a_pipe(folder):
    write(folder / "p", make_profile(61, 8))
    row = succeed("search", "p", "--budget", "300").splitlines()[2]
    assert len(row.split()) == 7 + 61


def test_show_refuses(folder):
    (folder / "x").write_text("{}")
    assert refuse("show", "x").startswith("x: its format is None, expected one of lexi-profile, lexi-allocation, ")
    assert refuse("show", "absent") == "cannot read absent: No such file or directory"


def test_a_profile_shows_its_plan_and_plain_lines_of_progress_in_a_pipe(folder, checkpoint):
    small = ["--batch", 2, "--length", 8, "--samples", 32]
    plain, percent = [*small, "--compensation", "none"], "percent of the work: {} of 100"
    for options, passes, total in ((FAST, 0, "layers: {} of 3"), (small, 10, percent), (plain, 7, percent)):
        plan, *lines, done, plot, search = run("profile", checkpoint, *options).stderr.splitlines()
        passes = f" in {passes} passes over 3 decoder layers" if passes else ""
        assert re.fullmatch(rf"plan: read [\d.]+ [kM]B of weights{passes}; memory for .*", plan)
        assert lines[0] == f"{total.format(0)}, elapsed 0:00:00"
        last = total.format(100 if "percent" in total else 3)
        assert re.fullmatch(rf"{last}, elapsed 0:\d\d:\d\d, left 0:00:00", lines[-1])
        assert done.startswith("done: olmoe: ") and "3 of 3 MoE layers" in done
        assert (plot, search) == (
            "next: lexi-search plot profile.json -o heatmap.png",
            "next: lexi-search search profile.json --budget 50%",
        )


def test_a_profile_says_where_weights_stay_and_how_long_its_phases_took(folder, checkpoint):
    small = ["--batch", 2, "--length", 8, "--samples", 32, "--compensation", "none", "--verbose"]
    said = {}
    for name, memory in (("all", []), ("none", ["--device-memory", "0GB", "--host-memory", "0GB"])):
        said[name] = run("profile", checkpoint, *small, *memory, "-o", f"{name}.json").stderr
    assert Path("all.json").read_bytes() == Path("none.json").read_bytes()
    plans = {name: text.splitlines()[0] for name, text in said.items()}
    size = r"[\d.]+ [kM]B"
    assert re.fullmatch(rf"plan: read ({size}) .*; weights stay on the device \(\1\)", plans["all"])
    assert re.fullmatch(
        rf"plan: read {size} .*; weights stay in the files, read in every pass \({size}\)", plans["none"]
    )
    for text in said.values():
        phases = [line.partition(":")[0] for line in text.splitlines() if re.search(r": .*\d s( \(|$)", line)]
        assert phases == ["opening", "text", "losses", "the rest"]
        assert re.search(r"^text: 6 passes, [\d.]+ s \([\d.]+(, [\d.]+){5}\)$", text, re.M)
        assert re.search(r"^read: .*, from disk .*\nhost memory: at most ", text, re.M)


def test_iterations_are_the_papers(folder, checkpoint):
    size = ["--input", "paper", "--batch", 2, "--length", 32]
    succeed("profile", checkpoint, *size, "--iterations", 10, "-o", "a")
    succeed("profile", checkpoint, *size, "--samples", 640, "--relative-error", 0, "-o", "b")
    assert Path("a").read_bytes() == Path("b").read_bytes()
    assert {loss.iterations for loss in serialisation.read_profile("a").layers.values()} == {10}
    for options, words in (
        (["--samples", 9], "--iterations and --samples both say when to stop"),
        (["--relative-error", 0], "--iterations and --relative-error both say when to stop"),
    ):
        assert words in refuse("profile", checkpoint, *size, "--iterations", 10, *options)
    assert "--iterations is 0, at least 1" in refuse("profile", checkpoint, *size, "--iterations", 0)
    assert "--iterations is for --input paper" in refuse("profile", checkpoint, "--iterations", 10)


def test_plot_writes_the_format_of_its_suffix(folder):
    write(folder / "p", make_profile())
    write(folder / "a", make_allocation())
    assert succeed("plot", "p") == "heatmap.png\n"
    assert Path("heatmap.png").read_bytes().startswith(b"\x89PNG")
    assert succeed("plot", "p", "a", "a", "-o", "map.SVG", "--absolute") == "map.SVG\n"
    assert Path("map.SVG").read_bytes().startswith(b"<?xml")
    assert succeed("plot", "p", "-o", "map.pdf") == "map.pdf\n"
    assert Path("map.pdf").read_bytes().startswith(b"%PDF")
    assert refuse("plot", "p", "-o", "map.eps") == "cannot draw 'eps'; name a file in .png, .svg or .pdf"
    assert "cannot write absent/map.png" in refuse("plot", "p", "-o", "absent/map.png")
    assert "expected 'lexi-profile'" in refuse("plot", "a")


@pytest.fixture
def allocation(checkpoint, folder):
    """One for the tiny checkpoint, as `search` made it."""
    succeed("profile", checkpoint, *FAST)
    succeed("search", "profile.json", "--budget", "7")
    (folder / "profile.json").unlink()
    return serialisation.read_allocation("allocation.json")


def test_export_lists(allocation):
    flat = {str(layer): k for layer, k in allocation.top_k.items()}
    assert json.loads(succeed("export", "allocation.json", "--to", "json")) == flat
    csv = "layer,top_k\n" + "".join(f"{layer},{k}\n" for layer, k in flat.items())
    assert succeed("export", "allocation.json", "--to", "csv") == csv
    assert succeed("export", "allocation.json", "--to", "csv", "-o", "top_k.csv") == "top_k.csv\n"
    assert Path("top_k.csv").read_text() == csv


def test_export_to_transformers(allocation, checkpoint):
    layers = {str(layer): {"num_experts_per_tok": k} for layer, k in allocation.top_k.items()}
    overlay = {"allow_global_per_layer_attribute_access": True, "per_layer_config": layers}
    assert json.loads(succeed("export", "allocation.json", "--to", "transformers")) == overlay
    output = succeed("export", "allocation.json", "--to", "transformers", "--model", checkpoint, "-o", "out")
    assert output == (
        "lexi_adapter.apply(transformers.AutoModelForCausalLM.from_pretrained('out'), 'allocation.json')\n"
    )
    original = json.loads((checkpoint / "config.json").read_text())
    extra = {"lexi_allocation": serialisation.to_document(allocation)}
    assert json.loads(Path("out/config.json").read_text()) == original | overlay | extra


def test_export_to_vllm(allocation, checkpoint):
    output = succeed("export", "allocation.json", "--to", "vllm", "--model", checkpoint, "-o", "out")
    assert output == "vllm serve out\n"
    exported = json.loads(Path("out/config.json").read_text())
    assert exported["architectures"] == ["LexiOlmoeForCausalLM"]
    assert sorted(os.listdir("out")) == sorted([*os.listdir(checkpoint), "lexi-export.json"])
    succeed("export", "allocation.json", "--to", "vllm", "--model", checkpoint, "-o", "whole", "--copy")
    assert not any(path.is_symlink() for path in Path("whole").iterdir())
    assert json.loads(Path("whole/config.json").read_text()) == exported
    command = succeed("export", "allocation.json", "--to", "vllm", "--model", checkpoint)
    words = subprocess.run(
        ["sh", "-c", f'vllm() {{ printf "%s\\0" "$@"; }}; {command}'], capture_output=True, text=True
    )
    serve, model, option, overrides, _ = words.stdout.split("\0")
    assert (serve, model, option) == ("serve", str(checkpoint), "--hf-overrides")
    original = json.loads((checkpoint / "config.json").read_text())
    assert original | json.loads(overrides) == exported


def test_export_refuses(allocation, checkpoint, tmp_path):
    assert (
        refuse("export", "allocation.json", "--to", "vllm") == "--to vllm needs --model, the model's folder or hub id"
    )
    assert "no such folder" in refuse("export", "allocation.json", "--to", "vllm", "--model", "absent")
    other = Path(shutil.copytree(checkpoint, tmp_path / "other"))
    reduce_k(other)
    for form in ("vllm", "transformers", "json", "csv"):
        message = refuse("export", "allocation.json", "--to", form, "--model", "other", "-o", "out")
        assert "the allocation is for num_experts_per_tok 4, the config has 1" in message
    for words in (["--to", "json", "-o", "a.json"], ["--to", "vllm", "--model", checkpoint]):
        assert "--copy is for a model folder" in refuse("export", "allocation.json", *words, "--copy")
    to_vllm = ["export", "allocation.json", "--to", "vllm", "--model"]
    succeed(*to_vllm, checkpoint, "-o", "out")
    assert "--force replaces it" in refuse(*to_vllm, checkpoint, "-o", "out")
    assert succeed(*to_vllm, checkpoint, "-o", "out", "--force") == "vllm serve out\n"
    assert "export from the model's original folder" in refuse(*to_vllm, "out", "-o", "out2")
    assert "cannot write absent/x: No such file or directory" in refuse(*to_vllm, checkpoint, "-o", "absent/x")


@pytest.mark.parametrize("hub", [False, True])
def test_export_compares_the_routers(allocation, checkpoint, folder, hub, monkeypatch):
    """A fine-tune has its base's config; from the hub, what the cache holds is compared."""
    source = folder / "copy"
    if hub:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "cache"))
        source = folder / "cache" / "models--owner--name" / "snapshots" / ("0" * 40)
        (source.parent.parent / "refs").mkdir(parents=True)
        (source.parent.parent / "refs" / "main").write_text("0" * 40)
    shutil.copytree(checkpoint, source)
    export = ("export", "allocation.json", "--to", "vllm", "--model", "owner/name" if hub else "copy")
    assert "note" not in run(*export).stderr
    tensors = load_file(source / "model.safetensors")
    tensors[allocation.model.router.format(1)] += 1
    save_file(tensors, source / "model.safetensors")
    assert "other router weights than the allocation was made for" in refuse(*export)
    (source / "model.safetensors").unlink()
    found = run(*export)
    assert found.exit_code == 0 and "were not compared (no safetensors shards there)" in found.stderr


# --- the whole program


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_the_chain_on_every_family(folder, family):
    """Profile, search, export: the folder for vLLM differs in the config only, where the model's own k is."""
    model = tiny.make_checkpoint(family, folder / "model")
    succeed("profile", "model", *FAST)
    layers = serialisation.read_profile("profile.json").model.moe_layers
    succeed("search", "profile.json", "--budget", 3 * len(layers) - 1, "--resamples", 0)
    assert succeed("export", "allocation.json", "--to", "vllm", "--model", "model", "-o", "out").startswith(
        "vllm serve "
    )
    before, after = (json.loads((path / "config.json").read_text()) for path in (model, folder / "out"))
    section = after.get("language_config", after)
    allocation = serialisation.read_allocation("allocation.json")
    assert section.pop("per_layer_config") == {
        str(layer): {"num_experts_per_tok": k} for layer, k in allocation.top_k.items()
    }
    assert section.pop("allow_global_per_layer_attribute_access") is True
    assert after.pop("lexi_allocation") == serialisation.to_document(allocation)
    assert after.pop("architectures") == ["Lexi" + name for name in before.pop("architectures")]
    assert after == before
    for name in os.listdir(model):
        assert name == "config.json" or (folder / "out" / name).samefile(model / name)


def test_every_option_says_what_it_does():
    for command in main.commands.values():
        assert command.help
        for parameter in command.params:
            assert parameter.param_type_name == "argument" or parameter.help, f"{command.name} {parameter.name}"


@pytest.mark.parametrize(
    "text, layers",
    [("3", (3,)), ("0:3", (0, 1, 2, 3)), ("0,2,5", (0, 2, 5)), ("5,0:2,1", (0, 1, 2, 5)), ("7:7", (7,))],
)
def test_layers(text, layers):
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "x", "1:", ":1", "1:2:3", "3:1", "-1", "1,,2", "0:-1", "1.5"])
def test_layers_that_are_not_understood(text):
    with pytest.raises(InputError, match="is not understood; write 0:15"):
        parse_layers(text)


@pytest.mark.parametrize(
    "text, budgets",
    [
        ("64:128:8", list(range(64, 129, 8))),
        ("4:9:2", [4, 6, 8]),
        ("5:5:1", [5]),
        ("25%:75%:12.5%", [32, 48, 64, 80, 96]),
        ("k=2:k=4:k=0.5", [32, 40, 48, 56, 64]),
        ("64:75%:16", [64, 80, 96]),
        ("1%:3%:1%", [1, 3, 4]),  # 1.28, 2.56 and 3.84: rounded after the steps are added
        ("64:64:0.1%", [64]),
    ],
)
def test_budgets(text, budgets):
    assert list(parse_budgets(text, layers=16, top_k=8)) == budgets


@pytest.mark.parametrize(
    "text, words",
    [
        *((text, "is not understood; write START:STOP:STEP") for text in ("", "64", "1:2", "1:2:3:4")),
        *((text, "is not understood; write a sum over layers") for text in ("a:b:c", "4:8:-1", "25%:75%:0.1")),
        *((text, "does not rise; write START:STOP:STEP") for text in ("8:4:1", "4:8:0", "50%:25%:5%", "1:9:k=0.0")),
        ("50%:101%:5%", "at most 100%"),
        ("0:999999999:0.000001%", "does not rise"),
    ],
)
def test_budgets_that_are_not_understood(text, words):
    with pytest.raises(InputError, match=words):
        parse_budgets(text, layers=16, top_k=8)


def test_bugs_stay_tracebacks(folder, monkeypatch):
    def fail(*_):
        raise ValueError("a bug")

    monkeypatch.setattr("lexi_search.cli.commands.show.read_artifact", fail)
    with pytest.raises(ValueError, match="a bug"):
        run("show", write(folder / "x", make_profile()))


def make_environment(**changes):
    variables = {**os.environ, "PYTHONPATH": str(Path(lexi_search.__file__).parent.parent)}
    del variables["JAX_COMPILATION_CACHE_DIR"]
    return variables | changes


def start(*arguments, **environment):
    command = [*CALL, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=make_environment(**environment))


def test_processes(folder, checkpoint):
    """Quiet in a pipe, exit codes, and JAX's compilation cache where the user's caches are."""
    assert start("--help").stdout.startswith("Usage: ")
    caches = folder / "caches"
    done = start("profile", checkpoint, *FAST, XDG_CACHE_HOME=str(caches))
    assert (done.returncode, done.stdout, list_warnings(done.stderr)) == (0, "profile.json\n", [])
    assert os.listdir(caches / "lexi-search" / "jax")
    done = start("search", "profile.json", "--budget", "7", XDG_CACHE_HOME=str(caches))
    assert (done.returncode, list_warnings(done.stderr)) == (0, [])
    done = start("search", "profile.json", "--budget", "99", XDG_CACHE_HOME=str(caches))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    done = start("profile", checkpoint, *FAST, "-o", "again", XDG_CACHE_HOME="/proc/absent")
    assert (done.returncode, list_warnings(done.stderr)) == (0, [])
    own = folder / "own"
    done = start("profile", checkpoint, *FAST, XDG_CACHE_HOME="/proc/absent", JAX_COMPILATION_CACHE_DIR=str(own))
    assert (done.returncode, list_warnings(done.stderr)) == (0, [])
    assert Path("again").read_bytes() == Path("profile.json").read_bytes()
    assert sorted(os.listdir()) == ["again", "allocation.json", "caches", "own", "profile.json"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_profile_cut_short_in_its_first_layer_leaves_nothing_to_read(folder, checkpoint, number):
    caches = folder / "lexi-search" / "jax"
    # A shell that runs the tests in the background has SIGINT ignored, and a child would inherit that.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    call = [sys.executable, "-c", heed + "from lexi_search.cli.main import main; main()"]
    command = [*call, "profile", str(checkpoint), "--input", "paper", "--relative-error", "0", "--samples", str(10**9)]
    environment = make_environment(XDG_CACHE_HOME=str(folder))
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    try:
        while not (caches.is_dir() and os.listdir(caches)):  # the first compiled function: it is at work
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert list_warnings(errors.decode()) == (["Error: interrupted"] if number == signal.SIGINT else [])
    left = [path for path in folder.rglob("*") if caches.parent not in path.parents and path != caches.parent]
    store = folder / "profile.json.partial"
    assert sorted(left) == ([] if number == signal.SIGINT else [store, store / "lock"])


def test_a_terminal_sees_a_progress_bar(folder, checkpoint):
    master, terminal = pty.openpty()
    command = [*CALL, "profile", str(checkpoint), *FAST]
    environment = make_environment(XDG_CACHE_HOME=str(folder), TERM="xterm", COLUMNS="100")
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=terminal, env=environment, check=True)
    os.close(terminal)
    shown = b""
    while chunk := read_terminal(master):
        shown += chunk
    os.close(master)
    assert done.stdout == b"profile.json\n"
    assert b"layers" in shown and b"3/3" in shown and b"left" in shown


def read_terminal(master):
    try:
        return os.read(master, 4096)
    except OSError:  # how Linux says that the other end is closed
        return b""


def test_the_version_is_printed():
    assert lexi_search.__version__ in succeed("--version")


def test_judged_allocations_show_what_makes_up_for_dropped_experts(capsys):
    maps = make_maps(make_profile(2, 2).model, rank=3)
    variants = {"full.json": Variant((1, 2), 0.25, maps), "alone.json": Variant((1, 2), 0.25), "none": Variant((1, 2))}
    judged = {name: Judgement(float(place), 0.5) for place, name in enumerate(variants)}
    rows = {row["name"]: (row["gate_exponent"], row["compensation_rank"]) for row in list_judgements(variants, judged)}
    assert rows == {"full.json": (0.25, 3), "alone.json": (0.25, None), "none": (None, None)}
    print_table(tabulate_judgements(variants, judged))
    cells = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert cells[0][:4] == ["allocation", "budget", "exponent", "rank"]
    assert cells[1] == ["full.json", "3", "0.25", "3", "0.0000", "0.5000"]
    assert cells[3] == ["none", "3", "2.0000", "0.5000"]


@pytest.mark.parametrize(("encoding", "sign"), [("ascii", "+-"), ("latin-1", "±"), ("utf-8", "±")])
def test_characters_that_stdout_lacks_are_escaped(monkeypatch, encoding, sign):
    judged = {"k\u2082.json": Judgement(0.5, 0.25)}
    shown = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", shown)
        print_table(tabulate_judgements({"k\u2082.json": Variant((1, 2))}, judged))
    text = shown.buffer.getvalue().decode(encoding)
    assert sign in text and ("k\u2082.json" if encoding == "utf-8" else "k\\u2082.json") in text
