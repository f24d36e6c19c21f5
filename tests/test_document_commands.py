"""The commands of README, serving.md and reproduce/ are run, in the text's order, by a reader with a small model."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import tiny
from click.testing import CliRunner
from command_line import shrink_runs
from documents import EXAMPLES, ROOT, TOOLS, list_commands
from results import make_quality, make_speed
from synthetic import make_cost_table

from lexi_search.artifacts import serialisation

DOCUMENTS = ["README.md", "examples/serving.md", "examples/reproduce/README.md"]
ENGINE = "starts vLLM, as tests/adapter/speed, evaluation and serving do"
# What is parsed only, in test_documents.py, by how it begins; and why.
NOT_RUN = {
    "lexi-adapter latency ": ENGINE,
    "lexi-adapter bench ": ENGINE,
    "lexi-adapter eval weights/ --backend vllm ": ENGINE,
    "lexi-adapter eval served/ --backend vllm ": ENGINE,
    "lexi-adapter check served/ --url ": "asks a server, as tests/adapter/serving/test_vllm_server.py does",
    "lexi-search profile weights/ --distributed": "needs Slurm; tests/search/profiling/test_distributed.py starts two",
}
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


def type_in(line):
    """Run a command; what it names by -o is there afterwards."""
    tool, *words = shlex.split(line)
    done = CliRunner().invoke(TOOLS[tool], words, catch_exceptions=False)
    assert done.exit_code == 0, f"{line}: {done.output}"
    for option, value in zip(words, words[1:], strict=False):
        assert option != "-o" or Path(value).exists(), f"{line}: no {value}"


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A reader's folder: weights, a text, a cost table, and what README's profile and a search by it write."""
    place = tmp_path_factory.mktemp("reader")
    tiny.make_checkpoint(
        "olmoe", place / "weights", num_hidden_layers=LAYERS, vocab_size=2048, max_position_embeddings=1024
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLES / "tiny-olmoe" / name, place / "weights")
    shutil.copy(ROOT / "README.md", place / "mine.txt")
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
    return place


@pytest.fixture
def reader(started, folder, monkeypatch):
    """The working directory: a copy of what is started."""
    shutil.copytree(started, folder, dirs_exist_ok=True, symlinks=True)
    shutil.copytree(folder, folder / "faster.lexi", ignore=lambda _, names: [n for n in names if "profile." not in n])
    shrink_runs(monkeypatch)


def write_measured():
    """What the engines that are not started would have written."""
    Path("eval.json").write_text(json.dumps(make_quality()).replace("mine.json", "allocation.json"))
    Path("bench.json").write_text(json.dumps(make_speed()).replace("./mine.json", "allocation.json"))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_commands_of_a_document_run_in_its_order(document, reader):
    ran = 0
    for command in find_commands(document):
        if command in NAMED or command.startswith(tuple(NOT_RUN)) or command == "lexi-search profile weights/":
            continue
        if command.startswith("lexi-adapter tradeoff "):
            write_measured()
        type_in(INSTEAD.get(command, command))
        ran += 1
    assert ran >= 3


def test_what_is_not_run_is_in_a_document_and_whole():
    every = [command for document in DOCUMENTS for command in find_commands(document)]
    assert "lexi-search profile weights/" in every and set(INSTEAD) <= set(every) and set(NAMED) <= set(every)
    assert all(any(command.startswith(start) for command in every) for start in NOT_RUN)
