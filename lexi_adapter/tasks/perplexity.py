"""Perplexity on text: the exponential of the mean cross-entropy of its tokens, each predicted from those before.

The text is cut into windows of equal length that do not overlap, as LExI's figure 7 and pruning papers do on WikiText
and C4; a shorter rest at the end is not read. A window's first token is context only, so a window of n tokens has
n - 1 predictions, and all windows weigh the same.
"""

import hashlib
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lexi_adapter.errors import AdapterError
from lexi_adapter.tasks.scores import Model, Outcome, Task, average
from lexi_adapter.tasks.texts import check_length, check_tokens, encode, find_bos, read_text

DEFAULT_WINDOW = 2048
OVERFLOW = 700.0  # nats per token; exp of more is no float


def make_task(
    path: str,
    tokenizer: Any,
    *,
    window: int | None,
    limit: int | None,
    max_windows: int | None = None,
    vocabulary: int | None = None,
) -> Task:
    """The task of perplexity on one text file.

    Args:
        window: tokens of a window, with the beginning-of-text token; None for 2048, or the model's positions if they
            are fewer.
        limit: the model's positions, if they are known.
        max_windows: at most so many windows, from the beginning.
        vocabulary: size of the model's vocabulary, if it is known.

    Raises:
        AdapterError: a text that is not UTF-8 or shorter than a window, a window of more tokens than the model has
            positions, or a token outside its vocabulary.
    """
    length = window or min(DEFAULT_WINDOW, limit or DEFAULT_WINDOW)
    check_length("a window", length, limit)
    text, bos = read_text(path), find_bos(tokenizer)
    tokens = encode(tokenizer, text, add_special_tokens=False)
    windows = cut_windows(tokens, length, bos)[:max_windows]
    if not windows:
        needed = length - (bos is not None)
        raise AdapterError(f"{path} has {len(tokens)} tokens, a window of {length} needs {needed}; take a smaller one")
    check_tokens(path, windows, vocabulary)
    settings = {
        "kind": "perplexity",
        "text": path,
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "tokens_of_text": len(tokens),
        "window": length,
        "windows": len(windows),
        "bos": bos,
    }
    return Task(f"perplexity {path}", settings, length, lambda model: measure(model, windows))


def cut_windows(tokens: Sequence[int], length: int, bos: int | None) -> list[list[int]]:
    """Consecutive windows of `length` tokens, each beginning with `bos` if there is one; a shorter rest is dropped."""
    prefix = [] if bos is None else [bos]
    step = length - len(prefix)
    return [prefix + list(tokens[start : start + step]) for start in range(0, len(tokens) - step + 1, step)]


def measure(model: Model, windows: Sequence[Sequence[int]]) -> Outcome:
    """The "loss", nats per predicted token, one value a window, and the "perplexity", its exponential."""
    losses = [-statistics.fmean(window) for window in model.score(windows)]
    if not (mean := statistics.fmean(losses)) < OVERFLOW:
        raise AdapterError(f"the loss is {mean} nats per token; try another --dtype")
    loss = average(losses)
    perplexity = math.exp(loss.value)
    # To first order in the windows' losses the perplexity is the mean of these: so it has a standard error, and so has
    # its difference from another model's on the same windows.
    linear = [perplexity * (1 + value - loss.value) for value in loss.values]
    return Outcome({"perplexity": replace(average(linear), value=perplexity, interval=None), "loss": loss})
