"""A checkpoint's logical tensors: `experts.0.gate_proj.weight` is one, however many stored parts make it up.

Whoever asks for a tensor asks by its logical name and sees its logical shape, [out, in] for a matrix; `dequantise` makes
the values from the parts, on the device.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lexi_search.checkpoint import Checkpoint
from lexi_search.schemes import Plain


class StoredTensor(NamedTuple):
    """One logical tensor: its shape, the type of its values, and the stored tensors (role -> name) that make it up."""

    file: Path  # of the part that holds the weight
    dtype: np.dtype
    shape: tuple[int, ...]
    scheme: Plain
    parts: Mapping[str, str]


class Tensors(Mapping[str, StoredTensor]):
    """Logical name -> `StoredTensor`, worked out when asked for; `folder` is the checkpoint's."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self.folder = checkpoint.folder

    def __getitem__(self, name: str) -> StoredTensor:
        entry = self.checkpoint.entries[name]
        return StoredTensor(entry.file, entry.dtype, entry.shape, Plain(), {"weight": name})

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint.entries)

    def __len__(self) -> int:
        return len(self.checkpoint.entries)
