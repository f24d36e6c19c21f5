"""Runs `lexi-search` in this process: it succeeds without a warning on stderr, or refuses in one line."""

import re
from pathlib import Path

from click.testing import CliRunner

from lexi_search.artifacts import serialisation
from lexi_search.cli.main import main
from lexi_search.profiling.profile import SAMPLES


def run(*arguments):
    return CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)


# What a command says on stderr where all is well: what it will take, how far it is, what was decided, how to go on.
TOLD = re.compile(r"(plan|done|next): .*|.*: \d+ of \d+, elapsed \d+:\d\d:\d\d(, left \d+:\d\d:\d\d)?")


SMALL = {"length": 32, "samples": 256}  # in place of the defaults, which take minutes


def shrink_runs(patch):
    """Have every command of lexi-search measure on a few tokens where it is not told how many."""
    for command in main.commands.values():
        for option in command.params:
            if option.name in SMALL and isinstance(option.default, int):
                patch.setattr(option, "default", SMALL[option.name])
    for input in ("weights", "text"):
        patch.setitem(SAMPLES, input, SMALL["samples"])


def list_warnings(stderr):
    """The lines on stderr that are no news."""
    return [line for line in stderr.splitlines() if not TOLD.fullmatch(line)]


def read_warnings(result):
    """What a process or call said on stderr, without the news."""
    return "".join(f"{line}\n" for line in list_warnings(result.stderr))


def succeed(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert list_warnings(result.stderr) == []
    return result.stdout


def refuse(*arguments):
    """The one line that the command refuses with."""
    before = sorted(Path.cwd().rglob("*"))
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = list_warnings(result.stderr)
    assert line.startswith("Error: ")
    assert sorted(Path.cwd().rglob("*")) == before
    return line.removeprefix("Error: ")


def write(path, artifact):
    path.write_bytes(serialisation.to_bytes(artifact))
    return path
