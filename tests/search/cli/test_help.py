"""The examples in every help text work, one after the other, and every command ends by saying what to type next."""

import re
import shlex
import shutil

import pytest
import tiny
from click.testing import CliRunner
from command_line import list_warnings, shrink_runs
from synthetic import make_cost_table

from lexi_search.artifacts import serialisation
from lexi_search.artifacts.profile import Profile
from lexi_search.cli.main import main

EVERYWHERE = "lexi-search profile weights/"  # an example of several commands, run once for all
UNSURE = ("noisy", "distinguishable", "another compensation", "as even as can be")  # said of so few tokens, rightly
# Commands, each after those whose examples make what its own read.
ORDER = ("profile", "merge", "search", "front", "plot", "export", "show", "compare", "judge", "prune", "auto")


def list_examples(name):
    """The command lines under "Example" in the help of a command."""
    shown = CliRunner().invoke(main, [name, "--help"] if name else ["--help"], terminal_width=80).output
    return re.findall(r"^ +(lexi-search .*?)(?:  .*)?$", shown, re.MULTILINE)


def run_example(line):
    """Run a command line: it ends well, without a warning, by what was decided and what may be typed next."""
    done = CliRunner().invoke(main, shlex.split(line)[1:], catch_exceptions=False)
    assert done.exit_code == 0, f"{line}: {done.output}"
    noise = [said for said in list_warnings(done.stderr) if not any(word in said for word in UNSURE)]
    assert noise == [], line
    assert re.search(r"^done: .+$", done.stderr, re.MULTILINE), line
    for following in re.findall(r"^next: (.+)$", done.stderr, re.MULTILINE):
        assert shlex.split(following)[0] in ("lexi-search", "lexi-adapter", "vllm"), following


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Two folders, for the overview's examples make files of the same names as the commands'. Both hold weights, a
    text, and what `EVERYWHERE` writes, also where `auto` looks for it."""
    place = tmp_path_factory.mktemp("examples")
    start = place / "start"
    tiny.make_checkpoint("olmoe", start / "weights", num_hidden_layers=8, num_experts=8, num_experts_per_tok=6)
    (start / "mine.txt").write_text(main.help * 9)
    tiny.write_tokenizer(start / "weights", main.help)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(start)
        patch.setenv("JAX_COMPILATION_CACHE_DIR", "")
        shrink_runs(patch)
        run_example(EVERYWHERE)
    made = sorted(start.glob("profile.*"))
    for output in re.findall(r" auto .* -o (\S+)", "\n".join(list_examples(None) + list_examples("auto"))):
        (start / f"{output}.lexi").mkdir()
        for file in made:
            shutil.copy(file, start / f"{output}.lexi")
    for name in ("overview", "commands"):
        shutil.copytree(start, place / name)
    return place


def test_every_command_has_an_example():
    assert set(ORDER) == set(main.commands)
    for name in (*ORDER, None):
        examples = list_examples(name)
        assert examples and any(name in (None, line.split()[1]) for line in examples), name


@pytest.mark.parametrize("name", [None, *ORDER])
def test_examples_work_in_the_order_of_the_commands(workplace, monkeypatch, name):
    place = workplace / ("commands" if name else "overview")
    monkeypatch.chdir(place)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    shrink_runs(monkeypatch)
    if name in ("search", "auto"):
        model = serialisation.read_profile("profile.json").model
        table = make_cost_table(len(model.moe_layers), model.top_k, num_experts=model.num_experts)
        (place / "cost.json").write_bytes(serialisation.to_bytes(table))
    examples = list_examples(name)
    assert EVERYWHERE in examples or name not in (None, "profile")
    for line in examples:
        if line != EVERYWHERE:
            run_example(line)
    if name == "profile":
        assert all(isinstance(serialisation.read_profile(file), Profile) for file in ("other.json", "paper.json"))
        assert {loss.iterations for loss in serialisation.read_profile("paper.json").layers.values()} == {10}
