"""Everything, on one GPU: text, models, profiles, study, report, in stages that go on where they ended.

    python examples/fidelity/run.py --stage corpus --stage train --seconds 75 --minutes 9
    python examples/fidelity/run.py --stage profiles --stage study --stage report --minutes 9

Profiles are made on the CPU, several at a time, unless JAX_PLATFORMS says otherwise (then take --jobs 1).

A stage that is cut short, by `--minutes` or otherwise, is taken up again by the same command.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import torch

EXAMPLES = Path(__file__).resolve().parent.parent
TRAINING, FIDELITY = EXAMPLES / "train_small_moe", EXAMPLES / "fidelity"
STAGES = ("corpus", "train", "profiles", "study", "report")
# A seed after the colon.
MODELS = ("olmoe-45m:0", "mixtral-45m:0", "qwen2-moe-50m:0", "qwen3-moe-45m:0", "deepseek-v2-45m:0", "olmoe-45m:1")
OVERHEAD = 25  # seconds of a training run besides training: start, evaluation, saving


def call(words: Sequence[object]) -> None:
    """Run a Python program; exits as it does if it fails."""
    done = subprocess.run([sys.executable, *map(str, words)])
    if done.returncode:
        raise SystemExit(done.returncode)


def find_folder(work: Path, model: str) -> Path:
    return work / "models" / model.replace(":", "-seed-")


def make_corpus(work: Path, text: Sequence[Path], most: int) -> None:
    """Collect text once."""
    if not (work / "corpus").exists():
        folders = [word for folder in text for word in ("--text", folder)]
        call([TRAINING / "domains.py", work / "corpus", "--most", most, *folders])


def train(work: Path, models: Sequence[str], seconds: float, options: Sequence[str], until: float) -> None:
    """Train what is not there yet, as long as there is time for a whole run."""
    (work / "models").mkdir(exist_ok=True)
    for model in models:
        preset, _, seed = model.partition(":")
        if find_folder(work, model).exists():
            continue
        if time.monotonic() + seconds + OVERHEAD > until:
            click.echo(f"no time to train {model}; the same command goes on from here")
            return
        click.echo(f"train {model}")
        place, corpus = find_folder(work, model), work / "corpus"
        call(
            [TRAINING / "train.py", place, "--preset", preset, "--seed", seed or 0, "--corpus", corpus]
            + ["--seconds", seconds, *options]
        )


def profile(work: Path, folders: Sequence[Path], jobs: int) -> None:
    """Make the profiles that commands make, several at a time; what fails is tried again and told by the study."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path.insert(0, str(FIDELITY))
    from tables import COMMANDS, Failed, make_profile

    def make(name: str, folder: Path) -> None:
        started = time.monotonic()
        try:
            make_profile(name, folder, work / "profiles" / folder.name / f"{name}.json")
            click.echo(f"profile {name} of {folder.name}: {time.monotonic() - started:.1f} s")
        except Failed as error:
            click.echo(f"profile {name} of {folder.name}: {error}")

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(make, *zip(*((name, folder) for folder in folders for name in COMMANDS), strict=True)))


@click.command()
@click.option("--stage", "stages", type=click.Choice(STAGES), multiple=True, default=STAGES, show_default="all")
@click.option("--work", type=click.Path(path_type=Path), default=Path("fidelity"), show_default=True)
@click.option("--models", default=" ".join(MODELS), show_default=True, help="PRESET:SEED, with blanks between.")
@click.option("--seconds", default=75.0, show_default=True, help="Training time of each model.")
@click.option("--minutes", default=1e6, show_default="no limit", help="Start nothing after so long.")
@click.option("--jobs", default=4, show_default=True, help="Profiles made at the same time.")
@click.option("--text", type=click.Path(path_type=Path), multiple=True, help="Text folder; default: where text is.")
@click.option("--most", default=80, show_default=True, help="Million characters of a domain.")
@click.option("--train-option", "train_options", multiple=True, help="Handed on to train.py, such as --layers=2.")
@click.option("--study-option", "study_options", multiple=True, help="Handed on to study.py, such as --length=64.")
@click.option("--default", help="Handed on to report.py.")
def main(
    stages: tuple[str, ...],
    work: Path,
    models: str,
    seconds: float,
    minutes: float,
    jobs: int,
    text: tuple[Path, ...],
    most: int,
    train_options: tuple[str, ...],
    study_options: tuple[str, ...],
    default: str | None,
) -> None:
    """Run the stages in their order, everything in the folder WORK."""
    until = time.monotonic() + 60 * minutes
    work = work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    click.echo(torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: this takes long")
    for stage in (stage for stage in STAGES if stage in stages):
        started, names = time.monotonic(), models.split()
        folders = [folder for folder in (find_folder(work, name) for name in names) if folder.is_dir()]
        if stage == "corpus":
            make_corpus(work, text, most)
        elif stage == "train":
            train(work, names, seconds, train_options, until)
        elif stage == "profiles":
            profile(work, folders, jobs)
        elif stage == "study":
            left = max(0.0, (until - time.monotonic()) / 60)
            call([FIDELITY / "study.py", *folders, "-o", work / "results.json", "--minutes", left, *study_options])
        else:
            words = [FIDELITY / "report.py", work / "results.json", "-o", work / "report"]
            call([*words, "--default", default] if default else words)
        click.echo(f"stage {stage}: {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
