"""One layer for one chunk of sequences, of the model and of all its variants."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from lexi_search.artifacts.compensation import Maps
from lexi_search.layers.decoder import attend, finish
from lexi_search.layers.kernels.blocks import StackedExperts, stack_experts
from lexi_search.layers.kernels.grouped import can_group, stacked_outputs
from lexi_search.layers.moe import Correction, compute_outputs, correct, mix
from lexi_search.layers.routing import Choice, route
from lexi_search.layers.weights import BlockWeights
from lexi_search.profiling.forward.variants import MODEL, Hidden, Kept, Plan, Run, Variant, group


class MoEOutputs(NamedTuple):
    """A MoE layer on some tokens: its input, each token's choice and K expert outputs, and the residual stream."""

    layer: int  # of the decoder
    x: Float[Array, "tokens hidden"]
    outputs: Float[Array, "tokens K hidden"]
    choice: Choice
    hidden: Hidden


class Mixing(NamedTuple):
    """How outputs are mixed: a k, of all tokens or of each, a gate exponent, and a correction, as a `Variant` says."""

    k: int | Int32[np.ndarray, "tokens 1"]
    exponent: float | None
    correction: Correction | None


def prepare(run: Run, weights: BlockWeights) -> BlockWeights:
    """The weights for several uses: experts dequantised once, and stacked where the device multiplies all at once."""
    moe, model = weights.moe, run.model
    if moe is None:
        return weights
    [device] = moe.router.devices()
    traits = {"activation": model.activation, "routing": model.routing, "dtype": run.dtype}
    if can_group(moe.experts, device, top_k=model.top_k, **traits):
        return weights._replace(moe=moe._replace(experts=stack_experts(moe.experts, dtype=run.dtype)))
    return weights._replace(moe=moe._replace(experts=tuple(moe.experts)))


def advance(
    run: Run, plan: Plan, variants: Sequence[Variant], layer: int, weights: BlockWeights, states: dict[int, Any]
) -> MoEOutputs | None:
    """The model's own outputs in a layer, if it is a MoE layer; takes `states` through it.

    States are replaced one by one, so that never two copies of all are in memory. Variants that branch off in this
    layer share the model's input and expert outputs, and mix them with a k of their own.
    """
    full, is_moe = run.model.top_k, weights.moe is not None
    place = run.model.layers.index(layer) if is_moe else None
    step = partial(_step, run, layer, weights)

    def list_mixings(some: Sequence[Variant]) -> list[Mixing]:
        return [
            Mixing(k, variant.exponent, stack_corrections(layer, [k], variant.maps, full))
            for variant in some
            for k in [variant.top_k[place] if is_moe else full]
        ]

    reduced = [number for number in states if number != MODEL]
    branching = [number for number, branch in enumerate(plan.branches) if is_moe and branch == place]
    model = Variant((full,) * len(run.model.layers))
    hidden, outputs = step(states[MODEL], list_mixings([model, *(variants[number] for number in branching)]))
    for some in group(reduced, variants, plan.together):
        top_k = [variants[number].top_k[place] if is_moe else full for number in some]
        top_k += top_k[-1:] * (plan.together - len(some))  # one shape, one compilation
        joined = [states[number] for number in some]
        joined = jnp.concatenate([*joined, *joined[-1:] * (plan.together - len(some))])
        k = np.repeat(np.asarray(top_k, np.int32), joined.shape[1] * (len(joined) // plan.together))[:, None]
        first = variants[some[0]]
        [moved], _ = step(joined, [Mixing(k, first.exponent, stack_corrections(layer, top_k, first.maps, full))])
        states |= zip(some, map(plan.keep, jnp.split(moved, plan.together)), strict=False)
    states |= zip([MODEL, *branching], map(plan.keep, hidden), strict=True)
    return outputs


def stack_corrections(layer: int, top_k: Sequence[int], maps: Maps | None, full: int) -> Correction | None:
    """The corrections of a layer at each of `top_k`; None where there are none."""
    if maps is None or all(k == full for k in top_k):
        return None
    some = next(maps[layer, k] for k in top_k if k < full)
    rows = [maps[layer, k] if k < full else tuple(map(np.zeros_like, some)) for k in top_k]
    return Correction(*(jnp.asarray(np.stack(arrays), jnp.float32) for arrays in zip(*rows, strict=True)))


def _step(
    run: Run, layer: int, weights: BlockWeights, hidden: Kept, mixings: Sequence[Mixing]
) -> tuple[list[Hidden], MoEOutputs | None]:
    """Hidden states after a layer, for each of `mixings`."""
    block, model, moe = run.decoder.blocks[layer], run.model, weights.moe
    hidden, x = attend(block, weights, jnp.asarray(hidden))
    if moe is None:
        return [finish(block, weights, hidden, x, None)] * len(mixings), None
    plain = model.routing._replace(exponent=None)
    choice = route(x, moe.router, moe.bias, routing=plain, top_k=model.top_k)
    if isinstance(moe.experts, StackedExperts):
        outputs = stacked_outputs(x, choice, moe.experts)
    else:
        outputs = compute_outputs(x, choice, moe.experts, routing=plain, activation=model.activation)
    results = []
    for mixing in mixings:
        k = jnp.asarray(mixing.k, jnp.int32)
        mixed = mix(outputs, choice.scores, k, routing=plain._replace(exponent=mixing.exponent))
        if mixing.correction is not None:
            mixed = mixed + correct(choice, k, mixing.correction, routing=plain)
        results.append(finish(block, weights, hidden, x, mixed))
    return results, MoEOutputs(layer, x, outputs, choice, hidden)
