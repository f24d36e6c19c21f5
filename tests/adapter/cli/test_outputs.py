"""Outputs of `lexi-adapter` never replace its inputs; `test_files` has the rest."""

import os

import pytest

from lexi_adapter import files
from lexi_adapter.errors import AdapterError


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
        with pytest.raises(AdapterError, match=f"cannot write .*{name}: the same command reads or writes it"):
            files.check_writable(tmp_path / name, apart_from=others)
    for name in ("model/config.json", "door/config.json"):
        with pytest.raises(AdapterError, match=f"cannot write .*{name}: it is a file of .*model, which the same"):
            files.check_writable(tmp_path / name, apart_from=others)
    (model / "eval.json").write_text('{"format": "lexi-eval"}')
    (model / "plot.png").touch()
    for name in ("model/new", "door/new", "model/eval.json", "model/plot.png", "model.json"):
        files.check_writable(tmp_path / name, apart_from=others)
    assert sorted(os.listdir(tmp_path)) == ["blobs", "door", "input", "link", "model"]
