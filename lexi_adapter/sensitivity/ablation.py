"""Brute force: how far a model moves, on given tokens, when one layer alone runs fewer experts.

For every MoE layer and every k below the model's own: the block's output on the model's own hidden states (what LExI's
Algorithm 1, arXiv 2509.02753, measures on N(0, 1)), and the whole model's predictions. Layers before the one that is
changed are computed once.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from lexi_adapter.allocation import Allocation, ModelIdentity
from lexi_adapter.errors import AllocationError
from lexi_adapter.model.variants import allocate
from lexi_adapter.sensitivity.divergence import Distances, compare, find_log_probabilities, stack
from lexi_adapter.sensitivity.replay import Decoder, check_replays, find_decoder, replaced, run_from, run_recorded
from lexi_adapter.serving.transformers_patch import apply

Table = Sequence[Sequence[float]]


class Movements(NamedTuple):
    """One layer on one batch of windows, each table [sequences][k - 1] for every k below the model's own.

    `squares` sums ||y_k - y_base||^2 over the sequence's tokens, `relative` is the mean over them of that over ||h||^2,
    with h the residual stream that the block's output is added to. `divergence` and `increase` are those of
    `divergences.Distances`, empty where only the block was looked at.
    """

    squares: Table
    relative: Table
    divergence: Table = ()
    increase: Table = ()


@dataclass(frozen=True)
class Switch:
    """A model whose layers are given fewer experts one at a time; `own` is what it runs by itself."""

    decoder: Decoder
    own: Allocation
    gate_exponent: float | None

    def reduce(self, layer: int, top_k: int) -> None:
        """Run `layer` with `top_k` experts and all the others as they are."""
        top_ks = {**self.own.top_k, layer: top_k}
        reduced = replace(allocate(self.own.model, top_ks), gate_exponent=self.gate_exponent)
        apply(self.decoder.model, reduced, check_weights=False)

    def restore(self) -> None:
        """Run all layers as they are."""
        apply(self.decoder.model, self.own, check_weights=False)

    @property
    def below(self) -> range:
        """Every k below the model's own."""
        return range(1, self.own.model.top_k)


def measure(
    model: torch.nn.Module,
    identity: ModelIdentity,
    windows: torch.Tensor,
    *,
    batch: int = 8,
    local: bool = False,
    gate_exponent: float | None = None,
    finished: Collection[tuple[int, int]] = (),
) -> Iterator[tuple[int, int, Movements]]:
    """(batch, layer, what was measured), batch by batch, and for each of them layer by layer.

    The model has its own top-k again when the iterator ends. Memory beside the model: one hidden state per layer and
    twice the logits of one batch.

    Args:
        model: a causal language model of transformers, in evaluation mode, on the device that is to compute.
        identity: which model it is, as `identity.describe_checkpoint` says.
        windows: token ids, [sequences, length].
        batch: sequences in one forward pass.
        local: look at the blocks only, which takes one pass, and not at the whole model.
        gate_exponent: how much of the dropped experts' gate mass the kept ones take over; None: as the model does.
        finished: batches and layers that are not to be measured again.

    Raises:
        AllocationError: a family that is not known, or layers' outputs or logits that are not finite.
    """
    own = allocate(identity, dict.fromkeys(identity.moe_layers, identity.top_k))
    switch = Switch(find_decoder(model, identity), own, gate_exponent)
    switch.restore()
    if not local:
        check_replays(switch.decoder, windows[:1].to(model.device))
    try:
        for index, tokens in enumerate(windows.split(batch)):
            missing = [layer for layer in identity.moe_layers if (index, layer) not in finished]
            if missing:
                found = _measure_batch(switch, tokens.to(model.device), missing, local)
                yield from ((index, layer, movements) for layer, movements in found)
    finally:
        switch.restore()


def _measure_batch(
    switch: Switch, tokens: torch.Tensor, layers: Sequence[int], local: bool
) -> Iterator[tuple[int, Movements]]:
    base, outputs, blocks = _observe(switch, tokens, layers)
    if local:
        yield from blocks.items()
        return
    for layer in layers:
        divergence, increase = map(_tabulate, _reduce(switch, layer, tokens, base, outputs))
        yield layer, blocks[layer]._replace(divergence=divergence, increase=increase)


@torch.inference_mode()
def _observe(
    switch: Switch, tokens: torch.Tensor, layers: Sequence[int]
) -> tuple[torch.Tensor, list[Any], dict[int, Movements]]:
    """Of the model as it is: log-probabilities, what every layer gives, and how the blocks of `layers` move."""
    probes = {layer: Probe(switch, layer, tokens.shape) for layer in layers}
    logits, outputs = run_recorded(switch.decoder, tokens, probes)
    return find_log_probabilities(logits), outputs, {layer: probe.movements for layer, probe in probes.items()}


@torch.inference_mode()
def _reduce(switch: Switch, layer: int, tokens: torch.Tensor, base: torch.Tensor, outputs: Sequence[Any]) -> Distances:
    """The distances of the whole model with this layer at each k below its own, each [k, sequences]."""
    found = []
    for top_k in switch.below:
        switch.reduce(layer, top_k)
        found.append(compare(base, run_from(switch.decoder, layer, tokens, outputs), tokens))
    switch.restore()
    return stack(found)


@dataclass
class Probe:
    """In place of a decoder layer's forward: computes what the layer does, and how its block moves at each k."""

    switch: Switch
    layer: int
    shape: torch.Size  # sequences, length
    given: Any = None  # by the block at its own k
    squares: list[torch.Tensor] = field(default_factory=list)  # of each k, [sequences, length]
    movements: Movements | None = None

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        block = self.switch.decoder.blocks[self.layer]
        compute = block.forward
        with replaced(block, lambda *inputs, **options: self._watch(compute, inputs, options)):
            output = forward(*args, **kwargs)
        # The layer where its block gives nothing is the residual stream, however a family scales what it adds to it.
        with replaced(block, lambda *inputs, **options: _silence(self.given)):
            stream = _first(forward(*args, **kwargs))
        # A token that the model never saw may be all zero, and so is then what the block makes of it.
        lengths = stream.double().reshape(*self.shape, -1).square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
        squares = torch.stack(self.squares)
        relative = squares / lengths
        if not all(values.isfinite().all() for values in (lengths, squares, relative)):
            raise AllocationError(
                f"the output of layer {self.layer} in {stream.dtype} is not always finite; use float32, or a gate "
                "exponent nearer to 0"
            )
        self.movements = Movements(_tabulate(squares.sum(-1)), _tabulate(relative.mean(-1)))
        return output

    def _watch(self, compute: Callable[..., Any], inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """The block's own output; those at fewer experts are compared with it."""
        self.given = compute(*inputs, **options)
        for top_k in self.switch.below:
            self.switch.reduce(self.layer, top_k)
            moved = _first(compute(*inputs, **options)).double() - _first(self.given).double()
            self.squares.append(moved.reshape(*self.shape, -1).square().sum(-1))
        self.switch.restore()
        return self.given


def _first(output: Any) -> torch.Tensor:
    """The hidden states in what a layer or a block gives: that itself, or the first of several things."""
    return output if torch.is_tensor(output) else output[0]


def _silence(output: Any) -> Any:
    zeros = torch.zeros_like(_first(output))
    return zeros if torch.is_tensor(output) else (zeros, *output[1:])


def _tabulate(values: torch.Tensor) -> Table:
    """[k, sequences] as numbers, [sequences][k - 1]."""
    return values.T.tolist()
