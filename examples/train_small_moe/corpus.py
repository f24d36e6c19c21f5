"""Text files of a folder, split into a training and a held-out part by file name, and their tokens."""

import hashlib
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
from sources import EXCLUDED_FOLDERS
from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
SUFFIXES = (".py", ".rst", ".md")
HELD_OUT_ONE_IN = 50
ENCODED_AT_ONCE = 4096  # texts; an encoding takes far more memory than its ids


class InputError(click.ClickException):
    """Bad input; the message is one line that names the thing, the place and the remedy."""

    exit_code = 2


def standard_library() -> Path:
    """Folder of the running Python's own standard library (its text is under the PSF License Agreement)."""
    return Path(sysconfig.get_paths()["stdlib"])


def is_held_out(name: str) -> bool:
    """Whether the file of this name (relative, with forward slashes) is kept from training.

    The name alone decides, so another version of the same text keeps the same files apart.
    """
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % HELD_OUT_ONE_IN == 0


def read_texts(folders: tuple[Path, ...]) -> tuple[list[str], list[str]]:
    """Texts of the folders' files, in order of their names: (training, held-out).

    Raises InputError where a folder is missing or either part comes out empty.
    """
    training, held_out = [], []
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"text folder {folder} does not exist: name a folder of {', '.join(SUFFIXES)} files")
        for path in sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file()):
            name = path.relative_to(folder)
            if EXCLUDED_FOLDERS.intersection(name.parts):
                continue
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # the standard library's own tests keep a few files that are broken on purpose
            (held_out if is_held_out(name.as_posix()) else training).append(text)
    for part, texts in (("training", training), ("held-out", held_out)):
        if not any(texts):
            raise InputError(f"no {part} text in {', '.join(map(str, folders))}: give folders with more files")
    return training, held_out


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """All texts as one stream of token ids, uint16 [tokens], each text ending with END_OF_TEXT."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    streams = []
    for start in range(0, len(texts), ENCODED_AT_ONCE):
        encodings = tokenizer.encode_batch_fast(list(texts[start : start + ENCODED_AT_ONCE]), add_special_tokens=False)
        streams += [np.array([*encoding.ids, end], np.uint16) for encoding in encodings]
    return np.concatenate(streams)
