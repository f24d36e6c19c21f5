"""The documents' commands that need vLLM, as two CPU cores can run them: its build for CPUs, nothing compiled."""

import importlib.util
import json
import shlex
import sys
from contextlib import contextmanager
from pathlib import Path

from documents import EXAMPLES
from engine import start
from results import MADE_TASK

ENTRY = "import sys; from {}.cli.entry import run; sys.argv[0] = {!r}; run()"
EAGER = ["--engine", json.dumps({"dtype": "float32", "enforce_eager": True})]
FIGURE_2 = "examples/benchmarks/configs/qwen1.5-moe-a2.7b"
# What stands for the text's own: shorter prompts, a shape that fits into memory, tasks whose data are here.
INSTEAD = {
    "16x1024x1024": ["64x16x16"],
    FIGURE_2: ["figure-2"],
    "lm-eval:paper": ["lm-eval:lexi_made", "--include-path", "tasks"],
    "cost.json": ["measured.json"],  # of so small a model it is noise, which leads to no speed-up
}
MORE = {  # by command, and by task of eval
    "latency": ["--rounds", "5"],
    "bench": ["--rounds", "1", "--in-place"],
    "perplexity": ["--max-windows", "2"],
    "passkey": ["--depths", "2", "--trials", "1"],
    "qasper": ["--max-items", "2"],
}
SHRUNK = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128, "num_hidden_layers": 2}
SHRUNK |= {"shared_expert_intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
TASK = MADE_TASK | {"task": "lexi_made"}


def write_inputs(place):
    """Write the data that the documents' commands read besides a text, as small as can be."""
    (place / "figure-2").mkdir()
    config = json.loads((EXAMPLES.parent / FIGURE_2 / "config.json").read_text()) | SHRUNK | {"vocab_size": 2048}
    (place / "figure-2" / "config.json").write_text(json.dumps(config))
    question = {"context": "The cat is black. " * 20, "question": "What colour is the cat?", "answers": ["black"]}
    (place / "qasper.jsonl").write_text(json.dumps(question) + "\n")
    (place / "tasks").mkdir()
    documents = [{"question": "def f(self):", "choices": ["return", "zebra"], "answer": n % 2} for n in range(2)]
    (place / "made.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    data = {"dataset_kwargs": {"data_files": {"test": str(place / "made.jsonl")}}}
    (place / "tasks" / "task.yaml").write_text(json.dumps(TASK | data))


def type_in_engine(line):
    """Run a command that starts engines in a process of its own, and return what it printed."""
    tool, command, *words = shlex.split(line)
    words = [other for word in words for other in INSTEAD.get(word, [word])]
    entry = ENTRY.format(tool.replace("-", "_"), tool)
    words += ["--workload", "16x64x16"] if command == "bench" and "--workload" not in words else []
    more = [other for word in dict.fromkeys([command, *words]) for other in MORE.get(word, [])]
    done = start(sys.executable, "-c", entry, command, *words, *EAGER, *more, timeout=1800)
    assert done.returncode == 0, f"{line}: {done.stdout[-1000:]}{done.stderr[-3000:]}"
    for option, value in zip(words, words[1:], strict=False):
        assert option not in ("-o", "--plot") or Path(value).stat().st_size, f"{line}: no {value}"
    return done.stdout


@contextmanager
def serving(line):
    """The server that a `vllm serve` of the documents starts: its address, and its log so far by a call."""
    specification = importlib.util.spec_from_file_location("serve_demo", EXAMPLES / "serve_demo.py")
    demo = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(demo)
    *command, folder = shlex.split(line)[:3]
    assert command == ["vllm", "serve"]
    with demo.serving(folder, *shlex.split(line)[3:]) as (url, log):
        yield url, log.read_text
