"""The weights of a decoder layer by what they are for: arrays, or where in a checkpoint they are stored."""

from collections.abc import Sequence
from dataclasses import dataclass

from lexi_search.checkpoint.tensors import Tensors
from lexi_search.errors import InputError
from lexi_search.layers.weights import Affine

WEIGHT_DTYPES = ("float32", "float16", "bfloat16", "float64")


def require_shape(tensors: Tensors, name: str, shape: tuple[int | None, ...]) -> tuple[int, ...]:
    """Check that a tensor is there, of a plain float type, and of this shape (None: any extent); return its shape."""
    entry = tensors.get(name)
    if entry is None:
        raise InputError(f"{tensors.folder}: tensor {name} is missing; is the download complete?")
    if entry.dtype.name not in WEIGHT_DTYPES:
        raise InputError(f"{entry.file}: tensor {name} is {entry.dtype.name}; known are {', '.join(WEIGHT_DTYPES)}")
    fits = len(entry.shape) == len(shape) and all(b in (None, a) for a, b in zip(entry.shape, shape, strict=True))
    if not fits or 0 in entry.shape:
        wanted = ", ".join("any" if extent is None else str(extent) for extent in shape)
        raise InputError(f"{entry.file}: tensor {name} has shape {list(entry.shape)}, expected [{wanted}]")
    return entry.shape


Shape = tuple[int | None, ...]  # None: any extent


@dataclass(frozen=True)
class Stored:
    """A tensor by its logical name, or some of its rows; stands where its array will stand in a tree of weights."""

    name: str
    rows: tuple[int, int] | None = None


class Finder:
    """Looks modules up by their names below a prefix, and remembers which tensors it found."""

    def __init__(self, tensors: Tensors, prefix: str = "", found: set[str] | None = None):
        self.tensors, self.prefix = tensors, prefix
        self.found: set[str] = set() if found is None else found

    def at(self, prefix: str) -> "Finder":
        """One for another prefix; what either finds, both remember."""
        return Finder(self.tensors, prefix, self.found)

    def has(self, module: str) -> bool:
        return f"{self.prefix}{module}.weight" in self.tensors

    def take(self, modules: Sequence[str], shape: Shape) -> Affine | None:
        """The weight, of that shape, and perhaps the bias of the first of `modules` that is there.

        Raises:
            InputError: another shape, or a type that is no float's.
        """
        module = next(filter(self.has, modules), None)
        if module is None:
            return None
        weight = self._take(f"{module}.weight", shape)
        has_bias = f"{self.prefix}{module}.bias" in self.tensors
        return Affine(weight, self._take(f"{module}.bias", self.get_shape(weight)[:1]) if has_bias else None)

    def need(self, modules: Sequence[str], shape: Shape) -> Affine:
        """The same, where it must be there."""
        found = self.take(modules, shape)
        if found is None:
            wanted = " or ".join(f"{self.prefix}{module}.weight" for module in modules)
            remedy = "complete the download, or use lexi-search profile --input paper, which takes the MoE layers alone"
            raise InputError(f"{self.tensors.folder}: tensor {wanted} is missing; {remedy}")
        return found

    def take_tensor(self, name: str, shape: Shape) -> Stored | None:
        """A tensor that is no module's weight, if it is there."""
        return self._take(name, shape) if self.prefix + name in self.tensors else None

    def get_shape(self, stored: Stored) -> tuple[int, ...]:
        return self.tensors[stored.name].shape

    def _take(self, name: str, shape: Shape) -> Stored:
        require_shape(self.tensors, self.prefix + name, shape)
        self.found.add(self.prefix + name)
        return Stored(self.prefix + name)
