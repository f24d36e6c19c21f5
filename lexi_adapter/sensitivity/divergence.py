"""Losses of a changed model's predictions: KL divergence from the model's own, and increase of the cross-entropy."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import kl_div

from lexi_adapter.allocation import Allocation
from lexi_adapter.errors import AdapterError
from lexi_adapter.model.variants import allocate
from lexi_adapter.serving.transformers_patch import apply


class PredictionLosses(NamedTuple):
    """Losses in nats per predicted token, float64 on the CPU; the last axis is that of the sequences.

    `divergence` is KL(base || changed), `increase` that of the cross-entropy of the sequence's own tokens.
    """

    divergence: torch.Tensor
    increase: torch.Tensor


def find_log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities for every token but the first of each sequence: [sequences, length - 1, vocabulary] float32."""
    return torch.stack([row[:-1].float().log_softmax(-1) for row in logits])


def compare(base: torch.Tensor, logits: torch.Tensor, tokens: torch.Tensor) -> PredictionLosses:
    """The losses of changed logits [sequences, length, vocabulary] against the model's own log-probabilities.

    One sequence at a time, for memory. Sums over the vocabulary round at 1e-7 of their largest terms, which differ in
    sign, and means over tokens are float64. AdapterError if something is not finite.
    """
    divergences, increases = [], []
    for original, row, ids in zip(base, logits, tokens[:, 1:, None], strict=True):
        changed = row[:-1].float().log_softmax(-1)
        divergence = kl_div(changed, original, reduction="none", log_target=True).sum(-1)
        divergences.append(divergence.double().mean().clamp_min(0.0))
        increases.append((original.gather(-1, ids) - changed.gather(-1, ids)).double().mean())
    losses = torch.stack([torch.stack(divergences), torch.stack(increases)]).cpu()
    if not losses.isfinite().all():
        raise AdapterError(f"the model's logits in {logits.dtype} are not all finite; use float32")
    return PredictionLosses(*losses)


def stack(losses: Sequence[PredictionLosses]) -> PredictionLosses:
    """The losses of several changed models as one, with a first axis for the models."""
    return PredictionLosses(*map(torch.stack, zip(*losses, strict=True)))


@torch.no_grad()
def judge_allocations(
    model: torch.nn.Module,
    windows: torch.Tensor,
    allocations: Sequence[Allocation],
    *,
    batch: int = 8,
    check_weights: bool = True,
) -> PredictionLosses:
    """The losses of whole allocations of one model on windows of tokens, each [allocations, sequences].

    The model has its own top-k again at the end.

    Args:
        model: a causal language model of transformers, in evaluation mode, on the device that is to compute.
        windows: token ids, [sequences, length], all predicted but the first of each; on any device.
        allocations: of this model, read from files or made by `variants.allocate`; their compensation applies.
        batch: sequences in one forward pass. Memory holds their logits twice.
        check_weights: as of `transformers_patch.apply`.

    Raises:
        AllocationError: an allocation is not for this model.
        AdapterError: there are no allocations, or logits are not finite.
    """
    if not allocations:
        raise AdapterError("there are no allocations to judge; give some")
    identity = allocations[0].model
    full = allocate(identity, dict.fromkeys(identity.moe_layers, identity.top_k))
    apply(model, full, check_weights=check_weights)
    batches = []
    try:
        for tokens in windows.split(batch):
            tokens = tokens.to(model.device)
            apply(model, full, check_weights=False)
            base = find_log_probabilities(model(tokens, use_cache=False).logits)
            losses = []
            for allocation in allocations:
                apply(model, allocation, check_weights=False)
                losses.append(compare(base, model(tokens, use_cache=False).logits, tokens))
            batches.append(stack(losses))
    finally:
        apply(model, full, check_weights=False)
    return PredictionLosses(*(torch.cat(parts, dim=1) for parts in zip(*batches, strict=True)))
