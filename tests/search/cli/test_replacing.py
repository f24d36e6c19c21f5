"""No command replaces a file of another model or another kind, unless it is told to."""

import os
from pathlib import Path

import pytest
import tiny
from command_line import refuse, succeed, write
from synthetic import add_model_losses, make_allocation, make_cost_table, make_profile

from lexi_search.artifacts import serialisation
from lexi_search.artifacts.files import find_nature

OTHER = {"router_sha256": "f" * 64}
# Command -> the kind of what it writes to OUT.
COMMANDS = {
    "search p --budget 9 -o OUT": "lexi-allocation",
    "search p --budget 9 --history OUT": "lexi-history",
    "front p -o OUT": "lexi-front",
    "front p --knee --allocation OUT": "lexi-allocation",
    "merge one two -o OUT": "lexi-profile",
    "plot p -o OUT": "figure",
    "export a --to csv -o OUT": "table by layer",
    "export a --to json -o OUT": "JSON object with the keys 0, 1, 2, 3",
}


@pytest.fixture
def files(folder):
    profile = make_profile()
    write(folder / "p", profile)
    write(folder / "a", make_allocation())
    for name, layers in (("one", (0, 1)), ("two", (2, 3))):
        layers = {layer: profile.layers[layer] for layer in layers}
        write(folder / name, serialisation.Profile(profile.model, profile.settings, layers, profile.made_by))
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_of_another_kind_stays_unless_forced(files, command):
    out = "out.png" if command.startswith("plot") else "out.json"
    words = command.replace("OUT", out).split()
    for data in (
        serialisation.to_bytes(make_cost_table()),
        b"notes\n",
        b'{"a": 1}',
        b"\x89PNG and so on",
        b"a,b\n1,2\n",
    ):
        if find_nature(data).kind == COMMANDS[command]:
            continue
        Path(out).write_bytes(data)
        assert f"cannot write {out}: there is a {find_nature(data).kind}; choose another" in refuse(*words)
        assert Path(out).read_bytes() == data
    succeed(*words, "--force")
    made = Path(out).read_bytes()
    assert find_nature(made).kind == COMMANDS[command]
    succeed(*words)  # a result of the same kind and model is replaced as it is
    assert Path(out).read_bytes() == made
    Path(out).write_bytes(b"")  # as mktemp leaves it
    succeed(*words)


@pytest.mark.parametrize("command", [name for name, kind in COMMANDS.items() if kind.startswith("lexi-")])
def test_a_result_of_another_model_stays_unless_forced(files, command):
    words = command.replace("OUT", "out.json").split()
    succeed(*words)
    ours = Path("out.json").read_bytes()
    theirs = ours.replace(b"0123456789abcdef" * 4, b"f" * 64)
    assert theirs != ours
    Path("out.json").write_bytes(theirs)
    assert f"there is a {COMMANDS[command]} of another model" in refuse(*words)
    assert Path("out.json").read_bytes() == theirs
    succeed(*words, "--force")
    assert Path("out.json").read_bytes() == ours


def test_merge_does_not_write_over_the_profile_of_another_model(files):
    theirs = write(files / "profile.json", make_profile(**OTHER)).read_bytes()
    assert "cannot write profile.json: there is a lexi-profile of another model" in refuse("merge", "one", "two")
    assert Path("profile.json").read_bytes() == theirs


def test_profile_does_not_write_over_that_of_another_model(folder):
    model = tiny.make_checkpoint("olmoe", folder / "model")
    theirs = write(folder / "profile.json", make_profile()).read_bytes()
    fast = ["--input", "paper", "--batch", 2, "--length", 32, "--iterations", 2]
    assert "there is a lexi-profile of another model" in refuse("profile", model, *fast)
    write(folder / "allocation.json", make_allocation())
    assert "there is a lexi-allocation" in refuse("profile", model, *fast, "-o", "allocation.json")
    assert Path("profile.json").read_bytes() == theirs
    succeed("profile", model, *fast, "--force")
    made = Path("profile.json").read_bytes()
    succeed("profile", model, *fast)
    assert Path("profile.json").read_bytes() == made != theirs


def test_no_file_of_a_folder_of_allocations_is_another_models(files):
    os.mkdir("allocations")
    theirs = write(files / "allocations" / "allocation-9.json", make_allocation(**OTHER)).read_bytes()
    said = refuse("search", "p", "--budgets", "8:9:1")
    assert "allocation-9.json: there is a lexi-allocation of another model" in said
    assert os.listdir("allocations") == ["allocation-9.json"]
    assert Path("allocations/allocation-9.json").read_bytes() == theirs


def test_search_and_front_write_to_files_of_their_own(files):
    succeed("search", "p", "--budget", 9)
    found = Path("allocation.json").read_bytes()
    succeed("front", "p", "--knee")
    assert Path("allocation.json").read_bytes() == found
    assert serialisation.read_allocation("front-allocation.json").made_by["method"] == "exact"


@pytest.mark.parametrize("twin", ["one", "./one", "link", "hard", "copy"])
def test_merge_takes_no_part_twice(files, twin):
    Path("link").symlink_to("one")
    os.link("one", "hard")
    Path("copy").write_bytes(Path("one").read_bytes())
    assert refuse("merge", "one", twin) == f"{twin}: the same part as one; name each part once"


def test_the_same_layers_by_another_loss_are_no_twin(files):
    """What `merge` refuses for another reason stays refused for that reason."""
    write(files / "more", add_model_losses(make_profile()))
    assert "differs from that in p" in refuse("merge", "p", "more")
