"""A user's text as tokens, read with the checkpoint's own `tokenizer.json`: what takes the place of sampled text."""

import hashlib
import os
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Int32

from lexi_search.artifacts.files import read_bytes, read_json_object
from lexi_search.checkpoint.reader import TOKENIZER, TOKENIZER_CONFIG, Checkpoint
from lexi_search.errors import InputError
from lexi_search.layers.decoder import Decoder
from lexi_search.models.decoder_stack import count_tokens
from lexi_search.models.model import Model

MOST_TEXT = MOST_TOKENIZER = 2**28  # bytes
CHARACTERS = 8  # of a token, more than most have: so much of a text is read first
MARGIN = 64  # tokens before the end of what is read that may be others when more is


class Text(NamedTuple):
    """Tokens from the beginning of a text, and hex SHA-256 of its file and of the tokens, as little-endian int64."""

    tokens: Int32[np.ndarray, "sequences length"]
    file_sha256: str
    tokens_sha256: str


def read_text(
    checkpoint: Checkpoint,
    model: Model,
    decoder: Decoder,
    file: str | os.PathLike[str],
    *,
    sequences: int,
    length: int,
    remedy: str = "lower --samples, --batch or --length",
) -> Text:
    """So many sequences from the beginning of a UTF-8 text, one after the other.

    Where the tokenizer puts tokens before a text, such as a BOS, each sequence begins with them, since each is run by
    itself; what it puts after a text is left out. `remedy` says what to do about a text that is too short.

    Raises:
        InputError: a file that cannot be read, is empty or no UTF-8; no `tokenizer.json`, or one that cannot be read or
            has tokens that the model has not; a text that is too short.
    """
    data = _read(file, MOST_TEXT, "name a text file, or a part of it")
    try:
        characters = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 (byte {error.start}); convert it, as with iconv") from error
    tokenizer, start = _open_tokenizer(checkpoint)
    needed = sequences * (length - len(start))
    if length <= len(start):
        raise InputError(f"--length {length} leaves no room behind the {len(start)} tokens of the tokenizer's own")
    ids = encode(tokenizer, characters, needed)
    if len(ids) < needed:
        raise InputError(
            f"{file} has {len(ids)} tokens, and {sequences} sequences of {length} take {needed}; give more text, or "
            f"{remedy}"
        )
    rows = np.array(ids[:needed], np.int64).reshape(sequences, -1)
    tokens = np.concatenate([np.tile(np.array(start, np.int64), (sequences, 1)), rows], axis=1)
    _check_vocabulary(tokens, count_tokens(checkpoint, model, decoder), f"{checkpoint.folder / TOKENIZER}")
    hashed = hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest()
    return Text(tokens.astype(np.int32), hashlib.sha256(data).hexdigest(), hashed)


def encode(tokenizer: Any, characters: str, needed: int) -> list[int]:
    """At least `needed` of the tokens that a whole text begins with, or all of them.

    No more of the text is read than that takes: an encoding needs a hundred times its memory.
    """
    size = CHARACTERS * (needed + MARGIN)
    while True:
        ids = tokenizer.encode(characters[:size], add_special_tokens=False).ids
        if size >= len(characters):
            return ids
        if len(ids) >= needed + MARGIN:
            return ids[: len(ids) - MARGIN]
        size *= 2


def _read(file: str | os.PathLike[str], most: int, remedy: str) -> bytes:
    try:
        data = read_bytes(file, most)
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}; {remedy}") from error
    if not data.strip():
        raise InputError(f"{file} is empty; {remedy}")
    return data


def _open_tokenizer(checkpoint: Checkpoint) -> tuple[Any, tuple[int, ...]]:
    """The checkpoint's tokenizer, and the tokens that it puts before a text."""
    from tokenizers import Tokenizer

    place = checkpoint.folder / TOKENIZER
    if not place.exists():
        raise InputError(
            f"{checkpoint.folder} has no {TOKENIZER}, which --text needs; save one there (transformers: "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)), or leave --text out"
        )
    data = _read(place, MOST_TOKENIZER, "fetch it again")
    try:
        tokenizer = Tokenizer.from_buffer(data)
    except Exception as error:  # the library has no class of its own
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{place}: the tokenizers library cannot read it ({reason}); fetch it again") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, _find_start(checkpoint, tokenizer)


def _find_start(checkpoint: Checkpoint, tokenizer: Any) -> tuple[int, ...]:
    """The tokens before a text: by `add_bos_token` of the tokenizer's config where that is set, as in transformers."""
    place = checkpoint.folder / TOKENIZER_CONFIG
    config = read_json_object(place, finite=False) if place.exists() else {}
    adds, bos = config.get("add_bos_token"), config.get("bos_token")
    if type(adds) is not bool:
        encoding = tokenizer.encode("a")
        first = encoding.special_tokens_mask.index(0) if 0 in encoding.special_tokens_mask else 0
        return tuple(encoding.ids[:first])
    token = bos.get("content") if isinstance(bos, dict) else bos
    number = tokenizer.token_to_id(token) if adds and isinstance(token, str) else None
    if adds and token is not None and number is None:
        raise InputError(f"{place}: bos_token {token!r} is not in {TOKENIZER}; make the two fit")
    return () if number is None else (number,)


def _check_vocabulary(tokens: Int[np.ndarray, "sequences length"], vocabulary: int, place: str) -> None:
    if tokens.max() >= vocabulary:
        raise InputError(
            f"{place}: the text has token {tokens.max()}, and the model has {vocabulary}, from 0; use the model's own "
            "tokenizer"
        )
