"""Failures of the environment, not of the input, are one line with the remedy, never a traceback."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from results import make_quality, make_speed

import lexi_adapter
from lexi_adapter.allocation import to_document
from lexi_adapter.cli.console import Commands
from lexi_adapter.model.identity import describe_checkpoint
from lexi_adapter.model.variants import allocate

CALL = (
    "import sys; sys.modules.update(dict.fromkeys(sys.argv.pop(1).split())); "
    "from lexi_adapter.cli.main import main; main()"
)
EXAMPLE = Path(lexi_adapter.__file__).parent.parent / "examples" / "tiny-olmoe"


@pytest.fixture
def results(folder):
    """A folder with results to draw and a text."""
    Path("eval.json").write_text(json.dumps(make_quality()))
    Path("bench.json").write_text(json.dumps(make_speed()))
    Path("text").write_text("some words " * 2000)
    model = describe_checkpoint(EXAMPLE)
    Path("a.json").write_text(json.dumps(to_document(allocate(model, dict.fromkeys(model.moe_layers, 1)))))
    return folder


def call(*arguments, without="", **options):
    command = [sys.executable, "-c", CALL, without, *map(str, arguments)]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize(
    ("without", "arguments", "remedy"),
    [
        ("torch", ("sensitivity", EXAMPLE, "--text", "text"), "pip install '.[transformers]'"),
        ("torch", ("eval", EXAMPLE, "--task", "perplexity", "--text", "text"), "pip install '.[transformers]'"),
        ("transformers", ("sensitivity", EXAMPLE, "--text", "text"), "pip install '.[transformers]'"),
        ("transformers", ("loads", EXAMPLE, "--text", "text"), "pip install '.[transformers]'"),
        ("matplotlib", ("tradeoff", "eval.json", "bench.json"), "pip install matplotlib"),
        ("matplotlib", ("bench", EXAMPLE, "--plot", "a.png"), "pip install matplotlib"),
        ("rich", ("eval", EXAMPLE, "--task", "passkey"), "pip install rich"),
    ],
)
def test_a_package_that_lacks_is_one_line(results, without, arguments, remedy):
    done = call(*arguments, without=without)
    assert done.returncode == 2
    *logged, line = done.stderr.splitlines()
    assert line.startswith(f"Error: cannot import {without} (") and line.endswith(remedy)
    assert "Traceback" not in done.stderr


def test_an_engine_that_lacks_is_one_line(results, monkeypatch):
    """An engine's process imports vLLM; a module in its place raises as if it were missing."""
    Path("vllm.py").write_text("raise ModuleNotFoundError('No module named \\'vllm\\'', name='vllm')")
    Path("tokens.json").write_text("[[1, 2]]")
    monkeypatch.setenv("PYTHONPATH", str(results))
    done = call("loads", EXAMPLE, "--tokens", "tokens.json")
    line = "Error: engine of 'base': cannot import vllm (No module named 'vllm'); pip install '.[serve]'\n"
    begun, ended = done.stderr.splitlines(keepends=True)
    assert (done.returncode, ended) == (2, line) and begun.startswith("variants: 0 of 1")


def test_a_defect_of_its_own_is_not_explained_away():
    group = Commands("group")

    @group.command()
    def broken():
        from lexi_adapter.cli.console import nothing  # noqa: F401

    with pytest.raises(ImportError, match="cannot import name 'nothing' from 'lexi_adapter.cli.console'"):
        CliRunner().invoke(group, ["broken"], catch_exceptions=False)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize(
    "arguments", [("tradeoff", "eval.json", "bench.json"), ("check", "a.json", "--model", EXAMPLE)]
)
def test_output_that_finds_no_room_is_one_line(results, arguments):
    with open("/dev/full", "w") as full:
        done = call(*arguments, stdout=full)
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert line == "Error: cannot go on: No space left on device; make room where the output goes"
    assert "Traceback" not in done.stderr
