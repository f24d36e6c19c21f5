"""How the values of one stored tensor follow from its parts, in JAX: one class per scheme, decoded on the device.

A scheme says where numbers lie and how they combine; which checkpoint uses which is `formats`' business. All compute in
float32, one multiplication per value at most where the format has one, so that rounding to the final type is the only
rounding.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Array


@dataclass(frozen=True)
class Plain:
    """The values themselves; part `weight`."""

    def decode(self, parts: Mapping[str, Array], shape: tuple[int, ...]) -> Array:
        return parts["weight"]
