"""What `eval` and `bench` wrote, read back: files of a user, so every value that is used is looked at first."""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lexi_adapter.errors import AllocationError
from lexi_adapter.evaluation import evaluate
from lexi_adapter.speed import throughput


def read_results(path: str, kind: str) -> dict[str, Any]:
    """A document of `eval` or `bench`, by its format, with all that is joined here. AllocationError for another."""
    remedy = f"make one with lexi-adapter {kind.removeprefix('lexi-')}"
    try:
        document = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise AllocationError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise AllocationError(f"{path} is not JSON ({error}); {remedy}") from error
    version = {evaluate.FORMAT: evaluate.VERSION, throughput.FORMAT: throughput.VERSION}[kind]
    if not isinstance(document, dict) or (document.get("format"), document.get("version")) != (kind, version):
        raise AllocationError(f"{path} is not a {kind} file of version {version}; {remedy}")
    if flaw := next(_find_flaws(document, SHAPES[kind], ""), None):
        raise AllocationError(f"{path} is not whole: {flaw}; {remedy}")
    return document


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < sys.float_info.max


def _is_error(value: Any) -> bool:
    return value is None or (_is_number(value) and value >= 0)


def _is_top_k(value: Any) -> bool:
    return isinstance(value, dict) and all(type(k) is int for k in value.values())


def _is_in_order(line: Mapping[str, Any]) -> bool:
    return 0 < line["lowest"] <= line["median"] <= line["highest"]


RATES = {"variant": _is_text, "workload": _is_text, "median": _is_number, "lowest": _is_number, "highest": _is_number}
# What is read of a document: keys and their shapes, [shape] of every entry of a list that is not empty, a check, or
# several of these one after the other.
SHAPES: Mapping[str, Any] = {
    evaluate.FORMAT: {
        "model": _is_text,
        "variants": [{"name": _is_text, "top_k": lambda value: value is None or _is_top_k(value)}],
        "summary": [
            {"variant": _is_text, "task": _is_text, "metric": _is_text, "value": _is_number, "stderr": _is_error}
        ],
    },
    throughput.FORMAT: {
        "variants": [
            {"name": _is_text, "overrides": lambda value: type(value) is dict, "engine": {"top_k": _is_top_k}}
        ],
        "workloads": [_is_text],
        "summary": [(RATES, _is_in_order)],
    },
}


def _find_flaws(value: Any, shape: Any, place: str) -> Iterator[str]:
    """What of a JSON value is not of this shape; a key that is not there has the value None."""
    if isinstance(shape, dict) and isinstance(value, dict):
        for key, inner in shape.items():
            yield from _find_flaws(value.get(key), inner, f"{place}.{key}" if place else key)
    elif isinstance(shape, list) and isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from _find_flaws(item, shape[0], f"{place}[{index}]")
    elif isinstance(shape, tuple):
        for inner in shape:
            yield from _find_flaws(value, inner, place)
    elif isinstance(shape, dict | list) or not shape(value):
        yield f"{place} is missing" if value is None else f"{place} is {repr(value)[:60]}"
