"""Runs `lexi-search` in this process: it succeeds without a word on stderr, or refuses in one line."""

from pathlib import Path

from click.testing import CliRunner

from lexi_search.artifacts import serialisation
from lexi_search.cli.main import main


def run(*arguments):
    return CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)


def succeed(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout


def refuse(*arguments):
    """The one line that the command refuses with."""
    before = sorted(Path.cwd().rglob("*"))
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert sorted(Path.cwd().rglob("*")) == before
    return result.stderr.removeprefix("Error: ").rstrip("\n")


def write(path, artifact):
    path.write_bytes(serialisation.to_bytes(artifact))
    return path
