"""The correction on CUDA: A phi beside the choice of experts, and B, c and the sum where the output is written anyway.

For layers that are opaque to vLLM's compiler; `gates` and `correction` have the formulas. `route` stands for a
softmax router and all that follows, `narrow` goes behind any other router, `add` takes the place of the sum over a
token's experts, or of the copy that ends their computation. A is [3 * experts, rank] and B [rank, hidden] here, the
rank a power of two from 16; `hold` of `vllm_correction` makes them. A phi is NaN for a token all of whose logits are
zero, which gets no correction. Imported only where it runs, or where a test interprets it (TRITON_INTERPRET=1).
"""

import torch
import triton
from triton import language as tl

from lexi_adapter.serving.kernels.gates import TINY
from lexi_adapter.serving.kernels.triton_gates import ROWS, find_factor, find_rank
from lexi_adapter.serving.kernels.triton_launch import count_blocks, launch, round_up

MOST_ROUTED = 256  # experts of a layer whose scores one program of `route` holds
BLOCK = 128  # experts whose logits a program of `narrow` holds at once
OUTPUT_ROWS, OUTPUT_COLUMNS, OUTPUT_WARPS = 16, 64, 4  # of one program of `add`


def route(
    logits: torch.Tensor,
    A: torch.Tensor,
    *,
    top_k: int,
    own_top_k: int,
    exponent: float,
    renormalize: bool,
    scale: float,
    ids_dtype: torch.dtype,
    padding: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The weights and ids [tokens, top_k] of a softmax router, best first, and A phi [tokens, rank], float32.

    Of equal logits the first are chosen. There are at most `MOST_ROUTED` experts. Rows where `padding` [tokens] is true
    choose experts -1, with weights 0.
    """
    tokens, experts = logits.shape
    weights = torch.empty((tokens, top_k), dtype=torch.float32, device=logits.device)
    ids = torch.empty((tokens, top_k), dtype=ids_dtype, device=logits.device)
    sums = torch.empty((tokens, A.shape[1]), dtype=torch.float32, device=logits.device)
    if tokens:
        block = max(16, round_up(experts))
        launch(
            _route,
            (count_blocks(tokens, ROWS), 1, 1),
            (logits.contiguous(), A, weights if padding is None else padding.view(torch.uint8), weights, ids, sums),
            (tokens, exponent, scale),
            {
                "tiny": TINY,
                "experts": experts,
                "block": block,
                "own_top_k": own_top_k,
                "top_k": top_k,
                "columns": round_up(top_k),
                "renormalize": renormalize,
                "padded": padding is not None,
                "rank": A.shape[1],
                "precision": _choose_precision(A),
                "rows": ROWS,
            },
            num_warps=4 if block <= 64 else 8,
        )
    return weights, ids, sums


def narrow(
    logits: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    A: torch.Tensor,
    *,
    top_k: int,
    exponent: float,
    ranked: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `triton_gates.narrow` returns, and A phi [tokens, rank], float32; `logits` are [tokens, experts]."""
    (tokens, own_top_k), experts = weights.shape, logits.shape[1]
    narrowed = [values.new_empty((tokens, top_k)) for values in (weights, ids)]
    sums = torch.empty((tokens, A.shape[1]), dtype=torch.float32, device=logits.device)
    if tokens:
        launch(
            _narrow,
            (count_blocks(tokens, ROWS), 1, 1),
            (logits.contiguous(), weights.contiguous(), ids.contiguous(), A, *narrowed, sums),
            (tokens, exponent),
            {
                "tiny": TINY,
                "experts": experts,
                "block": min(BLOCK, max(16, round_up(experts))),
                "own_top_k": own_top_k,
                "top_k": top_k,
                "columns": round_up(own_top_k),
                "ranked": ranked,
                "rank": A.shape[1],
                "precision": _choose_precision(A),
                "rows": ROWS,
            },
            num_warps=4,
        )
    return narrowed[0], narrowed[1], sums


def add(source: torch.Tensor, sums: torch.Tensor, B: torch.Tensor, c: torch.Tensor, output: torch.Tensor) -> None:
    """Write `source` + `sums` B + c into `output`, which may be `source`.

    Both are [tokens, width], rows apart as they like; columns past the hidden size, of padding, are copied. A `source`
    of [tokens, experts, width], without gaps, is summed over its experts.
    """
    tokens, width = output.shape
    if tokens:
        launch(
            _add,
            (count_blocks(tokens, OUTPUT_ROWS), count_blocks(width, OUTPUT_COLUMNS), 1),
            (source, sums, B, c, output),
            (tokens, source.stride(0), output.stride(0)),
            {
                "experts": source.shape[1] if source.dim() == 3 else 1,
                "width": width,
                "hidden": B.shape[1],
                "rank": B.shape[0],
                "precision": _choose_precision(B),
                "rows": OUTPUT_ROWS,
                "block": OUTPUT_COLUMNS,
            },
            num_warps=OUTPUT_WARPS,
        )


def _choose_precision(values: torch.Tensor) -> str:
    # Half-precision numbers are exact in TF32.
    return "ieee" if values.dtype == torch.float32 else "tf32"


# Never specialised by the number of tokens: nothing is compiled while a CUDA graph is captured.
@triton.jit(do_not_specialize=["tokens"])
def _route(
    logits,
    A,
    padding,
    out_weights,
    out_ids,
    out_sums,
    tokens,
    exponent,
    scale,
    tiny: tl.constexpr,
    experts: tl.constexpr,
    block: tl.constexpr,  # experts, rounded up to a power of two
    own_top_k: tl.constexpr,
    top_k: tl.constexpr,
    columns: tl.constexpr,  # top_k, rounded up to a power of two
    renormalize: tl.constexpr,
    padded: tl.constexpr,
    rank: tl.constexpr,
    precision: tl.constexpr,
    rows: tl.constexpr,
):
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    expert, column = tl.arange(0, block), tl.arange(0, columns)
    there = (expert < experts)[None, :]
    place = row[:, None].to(tl.int64)
    logit = tl.load(logits + place * experts + expert[None, :], mask=(row < tokens)[:, None] & there, other=0.0)
    logit = logit.to(tl.float32)
    score = tl.exp(logit - tl.max(tl.where(there, logit, float("-inf")), axis=1)[:, None])
    score = tl.where(there, score, 0.0)
    score = score / tl.sum(score, axis=1)[:, None]
    score = tl.where(score == score, score, 0.0)  # padding rows may hold anything
    left = tl.where(there, score, -1.0)
    mass, kept = tl.zeros((rows,), tl.float32), tl.zeros((rows,), tl.float32)
    weight, index = tl.zeros((rows, columns), tl.float32), tl.zeros((rows, columns), tl.int32)
    sums = tl.zeros((rows, rank), tl.float32)
    for turn in tl.static_range(own_top_k):
        best, which = tl.max(left, axis=1, return_indices=True, return_indices_tie_break_left=True)
        left = tl.where(expert[None, :] == which[:, None], -1.0, left)
        mass += best
        if turn < top_k:
            kept += best
            weight = tl.where((column == turn)[None, :], best[:, None], weight)
            index = tl.where((column == turn)[None, :], which[:, None], index)
            sums += _gather(A, best, which + experts, rank)
        else:
            sums += _gather(A, best, which + 2 * experts, rank)
    unit = tl.zeros((rows,), tl.float32) + scale
    if renormalize:
        unit = unit / tl.maximum(mass, tiny)
    factor = unit * find_factor(mass, kept, exponent, tiny)
    if padded:
        real = tl.load(padding + row, mask=row < tokens, other=1) == 0
        factor, index = tl.where(real, factor, 0.0), tl.where(real[:, None], index, -1)
    stored = (row < tokens)[:, None] & (column < top_k)[None, :]
    tl.store(out_weights + place * top_k + column[None, :], weight * factor[:, None], mask=stored)
    tl.store(out_ids + place * top_k + column[None, :], index, mask=stored)
    sums = _project(logit, A, sums * unit[:, None], expert, experts, rank, precision)
    sums = tl.where(_find_largest(logit)[:, None] > 0.0, sums, float("nan"))
    offsets = place * rank + tl.arange(0, rank)[None, :]
    tl.store(out_sums + offsets, sums, mask=(row < tokens)[:, None])


@triton.jit(do_not_specialize=["tokens"])
def _narrow(
    logits,
    weights,
    ids,
    A,
    out_weights,
    out_ids,
    out_sums,
    tokens,
    exponent,
    tiny: tl.constexpr,
    experts: tl.constexpr,
    block: tl.constexpr,
    own_top_k: tl.constexpr,
    top_k: tl.constexpr,
    columns: tl.constexpr,  # own_top_k, rounded up to a power of two
    ranked: tl.constexpr,
    rank: tl.constexpr,
    precision: tl.constexpr,
    rows: tl.constexpr,
):
    row, column = tl.program_id(0) * rows + tl.arange(0, rows), tl.arange(0, columns)
    place, known = row[:, None].to(tl.int64), (row < tokens)[:, None]
    valid = known & (column < own_top_k)[None, :]
    weight = tl.load(weights + place * own_top_k + column[None, :], mask=valid, other=0.0).to(tl.float32)
    index = tl.load(ids + place * own_top_k + column[None, :], mask=valid, other=-1).to(tl.int32)
    turn = find_rank(weight, column, own_top_k, ranked)
    kept = valid & (turn < top_k)
    factor = find_factor(tl.sum(weight, axis=1), tl.sum(tl.where(kept, weight, 0.0), axis=1), exponent, tiny)
    tl.store(out_weights + place * top_k + turn, weight * factor[:, None], mask=kept)
    tl.store(out_ids + place * top_k + turn, index, mask=kept)
    sums = tl.zeros((rows, rank), tl.float32)
    for other in tl.static_range(own_top_k):
        this = (column == other)[None, :]
        value = tl.sum(tl.where(this, weight, 0.0), axis=1)
        which = tl.sum(tl.where(this, index, 0), axis=1)
        part = experts + experts * tl.sum(tl.where(this & (turn >= top_k), 1, 0), axis=1)
        sums += _gather(A, tl.where(which < 0, 0.0, value), tl.maximum(which, 0) + part, rank)
    largest = tl.zeros((rows,), tl.float32)
    for start in tl.static_range(0, experts, block):
        expert = start + tl.arange(0, block)
        there = known & (expert < experts)[None, :]
        logit = tl.load(logits + place * experts + expert[None, :], mask=there, other=0.0).to(tl.float32)
        sums = _project(logit, A, sums, expert, experts, rank, precision)
        largest = tl.maximum(largest, _find_largest(logit))
    sums = tl.where(largest[:, None] > 0.0, sums, float("nan"))
    tl.store(out_sums + place * rank + tl.arange(0, rank)[None, :], sums, mask=known)


@triton.jit
def _find_largest(logit):
    """The largest absolute value of each row."""
    return tl.max(tl.abs(logit), axis=1)


@triton.jit
def _gather(A, weight, column, rank: tl.constexpr):
    """For every token, the column of the map that it names, times its weight: [rows, rank]."""
    values = tl.load(A + column[:, None] * rank + tl.arange(0, rank)[None, :])
    return weight[:, None] * values.to(tl.float32)


@triton.jit
def _project(logit, A, sums, expert, experts: tl.constexpr, rank: tl.constexpr, precision: tl.constexpr):
    """`sums` plus the product of the map with the logits of these experts."""
    offsets = expert[:, None] * rank + tl.arange(0, rank)[None, :]
    values = tl.load(A + offsets, mask=(expert < experts)[:, None], other=0.0).to(tl.float32)
    return tl.dot(logit, values, sums, input_precision=precision)


@triton.jit(do_not_specialize=["tokens"])
def _add(
    source,
    sums,
    B,
    c,
    output,
    tokens,
    source_stride,
    output_stride,
    experts: tl.constexpr,
    width: tl.constexpr,
    hidden: tl.constexpr,
    rank: tl.constexpr,
    precision: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
):
    row, column = tl.program_id(0) * rows + tl.arange(0, rows), tl.program_id(1) * block + tl.arange(0, block)
    place, inner = row[:, None].to(tl.int64), tl.arange(0, rank)
    known, real = (row < tokens)[:, None], (column < hidden)[None, :]
    stored = known & (column < width)[None, :]
    # All that is read is asked for before anything waits for it.
    left = tl.load(sums + place * rank + inner[None, :], mask=known, other=0.0)
    right = tl.load(B + inner[:, None] * hidden + column[None, :], mask=real, other=0.0).to(tl.float32)
    constant = tl.load(c + column[None, :], mask=real, other=0.0)
    value = tl.zeros((rows, block), tl.float32)
    for expert in range(experts):
        offsets = place * source_stride + expert * width + column[None, :]
        value += tl.load(source + offsets, mask=stored, other=0.0).to(tl.float32)
    change = tl.dot(left, right, input_precision=precision) + constant
    change = tl.where(change == change, change, 0.0)
    result = (value + change).to(output.dtype.element_ty)
    tl.store(output + place * output_stride + column[None, :], result, mask=stored)
