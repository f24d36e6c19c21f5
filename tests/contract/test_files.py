"""Files of either package: regular ones only, JSON within bounds, written whole. The rules are shared, not code."""

import json
import os
import stat
import subprocess
import sys
from functools import partial

import pytest
from synthetic import make_allocation

import lexi_adapter.files
import lexi_search.artifacts.files
from lexi_adapter.allocation import read_allocation
from lexi_adapter.cli.commands.eval import _read_finished
from lexi_adapter.cli.commands.loads import _read_prompts
from lexi_adapter.errors import AdapterError
from lexi_adapter.evaluation.results import read_results
from lexi_adapter.model.folder import read_config
from lexi_adapter.sensitivity.windows import read_tokens
from lexi_adapter.tasks.texts import read_records
from lexi_search.artifacts.serialisation import read_artifact, to_document
from lexi_search.checkpoint.reader import open_checkpoint
from lexi_search.errors import InputError

REFUSALS = {lexi_search.artifacts.files: InputError, lexi_adapter.files: AdapterError}


@pytest.fixture(params=REFUSALS, ids=lambda files: files.__name__)
def files(request):
    return request.param


def test_writing_replaces_and_leaves_nothing_else(files, tmp_path):
    path = tmp_path / "file"
    for data in (b"first", b"second"):
        files.write_atomically(path, data)
        assert path.read_bytes() == data
        assert os.listdir(tmp_path) == ["file"]
    reference = tmp_path / "reference"
    reference.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(reference.stat().st_mode)


def test_writing_through_a_link_keeps_the_link(files, tmp_path):
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "link").symlink_to("target")
    files.write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"new"


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_alone(files, tmp_path, monkeypatch, failing):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(REFUSALS[files], match="cannot write .*file: No space left on device"):
        files.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_an_interrupted_write_leaves_the_old_file_alone(files, tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("checked", [True, False])
def test_places_that_cannot_be_written(files, tmp_path, checked):
    write = files.check_writable if checked else partial(files.write_atomically, data=b"")
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for path, reason in {
        tmp_path / "absent" / "file": "No such file or directory",
        tmp_path / "file" / "child": "Not a directory",
        tmp_path: "not a regular file",
        tmp_path / "pipe": "not a regular file",
        tmp_path / "link": "not a regular file",
        "/dev/null": "not a regular file",
        "/": "not a regular file",
        "/proc/profile.json": "",
    }.items():
        with pytest.raises(REFUSALS[files], match=f"cannot write {path}: {reason}"):
            write(path)
    assert sorted(os.listdir(tmp_path)) == ["file", "link", "pipe"]
    assert (tmp_path / "pipe").is_fifo()


def test_check_writable_leaves_nothing(files, tmp_path):
    files.check_writable(tmp_path / "file")
    assert os.listdir(tmp_path) == []


READERS = {
    "an allocation, search": (read_artifact, InputError),
    "an allocation, adapter": (read_allocation, AdapterError),
    "a config, adapter": (lambda path: read_config(path.parent), AdapterError),
    "a config, search": (lambda path: open_checkpoint(path.parent), InputError),
    "results": (lambda path: read_results(str(path), "lexi-eval"), AdapterError),
    "finished results": (lambda path: _read_finished(str(path), {}), AdapterError),
    "prompts": (lambda path: _read_prompts(str(path)), AdapterError),
    "records": (lambda path: list(read_records(str(path))), AdapterError),
    "tokens": (lambda path: read_tokens(str(path)), AdapterError),
}


@pytest.fixture(params=READERS)
def refusal(request, tmp_path):
    """A function that makes a file by its argument, has it read, and returns the line by which it is refused."""
    read, error = READERS[request.param]

    def read_refused(make):
        path = tmp_path / "config.json"
        make(path)
        with pytest.raises(error) as caught:
            read(path)
        path.unlink()
        assert "\n" not in str(caught.value) and str(path) in str(caught.value) and len(str(caught.value)) < 500
        return str(caught.value)

    return read_refused


def test_only_regular_files_are_read(refusal):
    for make in (
        os.mkfifo,
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to("/dev/null"),
    ):
        assert "not a regular file" in refusal(make)


@pytest.mark.parametrize("opening", ["[", '{"a":'])
@pytest.mark.parametrize("levels", [150, 5_000, 100_000])
def test_json_is_nested_within_bounds(refusal, opening, levels):
    closing = "]" if opening == "[" else "}"
    assert "nested" in (line := refusal(lambda path: path.write_text(opening * levels + "1" + closing * levels))) or (
        "recursion" in line
    )


def test_files_are_no_larger_than_a_gigabyte(refusal):
    def make(path):
        with path.open("wb") as file:
            file.truncate(2**40)  # no block of it is on disk

    assert "larger than" in refusal(make)


@pytest.mark.parametrize(
    ("read", "error"), [(read_artifact, InputError), (read_allocation, AdapterError)], ids=["search", "adapter"]
)
def test_an_object_of_many_keys_takes_linear_time(tmp_path, read, error):
    path, document = tmp_path / "a.json", to_document(make_allocation())
    top_k = {str(layer): 1 for layer in range(300_000)}
    many = json.dumps(document | {"top_k": top_k, "budget": len(top_k)})
    twice = json.dumps(top_k)[:-1] + ', "299999": 1}'  # counting each key in turn would take an hour
    for text in (many, twice, json.dumps(document | top_k), json.dumps(document | {"top_k": {"9" * 5000: 1}})):
        path.write_text(text)
        with pytest.raises(error) as caught:
            read(path)
        assert str(path) in str(caught.value) and len(str(caught.value)) < 600


@pytest.fixture
def model(tmp_path):
    """A model's folder with links out of it, to a file and to a folder that leads back, and results in it."""
    model, beyond = tmp_path / "model", tmp_path / "beyond"
    for folder in (model, beyond):
        folder.mkdir()
    (beyond / "blob").write_bytes(b"weights")
    (beyond / "back").symlink_to(model)
    (model / "weights").symlink_to("../beyond/blob")
    (model / "more").symlink_to("../beyond")
    (model / "plain").write_bytes(b"plain")
    (model / "result.json").write_text('{"format": "lexi-profile"}')
    (model / "lexi-pruning.json").write_text('{"format": "lexi-pruning"}')
    (tmp_path / "hard").hardlink_to(model / "plain")
    (tmp_path / "hard.png").hardlink_to(beyond / "blob")
    (tmp_path / "link").symlink_to("model/weights")
    return model


def test_nothing_that_is_read_is_written(files, tmp_path, model):
    read = [None, model, tmp_path / "absent"]
    for write in (files.check_writable, partial(files.write_atomically, data=b"")):
        for name in (
            *("model/plain", "model/weights", "model/lexi-pruning.json", "beyond/blob"),
            *("hard", "hard.png", "link", "absent"),
        ):
            with pytest.raises(REFUSALS[files], match=f"cannot write .*{name}: .*the same command reads"):
                write(tmp_path / name, apart_from=read)
        for name in ("model/new", "model/result.json", "beyond/new"):
            write(tmp_path / name, apart_from=read)
    assert (model / "weights").read_bytes() == b"weights" and (model / "plain").read_bytes() == b"plain"


def test_what_becomes_an_input_while_a_command_runs_is_not_written(files, tmp_path, model, monkeypatch):
    def change(_):
        (tmp_path / "out").hardlink_to(model / "plain")

    monkeypatch.setattr(os, "fsync", change)
    with pytest.raises(REFUSALS[files], match="out: it is a file of .*model, which the same command reads"):
        files.write_atomically(tmp_path / "out", b"new", apart_from=[model])
    assert (tmp_path / "out").read_bytes() == b"plain"


MAKER = """
import os, sys, importlib
files = importlib.import_module(sys.argv[1])
def stop(_):
    print("writing", flush=True)
    sys.stdin.read()
os.fsync = stop
files.write_atomically("out", b"a whole model")
"""


def test_a_rerun_removes_what_dead_runs_to_the_same_file_left_and_nothing_else(files, tmp_path):
    def start():
        command = [sys.executable, "-c", MAKER, files.__name__]
        maker = subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert maker.stdout.readline() == b"writing\n"
        return maker

    killed = start()
    killed.kill()
    killed.communicate()
    [left] = os.listdir(tmp_path)
    files.write_atomically(tmp_path / "other", b"")
    assert left in os.listdir(tmp_path)
    alive = start()
    assert left not in os.listdir(tmp_path)
    files.check_writable(tmp_path / "out")
    files.write_atomically(tmp_path / "out", b"mine")
    assert len(os.listdir(tmp_path)) == 3
    alive.communicate(b"")
    assert alive.returncode == 0 and (tmp_path / "out").read_bytes() == b"a whole model"
    assert sorted(os.listdir(tmp_path)) == ["other", "out"]
