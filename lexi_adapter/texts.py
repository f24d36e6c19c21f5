"""Text and questions as users have them, and the tokenizer and limits of the model that reads them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lexi_adapter.allocation import AllocationError

# Where models with other senses keep their language model's configuration.
TEXT_CONFIGS = ("text_config", "language_config", "llm_config")


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


def read_records(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of a JSON list of objects, or of a file with one object a line."""
    text = read_text(path)
    try:
        whole = json.loads(text)
        records = [(f"{path}, entry {n}", r) for n, r in enumerate(whole if isinstance(whole, list) else [whole], 1)]
    except ValueError:
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
            except ValueError as error:
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


def find_limit(config: dict[str, Any]) -> int | None:
    """The positions that a model knows, by its config.json; None if that does not say."""
    sections = (config, *(config.get(name) or {} for name in TEXT_CONFIGS))
    return next((s["max_position_embeddings"] for s in sections if s.get("max_position_embeddings")), None)


def check_length(what: str, length: int, limit: int | None) -> None:
    """Raise AllocationError if `what` is longer than the model knows positions."""
    if limit is not None and length > limit:
        raise AllocationError(
            f"{what} of {length} tokens is more than the model's {limit} positions; take a shorter one"
        )
