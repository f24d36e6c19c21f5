"""What `lexi-adapter` writes: whole or not at all, only over regular files, never over what it reads."""

import os
import stat

import pytest

from lexi_adapter import files
from lexi_adapter.allocation import AllocationError


def test_writing_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "file"
    for data in (b"first", b"second"):
        files.write_atomically(path, data)
        assert path.read_bytes() == data
        assert os.listdir(tmp_path) == ["file"]
    reference = tmp_path / "reference"
    reference.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(reference.stat().st_mode)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch, failing):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(AllocationError, match="cannot write .*file: No space left on device"):
        files.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("write", [files.check_writable, lambda path: files.write_atomically(path, b"")])
def test_only_regular_files_are_written(tmp_path, write):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    before = sorted(os.listdir(tmp_path))
    for name, reason in {
        "absent/file": "No such file or directory",
        "file/child": "Not a directory",
        "": "not a regular file",
        "pipe": "not a regular file",
        "link": "not a regular file",
        "/dev/null": "not a regular file",
    }.items():
        with pytest.raises(AllocationError, match=f"cannot write .*{name}.*: {reason}"):
            write(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "pipe").is_fifo()


def test_outputs_are_kept_apart_from_inputs(tmp_path):
    model, blobs = tmp_path / "model", tmp_path / "blobs"
    for folder in (model, blobs):
        folder.mkdir()
    (blobs / "1").touch()
    (model / "config.json").symlink_to(blobs / "1")
    (tmp_path / "input").touch()
    (tmp_path / "link").symlink_to("input")
    (tmp_path / "door").symlink_to("model")
    others = [None, model, tmp_path / "input", tmp_path / "absent"]
    for name in ("input", "link", "absent"):
        with pytest.raises(AllocationError, match=f"cannot write .*{name}: the same command reads or writes it"):
            files.check_writable(tmp_path / name, apart_from=others)
    for name in ("model/config.json", "door/config.json"):
        with pytest.raises(AllocationError, match=f"cannot write .*{name}: it is a file of .*model, which the same"):
            files.check_writable(tmp_path / name, apart_from=others)
    (model / "eval.json").write_text('{"format": "lexi-eval"}')
    (model / "plot.png").touch()
    for name in ("model/new", "door/new", "model/eval.json", "model/plot.png", "model.json"):
        files.check_writable(tmp_path / name, apart_from=others)
    assert sorted(os.listdir(tmp_path)) == ["blobs", "door", "input", "link", "model"]
