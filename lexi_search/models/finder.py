"""Lookup of tensors by the names of their modules, with checks of type and shape."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lexi_search.checkpoint.reader import INDEX, find_missing_shards, find_unnamed_shards
from lexi_search.checkpoint.tensors import Tensors
from lexi_search.errors import InputError
from lexi_search.layers.weights import Affine

Shape = tuple[int | None, ...]  # None: any extent
_EXPERT = re.compile(r"(.*\.)experts\.\d+\.")
_WEIGHT_DTYPES = ("float32", "float16", "bfloat16", "float64")


def explain_absence(tensors: Tensors, name: str = "") -> str:
    """The likely reason why the tensor `name` is not there, and the remedy, for messages."""
    if expert := _EXPERT.match(name):
        module, switch = expert[0], expert[1] + "switch_mlp."
        if other := next((other for other in tensors if other.startswith(switch)), None):
            return f"{other} is MLX's layout, which is not read: take the checkpoint that it was converted from"
        others = [other for other in tensors if other.startswith(module)]
        if others and not any(".weight" in other or ".qweight" in other for other in others):
            return f"the expert has {others[0]} instead, and what that computes is not known"
    if unnamed := find_unnamed_shards(tensors.folder):
        return f"{unnamed[0]} is there, but not named in {INDEX}, so it is not read"
    shards = find_missing_shards(tensors.folder)
    more = f" and {len(shards) - 1} more" if len(shards) > 1 else ""
    return f"{shards[0]}{more} is not there, so the download is incomplete" if shards else "is the download complete?"


def require_shape(tensors: Tensors, name: str, shape: Shape) -> tuple[int, ...]:
    """The shape of a tensor; InputError unless the tensor is there, of a plain float type, and fits `shape`."""
    entry = tensors.get(name)
    if entry is None:
        raise InputError(f"{tensors.folder}: tensor {name} is missing; {explain_absence(tensors, name)}")
    if entry.dtype.name not in _WEIGHT_DTYPES:
        raise InputError(f"{entry.file}: tensor {name} is {entry.dtype.name}; known are {', '.join(_WEIGHT_DTYPES)}")
    fits = len(entry.shape) == len(shape) and all(b in (None, a) for a, b in zip(entry.shape, shape, strict=True))
    if not fits or 0 in entry.shape:
        wanted = ", ".join("any" if extent is None else str(extent) for extent in shape)
        raise InputError(f"{entry.file}: tensor {name} has shape {list(entry.shape)}, expected [{wanted}]")
    return entry.shape


@dataclass(frozen=True)
class Stored:
    """A reference to a tensor, or some of its rows, by logical name; stands for the array in a tree of weights."""

    name: str
    rows: tuple[int, int] | None = None


class Finder:
    """A lookup of modules by their names below a prefix; `used` are the names of all tensors that it returned."""

    def __init__(self, tensors: Tensors, prefix: str = "", used: set[str] | None = None):
        self.tensors, self.prefix = tensors, prefix
        self.used: set[str] = set() if used is None else used

    def at(self, prefix: str) -> "Finder":
        """A finder for another prefix, which shares `used` with this one."""
        return Finder(self.tensors, prefix, self.used)

    def at_module(self, stem: str) -> "Finder":
        """A finder for the modules below one of this finder's."""
        return self.at(self.prefix + stem)

    def has(self, module: str) -> bool:
        return f"{self.prefix}{module}.weight" in self.tensors

    def take(self, modules: Sequence[str], shape: Shape) -> Affine | None:
        """The weight, of shape `shape`, and the bias, if any, of the first of `modules` that is there; None for none.

        Raises:
            InputError: another shape, or a type that is not a float.
        """
        module = next(filter(self.has, modules), None)
        if module is None:
            return None
        weight = self._take(f"{module}.weight", shape)
        has_bias = f"{self.prefix}{module}.bias" in self.tensors
        return Affine(weight, self._take(f"{module}.bias", self.get_shape(weight)[:1]) if has_bias else None)

    def need(self, modules: Sequence[str], shape: Shape) -> Affine:
        """As `take`, but InputError where none of `modules` is there."""
        affine = self.take(modules, shape)
        if affine is None:
            wanted = " or ".join(f"{self.prefix}{module}.weight" for module in modules)
            remedy = "complete the download, or use lexi-search profile --input paper, which takes the MoE layers alone"
            raise InputError(f"{self.tensors.folder}: tensor {wanted} is missing; {remedy}")
        return affine

    def take_tensor(self, name: str, shape: Shape) -> Stored | None:
        """A tensor that is not the weight of a module; None if it is not there."""
        return self._take(name, shape) if self.prefix + name in self.tensors else None

    def need_tensor(self, name: str, shape: Shape) -> Stored:
        """As `take_tensor`, but InputError where the tensor is not there."""
        return self._take(name, shape)

    def get_shape(self, stored: Stored) -> tuple[int, ...]:
        return self.tensors[stored.name].shape

    def _take(self, name: str, shape: Shape) -> Stored:
        require_shape(self.tensors, self.prefix + name, shape)
        self.used.add(self.prefix + name)
        return Stored(self.prefix + name)
