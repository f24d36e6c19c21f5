"""The gate exponent: how much of the dropped experts' gate weights the kept ones take over.

The weights of a layer that runs k of the model's own K experts are `w_i(base) * (S_K / S_k)^b`. S_j is the sum of the
first j gate scores in the order of selection, and w_i(base) the model's weight of expert i at K. b = 0 drops the
weights of the others, b = 1 hands all of them on. An engine that routes at k does b = 0 if the family does not
renormalise, else b = 1.

Weights at K are the scores up to one factor a token, whether renormalised, scaled or neither. So S_K / S_k is a ratio
of sums of weights, and nothing here depends on the family. Shapes are static and no branch depends on values: the
functions can be compiled, and captured in CUDA graphs.
"""

import torch

TINY = torch.finfo(torch.float32).tiny  # padding rows have no weights at all: 0 / TINY is 0, and 0 / 0 would be NaN


def pick(weights: torch.Tensor, ids: torch.Tensor, kept: torch.Tensor, exponent: float) -> torch.Tensor:
    """The weights [tokens, k] of a layer with the experts `kept` [tokens, k], in any order, of `ids` [tokens, K]."""
    same = kept[:, :, None] == ids[:, None, :]
    return compensate(weights, torch.where(same, weights[:, None, :], 0.0).sum(-1), exponent)


def compensate(weights: torch.Tensor, kept: torch.Tensor, exponent: float) -> torch.Tensor:
    """`kept` [tokens, k], the kept ones of `weights` [tokens, K], times (S_K / S_k)^exponent."""
    mass = weights.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp_min(TINY)
    return kept * mass**exponent


def rescale(logits: torch.Tensor, top_k: int, own_top_k: int, exponent: float) -> torch.Tensor:
    """The factor [tokens, 1] of the output of a block that routes by a renormalised softmax of `logits` at top_k.

    For blocks whose weights are out of reach: a renormalised weight s_i / S_k becomes s_i / S_K * (S_K / S_k)^b, and
    the output is linear in the weights. `logits` are [tokens, experts], float32 wanted.
    """
    scores = logits.softmax(-1).topk(own_top_k).values
    return (scores[:, :top_k].sum(-1, keepdim=True) / scores.sum(-1, keepdim=True)) ** (1 - exponent)
