"""Profiles with a gate exponent, and the allocations that are made of them."""

import pytest
import tiny
from command_line import refuse, succeed

from lexi_search.artifacts import serialisation

QUICK = ("--input", "paper", "--batch", 2, "--length", 32, "--samples", 256, "--relative-error", 0)


def read_losses(folder, checkpoint, *options):
    succeed("profile", checkpoint, "-o", folder / "p.json", *QUICK, *options)
    profile = serialisation.read_profile(folder / "p.json")
    return profile, profile.losses("rms")


@pytest.mark.parametrize("family, own", [("olmoe", 0), ("mixtral", 1)])
def test_without_an_exponent_a_router_drops_mass_or_renormalises(folder, family, own):
    checkpoint = tiny.make_checkpoint(family, folder / family)
    _, plain = read_losses(folder, checkpoint)
    same, half = (read_losses(folder, checkpoint, "--gate-exponent", b)[1] for b in (own, 0.5))
    for rows in zip(plain, same, half, strict=True):
        assert rows[0] == pytest.approx(rows[1], rel=1e-5)
        assert rows[0][:-1] != pytest.approx(rows[2][:-1], rel=1e-3)


def test_allocations_carry_the_exponent_of_their_profile(folder):
    checkpoint = tiny.make_checkpoint("olmoe", folder / "olmoe")
    profile, _ = read_losses(folder, checkpoint, "--gate-exponent", 0.5)
    assert profile.settings.gate_exponent == 0.5
    budget = len(profile.layers) + 1
    succeed("search", "p.json", "--budget", budget)
    assert serialisation.read_allocation("allocation.json").gate_exponent == 0.5


def test_exponents_that_cannot_be_are_refused(folder):
    checkpoint = tiny.make_checkpoint("olmoe", folder / "olmoe")
    for value in ("-1", "nan", "inf", "2.5", "1e308"):
        assert "gate_exponent is" in refuse("profile", checkpoint, "--gate-exponent", value)
    paper = ("--input", "paper", "--gate-exponent", "0.5")
    assert "leave max_k out" in refuse("profile", checkpoint, *paper, "--max-k", "8")
    llama = tiny.make_checkpoint("llama4_text", folder / "llama")
    assert "has nothing to act on" in refuse("profile", llama, *paper, "--max-k", "2")
    assert not list(folder.glob("*.json*"))
