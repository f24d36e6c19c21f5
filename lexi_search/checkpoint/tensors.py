"""A checkpoint's logical tensors: `experts.0.gate_proj.weight` is one, however many stored tensors make it up.

A logical tensor is looked up by its logical name and has its logical shape, [out, in] for an expert's matrix. It is
quantised if the stored tensors say so by their names, and these must agree with the config.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lexi_search.checkpoint.dequantise import Plain, Scheme
from lexi_search.checkpoint.quantisation_config import Quantisation, read_quantisation
from lexi_search.checkpoint.quantisation_formats import FORMATS, Format, ShapeMismatch
from lexi_search.checkpoint.quantisation_methods import Storage
from lexi_search.errors import InputError


class TensorEntry(NamedTuple):
    """The place of a stored tensor: `size` bytes of `file` from byte `start` on, row-major."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    size: int


class StoredTensor(NamedTuple):
    """One logical tensor: its shape, the type of its values, and the stored tensors (role -> name) that make it up.

    If a quantised tensor has an axis of experts before its matrices, every part has it too, but for `shared` roles: one
    scale of all experts.
    """

    file: Path  # of the part that holds the weight
    dtype: np.dtype
    shape: tuple[int, ...]
    scheme: Scheme
    parts: Mapping[str, str]
    shared: tuple[str, ...] = ()


class Tensors(Mapping[str, StoredTensor]):
    """Logical name -> `StoredTensor`, worked out at the lookup from names and shapes; `folder` is the checkpoint's.

    Raises:
        InputError: a quantisation that is not supported; at a lookup, a tensor whose parts are missing, do not fit each
            other or the config, or that the config says is not quantised.
    """

    def __init__(self, config: Mapping[str, Any], folder: Path, entries: Mapping[str, TensorEntry]):
        self.folder = folder
        self._entries = entries
        self._quantisation = read_quantisation(config, folder)

    def __getitem__(self, name: str) -> StoredTensor:
        quantisation, matches = self._quantisation, []
        if quantisation is not None:
            storages = quantisation.find_storages(name.removesuffix(".weight"))
            matches = [(storage, parts) for storage in storages if (parts := _find_parts(self._entries, storage, name))]
            if len(matches) > 1:
                raise InputError(f"{quantisation.place}: several groups of settings hold for {name}; which one counts?")
        if matches:
            return self._describe(name, *matches[0], quantisation)
        entry = self._entries[name]
        return StoredTensor(entry.file, entry.dtype, entry.shape, Plain(), {"weight": name})

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @cached_property
    def _names(self) -> tuple[str, ...]:
        """Every stored name, with a quantised weight's replaced by the logical one."""
        storages = self._quantisation.storages if self._quantisation else ()
        formats = [FORMATS[storage.format] for storage in storages]
        return tuple(dict.fromkeys(_name_logically(name, formats) for name in self._entries))

    def _describe(
        self, name: str, storage: Storage, parts: Mapping[str, str], quantisation: Quantisation
    ) -> StoredTensor:
        format, entries = FORMATS[storage.format], {role: self._entries[part] for role, part in parts.items()}
        file = entries["weight"].file
        if quantisation.is_ignored(name.removesuffix(".weight")):
            raise InputError(f"{file}: {name} is quantised, but {quantisation.place} says that it is not")
        for role, part in format.parts.items():
            if role in entries and entries[role].dtype.name not in part.dtypes:
                thing = f"{parts[role]} is {entries[role].dtype.name}"
                raise InputError(f"{file}: tensor {thing}; {quantisation.place} allows {', '.join(part.dtypes)}")
        shapes = {role: entry.shape for role, entry in entries.items()}
        axes = shapes["weight"][: -format.rank]  # of experts, if any
        shared = tuple(role for role, shape in shapes.items() if axes and shape in ((), (1,)) and shape != axes)
        shapes |= {role: axes for role in shared}
        try:
            if len(axes) > 1 or any(shape[: len(axes)] != axes for shape in shapes.values()):
                raise ShapeMismatch
            scheme, shape = format.describe(storage, {role: shape[len(axes) :] for role, shape in shapes.items()})
        except ShapeMismatch:
            listed = ", ".join(f"{parts[role]} {list(shape)}" for role, shape in shapes.items())
            raise InputError(f"{file}: shapes do not fit what {quantisation.place} says: {listed}") from None
        return StoredTensor(file, np.dtype(quantisation.dtype), (*axes, *shape), scheme, parts, shared)


def _find_parts(entries: Mapping[str, TensorEntry], storage: Storage, name: str) -> dict[str, str] | None:
    """The stored parts of a quantised tensor, role -> name; None if the tensor is not quantised.

    Raises:
        InputError: a required part is missing.
    """
    format = FORMATS[storage.format]
    if not name.endswith(format.base):
        return None
    stem = name.removesuffix(format.base)
    parts = {
        role: next((stem + ending for ending in part.endings if stem + ending in entries), None)
        for role, part in format.parts.items()
    }
    if parts["weight"] is None or (parts["weight"] == name and parts["scale"] is None):
        return None
    if parts["weight"] != name and name in entries:
        raise InputError(f"{entries[name].file}: both {name} and {parts['weight']} are there; which one counts?")
    for role, part in format.parts.items():
        if (part.required or role in storage.needs) and parts[role] is None:
            wanted = " or ".join(stem + ending for ending in part.endings)
            raise InputError(f"{entries[parts['weight']].file}: {wanted} is missing beside {parts['weight']}")
    return {role: part for role, part in parts.items() if part is not None}


def _name_logically(name: str, formats: list[Format]) -> str:
    for format in formats:
        [ending] = format.parts["weight"].endings
        if ending and name.endswith(ending):
            return name.removesuffix(ending) + format.base
    return name
