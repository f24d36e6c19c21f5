"""One profile over several processes, through JAX's distributed runtime: layers are shared out, losses gathered.

Processes share nothing but the runtime's key-value store: no disk, and no collective operation between devices. Process
0 says what is to be done and gathers what the others measured. A process that stops says why, and the others stop at
their next layer; one that dies without a word is noticed by JAX, which then ends them all.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax

from lexi_search.artifacts.files import json_bytes
from lexi_search.artifacts.profile import Header, LayerLoss, find_difference
from lexi_search.checkpoint.reader import Checkpoint
from lexi_search.errors import InputError
from lexi_search.models.model import Model

HEARTBEAT_SECONDS = 60  # after this long without a sign of life JAX takes a process for dead
POLL_SECONDS = 0.1
SHARED, STOPPED, LAYERS, DONE = (f"lexi/{name}/" for name in ("shared", "stopped", "layers", "done"))


class Group(NamedTuple):
    """This process among those of a run: number `index` of `size`; `store` is None where there is one alone."""

    index: int = 0
    size: int = 1
    store: Any = None


@contextmanager
def join(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> Iterator[Group]:
    """Join the other processes of a run, for the time of a `with` block; before anything else that uses JAX.

    JAX finds out what is not given, under Slurm, Open MPI, Kubernetes and others. Where the block raises, the other
    processes are told and stop; where it ends, it ends for all.

    Raises:
        InputError: JAX finds no cluster and not all three are given, or the processes do not find together.
    """
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except (ValueError, LookupError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"cannot join the other processes ({reason}); start under Slurm, MPI or Kubernetes, or give --coordinator "
            "HOST:PORT, --num-processes and --process-id"
        ) from error
    group = Group(jax.process_index(), jax.process_count(), _get_store())
    try:
        yield group
        if group.index == 0:
            group.store.key_value_set(DONE + "0", "")
        _await(group, DONE)
    except BaseException as error:
        if not isinstance(error, PeerError):
            group.store.key_value_set(f"{STOPPED}{group.index}", str(error) or type(error).__name__)
        raise
    finally:
        jax.distributed.shutdown()


def _get_store() -> Any:
    """The key-value store of JAX's distributed runtime, which JAX has no public name for."""
    from jax._src.distributed import global_state

    return global_state.client


class PeerError(InputError):
    """Another process has stopped; the message says which and why."""


def share(group: Group, name: str, make: Callable[[], Any]) -> Any:
    """The value that `make` returns in process 0, in every process; JSON, and each name once."""
    if group.store is None:
        return make()
    if group.index == 0:
        made = make()
        group.store.key_value_set_bytes(f"{SHARED}{name}/0", json_bytes(made))
        return made
    return json.loads(_await(group, f"{SHARED}{name}/")[0])


def agree(group: Group, header: Header) -> None:
    """Raise InputError in a process whose `header` is not process 0's: what they measure would not be one profile."""
    ours = header.to_document()
    if difference := find_difference(ours, share(group, "header", lambda: ours)):
        raise InputError(f"process {group.index}: its {difference} in process 0; start all alike")


def spread(costs: Mapping[int, int], size: int) -> tuple[tuple[int, ...], ...]:
    """The layers of each of `size` processes, ascending: the costliest first, each to the process with least so far.

    `costs` is layer -> work in any unit. The result does not depend on their order.
    """
    shares: list[list[int]] = [[] for _ in range(size)]
    loads = [0] * size
    for layer, cost in sorted(costs.items(), key=lambda item: (-item[1], item[0])):
        least = min(range(size), key=lambda process: (loads[process], len(shares[process]), process))
        shares[least].append(layer)
        loads[least] += cost
    return tuple(tuple(sorted(share)) for share in shares)


def estimate_costs(checkpoint: Checkpoint, model: Model, layers: Sequence[int], source: str) -> dict[int, int]:
    """The work of measuring each layer on the input `source`, as layer -> a number.

    On `paper` input the bytes of its tensors in the checkpoint, since both reading and computing take time for them. On
    other input the number of decoder layers from it on: each process reads the whole model.
    """
    if source != "paper":
        return {layer: model.identity.num_hidden_layers - layer for layer in layers}
    prefix, _, _ = model.identity.router.partition("{}")
    costs = dict.fromkeys(layers, 0)
    for name, entry in checkpoint.entries.items():
        index = name.removeprefix(prefix).partition(".")[0]
        if name.startswith(prefix) and index.isdecimal() and int(index) in costs:
            costs[int(index)] += entry.size
    return costs


def gather(
    group: Group, measured: Iterator[tuple[int, LayerLoss]], layers: Sequence[int]
) -> Iterator[tuple[int, LayerLoss]]:
    """The layers that this process `measured`; in process 0 all of `layers`, those of other processes as they arrive.

    They arrive between layers of process 0, and after them. Raises InputError as soon as another process is known to
    have stopped.
    """
    awaited = set() if group.index else set(layers)
    for layer, loss in measured:
        if group.index:
            group.store.key_value_set_bytes(f"{LAYERS}{layer}", json_bytes(dataclasses.asdict(loss)))
        awaited.discard(layer)
        yield layer, loss
        if group.store is not None:
            yield from _receive(group, awaited)
            _check(group)
    while awaited:
        time.sleep(POLL_SECONDS)
        yield from _receive(group, awaited)
        _check(group)


def _receive(group: Group, awaited: set[int]) -> Iterator[tuple[int, LayerLoss]]:
    for key, value in sorted(group.store.key_value_dir_get_bytes(LAYERS)) if awaited else ():
        layer = int(key.rpartition("/")[2])
        if layer in awaited:
            awaited.remove(layer)
            fields = json.loads(value)
            yield layer, LayerLoss(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def _await(group: Group, folder: str) -> list[bytes]:
    """The values in a folder of the key-value store, as soon as there are any."""
    while not (found := group.store.key_value_dir_get_bytes(folder)):
        _check(group)
        time.sleep(POLL_SECONDS)
    return [value for _, value in found]


def _check(group: Group) -> None:
    for key, reason in group.store.key_value_dir_get(STOPPED):
        raise PeerError(f"process {key.rpartition('/')[2]} has stopped: {reason}")
