"""The gate exponent on CUDA, in one kernel after a router's own: of the model's own K experts, the first k, reweighed.

For layers that are opaque to vLLM's compiler; `gates` has the formula. Imported only where it runs, or where a test
interprets it (TRITON_INTERPRET=1).
"""

import torch
import triton
from triton import language as tl

from lexi_adapter.serving.kernels.gates import TINY
from lexi_adapter.serving.kernels.triton_launch import count_blocks, launch, round_up

ROWS = 16  # tokens of one program


def narrow(
    weights: torch.Tensor, ids: torch.Tensor, top_k: int, exponent: float, *, ranked: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights and ids [tokens, top_k] of a layer that keeps, of its own K experts, the top_k selected first.

    Args:
        weights: of the model's own K experts, [tokens, K], none below zero.
        ids: of these experts, [tokens, K].
        top_k: the number of experts to keep.
        exponent: b in (S_K / S_k)^b.
        ranked: the experts selected first are those of the largest weights, in any column; otherwise those of the first
            columns.
    """
    tokens, own_top_k = weights.shape
    narrowed = [values.new_empty((tokens, top_k)) for values in (weights, ids)]
    if tokens:
        launch(
            _narrow,
            (count_blocks(tokens, ROWS), 1, 1),
            (weights.contiguous(), ids.contiguous(), *narrowed),
            (tokens, exponent),
            {
                "tiny": TINY,
                "own_top_k": own_top_k,
                "top_k": top_k,
                "columns": round_up(own_top_k),
                "ranked": ranked,
                "rows": ROWS,
            },
            num_warps=1,
        )
    return narrowed[0], narrowed[1]


# Never specialised by the number of tokens: nothing is compiled while a CUDA graph is captured.
@triton.jit(do_not_specialize=["tokens"])
def _narrow(
    weights,
    ids,
    out_weights,
    out_ids,
    tokens,
    exponent,
    tiny: tl.constexpr,
    own_top_k: tl.constexpr,
    top_k: tl.constexpr,
    columns: tl.constexpr,  # own_top_k, rounded up to a power of two
    ranked: tl.constexpr,
    rows: tl.constexpr,
):
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    column = tl.arange(0, columns)
    valid = (row < tokens)[:, None] & (column < own_top_k)[None, :]
    offsets = row[:, None].to(tl.int64) * own_top_k + column[None, :]
    weight = tl.load(weights + offsets, mask=valid, other=0.0).to(tl.float32)
    expert = tl.load(ids + offsets, mask=valid, other=0)
    rank = find_rank(weight, column, own_top_k, ranked)
    kept = valid & (rank < top_k)
    factor = find_factor(tl.sum(weight, axis=1), tl.sum(tl.where(kept, weight, 0.0), axis=1), exponent, tiny)
    out_offsets = row[:, None].to(tl.int64) * top_k + rank
    tl.store(out_weights + out_offsets, weight * factor[:, None], mask=kept)
    tl.store(out_ids + out_offsets, expert, mask=kept)


@triton.jit
def find_rank(weight, column, own_top_k: tl.constexpr, ranked: tl.constexpr):
    """The place of each of the weights [rows, columns] in the order of selection; see `narrow` for `ranked`."""
    rank = tl.zeros_like(weight).to(tl.int32)
    if ranked:
        # One column at a time: the rank is the number of weights that are larger, or as large and to the left.
        for other in tl.static_range(own_top_k):
            value = tl.sum(tl.where((column == other)[None, :], weight, 0.0), axis=1)[:, None]
            rank += ((value > weight) | ((value == weight) & (other < column)[None, :])).to(tl.int32)
    else:
        rank += column[None, :]
    return rank


@triton.jit
def find_factor(whole, kept, exponent, tiny: tl.constexpr):
    """(whole / kept)^exponent of each row; 0 in padding rows, which have no weights at all."""
    mass = whole / tl.maximum(kept, tiny)
    return tl.where(mass > 0.0, tl.exp2(exponent * tl.log2(tl.where(mass > 0.0, mass, 1.0))), 0.0)
