"""Everything, on all GPUs: text, then models side by side, each trained and studied, then one report.

    python examples/fidelity/run.py --seconds 100 --at-once 3

Each model is trained and studied on its share of a GPU and of the cores, whatever becomes of the others; what its
programs say is in WORK/logs. What is cut short is taken up again by the same command.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import click
import torch
from records import describe_call

FIDELITY = Path(__file__).resolve().parent
TRAINING = FIDELITY.parent / "train_small_moe"
MODELS = "olmoe-45m:0 qwen3-moe-45m:0 deepseek-v2-45m:0 qwen2-moe-50m:0 mixtral-45m:0 olmoe-45m:1 qwen3-moe-45m:1"


class Failed(Exception):
    """A program that failed, in its own last words."""


class Slot(NamedTuple):
    """A share of the machine: what CUDA_VISIBLE_DEVICES is there, empty for no GPU, and cores."""

    gpu: str
    cores: tuple[int, ...]


def follow(model: str, slot: Slot, *, work: Path, training: Sequence[object], studying: Sequence[object]) -> bool:
    """Train a model, PRESET:SEED, unless it is there, and study it; whether neither failed."""
    preset, _, seed = model.partition(":")
    name = model.replace(":", "-seed-")
    place, log = work / "models" / name, work / "logs" / f"{name}.log"
    train = [TRAINING / "train.py", place, "--preset", preset, "--seed", seed or 0, "--corpus", work / "corpus"]
    study = [FIDELITY / "study.py", place, "-o", work / "results", "--profiles", work / "profiles"]
    try:
        if not place.exists():
            run_logged(f"{name}: train", [*train, *training], slot, log)
        run_logged(f"{name}: study", [*study, "--command", describe_call(), *studying], slot, log)
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
        program = [sys.executable, *map(str, words)]
        done = subprocess.run(program, env=environment, stdout=file, stderr=subprocess.STDOUT)
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


def find_cores() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def share_out(gpus: Sequence[str], cores: Sequence[int], count: int) -> list[Slot]:
    """Slots for `count` models at the same time: the GPUs in turn, and as many cores each, at least one."""
    step = max(1, len(cores) // count)
    starts = (index * step % len(cores) for index in range(count))
    return [
        Slot(gpus[index % len(gpus)] if gpus else "", tuple(cores[start : start + step]))
        for index, start in enumerate(starts)
    ]


def follow_all(step: Callable[[str, Slot], bool], models: Sequence[str], slots: Sequence[Slot]) -> list[str]:
    """Do a step for each model, one to a slot at a time; for which of them it failed."""
    free: SimpleQueue[Slot] = SimpleQueue()
    for slot in slots:
        free.put(slot)

    def follow_in_turn(model: str) -> bool:
        slot = free.get()
        try:
            return step(model, slot)
        finally:
            free.put(slot)

    with ThreadPoolExecutor(len(slots)) as pool:
        return [model for model, well in zip(models, pool.map(follow_in_turn, models), strict=True) if not well]


def call(*words: object) -> None:
    """Run a Python program; exits as it does if it fails."""
    if status := subprocess.run([sys.executable, *map(str, words)]).returncode:
        raise SystemExit(status)


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("fidelity"), show_default=True)
@click.option("--models", default=MODELS, show_default=True, help="PRESET:SEED, with blanks between.")
@click.option("--gpus", type=click.IntRange(0), help="How many GPUs to use; 0: the CPU.  [default: all]")
@click.option("--at-once", type=click.IntRange(1), default=1, show_default=True, help="Models at a time on each GPU.")
@click.option("--seconds", default=75.0, show_default=True, help="Training time of each model.")
@click.option("--text", type=click.Path(path_type=Path), multiple=True, help="Text folder; default: where text is.")
@click.option("--most", default=80, show_default=True, help="Million characters of a domain.")
@click.option("--train-option", "train_options", multiple=True, help="Handed on to train.py, such as --layers=2.")
@click.option("--study-option", "study_options", multiple=True, help="Handed on to study.py, such as --length=64.")
def main(
    work: Path,
    models: str,
    gpus: int | None,
    at_once: int,
    seconds: float,
    text: tuple[Path, ...],
    most: int,
    train_options: tuple[str, ...],
    study_options: tuple[str, ...],
) -> None:
    """Run everything in the folder WORK. Exits with 1 if a model failed; the others are in the report."""
    started, work = time.monotonic(), work.absolute()
    devices, names = find_gpus(gpus), models.split()
    slots = share_out(devices, find_cores(), max(1, min(len(names), max(1, len(devices)) * at_once)))
    click.echo(f"GPUs: {' '.join(devices) or 'none, this takes long'}; {len(slots)} of {len(names)} models at a time")
    for folder in ("models", "results", "logs"):
        (work / folder).mkdir(parents=True, exist_ok=True)
    if not (work / "corpus").exists():
        folders = [word for folder in text for word in ("--text", folder)]
        call(TRAINING / "domains.py", work / "corpus", "--most", most, *folders)
    training = ("--seconds", seconds, *train_options)
    failed = follow_all(partial(follow, work=work, training=training, studying=study_options), names, slots)
    if results := sorted((work / "results").glob("*.csv")):
        call(FIDELITY / "report.py", *results, "-o", work / "report")
    click.echo(f"all: {time.monotonic() - started:.0f} s{'; failed: ' + ' '.join(failed) if failed else ''}")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
