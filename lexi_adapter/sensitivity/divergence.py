"""How far a changed model's predictions are from the model's own: divergence, and increase of the cross-entropy."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import kl_div

from lexi_adapter.allocation import Allocation
from lexi_adapter.errors import AllocationError
from lexi_adapter.model.variants import allocate
from lexi_adapter.serving.transformers_patch import apply


class Distances(NamedTuple):
    """Of each sequence, in nats per predicted token, float64 on the CPU: the last axis is that of the sequences.

    `divergence` is KL(base || changed), `increase` that of the cross-entropy of the sequence's own tokens.
    """

    divergence: torch.Tensor
    increase: torch.Tensor


def find_log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Of every token but the first of each sequence, [sequences, length - 1, vocabulary] float32, from all logits."""
    return torch.stack([row[:-1].float().log_softmax(-1) for row in logits])


def compare(base: torch.Tensor, logits: torch.Tensor, tokens: torch.Tensor) -> Distances:
    """How far changed logits [sequences, length, vocabulary] are from the model's own log-probabilities.

    One sequence at a time, for memory. Sums over the vocabulary round at 1e-7 of their largest terms, which differ in
    sign, and means over tokens are float64. AllocationError if something is not finite.
    """
    divergences, increases = [], []
    for own, row, ids in zip(base, logits, tokens[:, 1:, None], strict=True):
        changed = row[:-1].float().log_softmax(-1)
        divergence = kl_div(changed, own, reduction="none", log_target=True).sum(-1)
        divergences.append(divergence.double().mean().clamp_min(0.0))
        increases.append((own.gather(-1, ids) - changed.gather(-1, ids)).double().mean())
    found = torch.stack([torch.stack(divergences), torch.stack(increases)]).cpu()
    if not found.isfinite().all():
        raise AllocationError(f"the model's logits in {logits.dtype} are not all finite; use float32")
    return Distances(*found)


def stack(distances: Sequence[Distances]) -> Distances:
    """The distances of several changed models as one, with a first axis for the models."""
    return Distances(*map(torch.stack, zip(*distances, strict=True)))


@torch.no_grad()
def judge_allocations(
    model: torch.nn.Module,
    windows: torch.Tensor,
    allocations: Sequence[Allocation],
    *,
    batch: int = 8,
    check_weights: bool = True,
) -> Distances:
    """What whole allocations of one model lose on windows of tokens, each [allocations, sequences].

    The model ends as it was made, with its own top-k.

    Args:
        model: a causal language model of transformers, in evaluation mode, on the device that is to compute.
        windows: token ids, [sequences, length], all predicted but the first of each; on any device.
        allocations: what is judged, as read from files or made by `variants.allocate`; gate exponents apply.
        batch: sequences in one forward pass. Memory holds their logits twice.
        check_weights: as of `transformers_patch.apply`.

    Raises:
        AllocationError: an allocation is not for this model.
    """
    if not allocations:
        raise AllocationError("there are no allocations to judge; give some")
    identity = allocations[0].model
    own = allocate(identity, dict.fromkeys(identity.moe_layers, identity.top_k))
    apply(model, own, check_weights=check_weights)
    judged = []
    try:
        for tokens in windows.split(batch):
            tokens = tokens.to(model.device)
            apply(model, own, check_weights=False)
            base = find_log_probabilities(model(tokens, use_cache=False).logits)
            found = []
            for allocation in allocations:
                apply(model, allocation, check_weights=False)
                found.append(compare(base, model(tokens, use_cache=False).logits, tokens))
            judged.append(stack(found))
    finally:
        apply(model, own, check_weights=False)
    return Distances(*(torch.cat(parts, dim=1) for parts in zip(*judged, strict=True)))
