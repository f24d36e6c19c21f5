"""The correction: a map of low rank, from the router alone, that makes up for the experts that a layer drops.

A layer that runs k of the model's own K experts adds B A phi + c to its routed experts' output, in float32. phi is
[tokens, 3 * experts]: the router's logits (with the router's own bias, before softmax or sigmoid, without a selection
bias); the weights of the k kept experts, each at its expert's place; those of the K - k dropped ones likewise. These
are the weights by which the model at K multiplies its experts' outputs: renormalised and scaled as the family does.
A token all of whose logits are zero gets nothing: its hidden state is zero, as that of padding, and stays so.
Shapes are static and no branch depends on values. Engines may compute it otherwise; these functions are their judge.
"""

import torch


def find_features(logits: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """phi [tokens, 3 * experts], float32.

    Args:
        logits: of the router, [tokens, experts].
        weights: of the model's own K experts, scaled and all, [tokens, K].
        ids: of these experts, [tokens, K]; below zero in padding rows.
        kept: ids of the k experts that run, [tokens, k], in any order.
    """
    logits, weights = logits.float(), torch.where(ids < 0, 0.0, weights.float())
    is_kept = (ids[:, :, None] == kept[:, None, :]).any(-1)
    places = ids.clamp_min(0).long()
    spread = [
        torch.zeros_like(logits).scatter_add(-1, places, torch.where(m, weights, 0.0)) for m in (is_kept, ~is_kept)
    ]
    return torch.cat([logits, *spread], -1)


def correct(output: torch.Tensor, phi: torch.Tensor, A: torch.Tensor, B: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """`output` [tokens, hidden] plus B A phi + c, in the output's type; A [rank, 3 * experts], B [hidden, rank]."""
    return output + expand(project(phi, A.T), B.T, c).to(output.dtype)


def project(phi: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """A phi [tokens, rank], float32, of A [3 * experts, rank]; NaN for a token that gets no correction."""
    seen = (phi[:, : phi.shape[1] // 3] != 0).any(-1, keepdim=True)
    return torch.where(seen, phi @ A.float(), torch.nan)


def expand(sums: torch.Tensor, B: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """The correction [tokens, hidden], float32, from what `project` returns; B [rank, hidden]."""
    return torch.where(sums[:, :1].isnan(), 0.0, sums @ B.float() + c.float())
