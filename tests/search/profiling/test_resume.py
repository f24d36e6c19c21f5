"""A profile cut short goes on where it was, and nothing of that shows in its bytes."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import command_line
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from synthetic import make_profile

import lexi_search
from lexi_search.artifacts import serialisation
from lexi_search.artifacts.profile import read_header
from lexi_search.errors import InputError
from lexi_search.profiling import resume
from lexi_search.profiling.resume import Partials, keep_partials

FAST = ["--input", "paper", "--batch", "2", "--length", "32", "--relative-error", "0.2"]
STORE = Path("profile.json.partial")
# Ends in the n-th call of a function that writes, either before or after it.
DIE = """
import os, signal
from lexi_search.artifacts import files
from lexi_search.profiling import resume
from lexi_search.cli.main import main
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
def add_and_die(self, layer, loss, add=resume.Partials.add):
    add(self, layer, loss)
    die()
"""
IN_THE_WRITE = DIE + "files.os.replace = die\nmain()"
AFTER_A_LAYER = DIE + "resume.Partials.add = add_and_die\nmain()"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.make_checkpoint("olmoe", tmp_path_factory.mktemp("checkpoint") / "olmoe")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, checkpoint):
    """The bytes of the whole profile, made in one go."""
    path = tmp_path_factory.mktemp("unbroken") / "profile.json"
    done = run(checkpoint, *FAST, "-o", path)
    assert (done.exit_code, command_line.read_warnings(done)) == (0, "")
    return path.read_bytes()


def run(*arguments):
    return command_line.run("profile", *arguments)


def interrupt_after(monkeypatch, layers, error=KeyboardInterrupt):
    """Stop as Ctrl-C does, after so many layers."""
    add = Partials.add

    def add_and_stop(self, layer, loss):
        add(self, layer, loss)
        if len(self.layers) == layers:
            raise error

    monkeypatch.setattr(Partials, "add", add_and_stop)


@pytest.fixture
def cut_short(folder, checkpoint):
    """A run that has finished layers 0 and 1 of 3."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 2)
        done = run(checkpoint, *FAST)
    assert done.exit_code == 130
    assert command_line.read_warnings(done) == (
        f"Error: interrupted; 2 of 3 layers are kept in {folder / STORE}, and the same command goes on from there\n"
    )
    assert [path.name.partition("-")[0] for path in sorted(STORE.glob("*.json"))] == ["0", "1"]
    assert not Path("profile.json").exists()
    return folder


def test_killed_in_every_layer_in_turn(folder, checkpoint, unbroken):
    environment = os.environ | {
        "PYTHONPATH": str(Path(lexi_search.__file__).parent.parent),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
    }

    def start(code):
        command = [sys.executable, "-c", code, "profile", str(checkpoint), *FAST]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    for finished, code in ((0, IN_THE_WRITE), (1, AFTER_A_LAYER), (2, AFTER_A_LAYER), (3, AFTER_A_LAYER)):
        assert start(code).returncode == -signal.SIGKILL
        assert len(list(STORE.glob("*.json"))) == finished
        assert not Path("profile.json").exists()
    last = start(DIE + "main()")
    assert (last.returncode, last.stdout) == (0, "profile.json\n")
    assert command_line.read_warnings(last) == f"3 of 3 layers are finished in {folder / STORE}\n"
    assert Path("profile.json").read_bytes() == unbroken
    assert sorted(os.listdir()) == ["cache", "profile.json"]


def test_only_what_is_missing_is_measured(cut_short, checkpoint, unbroken, monkeypatch):
    measured, add = [], Partials.add
    monkeypatch.setattr(Partials, "add", lambda self, layer, loss: (measured.append(layer), add(self, layer, loss)))
    done = run(checkpoint, *FAST)
    assert (done.exit_code, done.stdout, measured) == (0, "profile.json\n", [2])
    assert Path("profile.json").read_bytes() == unbroken
    assert os.listdir() == ["profile.json"]


def test_layers_that_were_not_asked_for_are_not_written(cut_short, checkpoint, unbroken):
    done = run(checkpoint, *FAST, "--layers", "1:2")
    store = cut_short / STORE
    told = f"1 of 2 layers are finished in {store}\n1 more finished layers stay in {store}\n"
    assert (done.exit_code, command_line.read_warnings(done)) == (0, told)
    assert tuple(serialisation.read_profile("profile.json").layers) == (1, 2)
    assert [path.name.partition("-")[0] for path in STORE.glob("*.json")] == ["0"]
    assert run(checkpoint, *FAST).exit_code == 0
    assert Path("profile.json").read_bytes() == unbroken and os.listdir() == ["profile.json"]


@pytest.mark.parametrize(
    "options, words",
    [
        (["--seed", "1"], "whose settings.seed is 0, not 1 as now"),
        (["--samples", "4096"], "whose settings.max_samples is 1048576, not 4096 as now"),
        (["--control-variate", "4"], "whose settings.control_variate is None, not 4 as now"),
        (["--dtype", "bfloat16"], "whose settings.dtype is float32, not bfloat16 as now"),
    ],
)
def test_other_settings_are_refused(cut_short, checkpoint, options, words):
    done = run(checkpoint, *FAST, *options)
    assert (done.exit_code, done.stdout, command_line.read_warnings(done).count("\n")) == (2, "", 1)
    assert words in done.stderr and "throw them away with --restart" in done.stderr
    assert len(list(STORE.glob("*.json"))) == 2  # still there for who wants them


@pytest.mark.parametrize("part, words", [("experts", "made_by.weights_sample"), ("mlp.gate", "model.router_sha256")])
def test_other_weights_are_refused(cut_short, checkpoint, part, words):
    other = Path(shutil.copytree(checkpoint, cut_short / "other"))
    tensors = load_file(other / "model.safetensors")
    changed = {name: value * (1.5 if part in name else 1) for name, value in tensors.items()}
    save_file(changed, other / "model.safetensors", {"format": "pt"})
    done = run(other, *FAST)
    assert (done.exit_code, command_line.read_warnings(done).count("\n")) == (2, 1)
    assert words in done.stderr


def test_another_input_is_refused_before_anything_is_drawn(cut_short, checkpoint, monkeypatch):
    monkeypatch.setattr("lexi_search.profiling.divergence.draw_tokens", None)
    for options in ([], ["--gate-exponent", "auto"]):
        done = run(checkpoint, *options)
        assert (done.exit_code, done.stdout, command_line.read_warnings(done).count("\n")) == (2, "", 1)
        assert "whose settings." in done.stderr and "throw them away with --restart" in done.stderr


def test_a_found_exponent_must_be_that_of_the_finished_layers(folder, checkpoint):
    small = ["--batch", "2", "--length", "16", "--samples", "64", "--compensation", "exponent"]
    assert run(checkpoint, *small).exit_code == 0
    unbroken = serialisation.read_profile("profile.json")
    found = str(unbroken.settings.gate_exponent)
    for exponent, code in ((found, 0), ("0.4", 2)):
        with pytest.MonkeyPatch.context() as patch:
            interrupt_after(patch, 1)
            assert run(checkpoint, *small, "--gate-exponent", exponent).exit_code == 130
        done = run(checkpoint, *small, "--gate-exponent", "auto")
        assert done.exit_code == code
        assert ("1 of 3 layers are finished" if code == 0 else "gate_exponent is 0.4, not ") in done.stderr
    assert found != "0.4"
    again = serialisation.read_profile("profile.json")
    for layer, loss in unbroken.layers.items():
        assert again.layers[layer].divergence == pytest.approx(loss.divergence, rel=1e-3)


def test_restart_throws_away(cut_short, checkpoint):
    done = run(checkpoint, *FAST, "--seed", "1", "--restart")
    assert (done.exit_code, command_line.read_warnings(done)) == (0, "")
    assert serialisation.read_profile("profile.json").settings.seed == 1
    assert os.listdir() == ["profile.json"]


@pytest.mark.parametrize("damage", [lambda data: data[:-40], lambda data: data.replace(b"1", b"2"), lambda data: b""])
def test_damaged_layers_are_measured_again(cut_short, checkpoint, unbroken, damage):
    path = sorted(STORE.glob("*.json"))[0]
    path.write_bytes(damage(path.read_bytes()))
    done = run(checkpoint, *FAST)
    assert done.exit_code == 0
    assert "1 of 3 layers are finished" in done.stderr and "made again: 1" in done.stderr
    assert Path("profile.json").read_bytes() == unbroken
    assert os.listdir() == ["profile.json"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_changed_byte_goes_unnoticed(tmp_path, data):
    profile = make_profile(1)
    with keep_partials(tmp_path / "p", read_header(profile), restart=True) as kept:
        kept.add(0, profile.layers[0])
        (path,) = kept.folder.glob("*.json")
        original = path.read_bytes()
    assert resume._read(path).layers == profile.layers
    place = data.draw(st.integers(0, len(original) - 1))
    other = data.draw(st.integers(0, 255).filter(lambda byte: byte != original[place]))
    path.write_bytes(original[:place] + bytes([other]) + original[place + 1 :])
    assert resume._read(path) is None


def test_two_runs_on_one_output_do_not_meet(folder, checkpoint, unbroken):
    header = read_header(make_profile())
    with keep_partials("profile.json", header):
        done = run(checkpoint, *FAST)
        assert done.exit_code == 2
        assert command_line.read_warnings(done) == (
            "Error: another run is writing profile.json; wait for it to end, or name another file with -o\n"
        )
        assert run(checkpoint, *FAST, "-o", "other.json").exit_code == 0
        assert STORE.is_dir()
    assert os.listdir() == ["other.json"]
    assert Path("other.json").read_bytes() == unbroken


def test_the_lock_of_a_run_that_just_ended_is_none(folder):
    """Opened while its holder lived, locked after that removed it: whoever has it is alone with a file of no name."""
    header = read_header(make_profile())
    with pytest.MonkeyPatch.context() as patch:
        real = fcntl.flock
        patch.setattr(fcntl, "flock", lambda lock, how: (os.unlink("p.partial/lock"), real(lock, how)))
        with pytest.raises(InputError, match="another run is writing p; wait"), keep_partials("p", header):
            pass


def test_interrupted_before_the_first_layer_leaves_nothing(folder, checkpoint, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Partials, "add", stop)
    done = run(checkpoint, *FAST)
    assert (done.exit_code, command_line.read_warnings(done).strip()) == (130, "Error: interrupted")
    assert os.listdir() == []


def test_a_later_layer_that_is_refused_keeps_the_earlier(folder, checkpoint, unbroken):
    spoiled = Path(shutil.copytree(checkpoint, folder / "spoiled"))
    tensors = load_file(spoiled / "model.safetensors")
    name = sorted(name for name in tensors if "layers.1." in name and "experts" in name)[-1]
    for value in (float("nan"), float("inf")):
        damaged = tensors[name].copy()
        damaged[0, 0] = value  # where no sample is taken
        save_file(tensors | {name: damaged}, spoiled / "model.safetensors", {"format": "pt"})
        done = run(spoiled, *FAST)
        assert (done.exit_code, done.stdout) == (2, "")
        assert f"tensor {name} holds NaN or Inf" in done.stderr
        assert [path.name.partition("-")[0] for path in STORE.glob("*.json")] == ["0"]
    assert run(checkpoint, *FAST).exit_code == 0
    assert Path("profile.json").read_bytes() == unbroken


def test_a_folder_that_cannot_be_used_is_refused(folder, checkpoint):
    STORE.write_text("a file")
    done = run(checkpoint, *FAST)
    assert (done.exit_code, command_line.read_warnings(done).count("\n")) == (2, 1)
    assert f"cannot use {folder / STORE}: File exists" in done.stderr
    assert STORE.read_text() == "a file"


def test_what_others_put_into_the_folder_stays(folder, checkpoint, unbroken):
    STORE.mkdir()
    (STORE / "notes.txt").write_text("mine")
    assert run(checkpoint, *FAST).exit_code == 0
    assert Path("profile.json").read_bytes() == unbroken
    assert os.listdir(STORE) == ["notes.txt"]


WRITES = ["--length", "32", "--samples", "256", "--dtype", "float32", "--compensation", "none"]


@pytest.fixture
def text_kept(folder, checkpoint):
    """A run on the model's own text that was interrupted after it had the text; the whole profile is in `whole`."""
    assert run(checkpoint, *WRITES, "-o", "whole").exit_code == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lexi_search.profiling.profile.measure_layers", interrupt)
        done = run(checkpoint, *WRITES)
    kept = f"the text and 0 of 3 layers are kept in {folder / STORE}"
    assert (done.exit_code, command_line.read_warnings(done)) == (
        130,
        f"Error: interrupted; {kept}, and the same command goes on from there\n",
    )
    assert [path.name.partition("-")[0] for path in STORE.glob("*.found")] == ["text"]
    return folder


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_the_text_is_drawn_once(text_kept, checkpoint, monkeypatch):
    monkeypatch.setattr("lexi_search.profiling.session.draw_samples", interrupt)
    done = run(checkpoint, *WRITES)
    assert (done.exit_code, done.stdout) == (0, "profile.json\n")
    assert command_line.read_warnings(done) == f"the text and 0 of 3 layers are finished in {text_kept / STORE}\n"
    assert Path("profile.json").read_bytes() == Path("whole").read_bytes() and not STORE.exists()


def test_a_text_that_is_damaged_is_drawn_again_and_another_runs_is_refused(text_kept, checkpoint):
    (kept,) = STORE.glob("*.found")
    done = run(checkpoint, *WRITES, "--seed", "1")
    assert done.exit_code == 2 and "settings.seed is 0, not 1 as now; repeat that run" in done.stderr
    assert run(checkpoint, *FAST).exit_code == 2
    assert list(STORE.glob("*.found")) == [kept]
    kept.write_bytes(kept.read_bytes().replace(b"[", b" [", 1))
    done = run(checkpoint, *WRITES)
    assert done.exit_code == 0 and "files that are damaged there, and made again: 1\n" in done.stderr
    assert Path("profile.json").read_bytes() == Path("whole").read_bytes() and not STORE.exists()


def test_an_exponent_that_was_found_is_not_looked_for_again(folder, checkpoint, monkeypatch):
    auto = [*WRITES, "--compensation", "exponent"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lexi_search.profiling.profile.measure_layers", interrupt)
        assert run(checkpoint, *auto).exit_code == 130
    assert sorted(path.name.partition("-")[0] for path in STORE.glob("*.found")) == ["compensation", "text"]
    for name in ("draw_samples", "find_compensation"):
        monkeypatch.setattr(f"lexi_search.profiling.session.{name}", interrupt)
    assert run(checkpoint, *auto).exit_code == 0 and not STORE.exists()
    assert run(checkpoint, *WRITES, "-o", "other").exit_code == 130  # which draws, so that the above did not


FULL = ["--batch", "2", "--length", "16", "--samples", "64", "--rank", "4"]
FITTED = ["compensation", "maps0", "maps1", "maps2", "text"]
# Ends after the n-th file that it writes, or, where that is 0, before the first.
AFTER_A_FILE = """
import os, signal, sys
from lexi_search.artifacts import files
from lexi_search.cli.main import main
left = int(sys.argv.pop(1))
def replace(*paths, replace=os.replace):
    global left
    replace(*paths)
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
files.os.replace = replace
main()
"""


@pytest.fixture(scope="module")
def corrected(tmp_path_factory, checkpoint):
    """The folder of a profile with corrections, made in one go."""
    place = tmp_path_factory.mktemp("corrected")
    done = run(checkpoint, *FULL, "-o", place / "profile.json")
    assert (done.exit_code, command_line.read_warnings(done)) == (0, "")
    return read_all(place)


def read_all(place):
    return {path.name: path.read_bytes() for path in Path(place).iterdir() if path.is_file()}


def list_kept(pattern="*.found"):
    return sorted(path.name.partition("-")[0] for path in STORE.glob(pattern))


def test_killed_after_every_finding_it_makes_the_same_bytes(folder, checkpoint, corrected):
    """Text, exponent, corrections of three layers, three layers, corrections of all: eight files before the last."""
    environment = os.environ | {
        "PYTHONPATH": str(Path(lexi_search.__file__).parent.parent),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def start(left):
        command = [sys.executable, "-c", AFTER_A_FILE, str(left), "profile", str(checkpoint), *FULL]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    kept = (
        ["text"],
        FITTED[::4],
        ["compensation", "maps0", "text"],
        *[["compensation", "maps0", "maps1", "text"]],
        FITTED,
    )
    for found in kept:
        assert start(1).returncode == -signal.SIGKILL
        assert (list_kept(), list_kept("*.json")) == (found, [])
    assert start(2).returncode == -signal.SIGKILL  # two of the three layers
    assert (list_kept(), list_kept("*.json")) == (FITTED, ["0", "1"])
    assert start(2).returncode == -signal.SIGKILL  # the third, and the corrections of all
    assert sorted(os.listdir()) == ["cache", "profile.json.partial", "profile.safetensors"]
    done = start(-1)
    assert (done.returncode, done.stdout) == (0, "profile.json\n"), done.stderr
    told = f"the text and 3 of 3 layers are finished in {folder / STORE}\n"
    assert command_line.read_warnings(done) == told
    assert read_all(folder) == corrected and not STORE.exists()


def test_corrections_that_are_kept_are_not_fitted_again(folder, checkpoint, corrected, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lexi_search.profiling.profile.measure_layers", interrupt)
        assert run(checkpoint, *FULL).exit_code == 130
    assert list_kept() == FITTED
    with monkeypatch.context() as patch:
        for name in ("draw_samples", "find_compensation", "fit_layers"):
            patch.setattr(f"lexi_search.profiling.session.{name}", interrupt)
        assert run(checkpoint, *FULL).exit_code == 0
    assert read_all(folder) == corrected and not STORE.exists()


@pytest.mark.parametrize("name", ["compensation", "maps1"])
def test_a_finding_that_is_damaged_is_made_again(folder, checkpoint, corrected, name):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lexi_search.profiling.profile.measure_layers", interrupt)
        assert run(checkpoint, *FULL).exit_code == 130
    [kept] = STORE.glob(f"{name}-*.found")
    kept.write_bytes(kept.read_bytes()[:-3])
    done = run(checkpoint, *FULL)
    assert done.exit_code == 0 and "files that are damaged there, and made again: 1\n" in done.stderr
    assert read_all(folder) == corrected and not STORE.exists()


def test_corrections_for_another_exponent_are_refused(folder, checkpoint, corrected):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lexi_search.profiling.profile.measure_layers", interrupt)
        assert run(checkpoint, *FULL, "--gate-exponent", "0.8").exit_code == 130
    assert list_kept() == ["maps0", "maps1", "maps2", "text"]  # nothing was looked for
    for options, words in (
        (["--gate-exponent", "0.4"], "settings.gate_exponent is 0.8, not 0.4 as now"),
        (["--gate-exponent", "0.8", "--rank", "3"], "settings.compensation_rank is 4, not 3 as now"),
        (["--compensation", "none"], "settings."),
        ([], "settings.gate_exponent is 0.8, not "),
    ):
        options = options if options[:1] == ["--compensation"] else [*FULL, *options]
        done = run(checkpoint, *(options if options[0] != "--compensation" else [*FULL[:-2], *options]))
        assert done.exit_code == 2 and words in done.stderr and "--restart" in done.stderr
        assert list_kept()[-4:] == ["maps0", "maps1", "maps2", "text"]
    assert run(checkpoint, *FULL, "--restart").exit_code == 0
    assert read_all(folder) == corrected and not STORE.exists()


def test_layers_in_parts_leave_the_corrections_of_the_others(folder, checkpoint, corrected):
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 2)
        assert run(checkpoint, *FULL).exit_code == 130
    assert (list_kept(), list_kept("*.json")) == (FITTED, ["0", "1"])
    assert run(checkpoint, *FULL, "--layers", "1:2", "-o", "profile.json").exit_code == 0
    part = serialisation.read_profile("profile.json")
    assert {layer for layer, _ in serialisation.read_profile_maps("profile.json", part)} == {1, 2}
    assert list_kept() == ["compensation", "maps0", "text"] and list_kept("*.json") == ["0"]
    assert run(checkpoint, *FULL).exit_code == 0
    whole = serialisation.read_profile("profile.json")
    assert Path("profile.safetensors").read_bytes() == corrected["profile.safetensors"]
    assert whole.layers.keys() == {0, 1, 2} and not STORE.exists()


def test_a_folder_that_is_read_is_never_the_place_for_finished_layers(checkpoint, tmp_path):
    model = tmp_path / "p.json.partial"
    shutil.copytree(checkpoint, model)
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    done = run(model, "--restart", "-o", tmp_path / "p.json")
    assert done.exit_code == 2 and "p.json.partial: the same command reads or writes it" in done.stderr
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


def test_a_restart_removes_only_files_of_its_own(tmp_path):
    header = read_header(make_profile())
    folder = tmp_path / "p.partial"
    folder.mkdir()
    for name in ("config.json", "notes.tmp", "my.found", "0-0123456789abcdef.json", ".lexi-0-1.tmp"):
        (folder / name).touch()
    with keep_partials(tmp_path / "p", header, restart=True):
        pass
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "lock", "my.found", "notes.tmp"]
