"""A launch of a Triton kernel that was launched alike before, without Triton's dispatch.

Dispatch takes the host several times as long as the launch, and where no CUDA graph covers a step, two kernels a layer
are launched from Python: small steps would wait for that. For the same reason sizes are rounded here: Triton's own
functions work at compile time, too, and take microseconds.
"""

from collections.abc import Mapping
from typing import Any

import torch

_compiled: dict[tuple, Any] = {}


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: tuple[torch.Tensor, ...],
    numbers: tuple[int | float, ...],
    constants: Mapping[str, Any],
    *,
    num_warps: int,
) -> None:
    """Launch `kernel`, whose parameters are these tensors, numbers and constants, in this order.

    The first of `numbers` is one that the kernel is never specialised by. By all others, by the tensors' types and by
    whether they are aligned, Triton compiles the kernel anew; so one that was compiled is kept for each of them.
    """
    own = [(tensor.dtype, tensor.data_ptr() % 16) for tensor in tensors]
    key = (kernel, tensors[0].device, num_warps, numbers[1:], *constants.values(), *own)
    compiled = _compiled.get(key)
    if compiled is None:
        compiled = kernel[grid](*tensors, *numbers, **constants, num_warps=num_warps)
        if compiled is not None:  # as it is where kernels are interpreted
            _compiled[key] = compiled
    else:
        compiled[grid](*tensors, *numbers, *constants.values())


def count_blocks(size: int, block: int) -> int:
    """How many blocks hold so many items."""
    return -(-size // block)


def round_up(number: int) -> int:
    """The smallest power of two that is not less than `number`, at least 1."""
    return 1 << (number - 1).bit_length()
