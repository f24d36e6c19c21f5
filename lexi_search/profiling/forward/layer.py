"""One layer for one chunk of sequences, of the model and of all its variants."""

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from lexi_search.artifacts.compensation import Maps
from lexi_search.layers.decoder import attend, finish
from lexi_search.layers.kernels.blocks import StackedExperts, stack_experts
from lexi_search.layers.kernels.grouped import can_group, stacked_outputs
from lexi_search.layers.moe import Correction, compute_outputs, correct, mix
from lexi_search.layers.routing import Choice, look_up, route
from lexi_search.layers.weights import BlockWeights
from lexi_search.models.loading.reader import read_ngrams
from lexi_search.profiling.forward.variants import MODEL, Hidden, Plan, Run, Variant, group


class MoEOutputs(NamedTuple):
    """A MoE layer on some tokens: its input, each token's choice and K expert outputs, and the residual stream."""

    layer: int  # of the decoder
    x: Float[Array, "tokens hidden"]
    outputs: Float[Array, "tokens K hidden"]
    choice: Choice
    hidden: Hidden


class Text(NamedTuple):
    """What is known of each position besides its hidden state: the token, and the layer's embeddings of n-grams."""

    tokens: Int32[np.ndarray, "sequences length"]
    ngrams: Float[Array, "sequences length width"] | None

    def repeat(self, count: int) -> "Text":
        """The same for `count` variants, one after the other."""
        ngrams = None if self.ngrams is None else jnp.concatenate([self.ngrams] * count)
        return Text(np.concatenate([self.tokens] * count), ngrams)


class Mixing(NamedTuple):
    """How outputs are mixed, as a `Variant` says: a k and a gate exponent, of all tokens or of each; corrections."""

    k: Int32[np.ndarray | np.generic, "..."]
    exponent: Float[np.ndarray | np.generic, "..."] | None
    correction: Correction | None


def prepare(run: Run, weights: BlockWeights) -> BlockWeights:
    """The weights for several uses: experts dequantised once, and stacked where the device multiplies all at once."""
    moe, model = weights.moe, run.model
    if moe is None or isinstance(moe.experts, StackedExperts):
        return weights
    [device] = moe.router.devices()
    traits = {"activation": model.activation, "routing": model.routing, "dtype": run.dtype}
    if can_group(moe.experts, device, top_k=model.top_k, **traits):
        return weights._replace(moe=moe._replace(experts=stack_experts(moe.experts, dtype=run.dtype)))
    return weights._replace(moe=moe._replace(experts=tuple(moe.experts)))


def advance(
    run: Run,
    plan: Plan,
    variants: Sequence[Variant],
    layer: int,
    weights: BlockWeights,
    tokens: Int32[np.ndarray, "chunk length"],
    states: dict[int, Any],
) -> MoEOutputs | None:
    """The model's own outputs in a layer, if it is a MoE layer that has a k to choose; takes `states` through it.

    States are replaced one by one, so that never two copies of all are in memory. Variants that are the same up to this
    layer share its input and expert outputs, and mix them with a k of their own.
    """
    full, is_moe = run.model.top_k, layer in run.model.layers
    place = run.model.layers.index(layer) if is_moe else None
    parting = _list_parting(plan, place, states)
    ngrams = read_ngrams(run.checkpoint, run.decoder, layer, tokens)
    [device] = jax.tree.leaves(weights._replace(moe=None))[0].devices()
    text = Text(tokens, None if ngrams is None else jax.device_put(ngrams, device))
    step = partial(_step, run, layer, weights)
    model = Variant((full,) * len(run.model.layers))

    def part(number: int) -> tuple[list[Hidden], MoEOutputs | None]:
        apart = [model if one == MODEL else variants[one] for one in parting[number]]
        mixings = _mix_each(apart, layer, place, full, device=device)
        return step(text, jax.device_put(states[number], device), mixings)

    hidden, outputs = part(MODEL)
    reduced = [number for number in states if number not in parting]
    for some in group(reduced, variants, plan.together):
        padded = some + some[-1:] * (plan.together - len(some))  # one shape, one compilation
        joined = jnp.concatenate([jax.device_put(states[number], device) for number in padded])
        size = joined.shape[1] * (len(joined) // plan.together)
        mixing = _mix_alike([variants[n] for n in padded], layer, place, full, size=size, device=device)
        [moved], _ = step(text.repeat(plan.together), joined, [mixing])
        states |= zip(some, map(plan.keep, jnp.split(moved, plan.together)), strict=False)
    for number in parting.keys() - {MODEL}:
        states |= zip(parting[number], map(plan.keep, part(number)[0]), strict=True)
    states |= zip(parting[MODEL], map(plan.keep, hidden), strict=True)
    return outputs if is_moe else None


def _list_parting(plan: Plan, place: int | None, states: Collection[int]) -> dict[int, list[int]]:
    """Those of `states` that go through the layer by themselves: state -> the variants that lead on from it.

    They are the model, which is the first of its own, the plan's `apart`, and those that several variants share whose k
    differ in this layer.
    """
    onward = {number: [number] for number in states}
    if place is not None:
        for before, after in dict.fromkeys(zip(plan.leaders[place], plan.leaders[place + 1], strict=True)):
            if after not in onward[before]:
                onward[before].append(after)
    return {number: own for number, own in onward.items() if number < plan.apart or len(own) > 1}


def _mix_each(some: Sequence[Variant], layer: int, place: int | None, full: int, *, device: jax.Device) -> list[Mixing]:
    """The mixing of each variant, all on the same tokens. Corrections go to the device together."""
    top_k = [full if place is None else variant.top_k[place] for variant in some]
    stacked = stack_corrections(layer, top_k, [variant.maps for variant in some], full, device=device)
    mixings = []
    for number, (variant, k) in enumerate(zip(some, top_k, strict=True)):
        own = None
        if stacked is not None and variant.maps is not None and k < full:
            own = Correction(*(array[number : number + 1] for array in stacked))
        mixings.append(Mixing(np.int32(k), None if variant.exponent is None else np.float32(variant.exponent), own))
    return mixings


def _mix_alike(
    some: Sequence[Variant], layer: int, place: int | None, full: int, *, size: int, device: jax.Device
) -> Mixing:
    """The mixing of variants that each have `size` tokens of a batch; all or none of them have an exponent."""
    top_k = np.asarray([full if place is None else variant.top_k[place] for variant in some], np.int32)
    exponents = None
    if some[0].exponent is not None:
        exponents = np.asarray([variant.exponent for variant in some], np.float32)
    correction = stack_corrections(layer, top_k.tolist(), [variant.maps for variant in some], full, device=device)
    rows = [None if values is None else np.repeat(values, size)[:, None] for values in (top_k, exponents)]
    return Mixing(*rows, correction)


def stack_corrections(
    layer: int, top_k: Sequence[int], maps: Sequence[Maps | None], full: int, *, device: jax.Device
) -> Correction | None:
    """The corrections of a layer at each of `top_k` from its own `maps`, zero where there is none; None for none."""
    rows = [None if own is None or k == full else own[layer, k] for k, own in zip(top_k, maps, strict=True)]
    some = next((row for row in rows if row is not None), None)
    if some is None:
        return None
    empty = tuple(map(np.zeros_like, some))
    stacked = zip(*(empty if row is None else row for row in rows), strict=True)
    return Correction(*(jax.device_put(np.stack(arrays).astype(np.float32), device) for arrays in stacked))


def _step(
    run: Run,
    layer: int,
    weights: BlockWeights,
    text: Text,
    hidden: Hidden,
    mixings: Sequence[Mixing],
) -> tuple[list[Hidden], MoEOutputs | None]:
    """Hidden states after a layer, for each of `mixings`."""
    block, model, moe = run.decoder.blocks[layer], run.model, weights.moe
    hidden, x = attend(block, weights, hidden, text.ngrams)
    if moe is None:
        return [finish(block, weights, hidden, x, None)] * len(mixings), None
    plain = model.routing._replace(exponent=None)
    if moe.choices is None:
        choice = route(x, moe.router, moe.bias, routing=plain, top_k=model.top_k)
    else:
        choice = look_up(x, moe.router, moe.choices, text.tokens.reshape(-1), routing=plain)
    if isinstance(moe.experts, StackedExperts):
        outputs = stacked_outputs(x, choice, moe.experts)
    else:
        outputs = compute_outputs(x, choice, moe.experts, routing=plain, activation=model.activation)
    results = []
    for mixing in mixings:
        mixed = mix(outputs, choice.scores, mixing.k, mixing.exponent, routing=plain)
        if mixing.correction is not None:
            mixed = mixed + correct(choice, mixing.k, mixing.correction, routing=plain)
        results.append(finish(block, weights, hidden, x, mixed))
    return results, MoEOutputs(layer, x, outputs, choice, hidden)
