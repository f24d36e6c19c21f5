"""Allocations of profiles with corrections are as even as can be unless another is surely better, however made."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command_line import list_warnings, run, write
from corrections import describe, draw_tensors, write_corrections
from synthetic import make_corrected_profile, make_cost_table

from lexi_search.allocation import tradeoff
from lexi_search.allocation.allocate import allocate
from lexi_search.allocation.baselines import spread_evenly
from lexi_search.allocation.costs import weigh
from lexi_search.allocation.targets import Target, search_target
from lexi_search.allocation.tradeoff import find_front
from lexi_search.artifacts.compensation import CompensationFile
from lexi_search.artifacts.serialisation import read_allocation, to_bytes
from lexi_search.solvers.problem import Constraints
from lexi_search.solvers.robust import CAUTION, Caution

ALIKE = make_corrected_profile(spread=0.0, error=0.15)
APART = make_corrected_profile(spread=1.0, error=0.05)
BUDGETS = [30, 54, 72, 96]


def read_k(allocation):
    return tuple(k for _, k in sorted(allocation.top_k.items()))


@pytest.mark.parametrize("method", ["evolution", "exact"])
def test_layers_that_are_alike_get_even_k_and_the_allocation_says_so(method):
    results = allocate(ALIKE, BUDGETS, method=method)
    for result, budget in zip(results, BUDGETS, strict=True):
        assert read_k(result.allocation) == spread_evenly(budget, 12)
        assert result.allocation.optimal_loss <= result.allocation.loss
    noted = [result.allocation.made_by.get("fallback") for result in results]
    assert noted[:2] == [
        {"expected_gain": result.expected_gain, "threshold": CAUTION.threshold} for result in results[:2]
    ]
    assert noted[-1] is None and results[-1].expected_gain == 0  # there is one allocation alone
    bold = allocate(ALIKE, BUDGETS, method=method, caution=Caution(threshold=-1.0, floor=0.0))
    assert read_k(bold[0].allocation) != read_k(results[0].allocation) and bold[0].expected_gain < CAUTION.threshold


def test_layers_that_differ_get_k_that_differ():
    table = APART.losses("divergence")
    for result, plain in zip(
        allocate(APART, BUDGETS[:3], method="exact", caution=Caution(threshold=0.03, floor=0.25)),
        allocate(APART, BUDGETS[:3], method="exact", caution=None),
        strict=True,
    ):
        assert result.expected_gain >= 0.03 and "fallback" not in result.allocation.made_by
        assert len(set(read_k(result.allocation))) > 2
        even = sum(row[k - 1] for row, k in zip(table, spread_evenly(result.allocation.budget, 12), strict=True))
        assert (even - result.allocation.loss) > 0.75 * (even - plain.allocation.loss) > 0
        assert result.allocation.optimal_loss == plain.allocation.loss and plain.expected_gain is None


def test_profiles_without_corrections_and_other_losses_are_as_they_were():
    plain = replace(ALIKE, settings=replace(ALIKE.settings, compensation_rank=None))
    for profile, options in ((plain, {}), (ALIKE, {"loss": "rms"})):
        by_default = allocate(profile, BUDGETS, method="exact", **options)
        before = allocate(profile, BUDGETS, method="exact", caution=None, **options)
        assert [to_bytes(result.allocation) for result in by_default] == [to_bytes(one.allocation) for one in before]
        assert all(result.allocation.gap == 0 and result.expected_gain is None for result in by_default)
    own = allocate(ALIKE, [30], fitness=lambda losses, top_k: -top_k[:, 0].astype(float), generations=8)
    assert own[0].expected_gain is None and own[0].allocation.top_k[0] == 8


def test_even_k_keep_to_the_constraints():
    constraints = Constraints(min_k=(1,) * 11 + (4,), max_k=(2,) + (8,) * 11, groups=())
    (result,) = allocate(ALIKE, [54], constraints=constraints, method="exact")
    k = read_k(result.allocation)
    assert "fallback" in result.allocation.made_by and k[0] == 2 and set(k[1:]) == {4, 5} and sum(k) == 54


def test_a_long_front_is_thinned_where_each_point_is_compared(monkeypatch):
    cost = weigh_costs(APART)
    whole = find_front(APART, cost=cost)
    monkeypatch.setattr(tradeoff, "MOST_COMPARED", 20)
    few = find_front(APART, cost=cost).points
    assert 3 < len(few) <= 20 < len(whole.points)
    assert (few[0], few[-1]) == (whole.points[0], whole.points[-1])
    assert find_front(APART, cost=cost, caution=None).points[5].limit is not None


def weigh_costs(profile):
    return weigh(make_cost_table(12, 8), profile.model, mix={16: 1})


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("profile", [ALIKE, APART])
def test_points_of_a_front_are_what_a_search_within_their_limits_finds(profile, timed):
    cost = weigh_costs(profile) if timed else None
    front = find_front(profile, cost=cost)
    points = front.points[:: max(1, len(front.points) // 7)]
    results = allocate(profile, [point.limit for point in points], cost=cost, method="exact")
    for point, result in zip(points, results, strict=True):
        assert read_k(result.allocation) == point.top_k and result.allocation.loss == point.loss
    even = [len(set(point.top_k)) <= 2 for point in front.points]
    assert all(even) if profile is ALIKE and not timed else not all(even)
    price = [point.ms if timed else point.budget for point in front.points]
    assert (np.diff(price) > 0).all() and (np.diff([point.loss for point in front.points]) < 0).all()
    if timed:
        assert all(point.ms <= point.limit * (1 + 1e-9) for point in front.points)


@pytest.mark.parametrize("profile", [ALIKE, APART])
def test_a_target_is_met_with_caution_as_well(profile):
    cost = weigh_costs(profile)
    (result, front), (budget,) = search_target(profile, Target("budget", 54), cost), allocate(profile, [54])
    assert read_k(result.allocation) == read_k(budget.allocation)
    assert read_k(result.allocation) in {point.top_k for point in front.points}
    for share in (0.1, 0.3, 0.6):
        result, _ = search_target(profile, Target("max_loss", share, relative=True), cost)
        assert result.allocation.loss <= share * sum(row[0] for row in profile.losses("divergence"))
        assert result.expected_gain >= CAUTION.threshold or len(set(read_k(result.allocation))) <= 2
    result, _ = search_target(profile, Target("speedup", 1.2), cost)
    assert result.speedup >= 1.2 * (1 - 1e-9)


@pytest.fixture
def profiles(folder):
    """Files of both profiles, with the corrections that they name."""
    for name, profile in (("alike", ALIKE), ("apart", APART)):
        pairs = [(layer, k) for layer in range(12) for k in range(1, 8)]
        tensors = draw_tensors(profile.model, pairs, hidden=8)
        named = write_corrections(folder / f"{name}.safetensors", tensors, describe(profile.model, 4))
        write(folder / f"{name}.json", replace(profile, compensation=CompensationFile(**named)))
    return folder


def test_search_says_in_one_line_where_it_fell_back(profiles):
    result = run("search", "alike.json", "--budget", 54, "--method", "exact", "-o", "a.json")
    assert result.exit_code == 0
    (line,) = list_warnings(result.stderr)
    told = r"budget 54: k as even as can be, for the profile cannot tell a better one: expected gain [\d.]+ %"
    assert re.fullmatch(told, line), line
    written = read_allocation("a.json")
    assert read_k(written) == spread_evenly(54, 12)
    assert set(written.made_by["fallback"]) == {"expected_gain", "threshold"}

    result = run("search", "alike.json", "--budget", 30, "--budget", 54, "--budget", 96, "--json", "-o", "several")
    (line,) = result.stderr.splitlines()
    assert line.startswith("budget 30, 54: k as even as can be, ") and "expected gain at most " in line
    rows = json.loads(result.stdout)
    assert [row["fallback"] for row in rows] == [True, True, False]
    assert all(row["expected_gain"] < CAUTION.threshold for row in rows)
    before = [Path(f"several/allocation-{budget}.json").read_bytes() for budget in (30, 54, 96)]
    assert run("search", "alike.json", "--budgets", "30:54:24", "--budget", 96, "-o", "several").exit_code == 0
    assert [Path(f"several/allocation-{budget}.json").read_bytes() for budget in (30, 54, 96)] == before


def test_search_says_why_a_gap_is_no_fault_of_the_search(profiles):
    told = "k are best by losses shrunk towards their mean over layers, gap is by those of the profile"
    for budget, found in (("54", True), ("96", False)):  # at 96 there is one allocation, and no gap
        shown = run("search", "apart.json", "--budget", budget, "--method", "exact", "-o", f"{budget}.json").stdout
        assert bool(read_allocation(f"{budget}.json").gap) is found
        assert (told in shown.splitlines()[0]) is found


def test_search_says_nothing_where_it_found_a_better_one(profiles):
    result = run("search", "apart.json", "--budget", 54, "--json")
    (row,) = json.loads(result.stdout)
    assert "even" not in result.stderr and row["fallback"] is False and row["expected_gain"] >= CAUTION.threshold
    assert "fallback" not in read_allocation("allocation.json").made_by


def test_front_writes_what_search_does(profiles):
    result = run("front", "alike.json", "--max-loss", "30%", "--allocation", "a.json")
    assert result.exit_code == 0
    written = read_allocation("a.json")
    (line,) = [line for line in list_warnings(result.stderr) if "even" in line]
    assert line.startswith(f"budget {written.budget}: k as even as can be, for the profile cannot tell")
    assert written.loss <= 0.3 * sum(row[0] for row in ALIKE.losses("divergence"))
    assert run("search", "alike.json", "--budget", written.budget, "--method", "exact", "-o", "b.json").exit_code == 0
    assert replace(read_allocation("b.json"), compensation=written.compensation) == written
