"""Parts of one profile put together: the same bytes as one run, and nothing that is no part of it."""

import dataclasses
import os
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from synthetic import make_profile

from lexi_search.artifacts import serialisation
from lexi_search.artifacts.profile import format_layers, merge
from lexi_search.cli.main import main
from lexi_search.cli.options import parse_layers
from lexi_search.errors import InputError

WHOLE = make_profile(12)


def take(layers, whole=WHOLE):
    return dataclasses.replace(whole, layers={layer: whole.layers[layer] for layer in layers})


layer_sets = st.sets(st.sampled_from(WHOLE.model.moe_layers), min_size=1)


@given(st.lists(layer_sets, min_size=1, max_size=5))
def test_parts_in_any_order_and_overlapping_are_the_whole_of_their_layers(shares):
    merged = merge({str(place): take(share) for place, share in enumerate(shares)})
    assert serialisation.to_bytes(merged) == serialisation.to_bytes(take(sorted(set().union(*shares))))


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda p: dataclasses.replace(p, settings=dataclasses.replace(p.settings, seed=1)),
            "settings.seed is 1, not 0",
        ),
        (
            lambda p: dataclasses.replace(p, model=dataclasses.replace(p.model, router_sha256="0" * 64)),
            f"model.router_sha256 is {'0' * 37}..., not 0123456789abcdef0123456789abcdef01234...",
        ),
        (lambda p: dataclasses.replace(p, made_by={"lexi_search": "9"}), "made_by.lexi_search is 9, not 0.1.0"),
        (lambda p: dataclasses.replace(p, made_by={**p.made_by, "x": 1}), "made_by.x is 1, not None"),
    ],
)
def test_parts_of_different_profiles_are_refused(change, words):
    with pytest.raises(InputError) as caught:
        merge({"a.json": take([0, 1]), "b.json": change(take([2, 3]))})
    assert str(caught.value) == f"b.json: {words} as in a.json; only parts of one profile can be merged"


def test_a_layer_measured_twice_with_different_losses_is_refused():
    other = dataclasses.replace(WHOLE, layers=make_profile(12, seed=1).layers)
    parts = {"a": take([0, 1]), "b": take([2, 3]), "c": take([3, 4], other)}
    with pytest.raises(InputError, match="^c: layer 3 differs from that in b; leave one of them out$"):
        merge(parts)


@given(layer_sets)
def test_layers_are_written_as_they_are_read(layers):
    assert parse_layers(format_layers(sorted(layers))) == tuple(sorted(layers))


def test_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, layers in (("a", range(4)), ("b", range(6, 9)), ("c", (4, 5, 9, 10, 11))):
        serialisation.write_profile(name, take(layers))

    def run(*arguments):
        return CliRunner().invoke(main, ["merge", *arguments], catch_exceptions=False)

    done = run("a", "b", "-o", "ab")
    assert (done.exit_code, done.stdout) == (0, "ab\n")
    assert done.stderr.splitlines() == [
        "done: 7 of 12 MoE layers, from 2 parts; still missing: --layers 4:5,9:11",
        "next: lexi-search profile WEIGHTS --layers 4:5,9:11 -o rest.json",
        "next: lexi-search merge ab rest.json -o whole.json",
    ]
    done = run("c", "ab")
    assert (done.exit_code, done.stdout) == (0, "profile.json\n")
    assert done.stderr.splitlines()[0] == "done: 12 of 12 MoE layers, from 2 parts"
    assert Path("profile.json").read_bytes() == serialisation.to_bytes(WHOLE)
    before = sorted(os.listdir())
    for arguments, words in (
        (("a", "absent"), "cannot read absent: No such file or directory"),
        (("a", "-o", "absent/x"), "cannot write absent/x"),
    ):
        done = run(*arguments)
        assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert words in done.stderr
    assert run().exit_code == 2
    assert sorted(os.listdir()) == before
