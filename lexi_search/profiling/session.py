"""A whole profile, from a checkpoint to a file: resumed where it was cut short, shared out over processes.

`lexi-search profile` parses its options and calls this; so may any program.
"""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from lexi_search import __version__
from lexi_search.artifacts.codec import require_gate_exponent
from lexi_search.artifacts.files import check_writable, refuse_inputs
from lexi_search.artifacts.merging import Header, find_difference, find_missing, read_header
from lexi_search.artifacts.profile import Profile, ProfileSettings
from lexi_search.artifacts.serialisation import describe_nature, read_profile, write_profile
from lexi_search.checkpoint.reader import Checkpoint, open_checkpoint, sample_weights
from lexi_search.errors import InputError
from lexi_search.models.model import Model, describe, find_dtype
from lexi_search.profiling.distributed import Group, agree, estimate_costs, gather, share, spread
from lexi_search.profiling.divergence import EXPONENTS, choose_exponent, draw_samples, open_run
from lexi_search.profiling.forward import Run
from lexi_search.profiling.profile import check_layers, choose_dtype, profile_layers
from lexi_search.profiling.resume import Partials, find_partials, keep_partials
from lexi_search.profiling.sampling import PASSES

AUTO = "auto"
RELATIVE_ERROR = {"weights": 0.0, "paper": 0.01}  # by input
SAMPLES = {"weights": 2**12, "paper": 2**20}


class Plan(NamedTuple):
    """What a run will take, known before it begins.

    `work` has for every decoder layer of every pass over the model, in order, how many copies of the text go through;
    it is empty on the paper's input. `read_bytes` of weights are read in all; `memory_bytes` are for hidden states or
    expert outputs, and for `weights_bytes` of the two largest layers as stored.
    """

    work: tuple[int, ...]
    decoder_layers: int
    read_bytes: int
    memory_bytes: int
    weights_bytes: int


@runtime_checkable
class Observer(Protocol):
    """A listener to the events of a run, a method for each; all of them are called from the caller's thread."""

    def plan(self, plan: Plan) -> None:
        """What the run will take; after `open`, in process 0 only."""

    def open(self, partials: Partials, layers: Sequence[int]) -> None:
        """Results of an earlier run are loaded; `layers` are those of the profile. In process 0 only."""

    def choose_exponent(self, exponent: float) -> None:
        """The gate exponent is found. In process 0 only."""

    def advance_pass(self, layer: int) -> None:
        """A decoder layer is done in one of the passes over the whole model; on input `weights` only."""

    def finish_layer(self, layer: int) -> None:
        """The losses of a MoE layer are measured; in process 0 they are on disk."""


class _Silent(Observer):
    """The default observer, which does nothing."""


class _Session(NamedTuple):
    """A run that is set up: the same in every process but for `group.index` and `partials`, which process 0 has."""

    group: Group
    checkpoint: Checkpoint
    model: Model
    settings: ProfileSettings
    run: Run | None  # None on the paper's input
    layers: Sequence[int]
    observer: Observer
    made_by: Mapping[str, Any]
    partials: Partials | None = None

    @property
    def header(self) -> Header:
        return Header(self.model.identity, self.settings, self.made_by)


def profile_checkpoint(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    layers: Collection[int] | None = None,
    input: str = "weights",
    batch: int = 4,
    length: int = 512,
    relative_error: float | None = None,
    samples: int | None = None,
    iterations: int | None = None,
    control_variate: int | None = None,
    seed: int = 0,
    dtype: str = AUTO,
    max_k: int | None = None,
    gate_exponent: float | str | None = None,
    restart: bool = False,
    reuse: bool = False,
    force: bool = False,
    group: Group = Group(),  # noqa: B008  (a tuple)
    observer: Observer | None = None,
) -> Profile | None:
    """The profile of the checkpoint `source`, a folder or hub id, which is also written to `output`.

    Args:
        layers: decoder-layer indices; by default all MoE layers.
        input: `weights`, text sampled from the model, or `paper`, N(0, 1). Settings are those of `ProfileSettings`.
        iterations: exactly so many on the paper's input, its N_iter, in place of `relative_error` and `samples`.
        gate_exponent: a number, or "auto" for the one with the least divergence.
        restart: throw away what a run that was cut short left in `<output>.partial/`, instead of going on from there.
        reuse: return the profile in `output` where this very run has written it before; without several processes.
        force: replace a file of another model or kind in `output`, too.
        group: this process among others, from `distributed.join`; process 0 writes `output`, others return None.

    Raises:
        InputError: bad settings, a checkpoint that cannot be read or is not known, an `output` that cannot be written,
            results of another run in `<output>.partial/` or, with `reuse`, in `output`, another process that has
            stopped.
    """
    paper = {"relative_error": relative_error, "control_variate": control_variate, "max_k": max_k}
    _check_settings(input, iterations=iterations, **paper)
    exponent = _check_exponent(gate_exponent, input)
    if group.index == 0:
        check_writable(output, apart_from=[source], nature=None if force else describe_nature(Profile))
        refuse_inputs(find_partials(output), [source])
    settings = {"input": input, "seed": seed, "batch": batch, "length": length} | paper
    settings |= _find_end(input, relative_error, samples, iterations, batch * length)
    session = _open(source, layers, dtype, exponent, group, observer or _Silent(), **settings)
    if reuse and (finished := _find_finished(output, session, but_exponent=exponent == AUTO)):
        return finished
    agree(group, session.header)
    if group.index == 0 and not force:
        check_writable(output, nature=describe_nature(Profile, session.model.identity))
    with ExitStack() as stack:
        if group.index == 0:
            kept = keep_partials(output, session.header, restart=restart, but_exponent=exponent == AUTO)
            session = session._replace(partials=stack.enter_context(kept))
            session.observer.open(session.partials, session.layers)
            session.observer.plan(_plan(session, find_exponent=exponent == AUTO))
        return _measure(session, output, find_exponent=exponent == AUTO, force=force)


def _find_finished(output: str | os.PathLike[str], session: _Session, *, but_exponent: bool) -> Profile | None:
    """The profile in `output`, all of whose layers the session's run has measured; None where nothing is there.

    InputError for a profile of another run. With `but_exponent` the session's gate exponent is not known yet.
    """
    if not os.path.lexists(output):
        return None
    profile = read_profile(output)
    theirs, ours = read_header(profile).to_document(), session.header.to_document()
    if but_exponent:
        ours["settings"]["gate_exponent"] = theirs["settings"]["gate_exponent"]
    if difference := find_difference(theirs, ours):
        raise InputError(f"{output} is the profile of another run, whose {difference} now; choose another place")
    if missing := find_missing(profile):
        raise InputError(f"{output} lacks layers, the first is {missing[0]}; choose another place")
    return profile


def _open(
    source: str | os.PathLike[str],
    layers: Collection[int] | None,
    dtype: str,
    exponent: float | str | None,
    group: Group,
    observer: Observer,
    **settings: Any,
) -> _Session:
    checkpoint = open_checkpoint(source)
    model = describe(checkpoint, max_k=settings["max_k"], gate_exponent=None if exponent == AUTO else exponent)
    chosen = tuple(layers or model.layers)
    check_layers(checkpoint, model, chosen)
    chosen_dtype = choose_dtype(dtype, settings["input"], find_dtype(checkpoint, model))
    complete = ProfileSettings(dtype=chosen_dtype, gate_exponent=model.routing.exponent, **settings)
    run = None if complete.input == "paper" else open_run(checkpoint, model, complete.dtype)
    made_by = {"lexi_search": __version__, "weights_sample_sha256": sample_weights(checkpoint)}  # reads the files
    return _Session(group, checkpoint, model, complete, run, chosen, observer, made_by)


def _plan(session: _Session, *, find_exponent: bool) -> Plan:
    """What is left of the run to do in this process, if no other shares it."""
    checkpoint, model, settings, partials = session.checkpoint, session.model, session.settings, session.partials
    missing = [layer for layer in session.layers if layer not in partials.layers]
    largest = sum(sorted(estimate_costs(checkpoint, model, model.layers, "paper").values())[-2:])
    row = model.hidden_size * np.dtype("float32" if settings.dtype == "float32" else "float16").itemsize
    if session.run is None:
        read = sum(estimate_costs(checkpoint, model, missing, "paper").values())
        tokens = settings.batch * settings.length * (1 + model.top_k)
        return Plan((), len(model.layers), read, tokens * row + largest, largest)
    layers, others = len(session.run.decoder.blocks), model.top_k - 1
    chooses = find_exponent and "exponent" not in partials.findings
    work = (1,) * layers * (PASSES if (missing or chooses) and "text" not in partials.findings else 0)
    work += (1 + len(EXPONENTS) * others,) * layers if chooses else ()
    # A variant has states of its own from the layer on in which it differs.
    work += tuple(1 + others * sum(layer <= at for layer in missing) for at in range(layers)) if missing else ()
    whole = settings.batch * settings.length * (settings.max_samples // (settings.batch * settings.length))
    states = whole * (1 + len(missing) * (model.top_k - 1)) * row
    read = len(work) // layers * sum(entry.size for entry in checkpoint.entries.values())
    return Plan(work, layers, read, states + largest, largest)


def _measure(session: _Session, output: str | os.PathLike[str], *, find_exponent: bool, force: bool) -> Profile | None:
    group, layers, partials = session.group, session.layers, session.partials
    get_text = cache(lambda: _get_text(session))
    if find_exponent:
        session = _find_exponent(session, get_text)
    missing = share(group, "missing", lambda: [layer for layer in layers if layer not in partials.layers])
    costs = estimate_costs(session.checkpoint, session.model, missing, session.settings.input)
    assigned = spread(costs, group.size)[group.index]
    tokens = get_text() if assigned and session.run is not None else None
    measured = profile_layers(
        session.checkpoint,
        session.model,
        layers=assigned,
        settings=session.settings,
        tokens=tokens,
        report=session.observer.advance_pass,
    )
    with closing(measured):
        for layer, loss in gather(group, measured, missing):
            if partials is not None:
                partials.add(layer, loss)
            session.observer.finish_layer(layer)
    if partials is None:
        return None
    header = session.header
    losses = {layer: partials.layers[layer] for layer in layers}
    profile = Profile(header.model, header.settings, losses, header.made_by)
    write_profile(output, profile, apart_from=[session.checkpoint.folder], force=force)
    partials.drop(layers)
    return profile


def _get_text(session: _Session) -> Int32[np.ndarray, "sequences length"]:
    """The text that all layers are measured on: from an earlier run, from process 0, or sampled now."""
    count = -(-len(session.layers) // session.group.size)
    report = session.observer.advance_pass

    def sample() -> list[list[int]]:
        return draw_samples(session.run, session.settings, layers=count, report=report).tolist()

    return np.asarray(share(session.group, "text", lambda: session.partials.find("text", sample)), np.int32)


def _find_exponent(session: _Session, get_text: Callable[[], Int32[np.ndarray, "sequences length"]]) -> _Session:
    """The session with the gate exponent of an earlier run, of process 0, or the best one on the text."""

    def choose() -> float:
        return choose_exponent(session.run, get_text(), report=session.observer.advance_pass)

    exponent = share(session.group, "exponent", lambda: session.partials.find("exponent", choose))
    model = session.model._replace(routing=session.model.routing._replace(exponent=exponent))
    session = session._replace(model=model, settings=replace(session.settings, gate_exponent=exponent))
    if session.partials is not None:
        session.observer.choose_exponent(exponent)
        session.partials.load(session.header)
    return session


def _check_settings(input: str, **settings: object) -> None:
    if input not in SAMPLES:
        raise InputError(f"input {input!r} is not known; known are {', '.join(SAMPLES)}")
    given = [f"--{name.replace('_', '-')}" for name, value in settings.items() if value is not None]
    if input != "paper" and given:
        raise InputError(f"{given[0]} is for --input paper; add that, or leave {given[0]} out")


def _find_end(
    input: str, relative_error: float | None, samples: int | None, iterations: int | None, size: int
) -> dict[str, Any]:
    """The settings that say when to stop; `iterations` of `size` tokens stand for both of them."""
    if iterations is None:
        error = RELATIVE_ERROR[input] if relative_error is None else relative_error
        return {"relative_error": error, "max_samples": SAMPLES[input] if samples is None else samples}
    if (relative_error, samples) != (None, None):
        other = "--samples" if relative_error is None else "--relative-error"
        raise InputError(f"--iterations and {other} both say when to stop; give one of them")
    if not 1 <= iterations < 2**31:
        raise InputError(f"--iterations is {iterations}, at least 1 expected")
    return {"relative_error": 0.0, "max_samples": iterations * size}


def _check_exponent(value: float | str | None, input: str) -> float | str | None:
    if value == AUTO and input == "paper":
        raise InputError("--gate-exponent auto is found on the model's own text; leave --input paper out")
    if value in (None, AUTO):
        return value
    try:
        exponent = float(value)
    except ValueError:
        raise InputError(f"--gate-exponent {value!r} is neither a number nor auto") from None
    require_gate_exponent(exponent)
    return exponent
