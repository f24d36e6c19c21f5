"""Everything, on all GPUs: text, then models side by side, each trained and studied, then one report.

    python examples/fidelity/run.py --seconds 100 --at-once 3

Several models share the GPUs and the CPU's cores: as soon as one has a place it goes through all stages there, whatever
becomes of the others. Times are taken while no other uses the GPU. What a model's programs say is in WORK/logs. What is
cut short, by `--minutes` or otherwise, is taken up again by the same command.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import click
import torch
from origins import name_call

from lexi_adapter.engines.locks import start_beside

EXAMPLES = Path(__file__).resolve().parent.parent
TRAINING, FIDELITY = EXAMPLES / "train_small_moe", EXAMPLES / "fidelity"
STAGES = ("corpus", "train", "study", "report")
# A seed after the colon.
MODELS = (
    "olmoe-45m:0",
    "qwen3-moe-45m:0",
    "deepseek-v2-45m:0",
    "qwen2-moe-50m:0",
    "mixtral-45m:0",
    "olmoe-45m:1",
    "qwen3-moe-45m:1",
)
OVERHEAD = 25  # seconds of a training run besides training: start, evaluation, saving


class Failed(Exception):
    """A program that failed, in its own last words."""


class Slot(NamedTuple):
    """A share of the machine: what CUDA_VISIBLE_DEVICES is there, empty for no GPU, and cores."""

    gpu: str
    cores: tuple[int, ...]


@dataclass(frozen=True)
class Job:
    """What is done with every model. `until` is on the monotonic clock."""

    work: Path
    stages: Sequence[str]
    seconds: float
    until: float
    train_options: Sequence[str]
    study_options: Sequence[str]

    def follow(self, model: str, slot: Slot) -> bool:
        """Take a model through the stages; whether none of them failed."""
        preset, _, seed = model.partition(":")
        name = model.replace(":", "-seed-")
        place, log = self.work / "models" / name, self.work / "logs" / f"{name}.log"
        card = self.work / "cards" / (slot.gpu or "cpu")
        late = time.monotonic() + self.seconds + OVERHEAD > self.until
        try:
            if "train" in self.stages and not place.exists():
                if late:
                    click.echo(f"{name}: no time to train; the same command goes on from here")
                    return True
                words = [TRAINING / "train.py", place, "--preset", preset, "--seed", seed or 0]
                words += ["--corpus", self.work / "corpus", "--seconds", self.seconds, *self.train_options]
                with start_beside([str(card)]):
                    run_logged(f"{name}: train", words, slot, log)
            if "study" in self.stages and place.exists():
                left = max(0.0, (self.until - time.monotonic()) / 60)
                words = [FIDELITY / "study.py", place, "-o", self.work / "results" / f"{name}.json", "--minutes", left]
                words += ["--profiles", self.work / "profiles" / name, "--card", card, "--command", name_call()]
                words += self.study_options
                run_logged(f"{name}: study", words, slot, log)
        except Failed as error:
            click.echo(error, err=True)
            return False
        return True


def run_logged(what: str, words: Sequence[object], slot: Slot, log: Path) -> None:
    """Run a Python program in its slot, its output at the end of a log, and tell its last line and its seconds."""
    threads = {name: str(len(slot.cores)) for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS")}
    environment = os.environ | threads | {"CUDA_VISIBLE_DEVICES": slot.gpu, "PYTHONUNBUFFERED": "1"}
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, slot.cores)  # of this thread, which the program inherits
    started = time.monotonic()
    with log.open("a") as file:
        done = subprocess.run(
            [sys.executable, *map(str, words)], env=environment, stdout=file, stderr=subprocess.STDOUT
        )
    last = (log.read_text(errors="replace").strip().splitlines() or ["nothing was said"])[-1].strip()
    if done.returncode:
        raise Failed(f"{what}: failed with exit status {done.returncode}: {last} (all of it: {log})")
    click.echo(f"{what}: {time.monotonic() - started:.0f} s; {last}")


def find_gpus(count: int | None) -> list[str]:
    """The first GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    visible, there = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count()
    names = [str(index) for index in range(there)] if visible is None else visible.split(",")[:there]
    if count is not None and count > there:
        raise click.UsageError(f"--gpus {count}: there are {there}; name at most so many")
    return names[:count]


def share_out(gpus: Sequence[str], cores: Sequence[int], count: int) -> list[Slot]:
    """Slots for `count` models at the same time: the GPUs in turn, and as many cores each, at least one."""
    step = max(1, len(cores) // count)
    starts = (index * step % len(cores) for index in range(count))
    return [
        Slot(gpus[index % len(gpus)] if gpus else "", tuple(cores[start : start + step]))
        for index, start in enumerate(starts)
    ]


def find_cores() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def follow_all(job: Job, models: Sequence[str], slots: Sequence[Slot]) -> list[str]:
    """Take the models through the stages, one to a slot at a time; which of them failed."""
    for folder in ("models", "results", "logs", "cards"):
        (job.work / folder).mkdir(exist_ok=True)
    free: SimpleQueue[Slot] = SimpleQueue()
    for slot in slots:
        free.put(slot)

    def follow(model: str) -> bool:
        slot = free.get()
        try:
            return job.follow(model, slot)
        finally:
            free.put(slot)

    with ThreadPoolExecutor(len(slots)) as pool:
        return [model for model, well in zip(models, pool.map(follow, models), strict=True) if not well]


def call(words: Sequence[object]) -> None:
    """Run a Python program; exits as it does if it fails."""
    done = subprocess.run([sys.executable, *map(str, words)])
    if done.returncode:
        raise SystemExit(done.returncode)


@click.command()
@click.option("--stage", "stages", type=click.Choice(STAGES), multiple=True, default=STAGES, show_default="all")
@click.option("--work", type=click.Path(path_type=Path), default=Path("fidelity"), show_default=True)
@click.option("--models", default=" ".join(MODELS), show_default=True, help="PRESET:SEED, with blanks between.")
@click.option("--gpus", type=click.IntRange(0), help="How many GPUs to use; 0: the CPU.  [default: all]")
@click.option("--at-once", type=click.IntRange(1), default=1, show_default=True, help="Models at a time on each GPU.")
@click.option("--seconds", default=75.0, show_default=True, help="Training time of each model.")
@click.option("--minutes", default=1e6, show_default="no limit", help="Start nothing after so long, but the report.")
@click.option("--text", type=click.Path(path_type=Path), multiple=True, help="Text folder; default: where text is.")
@click.option("--most", default=80, show_default=True, help="Million characters of a domain.")
@click.option("--train-option", "train_options", multiple=True, help="Handed on to train.py, such as --layers=2.")
@click.option("--study-option", "study_options", multiple=True, help="Handed on to study.py, such as --length=64.")
@click.option("--default", help="Handed on to report.py.")
def main(
    stages: tuple[str, ...],
    work: Path,
    models: str,
    gpus: int | None,
    at_once: int,
    seconds: float,
    minutes: float,
    text: tuple[Path, ...],
    most: int,
    train_options: tuple[str, ...],
    study_options: tuple[str, ...],
    default: str | None,
) -> None:
    """Run the stages, everything in the folder WORK. Exits with 1 if a model failed; the others are in the report."""
    started = time.monotonic()
    devices, names = find_gpus(gpus), models.split()
    slots = share_out(devices, find_cores(), max(1, min(len(names), max(1, len(devices)) * at_once)))
    click.echo(f"GPUs: {' '.join(devices) or 'none, this takes long'}; {len(slots)} of {len(names)} models at a time")
    work = work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    if "corpus" in stages and not (work / "corpus").exists():
        folders = [word for folder in text for word in ("--text", folder)]
        call([TRAINING / "domains.py", work / "corpus", "--most", most, *folders])
        click.echo(f"corpus: {time.monotonic() - started:.0f} s")
    job = Job(work, stages, seconds, started + 60 * minutes, train_options, study_options)
    failed = follow_all(job, names, slots) if {"train", "study"} & set(stages) else []
    if "report" in stages and (results := sorted((work / "results").glob("*.json"))):
        call([FIDELITY / "report.py", *results, "-o", work / "report", *(("--default", default) if default else ())])
    click.echo(f"all: {time.monotonic() - started:.0f} s{'; failed: ' + ' '.join(failed) if failed else ''}")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
