"""Dataclasses as JSON objects and back, each value checked against the type that its field declares.

Also the checks that several kinds of file share: `require` and its relatives.
"""

import dataclasses
import math
from collections.abc import Mapping
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from lexi_search.errors import InputError

MAX_GATE_EXPONENT = 2.0  # 1 hands all of the dropped gate mass on; far above 2, weights would overflow


def encode(value: Any) -> Any:
    """`value` as it is in JSON: fields that are None are left out, keys become strings."""
    if dataclasses.is_dataclass(value):
        pairs = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {name: encode(item) for name, item in pairs if item is not None}
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [encode(item) for item in value]
    return value


def decode(hint: Any, value: Any, where: str) -> Any:
    """The JSON `value` as the type `hint`; InputError naming the place (`where`) if it is of another type."""
    if dataclasses.is_dataclass(hint):
        return _decode_fields(hint, value, where)
    if get_origin(hint) is UnionType:
        return decode(get_args(hint)[0], value, where)
    if get_origin(hint) is tuple:
        _require_type(value, list, where)
        return tuple(decode(get_args(hint)[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if get_origin(hint) is Mapping:
        _require_type(value, dict, where)
        key_hint, item_hint = get_args(hint)
        if key_hint is str:
            return value
        return {_parse_index(key, where): decode(item_hint, item, f"{where}.{key}") for key, item in value.items()}
    if hint is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    _require_type(value, hint, where)
    return value


def _decode_fields(cls: type, value: Any, where: str) -> Any:
    _require_type(value, dict, where or "the file")
    dotted = f"{where}." if where else ""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    optional = {name for name, field in fields.items() if field.default is not dataclasses.MISSING}
    missing = sorted(set(fields) - optional - set(value))
    extra = sorted(set(value) - set(fields))
    require(not missing, f"missing {', '.join(dotted + name for name in missing)}"[:200])
    require(not extra, f"unknown {', '.join(dotted + name for name in extra)}"[:200])
    hints = get_type_hints(cls)
    values = {name: decode(hints[name], item, dotted + name) for name, item in value.items()}
    try:
        return cls(**values)
    except InputError as error:
        raise InputError(f"{where}: {error}" if where else str(error)) from error


def _parse_index(key: str, where: str) -> int:
    canonical = key.isascii() and key.isdecimal() and len(key) < 10 and str(int(key)) == key
    require(canonical, f"key {short(key)} of {where} is not a whole number")
    return int(key)


def short(value: Any) -> str:
    """The first forty characters of the value's `repr`, for messages."""
    return repr(value)[:40]


def _require_type(value: Any, expected: type, where: str) -> None:
    """Raise InputError unless `value` is of exactly this type."""
    names = {int: "an integer", float: "a number", str: "a string", list: "a list", dict: "an object"}
    require(type(value) is expected, f"{where} is not {names[expected]}: {short(value)}")


def require_loss(value: float, what: str) -> None:
    """Raise InputError unless `value` is finite and at least 0."""
    require(math.isfinite(value) and value >= 0, f"{what} is {value}, a finite number of at least 0 expected")


def require(condition: Any, message: str) -> None:
    """Raise InputError with `message` unless `condition` holds."""
    if not condition:
        raise InputError(message)


def require_gate_exponent(value: float) -> None:
    """Raise InputError unless `value` is between 0 and `MAX_GATE_EXPONENT`."""
    require_loss(value, "gate_exponent")
    require(
        value <= MAX_GATE_EXPONENT,
        f"gate_exponent is {value}, expected between 0 and {MAX_GATE_EXPONENT:g}; 1 hands all of the dropped mass on",
    )
