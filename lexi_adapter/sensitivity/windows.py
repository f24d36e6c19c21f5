"""Windows of tokens that a model is measured on, [sequences, length]: cut out of texts or drawn by the model itself."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lexi_adapter.errors import AllocationError


def read_tokens(path: str) -> list[list[int]]:
    """Streams of token ids: a .json list of lists, a .npy array or every array of an .npz file, a row each.

    Raises:
        AllocationError: the file cannot be read or holds something else.
    """
    import numpy

    try:
        data = Path(path).read_bytes()
        if path.endswith((".npy", ".npz")):
            loaded = numpy.load(io.BytesIO(data), allow_pickle=False)
            arrays = list(loaded.values()) if path.endswith(".npz") else [loaded]
        else:
            arrays = [numpy.asarray(row) for row in json.loads(data)]
    except Exception as error:  # numpy's own, its zip library's and the system's, by what is wrong with the file
        reason = " ".join(str(error).split())
        raise AllocationError(f"cannot read {path} ({reason}); give a .json list of lists, .npy or .npz") from error
    if not arrays or any(array.dtype.kind not in "iu" or array.ndim not in (1, 2) for array in arrays):
        raise AllocationError(f"{path} does not hold rows of token ids, and nothing else")
    return [row for array in arrays for row in numpy.atleast_2d(array).astype(numpy.int64).tolist()]


def cut(streams: Sequence[Sequence[int]], *, length: int, sequences: int, source: str) -> torch.Tensor:
    """At most `sequences` windows of `length` tokens, [sequences, length] int64, evenly over those that there are.

    No window crosses from one stream to the next, and what a stream has beyond its last whole window is left out.

    Raises:
        AllocationError: fewer than two windows: no standard error could be told. It names the `source` of the streams.
    """
    windows = [
        stream[start : start + length] for stream in streams for start in range(0, len(stream) - length + 1, length)
    ]
    count = min(sequences, len(windows))
    if count < 2:
        raise AllocationError(
            f"{source}: {count} windows of {length} tokens in {sum(map(len, streams))}, at least 2 needed; give more "
            "text, or a smaller --length"
        )
    return torch.tensor([windows[place * len(windows) // count] for place in range(count)])


def check_vocabulary(windows: torch.Tensor, config: Any) -> None:
    """Raise AllocationError for tokens that a model with this configuration does not have."""
    size = config.get_text_config().vocab_size
    wrong = windows[(windows < 0) | (windows >= size)]
    if len(wrong):
        raise AllocationError(f"the model has tokens 0 to {size - 1}, but there is {wrong[0]}; use its own tokenizer")


@torch.no_grad()
def generate(model: torch.nn.Module, *, length: int, sequences: int, batch: int, seed: int) -> torch.Tensor:
    """Windows that the model itself draws, [sequences, length] int64: each token from its whole distribution.

    The first is the token that begins a text, or where the model has none any, all alike. An end of text is a token
    like any other, as in training on texts in a row.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        length: tokens of each sequence, the first among them.
        sequences: how many.
        batch: how many are drawn at a time.
        seed: of the drawing; the same on one device for the same batch.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    text = model.config.get_text_config()
    first = getattr(text, "bos_token_id", None)
    drawn = []
    for start in range(0, sequences, batch):
        shape = (min(batch, sequences - start), 1)
        if first is None:
            tokens = torch.randint(text.vocab_size, shape, generator=generator, device=model.device)
        else:
            tokens = torch.full(shape, first, device=model.device)
        window, cache = [tokens], None
        for _ in range(length - 1):
            output = model(tokens, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            tokens = torch.multinomial(output.logits[:, -1].float().softmax(-1), 1, generator=generator)
            window.append(tokens)
        drawn.append(torch.cat(window, dim=1).cpu())
    return torch.cat(drawn)
