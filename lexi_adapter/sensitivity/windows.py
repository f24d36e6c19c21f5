"""Windows of tokens to measure a model on, [sequences, length]: cut from texts or sampled from the model itself."""

import io
from collections.abc import Sequence
from typing import Any

import torch

from lexi_adapter.errors import AdapterError
from lexi_adapter.files import MOST_DATA_BYTES, parse_json, read_bytes


def read_tokens(path: str) -> list[list[int]]:
    """Streams of token ids, one a row of a .json list of lists, of a .npy array, or of every array of an .npz file.

    Raises:
        AdapterError: the file cannot be read or holds something else.
    """
    import numpy

    try:
        data = read_bytes(path, MOST_DATA_BYTES)
        if path.endswith((".npy", ".npz")):
            loaded = numpy.load(io.BytesIO(data), allow_pickle=False)
            arrays = list(loaded.values()) if path.endswith(".npz") else [loaded]
        else:
            arrays = [numpy.asarray(row) for row in parse_json(data)]
    except Exception as error:  # from numpy, zipfile or the system, by the flaw of the file
        reason = " ".join(str(error).split())
        raise AdapterError(f"cannot read {path} ({reason}); give a .json list of lists, .npy or .npz") from error
    if not arrays or any(array.dtype.kind not in "iu" or array.ndim not in (1, 2) for array in arrays):
        raise AdapterError(f"{path} does not hold rows of token ids and nothing else")
    return [row for array in arrays for row in numpy.atleast_2d(array).astype(numpy.int64).tolist()]


def cut(streams: Sequence[Sequence[int]], *, length: int, sequences: int, source: str) -> torch.Tensor:
    """At most `sequences` windows of `length` tokens, [sequences, length] int64, evenly spaced over all windows.

    No window crosses from one stream to the next; the rest of a stream after its last whole window is left out.

    Raises:
        AdapterError: fewer than two windows, which have no standard error. It names the `source` of the streams.
    """
    windows = [
        stream[start : start + length] for stream in streams for start in range(0, len(stream) - length + 1, length)
    ]
    count = min(sequences, len(windows))
    if count < 2:
        raise AdapterError(
            f"{source}: {count} windows of {length} tokens in {sum(map(len, streams))}, at least 2 needed; give more "
            "text, or a smaller --length"
        )
    return torch.tensor([windows[index * len(windows) // count] for index in range(count)])


def check_vocabulary(windows: torch.Tensor, config: Any) -> None:
    """Raise AdapterError for tokens outside the vocabulary of a model with this configuration."""
    size = config.get_text_config().vocab_size
    wrong = windows[(windows < 0) | (windows >= size)]
    if len(wrong):
        raise AdapterError(f"the model has tokens 0 to {size - 1}, but there is {wrong[0]}; use its own tokenizer")


@torch.no_grad()
def generate(model: torch.nn.Module, *, length: int, sequences: int, batch: int, seed: int) -> torch.Tensor:
    """Windows sampled from the model itself, [sequences, length] int64, at temperature 1.

    The first token is the beginning-of-text token, or uniform over the vocabulary where the model has none. Sampling
    goes on after an end-of-text token, as in training on concatenated texts.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        length: tokens of each window, with the first.
        sequences: number of windows.
        batch: windows that are sampled at a time.
        seed: of the sampling; reproducible on one device at the same batch.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    config = model.config.get_text_config()
    bos = getattr(config, "bos_token_id", None)
    batches = []
    for start in range(0, sequences, batch):
        shape = (min(batch, sequences - start), 1)
        if bos is None:
            tokens = torch.randint(config.vocab_size, shape, generator=generator, device=model.device)
        else:
            tokens = torch.full(shape, bos, device=model.device)
        window, cache = [tokens], None
        for _ in range(length - 1):
            output = model(tokens, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            tokens = torch.multinomial(output.logits[:, -1].float().softmax(-1), 1, generator=generator)
            window.append(tokens)
        batches.append(torch.cat(window, dim=1).cpu())
    return torch.cat(batches)
