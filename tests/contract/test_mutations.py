"""Mutated files of this project: each is read as what it says, by both packages alike, or refused in one line.

What carries a checksum (journals, results of `eval`, finished layers) is never believed changed. Some in CI;
`LEXI_MUTATIONS=15000` sets another number, of each kind. Those of checkpoints are in `test_checkpoints.py`, of configs
in `tests/search/models/test_config_mutations.py`, of headers in `tests/search/checkpoint/test_fuzz.py`.
"""

import json
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from corrections import draw_maps
from mutation import mutate_bytes, mutate_text
from results import make_quality, make_speed
from synthetic import add_model_losses, make_allocation, make_cost_table, make_identity, make_profile

from lexi_adapter.allocation import read_allocation, to_document
from lexi_adapter.cli.commands.eval import _read_finished
from lexi_adapter.cli.tables import tabulate_tradeoff
from lexi_adapter.errors import AdapterError
from lexi_adapter.evaluation import evaluate
from lexi_adapter.evaluation.results import read_results
from lexi_adapter.evaluation.tradeoff import join, match
from lexi_adapter.files import write_json
from lexi_adapter.model.variants import Variant
from lexi_adapter.sensitivity.ablation import LayerLosses
from lexi_adapter.sensitivity.journal import keep_journal
from lexi_adapter.tasks.scores import Outcome, Score, Task
from lexi_search.allocation.costs import weigh
from lexi_search.artifacts import serialisation
from lexi_search.artifacts.compensation import format_maps, write_maps
from lexi_search.artifacts.profile import read_header
from lexi_search.cli.main import main
from lexi_search.errors import InputError
from lexi_search.profiling.resume import keep_partials

COUNT = int(os.environ.get("LEXI_MUTATIONS", "100"))


def mutate(name, original, change=mutate_text):
    """The number of every mutation, while the file `name` holds it."""
    rng = random.Random(name)
    for number in range(COUNT):
        Path(name).write_bytes(change(rng, original))
        yield number


def run(*arguments):
    """Whether the command takes its input; it refuses in one line."""
    done = CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code in (0, 2), done.output
    assert done.exit_code == 0 or (done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1)
    assert all(line.isprintable() for line in done.output.split("\n"))
    return done.exit_code == 0


def test_allocations_are_read_alike(folder):
    accepted = 0
    for number in mutate("a.json", serialisation.to_bytes(make_allocation(gate_exponent=0.5))):
        results = []
        for read, document, error in (
            (serialisation.read_allocation, serialisation.to_document, InputError),
            (read_allocation, to_document, AdapterError),
        ):
            try:
                results.append(document(read("a.json")))
            except error as refusal:
                assert "\n" not in str(refusal) and "a.json" in str(refusal)
                results.append(None)
        assert results[0] == results[1], number
        assert run("show", "a.json") == (results[0] is not None)
        if results[0] is not None:
            accepted += 1
            assert run("show", "a.json", "--json")
            run("export", "a.json", "--to", "transformers")
    assert 0 < accepted < COUNT


@pytest.mark.parametrize("make", [make_profile, lambda: add_model_losses(make_profile())], ids=["paper", "weights"])
def test_profiles_are_shown_or_refused(folder, make):
    accepted = 0
    for _ in mutate("p.json", serialisation.to_bytes(make())):
        accepted += run("show", "p.json")
        run("show", "p.json", "--json", "--absolute", "--loss", "squared")
        run("merge", "p.json", "-o", "merged.json")
    assert 0 < accepted < COUNT


def test_cost_tables_are_weighed_or_refused(folder):
    accepted = 0
    for _ in mutate("c.json", serialisation.to_bytes(make_cost_table())):
        try:
            weigh(serialisation.read_cost_table("c.json"), make_identity(), mix={16: 3.0, 4096: 1.0})
            accepted += 1
        except InputError as refusal:
            assert "\n" not in str(refusal)
    assert 0 < accepted < COUNT


def test_corrections_are_taken_along_or_refused(folder):
    profile = make_profile()
    settings = replace(profile.settings, gate_exponent=0.5, compensation_rank=2)
    pairs = [(layer, k) for layer in profile.layers for k in range(1, profile.model.top_k)]
    named = write_maps("p.safetensors", draw_maps(profile.model, pairs, hidden=8, rank=2), profile.model)
    data = serialisation.to_bytes(replace(profile, settings=settings, compensation=named))
    Path("p.json").write_bytes(data)
    for name, change in (("p.json", mutate_text), ("p.safetensors", mutate_bytes)):
        original, accepted = Path(name).read_bytes(), 0
        for _ in mutate(name, original, change):
            same = Path(name).read_bytes() == original
            accepted += run("show", "p.json") and not same
            assert not run("merge", "p.json", "-o", "merged.json", "--force") or same or name == "p.json"
        assert 0 < accepted < COUNT if name == "p.json" else accepted == 0
        Path(name).write_bytes(original)


class Stop(Exception):
    """The end of a run that is cut short."""


RUN = {"model": {"name": "m"}, "made_by": {"sequences_per_pass": 1}, "losses": []}
PARTS = {(0, layer): LayerLosses([[layer + 0.5]], [[0.5, 1e-9]], [], []) for layer in range(3)}


def test_what_has_changed_in_a_journal_is_not_believed(folder):
    def read():
        with keep_journal("out", RUN) as journal:
            found.update(journal.parts)
            raise Stop

    found = {}
    with pytest.raises(Stop), keep_journal("out", RUN) as journal:
        for (batch, layer), part in PARTS.items():
            journal.add(batch, layer, part)
        raise Stop
    original, counts = Path("out.partial").read_bytes(), set()
    for number in mutate("out.partial", original, mutate_bytes):
        found.clear()
        data = Path("out.partial").read_bytes()
        try:
            with pytest.raises(Stop):
                read()
        except AdapterError as refusal:
            assert "\n" not in str(refusal)
            assert Path("out.partial").read_bytes() == data
        else:
            counts.add(len(found))
            assert found == dict(list(PARTS.items())[: len(found)]), number
            assert len(found) == len(PARTS) or data != original
    assert len(counts) > 1


def test_what_has_changed_in_results_is_not_believed(folder):
    Path("model").mkdir()
    variants = [Variant("base", "model"), Variant("again", "model")]
    tasks = [Task(name, {"kind": "test"}, 1, None) for name in ("one", "two")]
    pieces = {
        (variant.name, task.name): Outcome({"a": Score(2.0, 0.1, (1.0, 3.0)), "b": Score(1.0)}, {"2": "two"})
        for variant in variants
        for task in tasks
    }
    write_json("eval.json", evaluate.make_document(variants, tasks, {"backend": "x"}, pieces))
    expected, accepted = evaluate.make_document(variants, tasks, {"backend": "x"}, {}), 0
    for number in mutate("eval.json", Path("eval.json").read_bytes()):
        try:
            found = _read_finished("eval.json", expected)
        except AdapterError as refusal:
            assert "\n" not in str(refusal)
        else:
            accepted += 1
            assert found.items() <= pieces.items() or all(found[place] == pieces[place] for place in found), number
    assert 0 < accepted < COUNT


def same_maps(one, other):
    return format_maps(one, make_identity()) == format_maps(other, make_identity())


def test_what_has_changed_of_a_finished_layer_is_measured_again(folder):
    profile = make_profile()
    header, made = read_header(profile), {"tokens": [1, 2, 3]}
    maps = draw_maps(profile.model, [(0, 1), (0, 2), (0, 3)], hidden=8, rank=2)
    with pytest.raises(Stop), keep_partials("p", header) as kept:
        assert kept.find("text", lambda: made) == made
        assert same_maps(kept.add_maps(0, maps), maps)
        for layer, loss in profile.layers.items():
            kept.add(layer, loss)
        raise Stop
    rng, files = random.Random(0), {path: path.read_bytes() for path in Path("p.partial").glob("*-*")}
    assert len(files) == len(profile.layers) + 2
    for number in range(COUNT):
        path = rng.choice(list(files))
        path.write_bytes(mutate_text(rng, files[path]))
        unchanged = path.read_bytes() == files[path]
        with pytest.raises(Stop), keep_partials("p", header) as kept:
            assert kept.layers.items() <= profile.layers.items(), number
            assert kept.findings in ({}, {"text": made})
            assert kept.maps == {} or same_maps(kept.maps[0], maps)
            assert (kept.damaged, len(kept.layers) + len(kept.findings) + len(kept.maps)) == (
                (0, len(files)) if unchanged else (1, len(files) - 1)
            )
            raise Stop
        path.write_bytes(files[path])


def test_results_are_joined_or_refused(folder):
    documents = {"eval.json": make_quality(), "bench.json": make_speed()}
    for name, document in documents.items():
        write_json(name, document)
    accepted = 0
    for name in documents:
        original = Path(name).read_bytes()
        for _ in mutate(name, original):
            try:
                quality, speed = read_results("eval.json", "lexi-eval"), read_results("bench.json", "lexi-bench")
                tabulate_tradeoff(join(quality, speed, tasks=(), workloads=()))
                match(quality, speed)
                accepted += 1
            except AdapterError as refusal:
                assert "\n" not in str(refusal)
        Path(name).write_bytes(original)
    assert 0 < accepted < 2 * COUNT


@pytest.mark.parametrize("value", [1e16, 1e200, 1e308])
def test_losses_whose_squares_overflow_are_refused(folder, value):
    document = serialisation.to_document(make_profile())
    document["layers"]["0"]["rms"][0] = value
    Path("p.json").write_text(json.dumps(document))
    for command in (("show", "p.json", "--loss", "squared", "--json"), ("search", "p.json", "--budget", 9)):
        assert not run(*command)


def test_an_allocation_of_very_many_experts_is_shown(folder):
    document = serialisation.to_document(make_allocation())
    document["model"] |= {"top_k": 2**50, "num_experts": 2**51}
    Path("a.json").write_text(json.dumps(document))
    assert run("show", "a.json")
