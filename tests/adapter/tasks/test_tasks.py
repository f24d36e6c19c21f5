"""The tasks of `lexi-adapter eval` with stand-ins for models, judged by slow arithmetic and by reading prompts."""

import json
import math
import random
import statistics
from pathlib import Path

import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

import lexi_adapter
from lexi_adapter.evaluation import evaluate
from lexi_adapter.tasks import passkey, perplexity, qasper, scores, texts
from lexi_adapter.tasks.scores import Outcome, Score, Task

MODEL = Path(lexi_adapter.__file__).parent.parent / "examples" / "tiny-olmoe"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


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


numbers = st.floats(-10, 10).filter(lambda value: value not in (0, 1))  # shares of right answers are another matter
values = st.lists(numbers, min_size=2, max_size=9)


@given(values, st.data())
def test_differences_are_paired_where_there_are_items(one, data):
    other = data.draw(st.lists(numbers, min_size=len(one), max_size=len(one)))
    difference = scores.compare(scores.average(one), scores.average(other))
    assert difference.value == pytest.approx(statistics.fmean(one) - statistics.fmean(other), abs=1e-9)
    paired = [a - b for a, b in zip(one, other, strict=True)]
    assert difference.stderr == pytest.approx(statistics.stdev(paired) / math.sqrt(len(one)))
    assert scores.compare(Score(3.0, 1.0), Score(1.0, 1.0)) == Score(2.0)


def test_a_share_of_none_or_all_is_not_known_without_error():
    for right in range(7):
        found = scores.average([1.0] * right + [0.0] * (6 - right))
        expected = scipy.stats.binomtest(right, 6).proportion_ci(0.95, method="wilson")
        assert found.interval == pytest.approx((expected.low, expected.high), abs=1e-12)
        assert (found.stderr is None) == (right in (0, 6))
    assert scores.average([0.0] * 6).interval[1] == pytest.approx(0.39, abs=0.01)
    assert scores.average([0.0, 0.5]).interval is None and scores.average([1.0]).interval is not None


def test_the_interval_of_a_paired_difference_of_shares_holds_the_truth_as_often_as_it_says():
    generator, held, trials = random.Random(0), 0, 2000
    for _ in range(trials):
        base = [float(generator.random() < 0.3) for _ in range(20)]
        other = [right if generator.random() < 0.8 else 1 - right for right in base]  # worth 0.2 * 0.4 in the mean
        low, high = scores.compare(scores.average(other), scores.average(base)).interval
        held += low <= 0.2 * (1 - 2 * 0.3) <= high
    assert 0.93 < held / trials < 0.985
    same = scores.compare(scores.average([0.0] * 6), scores.average([0.0] * 6))
    assert same.stderr is None and same.interval == pytest.approx((-0.245, 0.245), abs=1e-3)


def test_a_group_of_tasks_without_a_right_answer_has_the_interval_of_all_items():
    none, some = scores.average([0.0] * 6), scores.average([0.0, 1.0])
    assert scores.combine([none, none]).interval == scores.average([0.0] * 12).interval
    assert scores.combine([none, none]).stderr is None
    assert scores.combine([none, some]).interval is None  # of as many items each, or it is another mean
    difference = scores.compare(none, none)
    assert scores.combine([difference, difference], paired=True).interval == scores.find_difference_interval([0.0] * 12)


def test_a_difference_of_perplexities_has_the_error_that_drawing_the_windows_again_gives():
    generator = random.Random(0)
    hard = [generator.gauss(2.0, 0.5) for _ in range(60)]
    losses = [[loss + generator.gauss(shift, 0.05) for loss in hard] for shift in (0.0, 0.1)]

    class Model:
        def __init__(self, losses):
            self.losses = losses

        def score(self, windows):
            return [[-loss] for loss in self.losses]

    one, other = (perplexity.measure(Model(values), []).scores["perplexity"] for values in losses)
    difference = scores.compare(other, one)
    assert difference.value == pytest.approx(other.value - one.value)
    assert one.value == pytest.approx(math.exp(statistics.fmean(losses[0])))
    again = []
    for _ in range(2000):
        drawn = [generator.randrange(60) for _ in hard]
        means = [statistics.fmean(values[index] for index in drawn) for values in losses]
        again.append(math.exp(means[1]) - math.exp(means[0]))
    assert difference.stderr == pytest.approx(statistics.stdev(again), rel=0.1)
    assert difference.stderr < one.stderr / 3  # the windows' difficulty cancels


def test_groups_are_averaged_with_errors_in_squares():
    tasks = [Task(name, {}, 1, None, group="all") for name in ("x", "y")]
    pieces = {
        (variant, name): Outcome({"acc": Score(value, error)})
        for variant, name, value, error in (("base", "x", 0.5, 0.3), ("base", "y", 0.7, 0.4), ("other", "x", 0.4, None))
    }
    lines = {(line["variant"], line["task"]): line for line in evaluate.summarise(["base", "other"], tasks, pieces)}
    assert lines["base", "all"]["value"] == pytest.approx(0.6)
    assert lines["base", "all"]["stderr"] == pytest.approx(0.25)
    assert ("other", "all") not in lines  # one of its tasks is not there yet
    assert lines["other", "x"]["difference"] == pytest.approx(-0.1)
