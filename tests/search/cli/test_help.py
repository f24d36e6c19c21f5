"""The examples in every help text work, one after the other, and every command ends by saying what to type next."""

import re
import shlex

import pytest
from click.testing import CliRunner
from command_line import list_warnings, shrink_runs
from synthetic import make_cost_table

from lexi_search.artifacts import serialisation
from lexi_search.artifacts.profile import Profile
from lexi_search.cli.main import main

# A command -> those whose examples make what its own read.
ORDER = ("profile", "merge", "search", "front", "plot", "export", "show", "compare", "judge", "prune", "auto")


def list_examples(name):
    """The command lines under "Example" in the help of a command."""
    shown = CliRunner().invoke(main, [name, "--help"] if name else ["--help"], terminal_width=80).output
    return re.findall(r"^ +(lexi-search .*?)(?:  .*)?$", shown, re.MULTILINE)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return tmp_path_factory.mktemp("examples")


def test_every_command_has_an_example():
    assert set(ORDER) == set(main.commands)
    for name in (*ORDER, None):
        examples = list_examples(name)
        assert examples and any(name in (None, line.split()[1]) for line in examples), name


@pytest.mark.parametrize("name", [None, *ORDER])
def test_examples_work_in_the_order_of_the_commands(request, workplace, monkeypatch, name):
    place = workplace / ("commands" if name else "overview")  # the overview's examples make files of the same names
    place.mkdir(exist_ok=True)
    monkeypatch.chdir(place)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    weights = place / "weights"
    if not weights.exists():
        weights.symlink_to(request.config.rootpath / "examples" / "tiny-olmoe")
    shrink_runs(monkeypatch)
    if name == "search":
        model = serialisation.read_profile("profile.json").model
        table = make_cost_table(len(model.moe_layers), model.top_k)
        table = serialisation.CostTable(
            table.model.__class__(**{name: getattr(model, name) for name in vars(table.model)}),
            *(table.device, table.steps, table.made_by),
        )
        (place / "cost.json").write_bytes(serialisation.to_bytes(table))
    for line in list_examples(name):
        done = CliRunner().invoke(main, shlex.split(line)[1:], catch_exceptions=False)
        assert done.exit_code == 0, f"{line}: {done.output}"
        noise = [line for line in list_warnings(done.stderr) if "noisy" not in line and "distinguishable" not in line]
        assert noise == [], line
        assert re.search(r"^done: .+$", done.stderr, re.MULTILINE), line
        for following in re.findall(r"^next: (.+)$", done.stderr, re.MULTILINE):
            assert shlex.split(following)[0] in ("lexi-search", "lexi-adapter", "vllm"), following
    if name == "profile":
        assert all(isinstance(serialisation.read_profile(file), Profile) for file in ("other.json", "paper.json"))
        assert {loss.iterations for loss in serialisation.read_profile("paper.json").layers.values()} == {10}
