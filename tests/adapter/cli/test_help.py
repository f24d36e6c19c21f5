"""Help, progress and the last words of every command: what to type, how far it is, and what comes next."""

import itertools
import json
import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from engine import allocate, export
from results import make_quality, make_speed
from tiny import make_checkpoint

from lexi_adapter.cli.console import conclude
from lexi_adapter.cli.main import main
from lexi_adapter.cli.options import PRUNED_SHARE, SHARE
from lexi_adapter.cli.progress import Progress
from lexi_search.artifacts.serialisation import write_allocation


def list_examples(command):
    """The words of every example in a command's help, as a shell would split them."""
    text = CliRunner().invoke(main, [command, "--help"]).stdout.partition("Examples:")[2].partition("Options:")[0]
    text = text.replace("\\\n", " ")
    return [shlex.split(line)[1:] for line in map(str.strip, text.splitlines()) if line.startswith("lexi-adapter ")]


EXAMPLES = [(command, example) for command in main.commands for example in list_examples(command)]


def test_every_command_has_an_example_with_its_name():
    assert {command for command, _ in EXAMPLES} == set(main.commands)
    assert all(example[0] == command for command, example in EXAMPLES)


@pytest.mark.parametrize("command, example", EXAMPLES)
def test_every_example_is_understood(command, example, tmp_path, monkeypatch):
    """All options and values; what they do needs an engine, or is run below."""
    monkeypatch.chdir(tmp_path)
    for word in example:
        if word.endswith((".json", ".txt")) and "/" not in word:
            Path(word).write_text("x")
    main.commands[command].make_context(command, example[1:], parent=click.Context(main))


def test_the_examples_that_need_no_engine_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = make_checkpoint("olmoe", tmp_path / "weights")
    allocation = allocate(folder)
    write_allocation("allocation.json", allocation)
    export(allocation, folder, tmp_path / "served")
    Path("eval.json").write_text(json.dumps(make_quality()).replace("mine.json", "allocation.json"))
    speed = json.dumps(make_speed()).replace("./mine.json", "allocation.json").replace("16x8x8", "16x512x512")
    Path("bench.json").write_text(speed)
    ran = 0
    for command, example in EXAMPLES:
        if command in ("check", "tradeoff") and "--url" not in example and "--uniform-k" not in example:
            result = CliRunner().invoke(main, example, catch_exceptions=False)
            assert result.exit_code == 0, result.output
            assert re.search(r"^done: .*\nnext: ", result.stderr, re.MULTILINE), example
            ran += 1
    assert ran == 3


@pytest.mark.parametrize("text, share", [("50%", 0.5), ("12.5%", 0.125), ("0.5%", 0.005), ("99.9%", 0.999)])
def test_a_share_is_written_in_percent(text, share):
    assert SHARE.convert(text, None, None) == PRUNED_SHARE.convert(text, None, None) == share


@pytest.mark.parametrize("text", ["0.5", "50", "50 %", "-5%", "1e1%", "101%", "nan%", "%", "٥%"])
def test_another_share_is_refused_with_an_example(text):
    for kind in (SHARE, PRUNED_SHARE):
        with pytest.raises(click.BadParameter, match="is not a share .*, such as 50%"):
            kind.convert(text, None, None)


def test_the_ends_of_shares():
    assert SHARE.convert("100%", None, None) == 1 and PRUNED_SHARE.convert("0%", None, None) == 0
    for kind, text in ((SHARE, "0%"), (PRUNED_SHARE, "100%")):
        with pytest.raises(click.BadParameter):
            kind.convert(text, None, None)


def test_progress_in_a_pipe_has_the_total_first_and_a_line_every_ten_seconds(capsys):
    ticks = itertools.count(0, 4)
    progress = Progress("parts", clock=lambda: float(next(ticks)))
    for done in range(2, 13):
        progress(done, 12, f"layer {done}")
    assert capsys.readouterr().err.splitlines() == [
        "parts: 2 of 12, elapsed 0:00:00 (layer 2)",
        "parts: 5 of 12, elapsed 0:00:12, left 0:00:28 (layer 5)",
        "parts: 8 of 12, elapsed 0:00:24, left 0:00:16 (layer 8)",
        "parts: 11 of 12, elapsed 0:00:36, left 0:00:04 (layer 11)",
        "parts: 12 of 12, elapsed 0:00:40, left 0:00:00 (layer 12)",
    ]


def test_the_time_left_does_not_count_the_start_of_an_engine(capsys):
    times = iter((0, 100, 120))
    progress = Progress("turns", clock=lambda: float(next(times)))
    progress(0, 5, "engines start")
    progress(0, 5, "engines are up")
    progress(1, 5)
    assert capsys.readouterr().err.splitlines() == [
        "turns: 0 of 5, elapsed 0:00:00 (engines start)",
        "turns: 0 of 5, elapsed 0:01:40 (engines are up)",
        "turns: 1 of 5, elapsed 0:02:00, left 0:01:20",
    ]


def test_progress_on_a_terminal_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    ticks = itertools.count(0, 3600)
    progress = Progress("turns", clock=lambda: float(next(ticks)))
    for done in range(3):
        progress(done, 2)
    lines = capsys.readouterr().err.split("\r\x1b[K")
    assert lines[1:] == [
        "turns: 0 of 2, elapsed 0:00:00",
        "turns: 1 of 2, elapsed 1:00:00, left 1:00:00",
        "turns: 2 of 2, elapsed 2:00:00, left 0:00:00\n",
    ]


def test_last_words_can_be_typed(capsys):
    conclude("a b.json", ["lexi-adapter", "check", "a b.json"])
    assert capsys.readouterr().err == "done: a b.json\nnext: lexi-adapter check 'a b.json'\n"
