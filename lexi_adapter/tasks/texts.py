"""Text and questions as users have them, and the tokenizer and limits of the model that reads them."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lexi_adapter.errors import AllocationError


def read_text(path: str) -> str:
    """The text of a file in UTF-8. AllocationError for another encoding, an empty file, or none."""
    try:
        data = Path(path).read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise AllocationError(f"cannot read {path}: {error.strerror}; name a text file") from error
    except UnicodeDecodeError as error:
        raise AllocationError(f"{path} is not UTF-8 (byte {error.start}); convert it, as with iconv") from error
    if not text.strip():
        raise AllocationError(f"{path} holds no text; name one that does")
    return text


def check_unicode(what: str, text: str) -> None:
    """Raise AllocationError for a text that is none: JSON and Python let through half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise AllocationError(
            f"{what} holds {text[error.start]!r}, half of a surrogate pair and no letter; mend it there"
        ) from error


def read_records(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of a JSON list of objects, or of a file with one object a line."""
    text = read_text(path)
    try:
        whole = json.loads(text)
        records = [(f"{path}, entry {n}", r) for n, r in enumerate(whole if isinstance(whole, list) else [whole], 1)]
    except (ValueError, RecursionError):
        records = list(_read_lines(path, text))
    for place, record in records:
        if not isinstance(record, dict):
            raise AllocationError(f"{place} is not a JSON object")
        yield place, record


def _read_lines(path: str, text: str) -> Iterator[tuple[str, Any]]:
    # By "\n" alone: a JSON string may hold what str.splitlines takes for the end of a line.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}, line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise AllocationError(f"{path}, line {number} is not JSON ({error})") from error


def load_tokenizer(folder: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder. AllocationError if transformers finds none in it."""
    from transformers import AutoTokenizer

    remedy = "name a folder that has one by --tokenizer"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # what it raises depends on which file is missing or broken
        reason = " ".join(str(error).split())[:200]
        raise AllocationError(f"{folder} has no tokenizer that transformers reads ({reason}); {remedy}") from error
    # Of some model types it makes an empty one where there are no files.
    if not encode(tokenizer, "a", add_special_tokens=False):
        raise AllocationError(f"{folder} has no tokenizer, or one that knows no letters; {remedy}")
    return tokenizer


def encode(tokenizer: Any, text: str, **options: Any) -> list[int]:
    """Token ids of a text of any length, with the special tokens that the tokenizer itself puts around it."""
    return tokenizer(text, verbose=False, **options)["input_ids"]


def find_bos(tokenizer: Any) -> int | None:
    """The token that the tokenizer puts before a text, or None if it puts none."""
    bos = tokenizer.bos_token_id
    return bos if bos is not None and encode(tokenizer, "a")[:1] == [bos] else None


def check_length(what: str, length: int, limit: int | None) -> None:
    """Raise AllocationError if `what` is longer than the model knows positions."""
    if limit is not None and length > limit:
        raise AllocationError(
            f"{what} of {length} tokens is more than the model's {limit} positions; take a shorter one"
        )


def check_prompt(number: int, length: int, max_new_tokens: int, max_length: int | None) -> None:
    """Raise AllocationError if prompt `number` has no tokens, or more with its answer than `max_length`."""
    if length == 0:
        raise AllocationError(f"prompt {number} has no tokens; leave it out")
    if max_length is not None and length + max_new_tokens > max_length:
        raise AllocationError(
            f"prompt {number} of {length} tokens and its answer of {max_new_tokens} are more than "
            f"--max-length {max_length}; cut it"
        )


def check_tokens(what: str, sequences: Iterable[Sequence[int]], vocabulary: int | None) -> None:
    """Raise AllocationError if `what` has token ids that the model does not know."""
    if vocabulary is not None:
        ends = (end for sequence in sequences for end in (min(sequence), max(sequence)))
        if (token := next((end for end in ends if not 0 <= end < vocabulary), None)) is not None:
            raise AllocationError(
                f"{what} has token {token}, the model knows 0 to {vocabulary - 1}; use its own tokenizer"
            )
