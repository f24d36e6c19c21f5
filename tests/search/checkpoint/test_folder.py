"""New model folders: nothing of anybody else is replaced, whenever it comes, and dead runs leave nothing behind."""

import json
import os
import subprocess
import sys
import threading

import pytest
import tiny
import transformers
from synthetic import make_allocation

from lexi_search.allocation import export
from lexi_search.artifacts import serialisation
from lexi_search.checkpoint import folder as folders
from lexi_search.checkpoint.folder import build_folder
from lexi_search.errors import InputError


@pytest.fixture(params=["exchange", "two renames"])
def moved(request, monkeypatch):
    if request.param == "two renames":  # as on a file system that cannot
        monkeypatch.setattr(folders, "_exchange", lambda *_: False)
    return request.param


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / "model/model.safetensors").write_bytes(b"weights")
    return tmp_path / "model"


def write(number, *, force=False):
    export.write_folder("out", "model", {"lexi_allocation": {"n": number}}, force=force)


def read(folder):
    return json.loads((folder / "out/config.json").read_text())["lexi_allocation"]["n"]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["file", "folder", "link"])
def test_what_comes_to_the_place_while_a_run_is_at_work_stays(model, tmp_path, name, force):
    (tmp_path / "notes").write_text("years of work")
    with pytest.raises(InputError, match="cannot write .*out: it was made|out: not empty and no earlier export"):
        with build_folder("out", "model", force=force):
            if name == "file":
                (tmp_path / "out").write_text("years of work")
            elif name == "folder":
                (tmp_path / "out").mkdir()
                (tmp_path / "out/notes").write_text("years of work")
            else:
                (tmp_path / "out").symlink_to("notes")
    out = tmp_path / "out"
    assert (out / "notes" if name == "folder" else out).read_text() == "years of work"
    assert sorted(os.listdir(tmp_path)) == ["model", "notes", "out"]


def test_two_runs_to_one_place(model, tmp_path):
    with build_folder("out", "model") as building:
        with pytest.raises(InputError, match="another run is writing ./out; wait for it to end"):
            with build_folder("./out", "model"):
                pass
        (building / "first").touch()
    assert (tmp_path / "out/first").exists() and sorted(os.listdir(tmp_path)) == ["model", "out"]


def test_notes_that_come_into_an_export_while_it_is_replaced_stay(model, tmp_path, moved):
    write(1)
    with pytest.raises(InputError, match="/out: notes there is not as the earlier export left it"):
        with build_folder("out", "model", force=True):
            (tmp_path / "out/notes").write_text("years of work")
    assert read(tmp_path) == 1 and (tmp_path / "out/notes").read_text() == "years of work"
    assert sorted(os.listdir(tmp_path)) == ["model", "out"]


def test_force_replaces_only_what_is_as_an_export_left_it(model, tmp_path, moved):
    out = tmp_path / "out"

    def replace_link(data):
        (out / "model.safetensors").unlink()
        (out / "model.safetensors").write_bytes(data)

    for change, name in {
        lambda: (out / "notes").touch(): "notes",
        lambda: (out / "empty").mkdir(): "empty",
        lambda: (out / "config.json").write_text('{"lexi_allocation": {"n": 3}}'): "config.json",
        lambda: replace_link(b"other weights"): "model.safetensors",
        lambda: (out / "model.safetensors").unlink(): "model.safetensors",
    }.items():
        write(1)
        write(2, force=True)
        assert read(tmp_path) == 2
        change()
        before = sorted((path.name, path.is_dir() or path.read_bytes()) for path in out.iterdir())
        with pytest.raises(InputError, match=f"/out: {name} there is not as the earlier export left it; choose"):
            write(3, force=True)
        assert sorted((path.name, path.is_dir() or path.read_bytes()) for path in out.iterdir()) == before
        out.rename(tmp_path / f"kept {len(os.listdir(tmp_path))}")


def test_force_never_replaces_a_model_that_was_saved_with_an_allocation(tmp_path):
    """save_pretrained of an exported model writes real weights beside a config with the allocation."""
    model = tiny.make_checkpoint("olmoe", tmp_path / "model")
    saved, allocation = tmp_path / "saved", make_allocation()
    changes = {"lexi_allocation": serialisation.to_document(allocation)}
    export.write_folder(str(tmp_path / "out"), str(model), changes)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(saved)
    assert "lexi_allocation" in json.loads((saved / "config.json").read_text())
    with pytest.raises(InputError, match="saved: not empty and no earlier export; choose another name or remove it"):
        export.write_folder(str(saved), str(model), changes, force=True)
    assert not (saved / "model.safetensors").is_symlink()


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is of Linux")
def test_a_folder_that_is_replaced_is_always_there(model, tmp_path):
    write(0)
    misses, done = [], threading.Event()

    def look():
        while not done.is_set():
            if not os.path.lexists("out"):
                misses.append(None)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        for number in range(1, 100):
            write(number, force=True)
    finally:
        done.set()
        watcher.join()
    assert not misses and read(tmp_path) == 99


DIE = """
import os, signal, sys
from pathlib import Path
from lexi_search.allocation import export
from lexi_search.checkpoint import folder as folders
function, count = sys.argv[1], int(sys.argv[2])
folders._exchange = lambda *_: False
original = getattr(Path, function)
def die(*arguments, **options):
    global count
    count -= 1
    if not count:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **options)
setattr(Path, function, die)
export.write_folder("out", "model", {"lexi_allocation": {"n": 2}}, force=True)
"""


@pytest.mark.parametrize("function, count", [("symlink_to", 1), ("write_text", 1), ("rename", 1), ("rename", 3)])
def test_a_rerun_repairs_and_removes_what_a_kill_left(model, tmp_path, function, count):
    """The third rename is that between which and the second no folder is there."""
    write(1)
    died = subprocess.run([sys.executable, "-c", DIE, function, str(count)], check=False)
    assert died.returncode == -9
    assert (tmp_path / "out").exists() == (count < 3)
    assert len(os.listdir(tmp_path)) == 3 - (count == 3)
    with pytest.raises(InputError, match="an earlier export is there; --force replaces it"):
        write(3)
    if count == 3:
        assert read(tmp_path) == 1
        assert sorted(os.listdir(tmp_path)) == ["model", "out"]
    write(4, force=True)
    assert read(tmp_path) == 4 and sorted(os.listdir(tmp_path)) == ["model", "out"]


def test_a_rerun_after_a_kill_needs_no_force_where_there_was_nothing(model, tmp_path):
    assert subprocess.run([sys.executable, "-c", DIE, "write_text", "1"], check=False).returncode == -9
    assert len(os.listdir(tmp_path)) == 2
    write(3)
    assert read(tmp_path) == 3 and sorted(os.listdir(tmp_path)) == ["model", "out"]
