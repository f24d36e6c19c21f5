"""The commands of README, serving.md and reproduce/ are run, in the text's order, by a reader with a small model.

With LEXI_DOCUMENTS=engine, minutes long, also those that start vLLM or ask a server.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import tiny
from click.testing import CliRunner
from command_line import shrink_runs
from documents import EXAMPLES, ROOT, TOOLS, list_commands
from results import make_quality, make_speed
from served_documents import serving, type_in_engine, write_inputs
from synthetic import make_cost_table

from lexi_search.artifacts import serialisation

DOCUMENTS = ["README.md", "examples/serving.md", "examples/reproduce/README.md"]
ENGINES = os.environ.get("LEXI_DOCUMENTS") == "engine"
# By how they begin: what starts engines, what asks a server, and what needs Slurm (tests/search/profiling/
# test_distributed.py starts two processes). The first two are run if ENGINES; test_documents.py parses all.
STARTS = (
    *("lexi-adapter latency ", "lexi-adapter bench "),
    *("lexi-adapter eval weights/ --backend vllm ", "lexi-adapter eval served/ --backend vllm "),
)
ASKS = "lexi-adapter check served/ --url "
NOT_RUN = "lexi-search profile weights/ --distributed"
# Named in a sentence, without what it works on.
NAMED = {
    *("lexi-search compare", "lexi-search profile", "lexi-search export --to json"),
    *("lexi-adapter eval", "lexi-adapter bench", "lexi-adapter check"),
}
# The experts of so small a model take a thousandth of a step: nothing makes it 1.3 times as fast.
INSTEAD = {
    "lexi-search auto weights/ --target-speedup 1.3 -o faster/": "lexi-search auto weights/ --budget 50% -o faster/"
}
LAYERS, TOP_K, EXPERTS = 4, 4, 16


def find_commands(document):
    """The commands of a document, each once, without comments."""
    found = list_commands((ROOT / document).read_text("utf-8"))
    return list(dict.fromkeys(shlex.join(shlex.split(command, comments=True)) for command in found))


def run_tool(line):
    """What a command prints."""
    tool, *words = shlex.split(line)
    done = CliRunner().invoke(TOOLS[tool], words, catch_exceptions=False)
    assert done.exit_code == 0, f"{line}: {done.output}"
    return done.stdout


def type_in(line):
    """Run a command; what it names by -o is there afterwards."""
    run_tool(line)
    words = shlex.split(line)
    for option, value in zip(words, words[1:], strict=False):
        assert option != "-o" or Path(value).exists(), f"{line}: no {value}"


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A reader's folder: weights, a text, a cost table, and what README's profile and a search by it write."""
    place = tmp_path_factory.mktemp("reader")
    shape = {"num_hidden_layers": LAYERS, "vocab_size": 2048, "max_position_embeddings": 1024}
    shape |= {"intermediate_size": 2048} if ENGINES else {}  # experts whose time is not lost in an engine's
    tiny.make_checkpoint("olmoe", place / "weights", **shape)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLES / "tiny-olmoe" / name, place / "weights")
    write_inputs(place)
    for name in ("mine.txt", "wiki.txt"):
        shutil.copy(ROOT / "README.md", place / name)
    table = make_cost_table(LAYERS, TOP_K, num_experts=EXPERTS, sizes=(16, 16384))
    (place / "cost.json").write_bytes(serialisation.to_bytes(table))
    (place / "examples").symlink_to(EXAMPLES)
    (place / "quickstart").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("JAX_COMPILATION_CACHE_DIR", "")
        shrink_runs(patch)
        type_in("lexi-search profile weights/")
        type_in("lexi-search search profile.json --budget 50%")
        if ENGINES:  # an allocation with corrections, which so little text mostly does without
            type_in("lexi-search profile weights/ --compensation full -o corrected.json")
            type_in("lexi-search search corrected.json --budget 50% -o a.json")
    return place


@pytest.fixture
def reader(started, folder, monkeypatch):
    """The working directory, a copy of what is started."""
    shutil.copytree(started, folder, dirs_exist_ok=True, symlinks=True)
    shutil.copytree(folder, folder / "faster.lexi", ignore=lambda _, names: [n for n in names if "profile." not in n])
    shrink_runs(monkeypatch)
    return folder


def write_measured():
    """What the engines that are not started would have written."""
    Path("eval.json").write_text(json.dumps(make_quality()).replace("mine.json", "allocation.json"))
    Path("bench.json").write_text(json.dumps(make_speed()).replace("./mine.json", "allocation.json"))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_commands_of_a_document_run_in_its_order(document, reader):
    ran = 0
    for command in find_commands(document):
        starts = command.startswith(STARTS)
        if command in NAMED or command.startswith((NOT_RUN, ASKS)) or starts and not ENGINES:
            continue
        if command == "lexi-search profile weights/":
            continue
        if command.startswith("lexi-adapter tradeoff ") and not ENGINES:
            write_measured()
        if starts:
            print(f"$ {command}\n{type_in_engine(command)}")
        else:
            type_in(INSTEAD.get(command, command))
        ran += 1
    assert ran >= 3


@pytest.mark.skipif(not ENGINES, reason="LEXI_DOCUMENTS=engine runs it")
def test_each_way_in_serves_what_the_document_says(reader):
    every = (ROOT / "examples" / "serving.md").read_text("utf-8")
    type_in("lexi-search export allocation.json --to vllm --model weights/ -o served/")
    told = run_tool("lexi-search export allocation.json --to vllm --model weights/")
    (pasted,) = [line for line in told.splitlines() if line.startswith("vllm serve ")]
    beside = """vllm serve weights/ --additional-config '{"lexi_allocation": "/path/allocation.json"}'"""
    (check,) = [command for command in find_commands("README.md") if command.startswith(ASKS)]
    assert check in find_commands("examples/serving.md") and f"`{beside}`" in every and "vllm serve served/" in every
    plain = hashlib.sha256(Path("allocation.json").read_bytes()).hexdigest()[:12]
    of_folder = re.search(r"sha256 ([0-9a-f]{12})", run_tool("lexi-adapter check served/"))[1]
    ways = {"vllm serve served/": of_folder, pasted: plain, beside.replace("/path", str(reader)): plain}
    for line, sha256 in ways.items():
        with serving(line) as (url, read_log):
            stated = re.search(r"LExI allocation applied: .*", read_log())[0]
            live = run_tool(check.replace("http://localhost:8000", url))
        assert f"sha256 {sha256}" in stated and f"sha256 {sha256}" in live, f"{line}: {stated} {live}"
        print(f"$ {line}\n{stated}\n{live}")


def test_what_is_not_run_is_in_a_document_and_whole():
    every = [command for document in DOCUMENTS for command in find_commands(document)]
    assert "lexi-search profile weights/" in every and set(INSTEAD) <= set(every) and set(NAMED) <= set(every)
    assert all(any(command.startswith(start) for command in every) for start in (*STARTS, ASKS, NOT_RUN))
