"""Brute force: the losses of a model on given tokens when one layer alone runs fewer experts.

For every MoE layer and every k below the model's own: the change of the block's output on the model's own hidden states
(LExI's Algorithm 1, arXiv 2509.02753, measures it on N(0, 1)), and the change of the whole model's predictions. Layers
before the changed one are computed once.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from lexi_adapter.allocation import Allocation, ModelIdentity
from lexi_adapter.errors import AdapterError
from lexi_adapter.model.variants import allocate
from lexi_adapter.sensitivity.divergence import PredictionLosses, compare, find_log_probabilities, stack
from lexi_adapter.sensitivity.replay import (
    Decoder,
    check_replays,
    find_decoder,
    replace_forward,
    run_from,
    run_recorded,
)
from lexi_adapter.serving.transformers_patch import apply

Table = Sequence[Sequence[float]]


class LayerLosses(NamedTuple):
    """The losses of one layer on one batch of windows: tables [sequences][k - 1] for every k below the model's own.

    `squares` sums ||y_k - y_base||^2 over the sequence's tokens, `relative` is the mean over them of that over ||h||^2,
    with h the residual stream that the block's output is added to. `divergence` and `increase` are those of
    `divergence.PredictionLosses`, empty where only the block was measured.
    """

    squares: Table
    relative: Table
    divergence: Table = ()
    increase: Table = ()


@dataclass(frozen=True)
class _Reducible:
    """A model whose layers can run fewer experts, one layer at a time; `full` is the allocation of its own top-k."""

    decoder: Decoder
    full: Allocation
    gate_exponent: float | None

    def reduce(self, layer: int, top_k: int) -> None:
        """Run `layer` with `top_k` experts and all other layers in full."""
        reduced = allocate(self.full.model, {**self.full.top_k, layer: top_k})
        apply(self.decoder.model, replace(reduced, gate_exponent=self.gate_exponent), check_weights=False)

    def restore(self) -> None:
        """Run all layers in full."""
        apply(self.decoder.model, self.full, check_weights=False)

    @property
    def smaller_ks(self) -> range:
        """Every k below the model's own."""
        return range(1, self.full.model.top_k)


def measure(
    model: torch.nn.Module,
    identity: ModelIdentity,
    windows: torch.Tensor,
    *,
    batch: int = 8,
    local: bool = False,
    gate_exponent: float | None = None,
    finished: Collection[tuple[int, int]] = (),
) -> Iterator[tuple[int, int, LayerLosses]]:
    """(batch, layer, losses), batch by batch, and within a batch layer by layer.

    The model has its own top-k again when the iterator ends. Memory beside the model: one hidden state per layer and
    twice the logits of one batch.

    Args:
        model: a causal language model of transformers, in evaluation mode, on the device that is to compute.
        identity: which model it is, from `identity.describe_checkpoint`.
        windows: token ids, [sequences, length].
        batch: sequences in one forward pass.
        local: measure the blocks only, which takes one pass, and not the whole model.
        gate_exponent: how much of the dropped experts' gate weights the kept ones take over; None: as the model does.
        finished: batches and layers that are not to be measured again.

    Raises:
        AdapterError: an unknown family, or layers' outputs or logits that are not finite.
    """
    full = allocate(identity, dict.fromkeys(identity.moe_layers, identity.top_k))
    reducible = _Reducible(find_decoder(model, identity), full, gate_exponent)
    reducible.restore()
    if not local:
        check_replays(reducible.decoder, windows[:1].to(model.device))
    try:
        for index, tokens in enumerate(windows.split(batch)):
            missing = [layer for layer in identity.moe_layers if (index, layer) not in finished]
            if missing:
                for layer, losses in _measure_batch(reducible, tokens.to(model.device), missing, local):
                    yield index, layer, losses
    finally:
        reducible.restore()


def _measure_batch(
    reducible: _Reducible, tokens: torch.Tensor, layers: Sequence[int], local: bool
) -> Iterator[tuple[int, LayerLosses]]:
    base, outputs, block_losses = _measure_blocks(reducible, tokens, layers)
    if local:
        yield from block_losses.items()
        return
    for layer in layers:
        divergence, increase = map(_tabulate, _measure_predictions(reducible, layer, tokens, base, outputs))
        yield layer, block_losses[layer]._replace(divergence=divergence, increase=increase)


@torch.inference_mode()
def _measure_blocks(
    reducible: _Reducible, tokens: torch.Tensor, layers: Sequence[int]
) -> tuple[torch.Tensor, list[Any], dict[int, LayerLosses]]:
    """One pass of the full model: log-probabilities, outputs of all layers, and losses of the blocks of `layers`."""
    probes = {layer: _BlockProbe(reducible, layer, tokens.shape) for layer in layers}
    logits, outputs = run_recorded(reducible.decoder, tokens, probes)
    return find_log_probabilities(logits), outputs, {layer: probe.losses for layer, probe in probes.items()}


@torch.inference_mode()
def _measure_predictions(
    reducible: _Reducible, layer: int, tokens: torch.Tensor, base: torch.Tensor, outputs: Sequence[Any]
) -> PredictionLosses:
    """The losses of the whole model with this layer at each k below its own, each [k, sequences]."""
    losses = []
    for top_k in reducible.smaller_ks:
        reducible.reduce(layer, top_k)
        losses.append(compare(base, run_from(reducible.decoder, layer, tokens, outputs), tokens))
    reducible.restore()
    return stack(losses)


@dataclass
class _BlockProbe:
    """A wrapper of a decoder layer's forward: returns the layer's output, and measures its block's losses at each k."""

    reducible: _Reducible
    layer: int
    shape: torch.Size  # sequences, length
    full_output: Any = None  # of the block at its own k
    squares: list[torch.Tensor] = field(default_factory=list)  # of each k, [sequences, length]
    losses: LayerLosses | None = None

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        block = self.reducible.decoder.blocks[self.layer]
        compute = block.forward
        with replace_forward(block, lambda *inputs, **options: self._compare(compute, inputs, options)):
            output = forward(*args, **kwargs)
        # With a block that returns zeros, the layer returns the residual stream, whatever a family scales it by.
        with replace_forward(block, lambda *inputs, **options: _zero(self.full_output)):
            stream = _get_hidden_states(forward(*args, **kwargs))
        # A token that was never trained may be all zero, and so is the block's output for it.
        lengths = stream.double().reshape(*self.shape, -1).square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
        squares = torch.stack(self.squares)
        relative = squares / lengths
        if not all(values.isfinite().all() for values in (lengths, squares, relative)):
            raise AdapterError(
                f"the output of layer {self.layer} in {stream.dtype} is not always finite; use float32, or a gate "
                "exponent nearer to 0"
            )
        self.losses = LayerLosses(_tabulate(squares.sum(-1)), _tabulate(relative.mean(-1)))
        return output

    def _compare(self, compute: Callable[..., Any], inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """The block's output at its own k, after those at fewer experts were compared with it."""
        self.full_output = compute(*inputs, **options)
        full = _get_hidden_states(self.full_output).double()
        for top_k in self.reducible.smaller_ks:
            self.reducible.reduce(self.layer, top_k)
            difference = _get_hidden_states(compute(*inputs, **options)).double() - full
            self.squares.append(difference.reshape(*self.shape, -1).square().sum(-1))
        self.reducible.restore()
        return self.full_output


def _get_hidden_states(output: Any) -> torch.Tensor:
    """The hidden states in the output of a layer or a block: a tensor, or a tuple that begins with it."""
    return output if torch.is_tensor(output) else output[0]


def _zero(output: Any) -> Any:
    """The output of a layer or a block with its hidden states set to zero."""
    zeros = torch.zeros_like(_get_hidden_states(output))
    return zeros if torch.is_tensor(output) else (zeros, *output[1:])


def _tabulate(values: torch.Tensor) -> Table:
    """[k, sequences] as numbers, [sequences][k - 1]."""
    return values.T.tolist()
