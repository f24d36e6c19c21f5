"""`show` reads every file that either tool writes."""

import json
import re
import shutil
from pathlib import Path

import pytest
from command_line import refuse, succeed, write
from synthetic import make_cost_table, make_profile

from lexi_search.artifacts.records import read_record
from lexi_search.checkpoint.folder import write_record
from lexi_search.errors import InputError

ROOT = Path(__file__).parents[3]
FILES = sorted((ROOT / "examples" / "benchmarks" / "results").rglob("serving_*.json"))
RESULTS = [path for path in FILES if '"format": "lexi-' in path.read_text()]
SUMMARY = [{"variant": "base", "task": "perplexity", "metric": "nll", "value": 2.5, "stderr": 0.01}]
EVAL = {"format": "lexi-eval", "version": 1, "model": "/models/olmoe", "summary": SUMMARY}
JOURNAL = {"model": {"model_type": "olmoe"}, "settings": {"seed": 0}, "made_by": {}, "losses": ["divergence"]}


def find_formats():
    """The formats that the code of both packages names."""
    files = [path for name in ("lexi_search", "lexi_adapter") for path in (ROOT / name).rglob("*.py")]
    return set(re.findall(r'"(lexi-[a-z]+)"', "\n".join(path.read_text() for path in files)))


def test_every_format_of_either_package_is_read(folder):
    (folder / "x").write_text('{"format": "lexi-nonsense"}')
    known = set(refuse("show", "x").partition("expected one of ")[2].split(", "))
    binary = {"lexi-compensation"}  # shown with the profile or the allocation that names it
    assert find_formats() - known <= {"lexi-search", "lexi-adapter", "lexi-moe"} | binary


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: "-".join(path.parts[-2:]))
def test_results_in_the_repository_are_shown(folder, path):
    record = read_record(str(path))
    kind = json.loads(path.read_text())["format"]
    assert record.kind == kind and record.rows
    assert all(len(row) == len(record.columns) for row in record.rows)


def test_files_of_each_kind_are_shown(folder):
    write(folder / "p", make_profile())
    write(folder / "cost", make_cost_table())
    succeed("search", "p", "--budget", "50%", "--history", "h.json")
    succeed("front", "p")
    (folder / "e.json").write_text(json.dumps(EVAL))
    (folder / "j.partial").write_text(json.dumps(JOURNAL) + "\n" + "0123 [0, 1, []]\n")
    for name, words in {
        "cost": ["16", "4096", "k=4"],
        "h.json": ["8", "400"],
        "front.json": ["Pareto points", "k per layer"],
        "e.json": ["olmoe: scores", "perplexity", "2.5", "0.01"],
        "j.partial": ["finished parts", "olmoe"],
    }.items():
        shown = succeed("show", name)
        assert all(word in shown for word in words), shown
        assert json.loads(succeed("show", name, "--json"))["rows"]


def test_what_a_run_that_was_cut_short_has_finished_is_shown(folder):
    (folder / "profile.json.partial").mkdir()
    for name in ("0-0123456789abcdef.json", "1-0123456789abcdef.json", "text-0123456789abcdef.found"):
        (folder / "profile.json.partial" / name).touch()
    shown = succeed("show", "profile.json.partial")
    assert re.search(r"finished layers +0:1 ", shown) and re.search(r"kept for all +text", shown)


@pytest.mark.parametrize("document", [{"format": "lexi-eval"}, EVAL | {"summary": [{}]}, EVAL | {"summary": 3}])
def test_a_file_that_is_not_whole_is_refused(folder, document):
    (folder / "x").write_text(json.dumps(document))
    with pytest.raises(InputError, match="^x: a lexi-eval file that is not whole"):
        read_record("x")
    (folder / "empty").mkdir()
    assert "no folder that these tools made" in refuse("show", "empty")


def test_what_is_damaged_in_an_exported_folder_is_named_with_the_remedy(folder):
    (folder / "model").mkdir()
    (folder / "model" / "model.safetensors").touch()

    def export():
        shutil.rmtree("served", ignore_errors=True)
        Path("served").mkdir()
        Path("served/model.safetensors").symlink_to("../model/model.safetensors")
        Path("served/vocabulary").write_text("a")
        allocation = {"top_k": {"0": 1}, "made_by": {}, "budget": 1, "model": {"model_type": "olmoe"}}
        Path("served/config.json").write_text(json.dumps({"lexi_allocation": allocation}))
        write_record(Path("served"))

    export()
    assert "link to ../model/model.safetensors" in succeed("show", "served")
    Path("served/vocabulary").write_text("b")
    assert re.search("vocabulary +changed since the export", succeed("show", "served"))
    Path("served/vocabulary").unlink()
    assert refuse("show", "served") == ("served/vocabulary is gone since the export; remove served and export again")
    export()
    Path("model/model.safetensors").rename("elsewhere")
    assert refuse("show", "served") == (
        "served/model.safetensors links to served/../model/model.safetensors, which is not there; put it back, or "
        "export again where it is now"
    )
    Path("elsewhere").rename("model/model.safetensors")
    for damaged in ("{}", "{", "[]"):
        Path("served/config.json").write_text(damaged)
        message = "served/config.json: no whole config with an allocation; remove served, export again"
        assert refuse("show", "served") == message
    export()
    Path("served/lexi-export.json").unlink()
    assert refuse("show", "served") == (
        "served: an exported folder without its lexi-export.json; remove it and export again"
    )


def test_what_whole_models_lose_is_shown_by_variant(folder):
    variants = [{"top_k": [2, 1], "gate_exponent": 0.5}, {"top_k": [1, 1], "gate_exponent": None}]
    document = {"format": "lexi-judged", "version": 1, "variants": variants, "divergence": [[0.1, 0.3], [0.5, 0.7]]}
    names, means = ("this allocation, exponent 0.5", "k = 1 in every layer", "the model's own k = 2"), (0.2, 0.6, 0.0)
    rows = zip(names, means, (0.1, 0.1, 0.0), strict=True)
    document["judged"] = [{"name": name, "divergence": mean, "stderr": error} for name, mean, error in rows]
    (folder / "judged.json").write_text(json.dumps(document))
    shown = succeed("show", "judged.json")
    assert "2 1" in shown and "0.5" in shown and "0.2" in shown and "0.6" in shown
