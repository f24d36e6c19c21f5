"""Passkey retrieval: a number is hidden in irrelevant text, and the model is asked for it.

The prompt is that of Mohtashami and Jaggi (Landmark Attention, arXiv 2305.16300), which LExI's figure 6 takes from
YaRN (arXiv 2309.00071): accuracy over depths, the relative position of the number in the text.
"""

import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lexi_adapter.errors import AdapterError, check_memory
from lexi_adapter.tasks.scores import Model, Outcome, Task, average
from lexi_adapter.tasks.texts import check_length, check_tokens, encode

INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n"
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "What is the pass key? The pass key is"
DIGITS = 5
BYTES_OF_TOKEN = 36  # of a number and its place in a list of Python's
# Tokens of an answer beyond its digits, which take a token each at most. There may be a space before the digits, and
# text has to follow them: otherwise 12345 could be the start of 123456.
TOKENS_AROUND = 5


@dataclass(frozen=True)
class Trial:
    """One prompt and the right answer, `key`; `depth` is 0 at the start of the text and 1 at its end."""

    prompt: tuple[int, ...]
    key: str
    depth: float


def make_task(
    tokenizer: Any,
    *,
    length: int,
    depths: int,
    trials: int,
    seed: int,
    limit: int | None,
    digits: int = DIGITS,
    vocabulary: int | None = None,
) -> Task:
    """The task of `trials` passkeys at each of `depths` evenly spaced depths; `length` tokens hold prompt and answer.

    Raises:
        AdapterError: a length of more tokens than the model has positions, or too short for the prompt, or a token
            outside the model's `vocabulary`.
    """
    answer_tokens = digits + TOKENS_AROUND
    check_length("a passkey prompt with its answer", length, limit)
    size = BYTES_OF_TOKEN * length * depths * trials
    check_memory(f"{depths * trials} passkey prompts", size, "lower --trials, --depths or --passkey-length")
    prompt_tokens = length - answer_tokens
    made = make_trials(tokenizer, length=prompt_tokens, depths=depths, trials=trials, seed=seed, digits=digits)
    check_tokens("a passkey prompt", [trial.prompt for trial in made], vocabulary)
    settings = {
        "kind": "passkey",
        "length": length,
        "depths": depths,
        "trials": trials,
        "seed": seed,
        "digits": digits,
        "chance": 1 / len(list_keys(digits)),
    }
    return Task(
        f"passkey {length}", settings, length, lambda model: measure(model, made, answer_tokens), group="passkey"
    )


def list_keys(digits: int) -> range:
    """The numbers that a key is drawn from: those of so many digits, none beginning with 0."""
    return range(10 ** (digits - 1), 10**digits)


def make_trials(
    tokenizer: Any, *, length: int, depths: int, trials: int, seed: int, digits: int = DIGITS
) -> tuple[Trial, ...]:
    """Prompts of at most `length` tokens, the same for the same arguments and tokenizer, everywhere."""
    made = []
    for depth in [index / max(1, depths - 1) for index in range(depths)]:
        for trial in range(trials):
            generator = random.Random(f"{seed} {length} {depth} {trial}")
            key = str(generator.choice(list_keys(digits)))
            made.append(Trial(tuple(_make_prompt(tokenizer, key, depth, length)), key, depth))
    return tuple(made)


def _make_prompt(tokenizer: Any, key: str, depth: float, length: int) -> list[int]:
    """The tokens of a prompt with as much filler around the key as fits into `length`."""

    def encode_with(fillers: int) -> list[int]:
        before = round(depth * fillers)
        parts = (INTRODUCTION, FILLER * before, NEEDLE.format(key=key), FILLER * (fillers - before), QUESTION)
        return encode(tokenizer, "".join(parts))

    bare = len(encode_with(0))
    if bare > length:
        raise AdapterError(f"a passkey prompt without filler takes {bare} tokens, not {length}; take a longer one")
    fillers = (length - bare) // len(encode(tokenizer, FILLER, add_special_tokens=False))
    while len(tokens := encode_with(fillers)) > length:  # a joined text may take more tokens than its parts
        fillers -= 1
    return tokens


def is_right(answer: str, key: str) -> bool:
    """Whether the first number in the answer is the key, exactly."""
    number = re.search(r"\d+", answer)
    return number is not None and number[0] == key


def measure(model: Model, trials: Sequence[Trial], max_new_tokens: int) -> Outcome:
    """The "accuracy", 0 or 1 a trial; the details have its mean at every depth."""
    answers = model.generate([list(trial.prompt) for trial in trials], max_new_tokens)
    right = [float(is_right(answer, trial.key)) for answer, trial in zip(answers, trials, strict=True)]
    by_depth = defaultdict(list)
    for trial, value in zip(trials, right, strict=True):
        by_depth[f"{trial.depth:g}"].append(value)
    details = {depth: average(values).value for depth, values in by_depth.items()}
    return Outcome({"accuracy": average(right)}, {"accuracy_at_depth": details})
