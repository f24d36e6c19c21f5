"""One pass over all layers. On several devices chunks of sequences go from one to the next, each at work on its own."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int, Int32

from lexi_search.layers.decoder import embed
from lexi_search.models.loading.residence import Residence
from lexi_search.profiling.forward.layer import MoEOutputs, advance, prepare
from lexi_search.profiling.forward.variants import MODEL, Kept, Plan, Run, Variant, plan_pass


class Chunk(NamedTuple):
    """Some of the sequences: their tokens, and variant index -> hidden states."""

    tokens: Int32[np.ndarray, "chunk length"]
    states: dict[int, Any]


def forward(
    run: Run,
    tokens: Int[np.ndarray, "sequences length"],
    variants: Sequence[Variant] = (),
    *,
    apart: int = 0,
    observe: Callable[[MoEOutputs], None] = lambda outputs: None,
    report: Callable[[int], None] = lambda layer: None,
) -> list[dict[int, Kept]]:
    """Hidden states after the last layer, a dict for each chunk of sequences: variant index -> states.

    The unreduced model has the index `MODEL`, -1; a variant that is the same as the model, or as one before it, has no
    states of its own.
    The first `apart` variants are computed by themselves: whatever others there are, they have the same bits.
    `observe` is called with the outputs of each MoE layer of the model, for one chunk after the other; on several
    devices from a thread for each.
    """
    residence = run.find_residence()
    stages = residence.stages
    plan = plan_pass(run, tokens, variants, apart=apart, devices=len(stages))
    ends = residence.read_ends(0, first=True)
    texts = np.split(np.asarray(tokens, np.int32), len(tokens) // plan.chunk)
    chunks = [Chunk(text, {MODEL: plan.keep(embed(run.decoder, ends, text, dtype=run.dtype))}) for text in texts]
    del ends
    if len(stages) == 1:
        for layer in _pass_stage(run, residence, plan, variants, 0, chunks, observe):
            report(layer)
    else:
        _pass_stages(run, residence, plan, variants, chunks, observe, report)
    return [chunk.states for chunk in chunks]


def _pass_stage(
    run: Run,
    residence: Residence,
    plan: Plan,
    variants: Sequence[Variant],
    device: int,
    chunks: Sequence[Chunk],
    observe: Callable[[MoEOutputs], None],
) -> Iterator[int]:
    """Take chunks through the layers of one device; yields each layer that is done."""
    for layer, weights in residence.stream(residence.stages[device]):
        weights = prepare(run, weights)
        for chunk in chunks:
            outputs = advance(run, plan, variants, layer, weights, *chunk)
            if outputs is not None:
                observe(outputs)
        yield layer


def _pass_stages(
    run: Run,
    residence: Residence,
    plan: Plan,
    variants: Sequence[Variant],
    chunks: Sequence[Chunk],
    observe: Callable[[MoEOutputs], None],
    report: Callable[[int], None],
) -> None:
    """Take all chunks through all devices, one after the other: while one has a chunk, the one before has the next.

    A device that keeps its layers goes through all of them with each chunk, else through each of them with all chunks.
    """
    devices = range(len(residence.stages))
    arrived: list[list[Future[None]]] = [[Future() for _ in chunks] for _ in (*devices, None)]
    done: SimpleQueue[int | None] = SimpleQueue()

    def work(device: int) -> None:
        layers = residence.stages[device]
        groups = [[number] for number in range(len(chunks))] if residence.is_kept(layers) else [range(len(chunks))]
        try:
            with jax.default_device(residence.devices[device]):
                for group in groups:
                    for number in group:
                        arrived[device][number].result()
                    own = [chunks[number] for number in group]
                    for chunk in own:
                        chunk.states.update(_move(chunk.states, residence.devices[device]))
                    for layer in _pass_stage(run, residence, plan, variants, device, own, observe):
                        if number == len(chunks) - 1:
                            done.put(layer)
                    for number in group:
                        arrived[device + 1][number].set_result(None)
        except BaseException as error:
            for future in arrived[device + 1]:
                if not future.done():
                    future.set_exception(error)
            raise
        finally:
            done.put(None)

    for future in arrived[0]:
        future.set_result(None)
    with ThreadPoolExecutor(len(devices)) as pool:
        working = [pool.submit(work, device) for device in devices]
        left = len(working)
        while left:
            layer = done.get()
            if layer is None:
                left -= 1
            else:
                report(layer)
        for future in working:
            future.result()


def _move(states: dict[int, Kept], device: jax.Device) -> dict[int, Kept]:
    """The states on a device; those in host memory wait there until they are used."""
    return {n: one if isinstance(one, np.ndarray) else jax.device_put(one, device) for n, one in states.items()}


def spread(run: Run, chunks: Sequence[dict[int, Kept]], measure: Callable[[Any, dict[int, Kept]], Any]) -> list[Any]:
    """What `measure` returns of final norm and LM head and each chunk of states, on all devices in turn."""
    residence = run.find_residence()
    count = len(residence.stages)

    def work(number: int) -> Any:
        device = number % count
        if count == 1:
            return measure(residence.read_ends(0, first=False), chunks[number])
        with jax.default_device(residence.devices[device]):
            states = _move(chunks[number], residence.devices[device])
            return measure(residence.read_ends(device, first=False), states)

    if count == 1:
        return list(map(work, range(len(chunks))))
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(len(chunks))))
