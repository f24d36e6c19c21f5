"""`lexi-adapter eval` in transformers, judged by direct loops over the model's own logits and by slow arithmetic."""

import json
import math
import os
import shutil
import statistics
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from copying import save_copying_model
from corrections import compensate
from engine import allocate, export
from safetensors.torch import load_file, save_file
from tiny import find_moe_blocks, make_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

import lexi_adapter
from lexi_adapter.allocation import read_allocation
from lexi_adapter.cli.main import main
from lexi_adapter.errors import AdapterError
from lexi_adapter.evaluation import evaluate, transformers_backend
from lexi_adapter.files import read_json, write_json
from lexi_adapter.model.variants import Variant, make_variants
from lexi_adapter.tasks import hooks, perplexity
from lexi_adapter.tasks.scores import Outcome, Score, Task
from lexi_search.artifacts.serialisation import to_document

MODEL = Path(lexi_adapter.__file__).parent.parent / "examples" / "tiny-olmoe"
TEXT = "\n".join(f"def method_{n}(self, value):\n    return self.values[value + {n}]\n" for n in range(40))
WINDOW = 20
MIXED = (1, 5, 2)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads wait for each other longer than such small operations take."""
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
    *progress, error = result.stderr.splitlines(keepends=True)
    assert error.startswith("Error: ") and all(line.startswith("results: ") for line in progress), result.stderr
    return error


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
            assert 0 < ppl["difference_stderr"] < ppl["difference"]
            assert loss["difference"] > 0.05  # all of these lose something that can be seen
    assert {piece["variant"] for piece in document["pieces"]} == set(expected)
    assert "loss, nats" in result.stdout and "uniform k = 2" in result.stdout and document["made_by"]["lexi_adapter"]


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
    assert all(line["stderr"] is None and line["interval"][1] == 1 for line in summary)
    low = {line["task"]: line["interval"][0] for line in summary}
    assert low["passkey 150"] == low["passkey 300"] == pytest.approx(0.722, abs=1e-3) and low["passkey"] > 0.8
    assert "0.722 to 1.000" in result.stdout and "± s.e." in result.stdout


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
        return evaluate.evaluate(
            variants, tasks, setting={"backend": "x"}, finished=finished, open_model=Opened, report=reports.append
        )

    with pytest.raises(KeyboardInterrupt):
        start([make("one"), make("two", fails=True)], {})
    kept = json.loads(json.dumps(reports[-1], sort_keys=True))
    tasks = [make("one"), make("two")]
    empty = json.loads(json.dumps(evaluate.make_document(variants, tasks, {"backend": "x"}, {})))
    document = start(tasks, evaluate.find_finished(kept, "eval.json", empty))
    assert done == [("base", "one"), ("base", "two"), ("again", "one"), ("again", "two")]
    assert document["pieces"] == start(tasks, {})["pieces"]
    assert [line["metric"] for line in document["summary"]][:2] == ["b", "a"]
    for change in ({"setting": {"backend": "y"}}, {"tasks": []}, {"variants": empty["variants"][1:]}, {"version": 2}):
        with pytest.raises(AdapterError, match="eval.json"):
            evaluate.find_finished(kept if "version" not in change else kept | change, "eval.json", empty | change)


def change_value(piece):
    piece["scores"][0]["value"] += 1e-9


def change_values(piece):
    piece["scores"][0]["values"][0] = 2.0


def make_nan(piece):
    piece["scores"][0]["value"] = math.nan


def make_negative(piece):
    piece["scores"][0]["stderr"] = -0.1


def change_details(piece):
    piece["details"]["2"] = "other"


def leave_out(piece):
    del piece["sha256"]


@pytest.mark.parametrize(
    "damage", [change_value, change_values, make_nan, make_negative, change_details, leave_out, None]
)
def test_damaged_results_are_refused(folder, damage):
    variants, tasks = [Variant("base", str(MODEL))], [Task("one", {"kind": "test"}, 1, None)]
    outcome = Outcome({"a": Score(2.0, 0.1, (1.0, 3.0))}, {2: "two", 10: (1, 2)})
    whole = evaluate.make_document(variants, tasks, {}, {("base", "one"): outcome})
    write_json("eval.json", whole)
    document = read_json("eval.json")
    expected = evaluate.make_document(variants, tasks, {}, {})
    if damage is None:
        assert evaluate.find_finished(document, "eval.json", expected)["base", "one"].scores == outcome.scores
        return
    damage(document["pieces"][0])
    with pytest.raises(AdapterError, match="eval.json: the results of 'base' in 'one' are not as .*; name another"):
        evaluate.find_finished(document, "eval.json", expected)


def test_the_same_command_measures_nothing_twice(folder, monkeypatch):
    Path("text.txt").write_text(TEXT)
    arguments = (MODEL, "--task", "perplexity", "--text", "text.txt", "--window", WINDOW, "--max-windows", "1")
    assert run(*arguments).exit_code == 0
    first = json.loads(Path("eval.json").read_text())
    monkeypatch.setattr("lexi_adapter.evaluation.transformers_backend.open_model", pytest.fail)
    result = run(*arguments)
    assert result.exit_code == 0 and "eval.json has 1 of 1 results" in result.stderr
    assert json.loads(Path("eval.json").read_text()) == first
    assert "holds other results of 'perplexity text.txt' than these (another windows)" in refuse(*arguments[:-1], "2")
    assert "holds results with dtype 'auto', not 'float32'" in refuse(*arguments, "--dtype", "float32")
    assert run(f"{MODEL}/", *arguments[1:]).exit_code == 0  # as a shell completes it
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
    large = (10**400, [1e308] * 3, [1e308, -1e308])
    for value in (float("nan"), "x", [], ["x"], None, [1.0, float("nan")], [float("inf"), 1.0], *large):
        with pytest.raises(AdapterError, match="task t, metric m"):
            hooks.measure(None, lambda generate, value=value: {"m": value}, "t", 99)


def test_a_score_that_is_no_number_is_one_line():
    """Of a model whose losses overflowed, or of another program: JSON cannot hold it."""

    class Broken:
        def score(self, windows):
            return [[float("nan")] for _ in windows]

    with pytest.raises(AdapterError, match="the loss is nan nats per token; try another --dtype"):
        perplexity.measure(Broken(), [[1, 2]] * 3)
    task = Task("t", {}, 1, lambda model: Outcome({"m": Score(float("nan"))}))
    with pytest.raises(AdapterError, match="task t: m of 'base' is nan, not finite"):
        evaluate.evaluate(
            make_variants(str(MODEL), load_format="auto", allocations={}),
            [task],
            setting={},
            finished={},
            open_model=lambda variant: nullcontext(),
            report=lambda document: None,
        )


def test_results_may_lie_in_the_models_folder(folder):
    shutil.copytree(MODEL, "model")
    Path("text.txt").write_text(TEXT)
    task = ("--task", "perplexity", "--text", "../text.txt", "--window", "32", "--max-windows", "1")
    os.chdir("model")
    assert run(".", *task).exit_code == 0
    write_allocation(Path("a.json"))
    again = run(".", *task)
    assert again.exit_code == 0 and "eval.json has 1 of 1 results\n" in again.stderr
    Path("config.json").touch()
    assert "other results of 'base' than these (another state of its files)" in refuse(".", *task)


def test_results_of_another_source_are_refused(folder, monkeypatch):
    Path("changing.py").write_text("def measure(generate):\n    return {'number': 3}\n")
    Path("named.py").write_text("from changing import measure\n")
    monkeypatch.syspath_prepend(folder)
    calls = [(MODEL, "--task", f"{name}:measure", "-o", f"{name}.json") for name in ("changing", "named")]
    for call in calls:
        assert run(*call).exit_code == 0
        assert "has 1 of 1 results" in run(*call).stderr
    Path("changing.py").write_text("def measure(generate):\n    return {'number': 4}\n")
    for call in calls:
        assert f"holds other results of '{call[2]}' than these (another source)" in refuse(*call)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("def measure(:", "SyntaxError: invalid syntax (unfit_0.py, line 1)"),
        ("raise KeyError('a\\n b')", r"KeyError: 'a\n b'"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("import nowhere_at_all", "No module named 'nowhere_at_all'"),
    ],
)
def test_a_module_that_cannot_be_imported_is_refused(folder, monkeypatch, request, source, reason):
    name = f"unfit_{request.node.callspec.indices['source']}"
    Path(f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(folder)
    found = refuse(MODEL, "--task", f"{name}:measure")
    assert f"no task {name}:measure (" in found and reason in found
    assert "TypeError: the 'package' argument is required" in refuse(MODEL, "--task", ".os:getcwd")


@pytest.fixture(scope="module")
def opened(tokenizer):
    options = {"device": "cpu", "dtype": "float32", "batch_size": 2, "trust_remote_code": False}
    with transformers_backend.open_model(Variant("base", str(MODEL)), tokenizer, **options) as model:
        yield model


@pytest.mark.parametrize(
    ("prompts", "tokens", "message"),
    [
        (["def"], 0, "max_new_tokens is 0, an integer of at least 1 expected"),
        (["def"], 2.0, "max_new_tokens is 2.0"),
        ("def", 1, "generate takes a list of prompts"),
        (["def", ""], 1, "prompt 2 has no tokens"),
        ([[]], 1, "prompt 1 has no tokens"),
        ([[5], [2048]], 1, "a prompt has token 2048, the model knows 0 to 2047"),
        ([[-1]], 1, "a prompt has token -1"),
        ([[5] * 30], 3, "prompt 1 of 30 tokens and its answer of 3 are more than --max-length 32"),
        (["\ud800"], 1, r"a prompt holds '\ud800'"),
        ([[5.0]], 1, "neither a text nor token ids"),
        (5, 1, "raised TypeError: 'int' object is not iterable"),
    ],
)
def test_a_function_that_asks_for_what_cannot_be_is_refused(opened, prompts, tokens, message):
    with pytest.raises(AdapterError) as error:
        hooks.measure(opened, lambda generate: {"m": len(generate(prompts, tokens))}, "t", 32)
    assert str(error.value).startswith("task t") and message in str(error.value)


def test_a_function_that_fails_is_named_with_the_line(opened):
    def fail(generate):
        return json.loads("{")

    with pytest.raises(AdapterError, match=r"task t raised JSONDecodeError: .* \(.*test_evaluation.py, line \d+\)"):
        hooks.measure(opened, fail, "t", 32)
    with pytest.raises(AdapterError, match="task t raised SystemExit: 3"):
        hooks.measure(opened, lambda generate: sys.exit(3), "t", 32)


def test_a_failure_of_the_model_is_not_the_functions():
    """The caller, who opened the model, gives the remedy for a full memory."""

    class Full:
        def generate(self, *_):
            raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        hooks.measure(Full(), lambda generate: generate(["def"], 1), "t", 32)


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
    Path("deep.jsonl").write_text("[" * 200_000)
    Path("half.jsonl").write_text('{"context": "c", "question": "\\ud83d", "answers": ["a"]}')
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
        ("--task", "perplexity"): "--task perplexity needs --text FILE",
        ("--task", "qasper"): "--task qasper needs --qasper FILE",
        (*text, "nowhere.txt"): "cannot read nowhere.txt",
        (*text, "empty.txt"): "empty.txt holds no text",
        (*text, "latin.txt"): "latin.txt is not UTF-8 (byte 2)",
        (*text, "short.txt"): "a window of 1024 needs 1024",
        (*text, "text.txt", "--window", "2000"): "a window of 2000 tokens is more than the model's 1024 positions",
        ("--task", "passkey", "--passkey-length", "1025"): "more than the model's 1024 positions",
        ("--task", "passkey", "--passkey-length", "20"): "a passkey prompt without filler takes",
        ("--task", "qasper", "--qasper", "bad.jsonl"): "bad.jsonl, entry 1 has no answers",
        ("--task", "qasper", "--qasper", "broken.jsonl"): "broken.jsonl, line 2 is not JSON",
        ("--task", "qasper", "--qasper", "deep.jsonl"): "deep.jsonl, line 1 is not JSON",
        ("--task", "qasper", "--qasper", "half.jsonl"): r"half.jsonl, entry 1 holds '\ud83d', half of a surrogate pair",
        ("--task", "qasper", "--qasper", "bad.jsonl", "--max-length", "4096"): "more than the model's 1024 positions",
        ("--task", "passkey", "--uniform-k", "9"): "uniform k = 9 is not one of 1 to 8",
        ("--task", "passkey", "--drop-experts", "25%"): "write pruned weights by lexi-search prune",
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


def test_tokens_that_the_model_does_not_know_are_refused(folder, opened):
    Path("few").mkdir()
    Path("few/config.json").write_text(
        (MODEL / "config.json").read_text().replace('"vocab_size": 2048', '"vocab_size": 99')
    )
    Path("text.txt").write_text(TEXT)
    Path("q.jsonl").write_text('{"context": "c", "question": "q", "answers": ["a"]}')
    for task, what in (
        (("perplexity", "--text", "text.txt", "--window", "20"), "text.txt"),
        (("passkey",), "a passkey prompt"),
        (("qasper", "--qasper", "q.jsonl"), "q.jsonl"),
    ):
        found = refuse("few", "--tokenizer", MODEL, "--task", *task)
        assert found.startswith(f"Error: {what} has token ") and "the model knows 0 to 98" in found
    with pytest.raises(AdapterError, match="a window has token 2048, the model knows 0 to 2047"):
        opened.score([[1, 2], [2048, 5]])


@pytest.mark.parametrize(
    "changes",
    [
        {"max_position_embeddings": "1024"},
        {"max_position_embeddings": -1},
        {"vocab_size": 2048.0},
        {"vocab_size": True},
        {"text_config": {"vocab_size": "x"}, "vocab_size": None},
        {"num_hidden_layers": "8"},
        {"num_hidden_layers": None, "layers_block_type": 8},
        {"num_experts": "32"},
        {"num_experts_per_tok": None},
        {"model_type": ["olmoe"]},
    ],
)
def test_a_config_with_wrong_values_is_refused_by_name(folder, changes):
    shutil.copytree(MODEL, "wrong")
    config = json.loads((MODEL / "config.json").read_text())
    Path("wrong/config.json").write_text(json.dumps(config | changes))
    (key, value), *_ = changes.items()
    found = refuse("wrong", "--task", "passkey", "--uniform-k", "2")
    assert "config.json" in found and (key if not isinstance(value, dict) else "vocab_size") in found


def test_results_with_another_tokenizer_are_refused(folder):
    shutil.copytree(MODEL, "tokenizer", ignore=shutil.ignore_patterns("*.safetensors"))
    Path("tokenizer/merges.txt").write_text("a b\n")
    shape = ("--passkey-length", "120", "--depths", "1", "--trials", "1")
    arguments = (MODEL, "--tokenizer", "tokenizer", "--task", "passkey", *shape)
    assert run(*arguments).exit_code == 0
    assert run(*arguments).exit_code == 0
    Path("tokenizer/merges.txt").write_text("a bc\n")
    assert "holds results with tokenizer_sha256 " in refuse(*arguments)


def test_what_the_command_reads_is_not_written_over(folder, monkeypatch):
    Path("text.txt").write_text(TEXT)
    Path("questions.json").write_text("[]")
    write_allocation(Path("a.json"))
    shutil.copytree(MODEL, "model")
    shutil.copytree(MODEL, "other")
    before = {path: path.read_bytes() for path in Path.cwd().rglob("*.*")}
    tasks = ("--task", "perplexity", "--text", "text.txt", "--task", "qasper", "--qasper", "questions.json")
    arguments = ("model", *tasks, "--allocation", "a.json", "--folder", "other", "--tokenizer", "other", "--restart")
    for output in ("text.txt", "questions.json", "a.json"):
        assert f"cannot write {output}: the same command reads" in refuse(*arguments, "-o", output)
    for output in ("model/config.json", "other/tokenizer.json"):
        assert f"cannot write {output}: it is a file of " in refuse(*arguments, "-o", output)
    Path("task.py").write_text(source := "def measure(generate):\n    return {'number': 3}\n")
    monkeypatch.syspath_prepend(folder)
    assert "cannot write task.py: the same" in refuse(MODEL, "--task", "task:measure", "-o", "task.py", "--restart")
    assert Path("task.py").read_text() == source
    Path("task.py").unlink()
    shutil.rmtree("__pycache__", ignore_errors=True)
    assert {path: path.read_bytes() for path in Path.cwd().rglob("*.*")} == before


@pytest.mark.parametrize(
    ("option", "task", "reader"),
    [
        (("--max-items", "5"), "passkey", "qasper or lm-eval:TASK"),
        (("--window", "4"), "passkey", "perplexity"),
        (("--max-windows", "3"), "passkey", "perplexity"),
        (("--num-fewshot", "2"), "passkey", "lm-eval:TASK"),
        (("--include-path", "nope"), "passkey", "lm-eval:TASK"),
        (("--max-length", "99"), "passkey", "qasper or lm-eval:TASK or module:function"),
        (("--max-items", "5"), "json:dumps", "qasper or lm-eval:TASK"),
        (("--depths", "10"), "json:dumps", "passkey"),
        (("--trials", "10"), "lm-eval:boolq", "passkey"),
        (("--seed", "0"), "json:dumps", "passkey"),
        (("--passkey-length", "99"), "json:dumps", "passkey"),
        (("--text", "text.txt"), "passkey", "perplexity"),
        (("--qasper", "q.json"), "passkey", "qasper"),
    ],
)
def test_an_option_that_no_task_reads_is_refused(folder, option, task, reader):
    expected = f"Error: {option[0]} is for --task {reader}; add such a task, or leave it out\n"
    assert refuse(MODEL, "--task", task, *option) == expected


def test_uniform_k_needs_no_table_of_families(folder):
    checkpoint = make_checkpoint("glm4_moe", folder / "glm")
    base, uniform = make_variants(str(checkpoint), load_format="auto", allocations={}, uniform=[2])
    layers = read_allocation(to_document(allocate(checkpoint, (2,))))
    assert base.allocation is None and uniform.allocation.asks_the_same_as(layers)


def test_two_allocations_at_once_are_refused_before_anything_is_measured(folder, monkeypatch):
    monkeypatch.setattr(transformers_backend, "open_model", pytest.fail)
    exported = export(allocate(MODEL, (2,)), MODEL, Path("exported"))
    write_allocation(Path("other.json"), top_k=(3,))
    arguments = (exported, "--task", "passkey", "--passkey-length", "120", "--depths", "1", "--trials", "1")
    for option in (("--allocation", "other.json"), ("--uniform-k", "8")):
        assert "exported with another allocation" in refuse(*arguments, *option)


def test_a_folder_that_lacks_a_tensor_is_refused(folder):
    """transformers would initialise it at random."""
    shutil.copytree(MODEL, "lacking")
    tensors = load_file("lacking/model.safetensors")
    del tensors["model.layers.1.input_layernorm.weight"]
    Path("lacking/model.safetensors").unlink()
    save_file(tensors, "lacking/model.safetensors", metadata={"format": "pt"})
    found = refuse("lacking", "--task", "passkey", "--passkey-length", "120", "--depths", "1", "--trials", "1")
    assert "lacking lacks 1 tensors, such as model.layers.1.input_layernorm.weight" in found


def test_a_compensated_allocation_is_evaluated_with_and_without(folder, tokenizer):
    Path("text.txt").write_text(TEXT)
    allocation = allocate(MODEL, MIXED)
    hidden = json.loads((MODEL / "config.json").read_text())["hidden_size"]
    document = compensate(to_document(allocation), allocation.model, folder, hidden=hidden)
    Path("a.json").write_text(json.dumps(document))
    what = ("--task", "perplexity", "--text", "text.txt", "--window", WINDOW, "--max-windows", "2")
    options = ("--allocation", "a.json", "--uniform-k", "2", "--uncompensated", "--dtype", "float32", "--device", "cpu")
    result = run(MODEL, *what, *options)
    assert result.exit_code == 0, result.output
    found = json.loads(Path("eval.json").read_text())
    windows = [tokenizer(TEXT)["input_ids"][start : start + WINDOW] for start in (0, WINDOW)]
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    plain = {key: value for key, value in document.items() if key not in ("gate_exponent", "compensation")}
    losses = {line["variant"]: line["value"] for line in found["summary"] if line["metric"] == "loss"}
    assert list(losses) == ["base", "a.json", "a.json, no compensation", "uniform k = 2, no compensation"]
    for name, source in (("a.json", "a.json"), ("a.json, no compensation", plain)):
        lexi_adapter.apply(model, source)
        assert losses[name] == pytest.approx(statistics.fmean(list_losses(model, windows)), abs=1e-4)
    facts = {variant["name"]: variant for variant in found["variants"]}
    assert facts["a.json"]["compensation"] == document["compensation"]["sha256"]
    assert "compensation" not in facts["a.json, no compensation"]
    for command in (["eval", str(MODEL), *map(str, what)], ["bench", str(MODEL)], ["loads", str(MODEL)]):
        words = [*command, "--allocation", "a.json", "-o", "corrections.safetensors"]
        refusal = CliRunner().invoke(main, words).stderr
        assert "cannot write corrections.safetensors: the same command reads or writes it" in refusal
    Path("corrections.safetensors").write_bytes(b"")
    error = refuse(MODEL, *what, *options, "--restart")
    assert "corrections.safetensors: not the file that the allocation names" in error
    Path("a.json").write_text(json.dumps(plain))
    assert "--uncompensated: no --allocation here has a compensation" in refuse(MODEL, *what, *options)
