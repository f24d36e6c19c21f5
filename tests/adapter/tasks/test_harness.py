"""lm-eval's tasks: reading its results, and, where it is installed, a task and data that are made here."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from results import MADE_TASK
from transformers import AutoModelForCausalLM, AutoTokenizer

import lexi_adapter
from lexi_adapter.errors import AdapterError
from lexi_adapter.tasks import harness
from lexi_adapter.tasks.scores import Score, find_interval

MODEL = Path(lexi_adapter.__file__).parent.parent / "examples" / "tiny-olmoe"
CHOICES = ["self", "None", "zebra"]  # lm-eval puts a space before each
TASK = MADE_TASK | {"task": "lexi_returns", "metadata": {"version": 1.0}}


def make_samples(values):
    return [{"doc_id": n, "filter": "none", "acc": value} for n, value in reversed(list(enumerate(values)))]


def test_scores_come_with_the_values_of_the_documents():
    results = {
        "results": {
            "group": {"alias": "group", "acc,none": 0.6, "acc_stderr,none": 0.1},
            "one": {"alias": "one", "acc,none": 0.5, "acc_stderr,none": 0.2, "f1,none": 0.9, "f1_stderr,none": "N/A"},
            "two": {"alias": "two", "acc,none": 2 / 3, "acc_stderr,none": 0.3},
        },
        "group_subtasks": {"group": ["one", "two"]},
        "samples": {"one": make_samples([1.0, 0.0]), "two": make_samples([1.0, 1.0, 0.0])},
    }
    five, two = (1.0, 0.0, 1.0, 1.0, 0.0), (1.0, 0.0)
    assert dict(harness.read_scores(results, "group")) == {"acc": Score(0.6, 0.1, five, find_interval(five))}
    one = {"acc": Score(0.5, 0.2, two, find_interval(two)), "f1": Score(0.9)}
    assert dict(harness.read_scores(results, "one")) == one
    # A group with another mean than that of its documents has no values of its own, a tag no metric of its own.
    results["results"]["group"]["acc,none"] = 7 / 12
    assert dict(harness.read_scores(results, "group")) == {"acc": Score(7 / 12, 0.1)}
    assert set(dict(harness.read_scores(results, "tag"))) >= {"one acc", "one f1", "two acc"}


def test_task_files_that_change_are_other_tasks(tmp_path):
    """Their hash is in the results; data and other files beside them do not count."""
    (tmp_path / "below").mkdir()
    states = []
    for name, text in (("a.yaml", "1"), ("a.yaml", "2"), ("below/b.yaml", ""), ("below/code.py", "x = 1")):
        (tmp_path / name).write_text(text)
        states.append(harness.hash_sources([tmp_path]))
        (tmp_path / "data.jsonl").write_text(name + text)
        assert harness.hash_sources([str(tmp_path)]) == states[-1]
    assert len(set(states)) == len(states)


def test_the_task_files_are_among_the_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "_load", lambda *_: "0.0")
    (tmp_path / "a.yaml").write_text("1")
    (one,), (same,) = (make_tasks(["a"], [path]) for path in (str(tmp_path), f"{tmp_path}/"))
    (tmp_path / "a.yaml").write_text("2")
    (other,) = make_tasks(["a"], [str(tmp_path)])
    assert one.settings == same.settings != other.settings


def test_without_lm_eval_the_way_to_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(AdapterError, match=r"pip install '\.\[eval\]'"):
        make_tasks(["boolq"])


def make_tasks(names, include_paths=()):
    return harness.make_tasks(
        names,
        backend="transformers",
        include_paths=include_paths,
        max_length=512,
        max_items=None,
        num_fewshot=None,
        batch_size=4,
    )


@pytest.fixture
def task_folder(tmp_path):
    documents = [{"question": f"def f{n}(self):\n    return", "choices": CHOICES, "answer": n % 3} for n in range(6)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    data = {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}}}
    (tmp_path / "task.yaml").write_text(json.dumps(TASK | data))
    return tmp_path, documents


@pytest.mark.skipif(not all(map(find_spec, ("lm_eval", "accelerate", "peft"))), reason="lm-eval[hf] is not installed")
def test_a_task_of_ones_own_is_scored_as_by_hand(task_folder):
    tmp_path, documents = task_folder
    arguments = ["--task", "lm-eval:lexi_returns", "--include-path", tmp_path, "--uniform-k", "1", "--dtype", "float32"]
    code = "from lexi_adapter.cli.main import main; main()"  # in a process of its own: lm-eval and its data sets warn

    def run(*arguments):
        command = [sys.executable, "-c", code, "eval", *map(str, arguments)]
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=one_thread, timeout=500)

    done = run(MODEL, *arguments, "-o", "out.json")
    assert done.returncode == 0, done.stderr[-3000:]
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    found = {
        piece["variant"]: piece["scores"][0] for piece in json.loads((tmp_path / "out.json").read_text())["pieces"]
    }
    for variant, k in (("base", 8), ("uniform k = 1", 1)):
        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, num_experts_per_tok=k).eval()
        right = []
        for document in documents:
            sums = []
            prompt = tokenizer(document["question"])["input_ids"]
            for choice in CHOICES:
                whole = tokenizer(f"{document['question']} {choice}")["input_ids"]
                with torch.no_grad():
                    scores = model(torch.tensor([whole])).logits[0].log_softmax(-1)
                sums.append(sum(scores[place - 1, whole[place]].item() for place in range(len(prompt), len(whole))))
            right.append(float(sums.index(max(sums)) == document["answer"]))
        assert found[variant]["metric"] == "acc" and found[variant]["values"] == right
    for task, message in (("nowhere", "has no task 'nowhere'"), ("boolq", "lm-eval:boolq: ")):
        done = run(MODEL, "--task", f"lm-eval:{task}")
        assert done.returncode == 2 and message in done.stderr.splitlines()[-1]
