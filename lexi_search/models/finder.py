"""The weights of a decoder layer by what they are for: arrays, or where in a checkpoint they are stored."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lexi_search.decoders import Norms
from lexi_search.errors import InputError
from lexi_search.ffn import ExpertWeights
from lexi_search.layouts import require_shape
from lexi_search.tensors import Tensors

Shape = tuple[int | None, ...]  # None: any extent


@dataclass(frozen=True)
class Stored:
    """A tensor by its logical name, or some of its rows; stands where its array will stand in a tree of weights."""

    name: str
    rows: tuple[int, int] | None = None


class Affine(NamedTuple):
    """A matrix [out, in], or the gain of a norm, and its bias if there is one."""

    weight: Any
    bias: Any = None


class GroupedWeights(NamedTuple):
    """Of `GroupedAttention`: q [heads * head_dim, hidden], k and v [kv_heads * head_dim, hidden], o the way back.

    A `gate` like q scales what goes into o; `sinks` [heads] are the scores of seeing nothing.
    """

    q: Affine
    k: Affine
    v: Affine
    o: Affine
    q_norm: Affine | None = None
    k_norm: Affine | None = None
    gate: Affine | None = None
    sinks: Any = None


class LatentWeights(NamedTuple):
    """Of `LatentAttention`: queries from x or from q_norm(q_a x), keys and values from kv_norm of a part of kv_a x."""

    q: Affine
    kv_a: Affine
    kv_norm: Affine
    kv: Affine
    o: Affine
    q_a: Affine | None = None
    q_norm: Affine | None = None


class BlockWeights(NamedTuple):
    """One decoder layer.

    `ffn` is the dense MLP, or the shared experts of a MoE layer, whose output `ffn_gate` [1, hidden] scales if there
    is one. `moe` are the router and the experts on the device (`weights.LayerWeights`), None in a dense layer.
    """

    attention: GroupedWeights | LatentWeights
    norms: Norms
    ffn: ExpertWeights | None
    ffn_gate: Affine | None
    moe: Any = None


class EndWeights(NamedTuple):
    """What stands before and after the layers: embedding [vocabulary, hidden], final norm, head [vocabulary, hidden].

    The head is the embedding where both are one tensor.
    """

    embedding: Any
    norm: Affine
    head: Affine


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
