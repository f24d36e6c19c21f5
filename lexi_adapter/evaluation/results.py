"""The results of `eval` and `bench`, read from files: users may have edited them, so every value used is checked."""

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from lexi_adapter.errors import AdapterError
from lexi_adapter.files import MOST_DATA_BYTES, read_json


def read_results(path: str, file_format: str) -> dict[str, Any]:
    """The document in a file of `file_format`, one of `SHAPES`. AdapterError for any other file."""
    remedy = f"make one with lexi-adapter {file_format.removeprefix('lexi-')}"
    try:
        document = read_json(path, finite=False, most=MOST_DATA_BYTES)
    except OSError as error:
        raise AdapterError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise AdapterError(f"{path} is not JSON ({error}); {remedy}") from error
    if not isinstance(document, dict) or (document.get("format"), document.get("version")) != (file_format, VERSION):
        raise AdapterError(f"{path} is not a {file_format} file of version {VERSION}; {remedy}")
    if flaw := next(_find_flaws(document, SHAPES[file_format], ""), None):
        raise AdapterError(f"{path} is not whole: {flaw}; {remedy}")
    return document


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < sys.float_info.max


def _is_error(value: Any) -> bool:
    return value is None or (_is_number(value) and value >= 0)


def _is_interval(value: Any) -> bool:
    return value is None or (isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)))


def _is_top_k(value: Any) -> bool:
    return isinstance(value, dict) and all(type(k) is int for k in value.values())


def _is_in_order(line: Mapping[str, Any]) -> bool:
    return 0 < line["lowest"] <= line["median"] <= line["highest"]


RATES = {"variant": _is_text, "workload": _is_text, "median": _is_number, "lowest": _is_number, "highest": _is_number}
VERSION = 1  # of both formats: the one that the shapes below describe
# Format -> shape of the part of a document that is used. A shape is a dict of keys and their shapes, [shape] for a list
# that is not empty, a function that checks a value, or a tuple of shapes that all have to fit.
SHAPES: Mapping[str, Any] = {
    "lexi-eval": {
        "model": _is_text,
        "variants": [{"name": _is_text, "top_k": lambda value: value is None or _is_top_k(value)}],
        "summary": [
            {
                "variant": _is_text,
                "task": _is_text,
                "metric": _is_text,
                "value": _is_number,
                "stderr": _is_error,
                "interval": _is_interval,
            }
        ],
    },
    "lexi-bench": {
        "variants": [
            {"name": _is_text, "overrides": lambda value: type(value) is dict, "engine": {"top_k": _is_top_k}}
        ],
        "workloads": [_is_text],
        "summary": [(RATES, _is_in_order)],
    },
}


def _find_flaws(value: Any, shape: Any, place: str) -> Iterator[str]:
    """The parts of a JSON value that do not fit the shape; a missing key has the value None."""
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
