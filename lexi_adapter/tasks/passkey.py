"""Passkey retrieval: a number somewhere in irrelevant text, and the question what it was.

The prompt is that of Mohtashami and Jaggi (Landmark Attention, arXiv 2305.16300), which LExI's figure 6 takes from
YaRN (arXiv 2309.00071): accuracy over depths, the place of the number in the text.
"""

import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lexi_adapter.errors import AllocationError
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
# A digit takes a token at most. Before them there may be a space, and the answer must go on after them: else one could
# not tell 12345 from the start of 123456.
TOKENS_AROUND = 5


@dataclass(frozen=True)
class Trial:
    """One prompt, and the number that its answer has to be; `depth` is 0 at the start of the text and 1 at its end."""

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
    """`trials` numbers at each of `depths` evenly spaced depths, in at most `length` tokens with the answer.

    Raises:
        AllocationError: a length that the model has no positions for, or that the prompt does not fit into, or a token
            that is not one of its `vocabulary`.
    """
    answer = digits + TOKENS_AROUND
    check_length("a passkey prompt with its answer", length, limit)
    made = make_trials(tokenizer, length=length - answer, depths=depths, trials=trials, seed=seed, digits=digits)
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
    return Task(f"passkey {length}", settings, length, lambda model: measure(model, made, answer), group="passkey")


def list_keys(digits: int) -> range:
    """The numbers that a key is drawn from; none begins with 0."""
    return range(10 ** (digits - 1), 10**digits)


def make_trials(
    tokenizer: Any, *, length: int, depths: int, trials: int, seed: int, digits: int = DIGITS
) -> tuple[Trial, ...]:
    """Prompts of at most `length` tokens, the same for the same arguments and tokenizer, everywhere."""
    made = []
    for depth in [place / max(1, depths - 1) for place in range(depths)]:
        for trial in range(trials):
            generator = random.Random(f"{seed} {length} {depth} {trial}")
            key = str(generator.choice(list_keys(digits)))
            made.append(Trial(tuple(_fill(tokenizer, key, depth, length)), key, depth))
    return tuple(made)


def _fill(tokenizer: Any, key: str, depth: float, length: int) -> list[int]:
    """The tokens of a prompt with as much filler around the key as fits into `length`."""

    def write(fillers: int) -> list[int]:
        before = round(depth * fillers)
        parts = (INTRODUCTION, FILLER * before, NEEDLE.format(key=key), FILLER * (fillers - before), QUESTION)
        return encode(tokenizer, "".join(parts))

    bare = write(0)
    if len(bare) > length:
        raise AllocationError(
            f"a passkey prompt without filler takes {len(bare)} tokens, not {length}; take a longer one"
        )
    fillers = (length - len(bare)) // len(encode(tokenizer, FILLER, add_special_tokens=False))
    while len(tokens := write(fillers)) > length:  # texts put together may take more tokens than apart
        fillers -= 1
    return tokens


def is_right(answer: str, key: str) -> bool:
    """Whether the first number in the answer is the key, exactly."""
    found = re.search(r"\d+", answer)
    return found is not None and found[0] == key


def measure(model: Model, trials: Sequence[Trial], max_new_tokens: int) -> Outcome:
    """ "accuracy", 0 or 1 a trial; the details have it for every depth."""
    answers = model.generate([list(trial.prompt) for trial in trials], max_new_tokens)
    right = [float(is_right(answer, trial.key)) for answer, trial in zip(answers, trials, strict=True)]
    by_depth = defaultdict(list)
    for trial, value in zip(trials, right, strict=True):
        by_depth[f"{trial.depth:g}"].append(value)
    details = {depth: average(values).value for depth, values in by_depth.items()}
    return Outcome({"accuracy": average(right)}, {"accuracy_at_depth": details})
