"""No command of either tool writes over what it reads: not by its name, not through a link, not by a hard link."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from command_line import write
from corrections import draw_maps
from synthetic import make_allocation, make_profile

from lexi_adapter.cli.main import main as adapter
from lexi_search.artifacts.compensation import write_maps
from lexi_search.artifacts.serialisation import write_allocations
from lexi_search.cli.main import main as search

# Command -> the files that it reads, with what it takes to name them; OUT is the output.
COMMANDS = {
    "profile model -o OUT": "model/config.json model/model.safetensors",
    "search p --budget 9 -o OUT": "p",
    "search p --cost cost --target-ms 1 -o OUT": "p cost",
    "search p --budget 9 --history OUT": "p",
    "front p -o OUT": "p",
    "front p --knee --allocation OUT": "p",
    "plot p q a -o OUT": "p q a",
    "merge p q -o OUT": "p q",
    "export a --to json --model model -o OUT": "a model/config.json model/model.safetensors",
    "bench model --allocation a -o OUT": "a model/config.json model/model.safetensors",
    "bench model --folder other --plot OUT": "model/config.json other/config.json",
    "eval model --task perplexity --text t --allocation a -o OUT": "a t model/config.json",
    "eval model --task lm-eval:x --include-path tasks --tokenizer other -o OUT": "other/config.json",
    "latency model -o OUT": "model/config.json model/model.safetensors",
    "loads model --text t -o OUT": "t model/config.json",
    "sensitivity model --text t --tokenizer other -o OUT": "t model/config.json other/config.json",
    "tradeoff p q -o OUT": "p q",
    "search c.json --budget 9 --history OUT": "c.json c.safetensors",
    "bench model --allocation b.json -o OUT": "b.json b.safetensors",
    "eval model --task perplexity --text t --allocation b.json -o OUT": "b.json b.safetensors",
    "loads model --text t --allocation b.json -o OUT": "b.json b.safetensors",
}
ADAPTER = ("bench", "eval", "latency", "loads", "sensitivity", "tradeoff")
WAYS = {
    "itself": lambda file, suffix: file,
    "symlink": lambda file, suffix: Path(f"link{suffix}").symlink_to(Path(file).absolute()) or f"link{suffix}",
    "hard link": lambda file, suffix: os.link(os.path.realpath(file), f"hard{suffix}") or f"hard{suffix}",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("p", "q"):
        write(tmp_path / name, make_profile())
    write(tmp_path / "a", make_allocation())
    profile, allocation = make_profile(), make_allocation(gate_exponent=0.5)
    pairs = [(layer, k) for layer in profile.layers for k in range(1, profile.model.top_k)]
    maps = draw_maps(profile.model, pairs, hidden=8)
    write_allocations([tmp_path / "b.json"], [allocation], maps)
    named = write_maps(tmp_path / "c.safetensors", maps, profile.model)
    settings = replace(profile.settings, gate_exponent=0.5, compensation_rank=named.rank)
    write(tmp_path / "c.json", replace(profile, settings=settings, compensation=named))
    for name in ("cost", "t"):
        (tmp_path / name).write_text("{}")
    config = {"model_type": "olmoe", "num_hidden_layers": 4, "num_experts_per_tok": 4}
    (tmp_path / "blobs").mkdir()
    for name in ("model", "other"):  # as in the hub's cache
        (tmp_path / name).mkdir()
        (tmp_path / "blobs" / name).write_text(json.dumps(config))
        (tmp_path / name / "config.json").symlink_to(f"../blobs/{name}")
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
    return tmp_path


def read_all(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_writes_over_what_it_reads(folder, command, way):
    name = command.partition(" ")[0]
    for read in COMMANDS[command].split():
        suffix = ".png" if name in ("tradeoff", "plot") or "--plot" in command else ".json"
        for link in (f"link{suffix}", f"hard{suffix}"):
            Path(link).unlink(missing_ok=True)
        out = WAYS[way](read, suffix)
        before = read_all(folder)
        tool = adapter if name in ADAPTER else search
        result = CliRunner().invoke(tool, command.replace("OUT", out).split(), catch_exceptions=False)
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.stderr
        assert "the same command reads" in result.stderr
        assert read_all(folder) == before


def test_no_file_of_a_folder_is_an_input(folder):
    (folder / "out").mkdir()
    (folder / "p").rename(folder / "out/allocation-10.json")
    before = read_all(folder)
    command = ["search", "out/allocation-10.json", "--budgets", "9:10:1", "-o", "out"]
    result = CliRunner().invoke(search, command, catch_exceptions=False)
    assert result.exit_code == 2 and "allocation-10.json: the same command reads" in result.stderr
    assert read_all(folder) == before
