"""Files of a machine that are text: which domain each belongs to, and what it holds for it. Standard library only."""

import ast
import gzip
import hashlib
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

# Installed packages have licences of their own; encodings and test data are tables, not text.
EXCLUDED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "encodings", "data"})
DOCUMENTATION = (".md", ".rst", ".txt")
# Lists that packages install, in files named like documentation.
LISTS = frozenset({"top_level.txt", "entry_points.txt", "SOURCES.txt", "requirements.txt", "namespace_packages.txt"})
LARGEST_FILE = 1_000_000  # bytes; what is larger is a table


class Text(NamedTuple):
    """What one file holds for one domain; `digest` of the whole file orders it and decides its part."""

    domain: str
    digest: bytes
    text: str


def find_domain(path: Path) -> str | None:
    """The domain of a file, by its name: `docs/index.md` is prose, `man1/ls.1.gz` is man."""
    if path.parent.name.startswith("man") and path.parent.name[3:4].isdigit():
        return "man"
    if path.suffix == ".py":
        return "code"
    is_list = path.name in LISTS or path.name.startswith(("LICENSE", "COPYING", "NOTICE"))
    return "prose" if path.suffix in DOCUMENTATION and not is_list else None


def find_files(folders: Sequence[Path]) -> Iterator[Path]:
    """Files of every domain; links are not followed, and no translated manual pages."""
    for folder in folders:
        for place, names, files in os.walk(folder):
            names[:] = sorted(name for name in names if name not in EXCLUDED_FOLDERS and name != "locale")
            is_translated = Path(place).name.startswith("man") and Path(place).parent.name != "man"
            for name in sorted(files):
                path = Path(place, name)
                domain = find_domain(path)
                if domain and not (domain == "man" and is_translated) and not path.is_symlink():
                    yield path


def find_docstrings(source: str) -> str:
    """The docstrings of a Python source, a blank line between two; nothing if it does not parse."""
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(text for text in found if text)


def read_file(path: Path) -> list[Text]:
    """What a file gives to each domain; nothing if it is too large, cannot be read or is not UTF-8."""
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        text = data.decode() if len(data) <= LARGEST_FILE else ""
    except (OSError, EOFError, UnicodeDecodeError, gzip.zlib.error):
        return []
    digest, domain = hashlib.sha256(data).digest(), find_domain(path)
    texts = [Text(domain, digest, text)]
    if domain == "code":
        texts.append(Text("prose", digest, find_docstrings(text)))
    return [text for text in texts if text.text.strip()]
