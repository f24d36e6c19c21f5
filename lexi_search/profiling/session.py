"""A whole profile, from a checkpoint to a file: resumed where it was cut short, shared out over processes.

`lexi-search profile` parses its options and calls this; so may any program.
"""

import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from lexi_search import __version__
from lexi_search.artifacts.compensation import Maps, name_beside, write_maps
from lexi_search.artifacts.profile import Header, Profile, ProfileSettings
from lexi_search.artifacts.serialisation import write_profile
from lexi_search.checkpoint.reader import Checkpoint, open_checkpoint, sample_weights
from lexi_search.errors import InputError
from lexi_search.models.loading.residence import Room
from lexi_search.models.model import Model, describe, find_dtype
from lexi_search.profiling.compensation import CORRECTED_EXPONENTS, choose_ks, find_rank, fit_layers, list_unfitted
from lexi_search.profiling.distributed import Group, agree, estimate_costs, gather, share, spread
from lexi_search.profiling.divergence import (
    EXPONENTS,
    check_text_room,
    count_sequences,
    count_states,
    draw_samples,
    find_compensation,
    open_run,
)
from lexi_search.profiling.forward.passes import count_replicas
from lexi_search.profiling.forward.sampling import PASSES
from lexi_search.profiling.forward.text import Text, read_text
from lexi_search.profiling.forward.variants import Run
from lexi_search.profiling.observer import Observer, Plan, Silent
from lexi_search.profiling.profile import (
    AUTO,
    BATCH,
    LENGTH,
    check_layers,
    choose_background,
    choose_dtype,
    decide_compensation,
    profile_layers,
    read_exponent,
    read_settings,
)
from lexi_search.profiling.resume import COMPENSATION, Partials, check_output, check_place, find_finished, keep_partials


class _Session(NamedTuple):
    """A run that is set up: the same in every process but for `group.index` and `partials`, which process 0 has."""

    group: Group
    checkpoint: Checkpoint
    model: Model
    settings: ProfileSettings
    run: Run | None  # None on the paper's input
    text: Text | None  # the user's
    layers: Sequence[int]
    observer: Observer
    made_by: Mapping[str, Any]
    find_exponent: bool  # it is to be found on the text
    may_drop: bool  # corrections, too, where an exponent alone is better
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
    text: str | os.PathLike[str] | None = None,
    batch: int = BATCH,
    length: int = LENGTH,
    relative_error: float | None = None,
    samples: int | None = None,
    iterations: int | None = None,
    control_variate: int | None = None,
    seed: int = 0,
    dtype: str = AUTO,
    max_k: int | None = None,
    gate_exponent: float | str | None = None,
    compensation: str | None = None,
    rank: int | None = None,
    background_k: int | None = None,
    room: Room | None = None,
    restart: bool = False,
    reuse: bool = False,
    force: bool = False,
    group: Group = Group(),  # noqa: B008  (a tuple)
    observer: Observer | None = None,
) -> Profile | None:
    """The profile of the checkpoint `source`, a folder or hub id, which is also written to `output`.

    Args:
        layers: decoder-layer indices, by default all MoE layers. `input`: `weights`, sampled text, or `paper`, N(0, 1),
            for so many `iterations`; `text`: a UTF-8 file, to take its beginning. Others are of `ProfileSettings`.
        gate_exponent: a number, or "auto" for the one with the least divergence; with compensation None is "auto".
        compensation: "full", a gate exponent and corrections of a `rank`; "exponent" alone; or "none", the paper's
            method. By default what loses least of all that input and family allow.
        background_k: the k of other layers while one is measured, by default half of K with a compensation, else K.
        room: weights that stay in memory between passes, from `find_room`; by default as far as half of it holds them.
        restart: throw away what a run that was cut short left in `<output>.partial/`; `reuse`: return the profile in
            `output` where this very run wrote it; in one process.
        group: this process among others, from `distributed.join`; process 0 writes `output`, others return None.
        force: replace a file of another model or kind, too.

    Raises:
        InputError: bad settings, a checkpoint that cannot be read, an `output` that cannot be written, results of
            another run in `<output>.partial/` or, with `reuse`, in `output`, a process that has stopped.
    """
    paper = {"relative_error": relative_error, "control_variate": control_variate, "max_k": max_k}
    settings = read_settings(input, iterations, samples, text=text, batch=batch, length=length, seed=seed, **paper)
    if group.index == 0:
        check_place(output, [source, text], force=force)
    session = _open(
        source, text, layers, dtype, room, group, observer, compensation, gate_exponent, rank, background_k, **settings
    )
    if reuse and (finished := find_finished(output, session.header, but_exponent=session.find_exponent)):
        return finished
    agree(group, session.header)
    with ExitStack() as stack:
        session = _begin(stack, session, output, restart=restart, force=force)
        return _measure(session, output, force=force)


def _begin(
    stack: ExitStack, session: _Session, output: str | os.PathLike[str], *, restart: bool, force: bool
) -> _Session:
    """The session, in process 0 with what an earlier run has finished; says there what is planned.

    Begins to read weights, while the first programs are traced or process 0 writes the text.
    """
    reads = session.run is not None
    if session.group.index == 0:
        check_output(output, session.header, session.checkpoint.folder, force=force)
        kept = keep_partials(output, session.header, restart=restart, but_exponent=session.find_exponent)
        session = session._replace(partials=stack.enter_context(kept))
        session.observer.open(session.partials, session.layers)
        plan = _plan(session)
        session.observer.plan(plan)
        reads = bool(plan.phases)
    if reads:
        stack.enter_context(session.run.find_residence().read_ahead())
    return session


def _open(
    source: str | os.PathLike[str],
    file: str | os.PathLike[str] | None,
    layers: Collection[int] | None,
    dtype: str,
    room: Room | None,
    group: Group,
    observer: Observer | None,
    asked: str | None,
    exponent: float | str | None,
    rank: int | None,
    background_k: int | None,
    **settings: Any,
) -> _Session:
    exponent = read_exponent(exponent, settings["input"])
    checkpoint = open_checkpoint(source)
    model = describe(checkpoint, max_k=settings["max_k"], gate_exponent=None if exponent == AUTO else exponent)
    chosen = tuple(layers or model.layers)
    check_layers(checkpoint, model, chosen)
    compensation = decide_compensation(asked, exponent, settings["input"], model.routing)
    if compensation == "full":
        settings["compensation_rank"] = find_rank(model.hidden_size, model.identity.num_experts, rank)
    elif rank is not None:
        raise InputError(f"--rank is of corrections, which --compensation {compensation} has none of; leave it out")
    settings["background_k"] = choose_background(background_k, compensation, settings["input"], model.top_k)
    chosen_dtype = choose_dtype(dtype, settings["input"], find_dtype(checkpoint, model))
    complete = ProfileSettings(dtype=chosen_dtype, gate_exponent=model.routing.exponent, **settings)
    sequences = None if complete.input == "paper" else count_sequences(complete)
    run = None if sequences is None else open_run(checkpoint, model, complete.dtype, room=room)
    made_by = {"lexi_search": __version__, "weights_sample_sha256": sample_weights(checkpoint)}  # reads the files
    text = None
    if complete.input == "text":
        check_text_room(run, complete, layers=-(-len(chosen) // group.size))
        text = read_text(checkpoint, model, run.decoder, file, sequences=sequences, length=complete.length)
        made_by |= {"text_sha256": text.file_sha256, "tokens_sha256": text.tokens_sha256}
    find_exponent = compensation != "none" and exponent in (None, AUTO)
    finds = find_exponent, find_exponent and asked is None and rank is None
    return _Session(group, checkpoint, model, complete, run, text, chosen, observer or Silent(), made_by, *finds)


def _plan(session: _Session) -> Plan:
    """What is left of the run to do in this process, if no other shares it."""
    checkpoint, model, settings, partials = session.checkpoint, session.model, session.settings, session.partials
    missing = [layer for layer in session.layers if layer not in partials.layers]
    largest = sum(sorted(estimate_costs(checkpoint, model, model.layers, "paper").values())[-2:])
    row = model.hidden_size * np.dtype("float32" if settings.dtype == "float32" else "float16").itemsize
    if session.run is None:
        read = sum(estimate_costs(checkpoint, model, missing, "paper").values())
        tokens = settings.batch * settings.length * (1 + model.top_k)
        return Plan((), (), len(model.layers), read, tokens * row + largest, largest, None)
    layers, others = len(session.run.decoder.blocks), model.top_k - 1
    chooses = session.find_exponent and COMPENSATION not in partials.findings
    corrects = settings.compensation_rank is not None
    tried = len(CORRECTED_EXPONENTS) * corrects + len(EXPONENTS) * (session.may_drop or not corrects)
    halves = 2 if corrects else 1  # of the text, on one of which corrections are tried
    around = settings.background_k if missing else None
    unfitted = corrects and list_unfitted(session.run, partials.maps, session.layers, background_k=around)
    # A variant has states of its own from the layer on in which it differs.
    alone = 1 + (around is not None)
    own = tuple(alone + others * sum(layer <= at for layer in missing) for at in range(layers))
    writes = session.text is None and (missing or chooses) and "text" not in partials.findings
    passes = [("text", (1,) * layers)] * (PASSES if writes else 0)
    passes += [("compensation", (1,) * layers)] * (chooses and corrects)
    passes += [("compensation", (1 + tried * len(choose_ks(model.top_k)) // halves,) * layers)] * chooses
    passes += [("corrections", (1,) * layers)] * bool(unfitted)
    passes += [("losses", own)] * bool(missing)
    phases = tuple(Counter(name for name, _ in passes).items())
    sequences, streams = count_sequences(settings), session.run.decoder.num_streams
    states = sequences * settings.length * row * streams * count_states(settings, model.top_k, layers=len(missing))
    staying = session.run.find_residence().staying
    copies = count_replicas(session.run, sequences, settings.length)
    read = bool(passes) * (sum(staying) + max(len(passes) - 1, 0) * staying.files)
    return Plan(sum((one for _, one in passes), ()), phases, layers, read, states + largest, largest, staying, copies)


def _measure(session: _Session, output: str | os.PathLike[str], *, force: bool) -> Profile | None:
    group, layers, partials = session.group, session.layers, session.partials
    get_text = cache(lambda: _get_text(session))
    if session.find_exponent:
        session = _find_compensation(session, get_text)
    missing = share(group, "missing", lambda: [layer for layer in layers if layer not in partials.layers])
    costs = estimate_costs(session.checkpoint, session.model, missing, session.settings.input)
    assigned = spread(costs, group.size)[group.index]
    maps = None
    if session.settings.compensation_rank is not None:
        maps = _fit(session, assigned if partials is None else layers, get_text, measured=bool(assigned))
    measured = profile_layers(
        session.checkpoint,
        session.model,
        layers=assigned,
        settings=session.settings,
        tokens=get_text() if assigned and session.run is not None else None,
        maps=maps,
        run=session.run,
        report=session.observer.advance_pass,
    )
    with closing(measured):
        for layer, loss in gather(group, measured, missing):
            if partials is not None:
                partials.add(layer, loss)
            session.observer.finish_layer(layer)
    return None if partials is None else _write(session, output, maps, force=force)


def _write(session: _Session, output: str | os.PathLike[str], maps: Maps | None, *, force: bool) -> Profile:
    """Write the profile of all layers, after the corrections that it names; what was kept of them goes."""
    header, partials = session.header, session.partials
    losses = {layer: partials.layers[layer] for layer in session.layers}
    apart_from, compensation = [session.checkpoint.folder], None
    if maps is not None:
        own = {key: correction for key, correction in maps.items() if key[0] in session.layers}
        compensation = write_maps(
            name_beside(output), own, header.model, owners=[output], apart_from=apart_from, force=force
        )
    profile = Profile(header.model, header.settings, losses, header.made_by, compensation)
    write_profile(output, profile, apart_from=apart_from, force=force)
    partials.drop(session.layers)
    return profile


def _fit(
    session: _Session,
    layers: Sequence[int],
    get_text: Callable[[], Int32[np.ndarray, "sequences length"]],
    *,
    measured: bool,
) -> Maps:
    """The corrections of `layers`, those of the profile or of this process: from an earlier run, or fitted now; and, if
    any are `measured`, those of all others at the background's k."""
    partials = session.partials
    kept = {} if partials is None else partials.maps
    maps = {key: value for layer in layers for key, value in kept.get(layer, {}).items()}
    ks = list_unfitted(session.run, kept, layers, background_k=session.settings.background_k if measured else None)
    if ks:
        run = session.run._replace(model=session.model)
        settings = {"exponents": [session.settings.gate_exponent], "rank": session.settings.compensation_rank}
        [solving] = fit_layers(run, get_text(), ks, **settings, report=session.observer.advance_pass)
        for layer in ks:
            found = {(layer, k): solving[layer, k] for k in ks[layer]}
            maps |= found if partials is None or layer not in layers else partials.add_maps(layer, found)
    return maps


def _get_text(session: _Session) -> Int32[np.ndarray, "sequences length"]:
    """The text that all layers are measured on: the user's, or from an earlier run, from process 0, or sampled now."""
    if session.text is not None:
        return session.text.tokens
    count = -(-len(session.layers) // session.group.size)
    report = session.observer.advance_pass

    def sample() -> list[list[int]]:
        return draw_samples(session.run, session.settings, layers=count, report=report).tolist()

    return np.asarray(share(session.group, "text", lambda: session.partials.find("text", sample)), np.int32)


def _find_compensation(session: _Session, get_text: Callable[[], Int32[np.ndarray, "sequences length"]]) -> _Session:
    """The session with the compensation of an earlier run, of process 0, or the best one on the text."""

    def choose() -> dict[str, Any]:
        rank, report = session.settings.compensation_rank, session.observer.advance_pass
        alone = rank is None or session.may_drop
        return find_compensation(session.run, get_text(), rank=rank, alone=alone, report=report)._asdict()

    found = share(session.group, COMPENSATION, lambda: session.partials.find(COMPENSATION, choose))
    model = session.model._replace(routing=session.model.routing._replace(exponent=found["exponent"]))
    rank = session.settings.compensation_rank if found["corrected"] else None
    settings = replace(session.settings, gate_exponent=found["exponent"], compensation_rank=rank)
    session = session._replace(model=model, settings=settings)
    if session.partials is not None:
        session.partials.load(session.header)
    return session
