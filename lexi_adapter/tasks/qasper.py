"""Questions about long documents, scored by token F1, in the manner of Qasper in LongBench (LExI's figure 5).

The data come from the user: a JSON list, or one JSON object a line, with "context", "question" (or "input", as in
LongBench) and "answers", of which the best match counts. The middle of a prompt that is too long is cut out, as in
LongBench.
"""

import hashlib
import json
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lexi_adapter.errors import AdapterError
from lexi_adapter.tasks.scores import Model, Outcome, Task, average
from lexi_adapter.tasks.texts import check_tokens, check_unicode, encode, read_records

ANSWER_TOKENS = 128  # LongBench's
INSTRUCTION = (
    "as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based "
    'on the information in the article, write "unanswerable". If the question is a yes/no question, answer "yes", '
    '"no", or "unanswerable". Do not provide any explanation.\n\n'
)
PROMPT = (
    "You are given a scientific article and a question. Answer the question "
    + INSTRUCTION
    + "Article: {context}\n\nAnswer the question based on the above article "
    + INSTRUCTION
    + "Question: {question}\n\nAnswer:"
)


@dataclass(frozen=True)
class Question:
    """One question about `context`; any of `answers` is right."""

    context: str
    question: str
    answers: tuple[str, ...]


def make_task(
    path: str, tokenizer: Any, *, max_length: int, max_items: int | None = None, vocabulary: int | None = None
) -> Task:
    """The task of F1 over the questions of a file; `max_length` tokens hold prompt and answer.

    Raises:
        AdapterError: a file that cannot be read, a question that lacks a part, or a token outside the model's
            `vocabulary`.
    """
    questions = read_questions(path)[:max_items]
    room = max_length - ANSWER_TOKENS
    if room < 2:
        raise AdapterError(f"--max-length {max_length} leaves no prompt beside {ANSWER_TOKENS} tokens of answer")
    uncut = [encode(tokenizer, PROMPT.format(context=q.context, question=q.question)) for q in questions]
    prompts = [cut_middle(tokens, room) for tokens in uncut]
    check_tokens(path, prompts, vocabulary)
    settings = {
        "kind": "qasper",
        "data": path,
        "data_sha256": hashlib.sha256(json.dumps([asdict(q) for q in questions]).encode()).hexdigest(),
        "questions": len(questions),
        "cut": sum(len(tokens) > room for tokens in uncut),
        "max_length": max_length,
        "max_new_tokens": ANSWER_TOKENS,
    }
    longest = max(map(len, prompts)) + ANSWER_TOKENS
    return Task(f"qasper {path}", settings, longest, lambda model: measure(model, prompts, questions))


def read_questions(path: str) -> list[Question]:
    """The questions of a file, in its order."""
    questions = []
    for place, record in read_records(path):
        context, answers = record.get("context"), record.get("answers")
        question = record.get("question", record.get("input"))
        if not isinstance(context, str) or not isinstance(question, str):
            raise AdapterError(f"{place} has no context or no question that is a text")
        for part in (context, question):
            check_unicode(place, part)
        if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
            raise AdapterError(f"{place} has no answers, a list of one text or more")
        questions.append(Question(context, question, tuple(answers)))
    if not questions:
        raise AdapterError(f"{path} holds no question")
    return questions


def cut_middle(tokens: list[int], room: int) -> list[int]:
    """At most `room` tokens: the first and the last half of them."""
    first = (room + 1) // 2
    return tokens if len(tokens) <= room else tokens[:first] + tokens[len(tokens) - (room - first) :]


def normalise(text: str) -> list[str]:
    """The words of an answer as SQuAD compares them: lower case, without punctuation and articles."""
    unpunctuated = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", unpunctuated).split()


def score_f1(answer: str, reference: str) -> float:
    """The harmonic mean of precision and recall over words, each counted as often as both texts have it.

    Where a text has no words: 1 if neither has any, 0 otherwise, as in SQuAD 2.0.
    """
    given, expected = Counter(normalise(answer)), Counter(normalise(reference))
    if not given or not expected:
        return float(given == expected)
    return 2 * (given & expected).total() / (given.total() + expected.total())


def measure(model: Model, prompts: Sequence[list[int]], questions: Sequence[Question]) -> Outcome:
    """The "f1", from 0 to 1, one value a question: the best over its answers."""
    answers = model.generate(prompts, ANSWER_TOKENS)
    best = [
        max(score_f1(answer, reference) for reference in question.answers)
        for answer, question in zip(answers, questions, strict=True)
    ]
    return Outcome({"f1": average(best)})
