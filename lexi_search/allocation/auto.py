"""From a checkpoint to a folder that can be served, in one run: profile, search, judge, export.

`OUTPUT` is the folder that vLLM serves; `OUTPUT.lexi` beside it keeps what led there: `profile.json`, the paper's
`profile-paper.json`, `estimate.json` (of speed, where no cost table is given), `allocation.json` and `judged.json`.
Every step takes what an earlier run has left, so the same run again goes on or is over at once. What is there with
other content is replaced only with `force`, and never if it is another model's.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from lexi_search.allocation import export
from lexi_search.allocation.allocate import AllocationResult
from lexi_search.allocation.baselines import (
    Contender,
    describe_judging,
    judge_contenders,
    list_contenders,
    list_variants,
    read_divergence,
)
from lexi_search.allocation.costs import Cost, weigh
from lexi_search.allocation.speed_estimate import CARDS, estimate, measure_size
from lexi_search.allocation.targets import Target, check_target, search_target
from lexi_search.allocation.tradeoff import Front
from lexi_search.artifacts.allocation import Allocation
from lexi_search.artifacts.compensation import Maps, format_maps, name_beside, name_maps
from lexi_search.artifacts.cost_table import CostTable
from lexi_search.artifacts.files import check_writable_folder, json_bytes, lock_file, write_atomically
from lexi_search.artifacts.profile import Profile, ProfileSettings
from lexi_search.artifacts.serialisation import read_artifact, read_profile_maps, to_bytes
from lexi_search.checkpoint.folder import check_place, require_folder
from lexi_search.checkpoint.reader import Checkpoint, open_checkpoint
from lexi_search.errors import InputError
from lexi_search.models.decoder_stack import describe_decoder
from lexi_search.models.model import Model, describe
from lexi_search.profiling.divergence import count_sequences, measure_variants, open_run
from lexi_search.profiling.forward.text import read_text
from lexi_search.profiling.profile import BATCH, LENGTH, read_settings
from lexi_search.profiling.session import Observer, profile_checkpoint

PROFILE, PAPER, ESTIMATE = "profile.json", "profile-paper.json", "estimate.json"
ALLOCATION, JUDGED = "allocation.json", "judged.json"
PAPER_ITERATIONS = 10  # N_iter of the paper's Algorithm 1
LOCK = "lock"

Listen = Callable[[str], AbstractContextManager[Observer | None]]
Tokens = Int32[np.ndarray, "sequences length"]


class Job(NamedTuple):
    """What is to be done, where: `folder` is for the files beside `output`, and `table` is what `cost` is from.

    `estimate` makes that table for corrections of a `rank`, or without; it is None for a table that was measured.
    `text` is the user's file, None where the model writes one.
    """

    source: str
    output: str
    folder: Path
    force: bool
    model: Model
    target: Target
    table: CostTable
    cost: Cost
    estimate: Callable[..., CostTable] | None
    listen: Listen
    text: str | None = None

    def keep(self, name: str, data: bytes) -> None:
        """Write a file of the folder; InputError where other content is there, unless it may be replaced."""
        path = self.folder / name
        if not path.is_file() or path.read_bytes() != data:
            self.refuse_other(path)
            write_atomically(path, data, apart_from=[self.source, self.text])

    def refuse_other(self, path: Path) -> None:
        """Raise InputError if something is at `path` and may not be replaced."""
        if os.path.lexists(path) and not self.force:
            raise InputError(f"{path} is there with other content; --force replaces it, or choose another -o")


class Outcome(NamedTuple):
    """All that a run found: the facts of a report.

    `contenders` are the allocation; the k of the same budget that are as equal as can be; the paper's allocation of the
    same budget, if it was measured; and the model's own k. `settings` are those of the text that they were judged on,
    None where nothing was judged; `command` serves the output.
    """

    job: Job
    profile: Profile
    result: AllocationResult
    front: Front
    contenders: tuple[Contender, ...]
    settings: ProfileSettings | None
    command: str


def find_folder(output: str | os.PathLike[str]) -> Path:
    """The folder beside `output` for the files that lead there."""
    path = Path(output) if Path(output).name else Path(os.path.abspath(output))
    return path.with_name(f"{path.name}.lexi")


def prepare_checkpoint(
    source: str,
    output: str,
    target: Target,
    *,
    table: CostTable | None = None,
    mix: Mapping[int, float] | None = None,
    card: str = "h100",
    concurrency: int = 16,
    context: int = 1024,
    paper: bool = True,
    judge: bool = True,
    force: bool = False,
    listen: Listen = lambda step: nullcontext(),
    **settings: Any,
) -> Outcome:
    """Make `output` of the checkpoint in the folder `source`: a folder for vLLM, with the allocation of least loss.

    Args:
        table: measured costs, weighted by `mix`; without, an estimate for a step of `concurrency` sequences with
            `context` tokens each on `card`, one of `speed_estimate.CARDS`.
        paper: profile by the paper's method as well, for comparison.
        judge: measure the whole model under the allocation and its like, on text that it writes, or with a `text` on as
            much of what follows that the profile has read.
        force: replace what an earlier run left for another target, and its export.
        listen: the context manager, with an observer or None, of each step "profile", "paper" and "judge".
        settings: those of `profile_checkpoint`.

    Raises:
        InputError: a target out of reach, with the nearest one within; where files go, another model's or, without
            `force`, other content; as the steps.
    """
    checkpoint = open_checkpoint(require_folder(source))
    model = describe(checkpoint)
    guess = None
    if table is None:
        size, step = measure_size(checkpoint, model), {"batch": concurrency, "context": context}
        guess = partial(estimate, size, model.identity, CARDS[card], **step)
        table = guess()
    job = Job(
        source=source,
        output=output,
        folder=find_folder(output),
        force=force,
        model=model,
        target=target,
        table=table,
        cost=weigh(table, model.identity, mix=mix),
        estimate=guess,
        listen=listen,
        text=settings.get("text"),
    )
    check_target(target, model.identity, job.cost, table.device)
    _check_files(job)
    held_out = _read_held_out(checkpoint, model, **settings) if judge and job.text is not None else None
    with _claim(job):
        return _run(job, paper=paper, judge=judge, held_out=held_out, **settings)


def _read_held_out(
    checkpoint: Checkpoint,
    model: Model,
    *,
    text: str,
    batch: int = BATCH,
    length: int = LENGTH,
    samples: int | None = None,
    **_: Any,
) -> Tokens:
    """What allocations are judged on: as much of a user's text as the profile takes, from what follows that."""
    asked = {"batch": batch, "length": length, "seed": 0, "relative_error": None}
    settings = read_settings("text", None, samples, text=text, **asked)
    sequences = count_sequences(ProfileSettings(dtype="float32", **settings))
    size = {"sequences": 2 * sequences, "length": length}
    remedy = "lower --samples, or take --no-judge, which needs half as much"
    decoder = describe_decoder(checkpoint, model)
    return read_text(checkpoint, model, decoder, text, **size, remedy=remedy).tokens[sequences:]


def _run(job: Job, *, paper: bool, judge: bool, held_out: Tokens | None, **settings: Any) -> Outcome:
    with job.listen("profile") as observer:
        profile = profile_checkpoint(job.source, job.folder / PROFILE, reuse=True, observer=observer, **settings)
    plain, job = job.cost, _count_corrections(job, profile)
    if job.cost.estimated:
        job.keep(ESTIMATE, to_bytes(job.table))
    by_paper = None
    if paper and profile.settings.input != "paper":
        by_paper = _profile_as_paper(job, profile, restart=settings.get("restart", False))
    result, front = search_target(profile, job.target, job.cost)
    maps = read_profile_maps(job.folder / PROFILE, profile)
    result = result._replace(allocation=_keep_allocation(job, result.allocation, maps))
    contenders = list_contenders(profile, result.allocation, job.cost, plain=plain, by_paper=by_paper)
    judged = None
    if judge and profile.settings.input != "paper":  # on another text of the same size
        own = profile.settings.input == "weights"
        judged = replace(profile.settings, seed=(profile.settings.seed + 1) % 2**32) if own else profile.settings
        contenders = _judge(job, profile, contenders, judged, maps, held_out)
    return Outcome(job, profile, result, front, contenders, judged, _export(job, result.allocation))


def _check_files(job: Job) -> None:
    """Raise InputError where the run would end because of what is at its places now; nothing is written."""
    check_place(job.output, job.source, force=True)
    source, folder = (Path(os.path.realpath(path)) for path in (job.source, job.folder))
    if source == folder or folder in source.parents or source in folder.parents:
        raise InputError(f"cannot write {job.folder}: it overlaps the model folder {job.source}; choose another -o")
    check_writable_folder(job.folder)
    found = {}
    for name in (PROFILE, PAPER, ALLOCATION):
        if os.path.lexists(job.folder / name):
            found[name] = read_artifact(job.folder / name)
            if found[name].model != job.model.identity:
                raise InputError(f"{job.folder / name} is of another model than {job.source}; choose another -o")
    if not job.force and os.path.isdir(job.output) and os.listdir(job.output):
        ours = found.get(ALLOCATION)
        ours, files = (None, {}) if ours is None else export.carry(ours, job.folder / ALLOCATION)
        if ours is None or not export.holds_folder(job.output, job.source, _override(job, ours), files=files):
            raise InputError(f"cannot write {job.output}: an earlier export is there; --force replaces it")


@contextmanager
def _claim(job: Job) -> Iterator[None]:
    """The folder of the files, made if need be, and locked against other runs; it goes if nothing came into it."""
    job.folder.mkdir(exist_ok=True)
    lock = lock_file(job.folder / LOCK)
    if lock is None:
        raise InputError(f"another run is writing {job.folder}; wait for it to end, or choose another -o")
    try:
        yield
    finally:
        (job.folder / LOCK).unlink(missing_ok=True)
        os.close(lock)
        with suppress(OSError):
            job.folder.rmdir()


def _count_corrections(job: Job, profile: Profile) -> Job:
    """The job with the time of the profile's corrections in an estimate of speed; the target is checked again."""
    rank = profile.settings.compensation_rank
    if rank is None or job.estimate is None:
        return job
    table = job.estimate(rank=rank)
    cost = weigh(table, job.model.identity)
    check_target(job.target, job.model.identity, cost, table.device)
    return job._replace(table=table, cost=cost)


def _profile_as_paper(job: Job, profile: Profile, *, restart: bool) -> Profile:
    """The profile by the paper's method: Gaussian input, `PAPER_ITERATIONS` iterations."""
    batch, length = profile.settings.batch, profile.settings.length
    with job.listen("paper") as observer:
        return profile_checkpoint(
            job.source,
            job.folder / PAPER,
            input="paper",
            batch=batch,
            length=length,
            seed=profile.settings.seed,
            iterations=PAPER_ITERATIONS,
            restart=restart,
            reuse=True,
            observer=observer,
        )


def _judge(
    job: Job,
    profile: Profile,
    contenders: tuple[Contender, ...],
    settings: ProfileSettings,
    maps: Maps | None,
    held_out: Tokens | None,
) -> tuple[Contender, ...]:
    """The contenders judged on `held_out` text or one that is sampled by `settings`, now or by an earlier run."""
    tried = list_variants(contenders, settings.gate_exponent, maps)
    header = describe_judging(profile, settings, tried)
    path = job.folder / JUDGED
    divergence = read_divergence(path, header) if path.exists() else None
    if divergence is None:
        job.refuse_other(path)
        with job.listen("judge") as observer:
            report = observer.advance_pass if observer else lambda layer: None
            run = open_run(open_checkpoint(job.source), job.model, settings.dtype)
            divergence = measure_variants(run, settings, tried, tokens=held_out, report=report)
    judged = judge_contenders(contenders, divergence)
    means = [{"name": one.name, **one.judged._asdict()} for one in judged]
    job.keep(JUDGED, json_bytes(header | {"divergence": divergence.tolist(), "judged": means}))
    return judged


def _keep_allocation(job: Job, allocation: Allocation, maps: Maps | None) -> Allocation:
    """The allocation as it is kept in the folder of the files, with what corrections it uses beside it."""
    if maps is not None and allocation.corrected:
        place = name_beside(job.folder / ALLOCATION)
        data = format_maps({key: maps[key] for key in allocation.corrected}, allocation.model)
        job.keep(place.name, data)
        allocation = replace(allocation, compensation=name_maps(place, maps, data))
    job.keep(ALLOCATION, to_bytes(allocation))
    return allocation


def _override(job: Job, allocation: Allocation) -> dict[str, Any]:
    """The changes to the model's config.json for vLLM; InputError for a config that does not fit."""
    config = export.read_config(job.source)
    export.check_config(allocation.model, config)
    return export.make_vllm_overrides(allocation, config)


def _export(job: Job, allocation: Allocation) -> str:
    """Write the folder that is served, unless it is there already, and return the command that serves it."""
    allocation, files = export.carry(allocation, job.folder / ALLOCATION)
    overrides = _override(job, allocation)
    if not export.holds_folder(job.output, job.source, overrides, files=files):
        export.write_folder(job.output, job.source, overrides, files=files, force=job.force)
    return export.format_vllm_command(job.output, allocation.model.model_type)
