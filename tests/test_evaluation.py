"""`lexi-adapter eval` in transformers, judged by direct loops over the model's own logits and by slow arithmetic."""

import json
import math
import random
import shutil
import statistics
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from copying import save_copying_model
from engine import allocate, export
from hypothesis import given
from hypothesis import strategies as st
from tiny import find_moe_blocks
from transformers import AutoModelForCausalLM, AutoTokenizer

import lexi_adapter
from lexi_adapter import evaluation, hooks, passkey, perplexity, qasper, scores, texts
from lexi_adapter.allocation import AllocationError
from lexi_adapter.cli import main
from lexi_adapter.scores import Outcome, Score, Task
from lexi_adapter.variants import Variant
from lexi_search.artifacts import to_document

MODEL = Path(lexi_adapter.__file__).parent.parent / "examples" / "tiny-olmoe"
TEXT = "\n".join(f"def method_{n}(self, value):\n    return self.values[value + {n}]\n" for n in range(40))
WINDOW = 20
MIXED = (1, 5, 2)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads that wait for each other in the smallest of operations take longer than the operations."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def run(*arguments):
    return CliRunner().invoke(main, ["eval", *map(str, arguments)], catch_exceptions=False)


def refuse(*arguments):
    result = run(*arguments)
    assert result.exit_code == 2 and result.stdout == "", result.output
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def write_allocation(path, folder=MODEL, top_k=MIXED):
    path.write_text(json.dumps(to_document(allocate(folder, top_k))))
    return path


def list_losses(model, windows):
    """Mean loss of each window, token by token from the logits of one forward pass."""
    means = []
    for window in windows:
        with torch.no_grad():
            logits = model(torch.tensor([window])).logits[0].double()
        losses = [logits[place].logsumexp(0) - logits[place][window[place + 1]] for place in range(len(window) - 1)]
        means.append(sum(losses).item() / len(losses))
    return means


def test_perplexity_is_that_of_a_direct_loop(folder, tokenizer):
    Path("text.txt").write_text(TEXT)
    write_allocation(Path("mixed.json"))
    exported = export(allocate(MODEL), MODEL, Path("exported"))  # transformers would run its full k
    what = ("--task", "perplexity", "--text", "text.txt", "--window", WINDOW, "--max-windows", "3", "--batch-size", "2")
    variants = ("--uniform-k", "2", "--allocation", "mixed.json", "--folder", exported)
    result = run(MODEL, *what, *variants, "--dtype", "float32", "--device", "cpu")
    assert result.exit_code == 0, result.output
    document = json.loads(Path("eval.json").read_text())

    tokens = tokenizer(TEXT)["input_ids"]
    windows = [tokens[start : start + WINDOW] for start in range(0, 3 * WINDOW, WINDOW)]
    expected = {}
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    cycles = {"base": (8,), "uniform k = 2": (2,), "mixed.json": MIXED, "exported": (1, 3, 2)}
    for name, cycle in cycles.items():
        for layer, block in find_moe_blocks(model).items():
            block.gate.top_k = cycle[layer % len(cycle)]
        expected[name] = list_losses(model, windows)

    lines = {(line["variant"], line["metric"]): line for line in document["summary"]}
    for name, losses in expected.items():
        loss, ppl = lines[name, "loss"], lines[name, "perplexity"]
        assert loss["value"] == pytest.approx(statistics.fmean(losses), abs=1e-4)
        assert ppl["value"] == pytest.approx(math.exp(statistics.fmean(losses)), rel=1e-4)
        assert loss["stderr"] == pytest.approx(statistics.stdev(losses) / math.sqrt(3), abs=1e-4)
        if name != "base":
            differences = [one - other for one, other in zip(losses, expected["base"], strict=True)]
            assert loss["difference"] == pytest.approx(statistics.fmean(differences), abs=1e-4)
            assert loss["difference_stderr"] == pytest.approx(statistics.stdev(differences) / math.sqrt(3), abs=1e-4)
            assert loss["difference"] > 0.05  # all of these lose something that can be seen
    assert {piece["variant"] for piece in document["pieces"]} == set(expected)
    assert "uniform k = 2" in result.stdout and document["made_by"]["lexi_adapter"]


@given(st.lists(st.integers(0, 9), max_size=40), st.integers(2, 7), st.none() | st.just(99))
def test_windows_are_the_text_in_order(tokens, length, bos):
    windows = perplexity.cut_windows(tokens, length, bos)
    assert all(len(window) == length for window in windows)
    read = [token for window in windows for token in window[bos is not None :]]
    assert read == tokens[: len(read)] and len(tokens) - len(read) < length
    assert bos is None or all(window[0] == bos for window in windows)


def test_a_tokenizer_that_puts_a_token_before_a_text_puts_it_before_every_window(tokenizer, tmp_path):
    assert texts.find_bos(tokenizer) is None

    class WithBos:
        bos_token_id = 7

        def __call__(self, text, add_special_tokens=True, **_):
            return {"input_ids": [7] * add_special_tokens + [ord(letter) for letter in text]}

    (tmp_path / "text").write_text("abcdefg")
    task = perplexity.make_task(str(tmp_path / "text"), WithBos(), window=4, limit=None)
    seen = []

    class Model:
        def score(self, windows):
            seen.extend(windows)
            return [[-1.0] * (len(window) - 1) for window in windows]

    assert task.evaluate(Model()).scores["perplexity"].value == pytest.approx(math.e)
    assert seen == [[7, *map(ord, "abc")], [7, *map(ord, "def")]]


def test_a_model_that_copies_finds_every_passkey(folder):
    copying = save_copying_model(Path("copying"), vocab_size=2048)
    shape = ("--passkey-length", "150", "--passkey-length", "300", "--depths", "5", "--trials", "2")
    result = run(copying, "--tokenizer", MODEL, "--task", "passkey", *shape)
    assert result.exit_code == 0, result.output
    summary = json.loads(Path("eval.json").read_text())["summary"]
    assert {(line["task"], line["value"]) for line in summary} == {
        ("passkey 150", 1),
        ("passkey 300", 1),
        ("passkey", 1),
    }


class Guessing:
    """Answers every prompt with a number of so many digits, without reading it."""

    def __init__(self, digits):
        self.generator, self.digits = random.Random(0), digits

    def generate(self, prompts, max_new_tokens):
        return [f" {self.generator.choice(passkey.list_keys(self.digits))}. And so" for _ in prompts]


def test_a_model_that_guesses_finds_as_many_passkeys_as_chance_does(tokenizer):
    trials, chance = 900, 1 / 9
    task = passkey.make_task(tokenizer, length=110, depths=1, trials=trials, seed=0, limit=None, digits=1)
    assert task.settings["chance"] == chance
    accuracy = task.evaluate(Guessing(1)).scores["accuracy"]
    error = math.sqrt(chance * (1 - chance) / trials)
    assert accuracy.stderr == pytest.approx(error, rel=0.2)
    assert abs(accuracy.value - chance) < 4 * error
    task = passkey.make_task(tokenizer, length=110, depths=1, trials=trials, seed=0, limit=None)
    assert task.evaluate(Guessing(5)).scores["accuracy"].value <= 1 / 100


def test_passkey_prompts_hold_the_number_where_they_say(tokenizer):
    arguments = {"length": 400, "depths": 3, "trials": 4}
    trials = passkey.make_trials(tokenizer, seed=3, **arguments)
    assert trials == passkey.make_trials(tokenizer, seed=3, **arguments)
    assert [trial.key for trial in trials] != [t.key for t in passkey.make_trials(tokenizer, seed=4, **arguments)]
    filler = len(tokenizer(passkey.FILLER)["input_ids"])
    for trial in trials:
        text = tokenizer.decode(list(trial.prompt))
        assert 400 - filler <= len(trial.prompt) <= 400
        assert text.startswith(passkey.INTRODUCTION) and text.endswith(passkey.QUESTION)
        before, after = text.split(passkey.NEEDLE.format(key=trial.key))
        lengths = [part.count(passkey.FILLER) for part in (before, after)]
        assert abs(lengths[0] - trial.depth * sum(lengths)) <= 0.5


@pytest.mark.parametrize(
    ("answer", "right"),
    [(" 12345. Remember", True), ("12345", True), ("**12345**", True), (" 123456", False), (" 1234", False),
     (" 99999 12345", False), ("", False), (" the key", False)],
)  # fmt: skip
def test_a_passkey_is_right_only_if_it_is_the_first_number(answer, right):
    assert passkey.is_right(answer, "12345") is right


words = st.lists(st.sampled_from(["a", "the", "cat", "Cat", "sat,", "on", "mat", "."]), max_size=8).map(" ".join)


def count_f1(answer, reference):
    """Words taken out of the reference one by one."""
    strip = "".maketrans("", "", ".,")
    found, expected = (
        [word for word in text.lower().translate(strip).split() if word not in ("a", "an", "the")]
        for text in (answer, reference)
    )
    if not found or not expected:
        return 1.0 if found == expected else 0.0
    left, common = list(expected), 0
    for word in found:
        if word in left:
            left.remove(word)
            common += 1
    precision, recall = common / len(found), common / len(expected)
    return 2 * precision * recall / (precision + recall) if common else 0.0


@given(words, words)
def test_f1_is_that_of_counted_words(answer, reference):
    value = qasper.score_f1(answer, reference)
    assert value == pytest.approx(count_f1(answer, reference))
    assert value == qasper.score_f1(reference, answer)
    assert qasper.score_f1(answer, answer.upper()) == 1


def test_qasper_takes_the_best_answer_and_cuts_the_middle(tokenizer, tmp_path):
    records = [
        {"context": "word " * 900, "question": "Which?", "answers": ["the blue cat", "unanswerable"]},
        {"context": "Short.", "input": "Is it?", "answers": ["yes"]},
        {"context": "Short.", "question": "None?", "answers": [""]},
    ]
    (tmp_path / "lines").write_text("".join(f"{json.dumps(record)}\n\n" for record in records))
    (tmp_path / "list").write_text(json.dumps(records))
    asked = []

    class Model:
        def generate(self, prompts, max_new_tokens):
            asked.extend(tokenizer.decode(prompt) for prompt in prompts)
            assert max_new_tokens == 128 and all(len(prompt) <= 472 for prompt in prompts)
            return [" A blue cat!", " no", " nothing at all"]

    task = qasper.make_task(str(tmp_path / "lines"), tokenizer, max_length=600)
    assert task.evaluate(Model()).scores["f1"].values == (1.0, 0.0, 0.0)
    assert task.longest == 600 and task.settings["cut"] == 1
    assert asked[0].startswith("You are given") and asked[0].endswith("Question: Which?\n\nAnswer:")
    assert "Article: Short.\n" in asked[1] and "Question: Is it?" in asked[1]
    again = qasper.make_task(str(tmp_path / "list"), tokenizer, max_length=600)
    assert again.settings["data_sha256"] == task.settings["data_sha256"]


@given(st.lists(st.integers(), min_size=1), st.integers(2, 20))
def test_what_is_cut_keeps_both_ends(tokens, room):
    cut = qasper.cut_middle(tokens, room)
    assert len(cut) == min(room, len(tokens))
    assert cut[: (room + 1) // 2] == tokens[: (room + 1) // 2] and cut[-(room // 2) :] == tokens[-(room // 2) :]


values = st.lists(st.floats(-10, 10), min_size=2, max_size=9)


@given(values, st.data())
def test_differences_are_paired_where_there_are_items(one, data):
    other = data.draw(st.lists(st.floats(-10, 10), min_size=len(one), max_size=len(one)))
    difference = scores.compare(scores.average(one), scores.average(other))
    assert difference.value == pytest.approx(statistics.fmean(one) - statistics.fmean(other), abs=1e-9)
    paired = [a - b for a, b in zip(one, other, strict=True)]
    assert difference.stderr == pytest.approx(statistics.stdev(paired) / math.sqrt(len(one)))
    assert scores.compare(Score(3.0, 1.0), Score(1.0, 1.0)) == Score(2.0)


def test_groups_are_averaged_with_errors_in_squares():
    tasks = [Task(name, {}, 1, None, group="all") for name in ("x", "y")]
    pieces = {
        (variant, name): Outcome({"acc": Score(value, error)})
        for variant, name, value, error in (("base", "x", 0.5, 0.3), ("base", "y", 0.7, 0.4), ("other", "x", 0.4, None))
    }
    lines = {(line["variant"], line["task"]): line for line in evaluation.summarise(["base", "other"], tasks, pieces)}
    assert lines["base", "all"]["value"] == pytest.approx(0.6)
    assert lines["base", "all"]["stderr"] == pytest.approx(0.25)
    assert ("other", "all") not in lines  # one of its tasks is not there yet
    assert lines["other", "x"]["difference"] == pytest.approx(-0.1)


def test_a_run_that_was_cut_short_goes_on(folder):
    done, reports = [], []

    def make(name, fails=False):
        def measure(model):
            if fails:
                raise KeyboardInterrupt
            done.append((model, name))
            return Outcome({"b": Score(1.0), "a": Score(2.0, 0.1, (1.0, 3.0))}, {"note": name})

        return Task(name, {"kind": "test"}, 1, measure)

    class Opened:
        def __init__(self, variant):
            self.name = variant.name

        def __enter__(self):
            return self.name

        def __exit__(self, *_):
            pass

    variants = [Variant("base", str(MODEL)), Variant("again", str(MODEL))]

    def start(tasks, finished):
        return evaluation.evaluate(
            variants, tasks, setting={"backend": "x"}, finished=finished, open_model=Opened, report=reports.append
        )

    with pytest.raises(KeyboardInterrupt):
        start([make("one"), make("two", fails=True)], {})
    kept = json.loads(json.dumps(reports[-1], sort_keys=True))
    tasks = [make("one"), make("two")]
    empty = json.loads(json.dumps(evaluation.make_document(variants, tasks, {"backend": "x"}, {})))
    document = start(tasks, evaluation.find_finished(kept, "eval.json", empty))
    assert done == [("base", "one"), ("base", "two"), ("again", "one"), ("again", "two")]
    assert document["pieces"] == start(tasks, {})["pieces"]
    assert [line["metric"] for line in document["summary"]][:2] == ["b", "a"]
    for change in ({"setting": {"backend": "y"}}, {"tasks": []}, {"variants": empty["variants"][1:]}, {"version": 2}):
        with pytest.raises(AllocationError, match="eval.json"):
            evaluation.find_finished(kept if "version" not in change else kept | change, "eval.json", empty | change)


def test_the_same_command_measures_nothing_twice(folder, monkeypatch):
    Path("text.txt").write_text(TEXT)
    arguments = (MODEL, "--task", "perplexity", "--text", "text.txt", "--window", WINDOW, "--max-windows", "1")
    assert run(*arguments).exit_code == 0
    first = json.loads(Path("eval.json").read_text())
    monkeypatch.setattr("lexi_adapter.transformers_model.open_model", pytest.fail)
    result = run(*arguments)
    assert result.exit_code == 0 and "eval.json has 1 of 1 results" in result.stderr
    assert json.loads(Path("eval.json").read_text()) == first
    assert "holds other results of" in refuse(*arguments[:-1], "2")
    Path("eval.json").write_text('{"format": "lexi-eval", "version": 1}')
    assert "eval.json is not whole" in refuse(*arguments)
    Path("eval.json").write_text("[]")
    assert "eval.json is not a lexi-eval file" in refuse(*arguments)


def test_a_task_of_the_users_own(folder, monkeypatch):
    Path("mine.py").write_text(
        "def measure(generate):\n"
        "    answers = generate(['def f(self', [5, 6, 7]], max_new_tokens=3)\n"
        "    return {'length': [len(answer) for answer in answers], 'number': 3}\n"
        "def wrong(generate):\n    return 3\n"
        "def image(generate):\n    return generate([{'prompt': ''}], 1)\n"
    )
    monkeypatch.syspath_prepend(folder)
    assert run(MODEL, "--task", "mine:measure").exit_code == 0
    (piece,) = json.loads(Path("eval.json").read_text())["pieces"]
    assert [len(score["values"]) for score in piece["scores"]] == [2, 0]
    assert "returned int" in refuse(MODEL, "--task", "mine:wrong", "-o", "b.json")
    assert "needs --backend vllm" in refuse(MODEL, "--task", "mine:image", "-o", "b.json")
    assert "no task mine:nothing" in refuse(MODEL, "--task", "mine:nothing", "-o", "b.json")
    for value in (float("nan"), "x", [], ["x"], None):
        with pytest.raises(AllocationError, match="task t, metric m"):
            hooks.measure(None, lambda generate, value=value: {"m": value}, "t")


@pytest.mark.parametrize("device", ["cuda", "gpu", "cuda:7"])
def test_refuses_a_device_that_is_not_here(folder, device):
    if device.startswith("cuda") and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert device in refuse(MODEL, "--task", "passkey", "--device", device)


def test_refusals_name_what_is_wrong(folder):
    Path("text.txt").write_text(TEXT)
    Path("short.txt").write_text("def f(): pass")
    Path("empty.txt").write_text(" \n")
    Path("latin.txt").write_bytes("naïve".encode("latin-1"))
    Path("bad.jsonl").write_text('{"context": "c", "question": "q", "answers": []}')
    Path("broken.jsonl").write_text('{"context": "c"}\n{')
    Path("base").mkdir()
    shutil.copy(MODEL / "config.json", "base")
    Path("other").mkdir()
    Path("other/config.json").write_text((MODEL / "config.json").read_text().replace("2048", "999"))
    write_allocation(Path("fits.json"))
    document = json.loads(Path("fits.json").read_text())
    Path("unfit.json").write_text(json.dumps(document | {"model": document["model"] | {"num_hidden_layers": 9}}))
    text = ("--task", "perplexity", "--text")
    cases = {
        ("--task", "nothing"): "no task 'nothing'",
        ("--task", "perplexity"): "--task perplexity and --text FILE go together",
        ("--task", "passkey", "--text", "text.txt"): "go together",
        ("--task", "qasper"): "--task qasper and --qasper FILE go together",
        (*text, "nowhere.txt"): "cannot read nowhere.txt",
        (*text, "empty.txt"): "empty.txt holds no text",
        (*text, "latin.txt"): "latin.txt is not UTF-8 (byte 2)",
        (*text, "short.txt"): "a window of 1024 needs 1024",
        (*text, "text.txt", "--window", "2000"): "a window of 2000 tokens is more than the model's 1024 positions",
        ("--task", "passkey", "--passkey-length", "1025"): "more than the model's 1024 positions",
        ("--task", "passkey", "--passkey-length", "20"): "a passkey prompt without filler takes",
        ("--task", "qasper", "--qasper", "bad.jsonl"): "bad.jsonl, entry 1 has no answers",
        ("--task", "qasper", "--qasper", "broken.jsonl"): "broken.jsonl, line 2 is not JSON",
        ("--task", "qasper", "--qasper", "bad.jsonl", "--max-length", "4096"): "more than the model's 1024 positions",
        ("--task", "passkey", "--uniform-k", "9"): "uniform k = 9 is not one of 1 to 8",
        ("--task", "passkey", "--allocation", "unfit.json"): "num_hidden_layers",
        ("--task", "passkey", "--folder", "other"): "another vocabulary",
        ("--task", "passkey", "--folder", "base"): "two variants are called 'base'",
        ("--task", "passkey", "--folder", "nowhere"): "cannot read nowhere/config.json",
        ("--task", "passkey", "--tokenizer", "base"): "base has no tokenizer",
        ("--task", "passkey", "--backend", "vllm", "--device", "cpu"): "--device is for transformers",
        ("--task", "passkey", "--engine", '{"a": 1}'): "--engine and --tensor-parallel-size are for --backend vllm",
        ("--task", "passkey", "-o", "nowhere/eval.json"): "cannot write nowhere/eval.json",
    }  # fmt: skip
    for arguments, message in cases.items():
        assert message in refuse(MODEL, *arguments), arguments
    assert "transformers cannot load base" in refuse("base", "--tokenizer", MODEL, "--task", "passkey")
    assert not Path("eval.json").exists()


def test_two_allocations_at_once_are_refused(folder):
    exported = export(allocate(MODEL, (2,)), MODEL, Path("exported"))
    write_allocation(Path("other.json"), top_k=(3,))
    arguments = (exported, "--task", "passkey", "--passkey-length", "120", "--depths", "1", "--trials", "1")
    assert "exported with another allocation" in refuse(*arguments, "--allocation", "other.json")
