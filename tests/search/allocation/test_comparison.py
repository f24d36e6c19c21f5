"""One profile judged by another."""

import dataclasses
import json
import random

import numpy as np
import pytest
from command_line import refuse, run, succeed, write
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from synthetic import add_model_losses, make_allocation, make_corrected_profile, make_profile

from lexi_search.allocation.comparison import SHARES, compare, correlate
from lexi_search.artifacts.profile import LOSS_KINDS
from lexi_search.errors import InputError


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=30))
def test_correlation_is_spearmans(pairs):
    one, other = np.array(pairs, float).T
    if len(set(one)) == 1 or len(set(other)) == 1:
        assert np.isnan(correlate(one, other))
    else:
        assert correlate(one, other) == pytest.approx(spearmanr(one, other)[0], abs=1e-12)


def find_best(table, budget):
    """The loss and k of every allocation of the budget, the slow way."""
    reached = {0: [(0.0, ())]}
    for row in table:
        ways = [
            (b + k, loss + value, top_k + (k,))
            for b, all_ways in reached.items()
            for loss, top_k in all_ways
            for k, value in enumerate(row, 1)
        ]
        reached = {}
        for b, loss, top_k in ways:
            reached.setdefault(b, []).append((loss, top_k))
    return min(reached[budget])


@given(seeds=st.tuples(st.integers(0, 99), st.integers(0, 99)), top_k=st.sampled_from([2, 3, 4]))
def test_allocations_of_one_table_are_judged_by_the_other(seeds, top_k):
    truth, other = (make_profile(4, top_k, seed=seed) for seed in seeds)
    found = compare(truth, other, reference_loss="squared", loss="rms")
    budgets = sorted({round(share * 4 * top_k) for share in SHARES})
    assert found.budgets.tolist() == [budget for budget in budgets if budget > 4]
    table = truth.losses("squared")
    for place, budget in enumerate(found.budgets.tolist()):
        below = budget // 4
        between = budget / 4 - below
        sums = [sum(row[k - 1] for row in table) for k in (below, min(below + 1, top_k))]
        assert found.uniform[place] == pytest.approx((1 - between) * sums[0] + between * sums[1])
        assert found.optimum[place] == pytest.approx(find_best(table, budget)[0])
        chosen = find_best(other.losses("rms"), budget)[1]
        assert found.found[place] == pytest.approx(sum(row[k - 1] for row, k in zip(table, chosen, strict=True)))
    assert (found.found >= found.optimum - 1e-12).all()


def test_a_profile_judges_itself_perfect():
    profile = make_profile(5, 4)
    found = compare(profile, profile)
    assert found.correlation == pytest.approx(1)
    assert [share for share in found.closed if not np.isnan(share)] == pytest.approx([1] * len(found.closed))


def make_noisy(profile, noise, *, seed):
    """The profile as a sample of it would be: increases off by draws of `noise`, which its standard errors state."""
    draw = random.Random(seed)
    layers = {}
    for layer, loss in profile.layers.items():
        values = tuple(value + draw.gauss(0, noise) for value in loss.divergence[:-1]) + (0.0,)
        layers[layer] = dataclasses.replace(
            loss, increase=values, increase_stderr=(noise,) * (len(values) - 1) + (0.0,)
        )
    return dataclasses.replace(profile, layers=layers)


def test_a_noisy_reference_says_that_it_cannot_tell():
    """The same files, by the divergence that is known well and by an increase that is not."""
    profile = add_model_losses(make_profile(8, 6))
    noisy = make_noisy(profile, 0.5, seed=3)
    by_divergence = compare(noisy, profile, reference_loss="divergence", loss="divergence", resamples=200)
    by_increase = compare(noisy, profile, reference_loss="increase", loss="divergence", resamples=200)
    assert by_divergence.closed == pytest.approx(1)
    assert by_divergence.distinguishable.all() and (by_divergence.closed_error < 0.1).all()
    assert (by_increase.closed_error > 0.1).all() and not by_increase.distinguishable.all()


def test_the_standard_error_is_the_spread_over_samples():
    profile = add_model_losses(make_profile(8, 6))
    leads = []
    for seed in range(100):
        found = compare(make_noisy(profile, 0.02, seed=seed), profile, reference_loss="increase", loss="divergence")
        leads.append(found.uniform - found.found)
    stated = compare(
        make_noisy(profile, 0.02, seed=0), profile, reference_loss="increase", loss="divergence", resamples=200
    )
    assert stated.lead_error == pytest.approx(np.std(leads, axis=0), rel=0.5)


def test_the_command_warns_of_a_noisy_reference(folder):
    profile = add_model_losses(make_profile(8, 6))
    write(folder / "truth.json", make_noisy(profile, 0.5, seed=3))
    write(folder / "p.json", profile)
    done = run("compare", "truth.json", "p.json")
    assert "results are not distinguishable from the same k in every layer (~); --loss divergence" in done.stderr
    assert "~ " in done.stdout and "+-" in done.stdout.replace("±", "+-")
    (row, *_) = json.loads(run("compare", "truth.json", "p.json", "--json").stdout)
    assert not all(row["distinguishable"]) and all(error > 0 for error in row["closed_error"])
    row = json.loads(succeed("compare", "truth.json", "p.json", "--loss", "divergence", "--json"))[4]
    assert row["loss"] == "divergence" and all(row["distinguishable"])


def test_no_best_is_named_where_none_can_be_told(folder):
    profile = add_model_losses(make_profile(8, 6))
    write(folder / "p.json", profile)
    write(folder / "truth.json", noisy := make_noisy(profile, 50.0, seed=3))
    done = run("compare", "truth.json", "p.json")
    rows = json.loads(run("compare", "truth.json", "p.json", "--json").stdout)
    assert not any(told for row in rows for told in row["distinguishable"])
    assert "the least loss has" not in done.stderr and "none is named the best" in done.stderr
    assert "next: lexi-search compare truth.json p.json --loss divergence\n" in done.stderr
    alone = {k: dataclasses.replace(v, divergence=None, divergence_stderr=None) for k, v in noisy.layers.items()}
    write(folder / "truth.json", dataclasses.replace(noisy, layers=alone))
    samples = 4 * noisy.settings.max_samples
    done = run("compare", "truth.json", "p.json")
    assert f"next: lexi-search profile WEIGHTS --samples {samples} -o more.json\n" in done.stderr


def test_the_best_is_named_by_a_budget_at_which_it_can_be_told(folder):
    profile = add_model_losses(make_profile(8, 6))
    write(folder / "truth.json", make_noisy(profile, 0.5, seed=3))
    write(folder / "p.json", profile)
    rows = json.loads(run("compare", "truth.json", "p.json", "--json").stdout)
    pairs = [pair for row in rows for pair in zip(row["budgets"], row["distinguishable"], strict=True)]
    (line,) = [line for line in run("compare", "truth.json", "p.json").stderr.splitlines() if line.startswith("done: ")]
    assert int(line.rpartition("B = ")[2]) in {budget for budget, clear in pairs if clear}


def test_the_command_says_that_k_alone_are_judged_where_compensation_differs(folder):
    corrected = make_corrected_profile(6, 4, spread=0.5, error=0.1)
    for seed, file in enumerate(("truth.json", "p.json")):
        write(folder / file, corrected if seed else add_model_losses(make_profile(6, 4)))
    title = "by increase of truth.json, measured without compensation"
    done = run("compare", "truth.json", "truth.json", "p.json")
    assert done.stdout.splitlines()[0].strip() == title
    (line,) = {line for line in done.stdout.splitlines() if line.startswith("p.json") and " divergence " in line}
    assert " gate exponent 0.5 and corrections of rank 4 " in line
    assert "p.json: measured with another compensation than truth.json, so that the k are judged, not" in done.stderr
    rows = json.loads(run("compare", "truth.json", "truth.json", "p.json", "--json").stdout)
    pairs = {(row["profile"], row["gate_exponent"], row["compensation_rank"]) for row in rows}
    assert pairs == {("truth.json", None, None), ("p.json", 0.5, 4)}
    alike = run("compare", "p.json", "p.json")
    assert alike.stdout.startswith("by divergence of p.json, measured with gate exponent 0.5 and corrections of rank 4")
    assert "another compensation" not in alike.stderr


def test_of_losses_as_good_the_one_is_named_that_a_search_takes(folder):
    profile = add_model_losses(make_profile(2, 2))  # so few choices that several losses lead to the same
    write(folder / "p.json", profile)
    found = {kind: compare(profile, profile, reference_loss="divergence", loss=kind).found for kind in LOSS_KINDS}
    assert sum((each == found["divergence"]).all() for each in found.values()) > 1
    done = run("compare", "p.json", "p.json", "--loss", "divergence")
    assert "next: lexi-search search p.json --loss divergence --budget 50%" in done.stderr


def test_other_models_are_refused():
    with pytest.raises(InputError, match="a different model"):
        compare(make_profile(), make_profile(router_sha256="f" * 64))
    part = dataclasses.replace(make_profile(), layers={0: make_profile().layers[0]})
    with pytest.raises(InputError, match="different layers"):
        compare(make_profile(), part)


def test_the_command_judges_every_loss(folder):
    write(folder / "truth.json", add_model_losses(make_profile(5, 4)))
    write(folder / "paper.json", make_profile(5, 4, seed=3))
    lines = run("compare", "truth.json", "paper.json", "truth.json").stdout.splitlines()
    assert lines[0].strip() == "by increase of truth.json, measured without compensation"
    rows = json.loads(succeed("compare", "truth.json", "paper.json", "truth.json", "--json"))
    kinds = [("paper.json", kind) for kind in ("frobenius", "rms", "squared")]
    kinds += [("truth.json", kind) for kind in LOSS_KINDS]
    assert [(row["profile"], row["loss"]) for row in rows] == kinds
    own = rows[-1]
    assert own["loss"] == "increase" and own["spearman"] == pytest.approx(1) and own["found"] == own["optimum"]
    assert "holds frobenius, rms, squared, no increase" in refuse(
        "compare", "paper.json", "truth.json", "--loss", "increase"
    )


def test_names_are_shown_as_they_are(folder):
    (folder / "a[").mkdir()
    write(folder / "a.json", make_profile(5, 4))
    write(folder / "a[" / "x] :smile:.json", make_profile(5, 4, seed=1))
    assert "a[/x] :smile:.json" in run("compare", "a.json", "a[/x] :smile:.json").stdout


def test_profiles_stand_side_by_side(folder):
    write(folder / "a.json", make_profile(5, 4))
    write(folder / "b.json", add_model_losses(make_profile(5, 4)))
    write(folder / "c.json", make_allocation(5, 4))
    assert succeed("plot", "a.json", "b.json", "c.json", "-o", "both.png") == "both.png\n"
    assert (folder / "both.png").read_bytes().startswith(b"\x89PNG")
    write(folder / "d.json", make_profile(6, 4))
    assert "profile d.json is for another model than the first profile" in refuse("plot", "a.json", "d.json")
