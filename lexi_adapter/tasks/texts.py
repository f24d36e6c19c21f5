"""Text files and JSON records, tokenizers, and checks of lengths and token ids against a model's limits."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lexi_adapter.errors import AdapterError
from lexi_adapter.files import MOST_DATA_BYTES, parse_json, read_bytes


def read_text(path: str) -> str:
    """The text of a file in UTF-8. AdapterError for another encoding, an empty file, or none."""
    try:
        data = read_bytes(path, MOST_DATA_BYTES)
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise AdapterError(f"cannot read {path}: {error.strerror}; name a text file") from error
    except UnicodeDecodeError as error:
        raise AdapterError(f"{path} is not UTF-8 (byte {error.start}); convert it, as with iconv") from error
    if not text.strip():
        raise AdapterError(f"{path} holds no text; name one that does")
    return text


def check_unicode(name: str, text: str) -> None:
    """Raise AdapterError for text that is not valid Unicode: JSON and Python let through half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise AdapterError(
            f"{name} holds {text[error.start]!r}, half of a surrogate pair and no letter; mend it there"
        ) from error


def read_records(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) for every object of a JSON list, or of a file with one JSON object a line."""
    text = read_text(path)
    try:
        document = parse_json(text)
        entries = document if isinstance(document, list) else [document]
        records = [(f"{path}, entry {number}", entry) for number, entry in enumerate(entries, 1)]
    except ValueError:
        records = list(_read_lines(path, text))
    for place, record in records:
        if not isinstance(record, dict):
            raise AdapterError(f"{place} is not a JSON object")
        yield place, record


def _read_lines(path: str, text: str) -> Iterator[tuple[str, Any]]:
    # Split at "\n" alone: str.splitlines also splits at characters that a JSON string may hold.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}, line {number}", parse_json(line)
            except ValueError as error:
                raise AdapterError(f"{path}, line {number} is not JSON ({error})") from error


def load_tokenizer(folder: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder. AdapterError if transformers finds none in it."""
    from transformers import AutoTokenizer

    remedy = "name a folder that has one by --tokenizer"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # its type depends on which file is missing or broken
        reason = " ".join(str(error).split())[:200]
        raise AdapterError(f"{folder} has no tokenizer that transformers reads ({reason}); {remedy}") from error
    # For some model types AutoTokenizer makes an empty tokenizer where there are no files.
    if not encode(tokenizer, "a", add_special_tokens=False):
        raise AdapterError(f"{folder} has no tokenizer, or one without letters; {remedy}")
    return tokenizer


def encode(tokenizer: Any, text: str, **options: Any) -> list[int]:
    """Token ids of a text of any length, with the special tokens that the tokenizer itself adds."""
    return tokenizer(text, verbose=False, **options)["input_ids"]


def find_bos(tokenizer: Any) -> int | None:
    """The id of the token that the tokenizer puts before a text, or None if it puts none."""
    bos = tokenizer.bos_token_id
    return bos if bos is not None and encode(tokenizer, "a")[:1] == [bos] else None


def check_length(name: str, length: int, limit: int | None) -> None:
    """Raise AdapterError if `length` is more than the model's positions, `limit`; `name` is for the message."""
    if limit is not None and length > limit:
        raise AdapterError(f"{name} of {length} tokens is more than the model's {limit} positions; take a shorter one")


def check_prompt(number: int, length: int, max_new_tokens: int, max_length: int | None) -> None:
    """Raise AdapterError if prompt `number` has no tokens, or with its answer more than `max_length`."""
    if length == 0:
        raise AdapterError(f"prompt {number} has no tokens; leave it out")
    if max_length is not None and length + max_new_tokens > max_length:
        raise AdapterError(
            f"prompt {number} of {length} tokens and its answer of {max_new_tokens} are more than "
            f"--max-length {max_length}; cut it"
        )


def check_tokens(name: str, sequences: Iterable[Sequence[int]], vocabulary: int | None) -> None:
    """Raise AdapterError for token ids outside the model's vocabulary; `name` is for the message."""
    if vocabulary is not None:
        ends = (end for sequence in sequences for end in (min(sequence), max(sequence)))
        if (token := next((end for end in ends if not 0 <= end < vocabulary), None)) is not None:
            raise AdapterError(
                f"{name} has token {token}, the model knows 0 to {vocabulary - 1}; use its own tokenizer"
            )
