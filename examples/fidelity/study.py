"""The fidelity study of one model: what allocations from each kind of profile really lose.

    python examples/fidelity/study.py MODEL_DIR -o results.json

A model folder is a checkpoint with its held-out tokens, as `examples/train_small_moe/train.py` leaves one, or any other
beside `--tokens`. The file is written again after every piece, and a second run goes on where the first one ended. What
cannot be measured is in the file by name, with the reason.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # searches are small, and the GPU's memory is PyTorch's

import json  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable, Iterator, Sequence  # noqa: E402
from concurrent.futures import ThreadPoolExecutor, wait  # noqa: E402
from contextlib import AbstractContextManager, nullcontext  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, NamedTuple  # noqa: E402

import click  # noqa: E402
import pieces  # noqa: E402
import torch  # noqa: E402
from judging import Judge, load  # noqa: E402
from origins import describe_run  # noqa: E402
from pieces import Study  # noqa: E402
from tables import COMMANDS, Failed  # noqa: E402
from timing import time_passes  # noqa: E402
from windows import cut_more, cut_what_fits, read_streams  # noqa: E402

from lexi_adapter.allocation import AllocationError  # noqa: E402
from lexi_adapter.engines.locks import measure_alone, start_beside  # noqa: E402
from lexi_adapter.files import write_atomically  # noqa: E402

FORMAT, VERSION = "lexi-fidelity", 1
TABLES, CELLS, FLOORS = "tables", "cells", "floors"

Hold = Callable[[Sequence[str]], AbstractContextManager[None]]


class Piece(NamedTuple):
    """`name` says whether it is done; the result goes to `into`, merged with what is there where that is `TABLES`.

    `hold` is how the GPU is held meanwhile, if at all: with others, or alone.
    """

    name: str
    make: Callable[[Study], Any]
    into: tuple[str, ...]
    merge: bool = False
    always: bool = False  # cheap, and depends on what else is there
    hold: Hold = start_beside


def plan(study: Study) -> Iterator[Piece]:
    """The pieces in order; those that depend on earlier ones are known only when these are done.

    What waits for a command comes late.
    """
    yield Piece("base", pieces.judge_base, ("base",))
    yield Piece("uniform", pieces.judge_uniform, ("uniform",))
    yield Piece("random", pieces.judge_random, ("random",))
    yield Piece("measured", pieces.measure_tables, (TABLES,), merge=True)
    yield Piece("generated", pieces.generate_tables, (TABLES,), merge=True)
    yield from plan_cells(study)
    yield Piece("refined", pieces.refine_oracle, ("refined",))
    yield from plan_floors(study)
    for name in COMMANDS:
        make = partial(pieces.profile, name=name)
        yield Piece(f"profile {name}", make, (TABLES,), merge=True, hold=nullcontext)
    yield from plan_cells(study)
    yield from plan_floors(study)
    yield Piece("correlations", pieces.correlate, ("correlations",), always=True, hold=nullcontext)
    yield Piece("compounding", pieces.compound, ("compounding",), always=True, hold=nullcontext)
    wait(study.files.values())  # and not while the GPU is held
    yield Piece("pruned", pieces.judge_pruned, ("pruned",))
    yield Piece("times", time_passes, ("times",), hold=measure_alone)


def plan_cells(study: Study) -> Iterator[Piece]:
    """Every table that there is so far, judged."""
    for name in list(study.found.get(TABLES, {})):
        yield Piece(f"cells {name}", partial(pieces.judge_cells, name=name), (CELLS, name))


def plan_floors(study: Study) -> Iterator[Piece]:
    """Of the tables that there are so far, those that are held to the floors, on more windows; nothing if no more."""
    if len(study.more.windows.tokens) <= len(study.judge.windows.tokens):
        return
    yield Piece("floors uniform", pieces.judge_uniform_on_more, (FLOORS,), merge=True)
    for name in pieces.FLOORS:
        if name in study.found.get(TABLES, {}):
            make = partial(pieces.judge_cells, name=name, on_more=True)
            yield Piece(f"floors {name}", make, (FLOORS, CELLS, name))


def run(study: Study, save: Callable[[], None], until: float, cards: Sequence[str] = ()) -> bool:
    """Make what is missing, saving after each piece; False if time ran out. What fails is left out by name.

    `cards` are files that stand for the GPU, as in `lexi_adapter.engines.locks`.
    """
    finished = True
    seconds, skipped = (study.found.setdefault(name, {}) for name in ("seconds", "skipped"))
    for piece in plan(study):
        if piece.name in seconds and not piece.always:
            continue
        if time.monotonic() > until and not piece.always:
            finished = False
            continue
        try:
            with piece.hold(cards):
                started = time.monotonic()
                result = piece.make(study)
        except (Failed, AllocationError, RuntimeError) as error:  # PyTorch's own are RuntimeError
            skipped[piece.name] = study.shorten(error)
            click.echo(f"  {piece.name}: left out: {skipped[piece.name]}")
        else:
            *parents, last = piece.into
            place = study.found
            for parent in parents:
                place = place.setdefault(parent, {})
            place[last] = place.get(last, {}) | dict(result) if piece.merge else result
            skipped.pop(piece.name, None)
            seconds[piece.name] = round(time.monotonic() - started, 3)
            click.echo(f"  {piece.name}: {seconds[piece.name]:.1f} s")
        save()
    return finished


def read_results(output: Path) -> dict[str, Any]:
    """The study so far, or an empty one."""
    if not output.is_file():
        return {"format": FORMAT, "version": VERSION, "models": {}}
    results = json.loads(output.read_text())
    if (results.get("format"), results.get("version")) != (FORMAT, VERSION):
        raise click.UsageError(f"{output} is no {FORMAT} file of version {VERSION}: name another -o")
    return results


def write_results(output: Path, results: dict[str, Any]) -> None:
    """The study so far, in one line: it is long."""
    write_atomically(output, (json.dumps(results, sort_keys=True, allow_nan=False) + "\n").encode())


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("results.json"), show_default=True)
@click.option("--tokens", type=click.Path(path_type=Path, exists=True), help="Held-out tokens, if not in the folder.")
@click.option("--profiles", type=click.Path(path_type=Path), help="Its profiles.  [default: profiles/, beside OUTPUT]")
@click.option("--jobs", default=4, show_default=True, help="Commands that make profiles and pruned models at a time.")
@click.option("--measure", default=42, show_default=True, help="Windows of each domain to measure on.")
@click.option("--judge", type=click.IntRange(2), default=40, show_default=True, help="And to judge on.")
@click.option("--judge-more", default=160, show_default=True, help="And for the floors; or all that there are.")
@click.option("--length", default=512, show_default=True, help="Tokens of a window.")
@click.option("--batch", default=32, show_default=True, help="Windows in one forward pass.")
@click.option("--judge-batch", type=click.IntRange(1), help="And in one that judges.  [default: as --batch]")
@click.option("--dtype", type=click.Choice(("float32", "bfloat16")), default="float32", show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default="cuda if there, or cpu")
@click.option("--minutes", default=1e6, show_default="no limit", help="Start no piece after so long.")
@click.option("--card", type=click.Path(), help="A file, the same for all that share a GPU: times are taken alone.")
@click.option("--command", help="What the results say made them.  [default: this call]")
def main(
    model: Path,
    output: Path,
    tokens: Path | None,
    profiles: Path | None,
    jobs: int,
    measure: int,
    judge: int,
    judge_more: int,
    length: int,
    batch: int,
    judge_batch: int | None,
    dtype: str,
    device: str,
    minutes: float,
    card: str | None,
    command: str | None,
) -> None:
    """Study MODEL and write what was found to OUTPUT."""
    until = time.monotonic() + 60 * minutes
    results, folder = read_results(output), model.resolve()
    file = tokens or folder / "held_out.npz"
    if not file.is_file():
        raise click.UsageError(f"{folder} holds no held_out.npz: name held-out tokens with --tokens")
    place = profiles or output.absolute().parent / "profiles" / folder.name
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    found = results["models"].setdefault(folder.name, {})
    found["made_by"] = describe_run(device, dtype=dtype, command=command)
    cards = [card] if card else []
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(jobs) as pool:
        files = pieces.start_commands(pool, folder, place, Path(scratch), until=until)
        try:
            streams = read_streams(file)
            measuring, judging, short = cut_what_fits(streams, measure=measure, judge=judge, length=length)
            kept = {domain: stream for domain, stream in streams.items() if domain not in short}
            more = cut_more(kept, judge=max(judge, judge_more), length=length)
            found.setdefault("skipped", {}).update({f"domain {domain}": why for domain, why in short.items()})
            with start_beside(cards):
                loaded = load(folder, device=device, dtype=getattr(torch, dtype))
            judges = [Judge(loaded, windows, batch=judge_batch or batch) for windows in (judging, more)]
            study = Study(folder, loaded, measuring, *judges, batch, place, found, files)
            finished = run(study, partial(write_results, output, results), until, cards)
        except (AllocationError, ValueError) as error:
            raise click.UsageError(f"{folder}: {error}") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    click.echo(f"{folder.name} is done" if finished else "time is up; the same command goes on from here")


if __name__ == "__main__":
    main()
