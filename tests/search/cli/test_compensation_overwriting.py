"""Corrections that lie there already: what commands write over, and what they refuse to; on synthetic profiles."""

from dataclasses import replace
from pathlib import Path

import pytest
from command_line import refuse, succeed
from synthetic import add_model_losses, make_maps, make_profile

import lexi_search
from lexi_search.artifacts.compensation import name_beside, write_maps
from lexi_search.artifacts.serialisation import read_allocation, read_allocation_maps, read_profile, write_profile

SEARCH = ("search", "p.json", "--method", "exact", "--resamples", 5)


def write_profile_with_maps(path, *, seed=0, layers=None, **changes):
    profile = add_model_losses(make_profile(**changes))
    settings = replace(profile.settings, input="weights", gate_exponent=0.5, compensation_rank=2)
    kept = {layer: loss for layer, loss in profile.layers.items() if layers is None or layer in layers}
    maps = {place: one for place, one in make_maps(profile.model, seed=seed).items() if place[0] in kept}
    named = write_maps(name_beside(path), maps, profile.model, owners=[path])
    write_profile(path, replace(profile, settings=settings, layers=kept, compensation=named))


@pytest.fixture
def profiled(folder):
    write_profile_with_maps("p.json")
    return folder


def read(path):
    allocation = read_allocation(path)
    maps = read_allocation_maps(path, allocation)
    assert set(maps) == set(allocation.corrected)
    return allocation


def test_python_writes_what_the_command_does_and_is_told_how(profiled):
    succeed(*SEARCH, "--budget", 9, "-o", "a.json")
    profile = lexi_search.read_profile("p.json")
    (found,) = lexi_search.allocate(profile, [9], method="exact", resamples=5)
    with pytest.raises(lexi_search.InputError, match="; write it by write_allocations, with what read_profile_maps"):
        lexi_search.write_allocation("b.json", found.allocation)
    maps = lexi_search.read_profile_maps("p.json", profile)
    lexi_search.write_allocations(["b.json"], [found.allocation], maps)
    assert replace(read("b.json"), compensation=None) == replace(read("a.json"), compensation=None)
    assert Path("b.safetensors").read_bytes() == Path("a.safetensors").read_bytes()


def test_a_second_search_into_a_folder_does_not_break_the_first(profiled):
    succeed(*SEARCH, "--budgets", "8:10:1", "-o", "out")
    said = refuse(*SEARCH, "--budgets", "12:13:1", "-o", "out")
    assert "allocation-10.json names it and would lose its corrections" in said
    assert read("out/allocation-8.json") and not Path("out/allocation-12.json").exists()
    succeed(*SEARCH, "--budgets", "8:10:1", "-o", "out")
    succeed(*SEARCH, "--budgets", "12:13:1", "-o", "out", "--force")
    assert read("out/allocation-12.json")


def test_a_history_does_not_replace_corrections(profiled):
    said = refuse("search", "p.json", "--budget", 9, "--history", "a.safetensors", "--force", "-o", "a.json")
    assert "a.safetensors" in said and not Path("a.json").exists()


def test_corrections_of_another_model_are_not_replaced(profiled):
    write_profile_with_maps("a.json", router_sha256="f" * 64)
    Path("a.json").unlink()
    assert "a file of another model" in refuse(*SEARCH, "--budget", 9, "-o", "a.json")
    succeed(*SEARCH, "--budget", 9, "-o", "a.json", "--force")
    assert read("a.json")


def test_parts_merge_with_their_corrections_unless_those_differ(folder):
    write_profile_with_maps("one.json", layers=(0, 1))
    write_profile_with_maps("two.json", layers=(1, 2, 3))
    succeed("merge", "one.json", "two.json", "-o", "p.json")
    assert read_profile("p.json").compensation.file == "p.safetensors"
    succeed(*SEARCH, "--budget", 9, "-o", "a.json")
    assert read("a.json")
    write_profile_with_maps("two.json", layers=(1, 2, 3), seed=1)
    said = refuse("merge", "one.json", "two.json", "-o", "q.json")
    assert "two.json: the correction of layer 1 at k = 1 differs from that in one.json" in said


def test_files_of_corrections_are_shown(profiled):
    shown = succeed("show", "p.safetensors")
    assert "olmoe: corrections of rank 2" in shown and "1 2 3" in shown
    Path("q.safetensors").write_bytes(b"no")
    assert "no file of corrections" in refuse("show", "q.safetensors")
