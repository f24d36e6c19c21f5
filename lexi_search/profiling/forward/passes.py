"""One pass over all layers. Replicas of the layers each take a share of the chunks of sequences.

On several devices of a replica chunks go from one to the next, each at work on its own.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int, Int32

from lexi_search.layers.decoder import embed
from lexi_search.layers.weights import EndWeights
from lexi_search.models.loading.residence import Residence
from lexi_search.profiling.forward.layer import MoEOutputs, advance, prepare
from lexi_search.profiling.forward.variants import MODEL, Kept, Plan, Run, Variant, cut, plan_pass

Observe = Callable[[int, MoEOutputs], None]  # the number of the first of some sequences, and a layer on them


class Chunk(NamedTuple):
    """Some of the sequences: the number of the first, their tokens, and variant index -> hidden states."""

    first: int
    tokens: Int32[np.ndarray, "chunk length"]
    states: dict[int, Any]


class _Pass(NamedTuple):
    """What all threads of a pass have in common."""

    run: Run
    residence: Residence
    plan: Plan
    variants: Sequence[Variant]
    observe: Observe


def forward(
    run: Run,
    tokens: Int[np.ndarray, "sequences length"],
    variants: Sequence[Variant] = (),
    *,
    apart: int = 0,
    observe: Observe = lambda first, outputs: None,
    report: Callable[[int], None] = lambda layer: None,
) -> list[dict[int, Kept]]:
    """Hidden states after the last layer, a dict for each chunk of sequences: variant index -> states.

    The unreduced model has the index `MODEL`, -1; a variant that is the same as the model, or as one before it, has no
    states of its own.
    The first `apart` variants are computed by themselves: whatever others there are, they have the same bits.
    `observe` is called with the outputs of each MoE layer of the model, for every chunk; on several devices from a
    thread for each, so that only the chunks of one replica come in order, and arrays lie on different devices.
    `report` is called from this thread, with each layer that all chunks have gone through.
    """
    residence = run.find_residence()
    stages, replicas = len(residence.stages), residence.replicas
    plan = plan_pass(run, tokens, variants, apart=apart, devices=stages)
    ends = residence.read_ends(first=True)
    tokens = np.asarray(tokens, np.int32)
    chunks = []
    for first in range(0, len(tokens), plan.chunk):
        text = tokens[first : first + plan.chunk]
        chunks.append(Chunk(first, text, {MODEL: plan.keep(embed(run.decoder, ends, text, dtype=run.dtype))}))
    del ends
    common = _Pass(run, residence, plan, variants, observe)
    shares = [chunks[replica :: len(replicas)] for replica in range(min(len(replicas), len(chunks)))]
    if stages == len(shares) == 1:
        for layer in _pass_stage(common, 0, 0, chunks):
            report(layer)
    else:
        _pass_all(common, shares, report)
    return [chunk.states for chunk in chunks]


def count_replicas(run: Run, sequences: int, length: int) -> int:
    """How many replicas have a share of a text: no more than it has chunks."""
    residence = run.find_residence()
    chunk = cut(run, sequences, length, devices=len(residence.stages))
    return min(len(residence.replicas), sequences // chunk)


def _pass_stage(common: _Pass, replica: int, stage: int, chunks: Sequence[Chunk]) -> Iterator[int]:
    """Take chunks through the layers of one device; yields each layer that is done."""
    run, residence, plan, variants, observe = common
    for layer, weights in residence.stream(residence.stages[stage], replica):
        weights = prepare(run, weights)
        for chunk in chunks:
            outputs = advance(run, plan, variants, layer, weights, chunk.tokens, chunk.states)
            if outputs is not None:
                observe(chunk.first, outputs)
        yield layer


def _pass_all(common: _Pass, shares: Sequence[Sequence[Chunk]], report: Callable[[int], None]) -> None:
    """Take the share of each replica through its devices, a thread for each; an error in one ends all, and is raised.

    Where a replica has several devices, one has a chunk while the one before has the next: a device that keeps its
    layers goes through all of them with each chunk, else through each of them with all chunks.
    """
    stages, replicas = common.residence.stages, common.residence.replicas
    done: SimpleQueue[tuple[int, int] | None] = SimpleQueue()  # a layer, and how many chunks went through it
    errors: list[BaseException] = []

    def work(replica: int, stage: int, arrived: Sequence[Future[None]], leaving: Sequence[Future[None]]) -> None:
        chunks, layers = shares[replica], stages[stage]
        one_by_one = len(stages) > 1 and common.residence.is_kept(layers, replica)
        groups = [[number] for number in range(len(chunks))] if one_by_one else [range(len(chunks))]
        try:
            for group in groups:
                for number in group:
                    arrived[number].result()
                own = [chunks[number] for number in group]
                for chunk in own:
                    chunk.states.update(_move(chunk.states, replicas[replica][stage]))
                for layer in _pass_stage(common, replica, stage, own):
                    done.put((layer, len(own)))
                    if errors:
                        raise errors[0]
                for number in group:
                    leaving[number].set_result(None)
        except BaseException as error:
            errors.append(error)
            for future in leaving:
                if not future.done():
                    future.set_exception(error)
        finally:
            done.put(None)

    passed, total = Counter(), sum(map(len, shares))
    with ThreadPoolExecutor(len(shares) * len(stages)) as pool:
        for replica, chunks in enumerate(shares):
            arrived = [Future() for _ in chunks]
            for future in arrived:
                future.set_result(None)
            for stage in range(len(stages)):
                leaving = [Future() for _ in chunks]
                pool.submit(work, replica, stage, arrived, leaving)
                arrived = leaving
        try:
            working = len(shares) * len(stages)
            while working:
                found = done.get()
                if found is None:
                    working -= 1
                    continue
                layer, count = found
                passed[layer] += count
                if passed[layer] == total:
                    report(layer)
        except BaseException as error:  # of `report`, or an interrupt: no thread begins another layer
            errors.append(error)
    if errors:
        raise errors[0]


def _move(states: dict[int, Kept], device: jax.Device) -> dict[int, Kept]:
    """The states on a device; those in host memory wait there until they are used."""
    return {n: one if isinstance(one, np.ndarray) else jax.device_put(one, device) for n, one in states.items()}


def spread(
    run: Run, chunks: Sequence[dict[int, Kept]], measure: Callable[[EndWeights, dict[int, Kept]], Any]
) -> list[Any]:
    """What `measure` returns of final norm and LM head and each chunk of states; a chunk stays with its replica, whose
    devices take turns."""
    residence = run.find_residence()
    stages, replicas = len(residence.stages), residence.replicas

    def work(number: int) -> Any:
        turn, replica = divmod(number, len(replicas))
        device = replicas[replica][turn % stages]
        return measure(residence.read_ends(device, first=False), _move(chunks[number], device))

    working = stages * min(len(replicas), len(chunks))
    if working == 1:
        return list(map(work, range(len(chunks))))
    with ThreadPoolExecutor(working) as pool:
        return list(pool.map(work, range(len(chunks))))
