"""Progress of long commands on stderr, and the observer of a profile's run that shows it."""

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lexi_search.cli.console import echo, format_size
from lexi_search.profiling.resume import Partials

if TYPE_CHECKING:
    from rich.progress import Progress

    from lexi_search.profiling.session import Plan


class PlainProgress:
    """Progress as lines on stderr, for logs: the methods of rich's `Progress` that the commands use.

    A task says its total first. Then it has a line at most every ten seconds, less often the longer it runs, and a last
    one.
    """

    def __init__(self) -> None:
        self.tasks: list[dict[str, Any]] = []

    def __enter__(self) -> "PlainProgress":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def add_task(self, description: str, *, total: int | None = None, visible: bool = True) -> int:
        self.tasks.append({"description": description, "total": None, "completed": 0, "begun": None})
        self.update(len(self.tasks) - 1, total=total if visible else None)
        return len(self.tasks) - 1

    def advance(self, task: int) -> None:
        self.update(task, completed=self.tasks[task]["completed"] + 1)

    def update(
        self, task: int, *, total: int | None = None, completed: int | None = None, visible: bool = True
    ) -> None:
        state, now = self.tasks[task], time.monotonic()
        before = state["completed"]
        state["completed"] = before if completed is None else completed
        if total is not None and visible:
            state |= {"total": total, "begun": now, "first": state["completed"], "told": now}
        elif state["total"] is None or state["completed"] == before:
            return
        elif state["completed"] < state["total"] and now - state["told"] < max(10, (now - state["begun"]) / 10):
            return
        state["told"] = now
        echo(self._describe(state, now - state["begun"]), err=True)

    def _describe(self, state: dict[str, Any], elapsed: float) -> str:
        done, total, first = state["completed"], state["total"], state["first"]
        left = f", left {_clock(elapsed / (done - first) * (total - done))}" if done > first else ""
        return f"{state['description']}: {done} of {total}, elapsed {_clock(elapsed)}{left}"


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def make_progress(*, quiet: bool = False) -> "Progress | PlainProgress":
    """Progress with the times elapsed and left on stderr: a bar on a terminal, else lines; nothing if `quiet`."""
    if not quiet and not sys.stderr.isatty():
        return PlainProgress()
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("elapsed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet)


class Reporter:
    """The observer of a run that shows it on stderr; `kept` is what a run that is interrupted leaves behind."""

    def __init__(self, progress: "Progress | PlainProgress", *, from_text: bool, step: str = "") -> None:
        self.progress = progress
        passes, layers = f"{step}percent of the work", f"{step}layers"
        self.passes = progress.add_task(passes, total=None, visible=False) if from_text else None
        # On a text all layers are done together, at the end of the passes.
        self.bar = None if from_text else progress.add_task(layers, total=None, visible=False)
        self.kept: Partials | None = None
        self.layers: Sequence[int] = ()
        self.work: Sequence[int] = ()
        self.reported = 0  # decoder layers, over all passes

    def open(self, partials: Partials, layers: Sequence[int]) -> None:
        self.kept, self.layers = partials, layers
        if partials.layers or partials.findings or partials.damaged:
            damaged = f"; files that are damaged there, and made again: {partials.damaged}" if partials.damaged else ""
            echo(f"{self.describe_kept('are finished')} in {partials.folder}{damaged}", err=True)

    def plan(self, plan: "Plan") -> None:
        count = len(plan.work) // plan.decoder_layers
        passes = f" in {count} passes over {plan.decoder_layers} decoder layers" if count else ""
        self.work = plan.work
        memory, layers = format_size(plan.memory_bytes), format_size(plan.weights_bytes)
        echo(
            f"plan: read {format_size(plan.read_bytes)} of weights{passes}; memory for {memory}, of which {layers} are "
            "two layers as stored",
            err=True,
        )
        if self.passes is not None:
            self.progress.update(self.passes, total=100, visible=True)
        if self.bar is not None:
            self.progress.update(self.bar, total=len(self.layers), completed=self.count_finished(), visible=True)

    def advance_pass(self, layer: int) -> None:
        if self.passes is not None:
            self.reported += 1
            done, total = sum(self.work[: self.reported]), sum(self.work)
            self.progress.update(self.passes, completed=100 * done // max(total, 1))

    def finish_layer(self, layer: int) -> None:
        if self.bar is not None:
            self.progress.update(self.bar, completed=self.count_finished())

    def count_finished(self) -> int:
        return sum(layer in self.kept.layers for layer in self.layers) if self.kept else 0

    def describe_kept(self, verb: str) -> str:
        text = "the text and " if "text" in self.kept.findings else ""
        return f"{text}{self.count_finished()} of {len(self.layers)} layers {verb}"

    def describe_end(self) -> str:
        """What a run that is interrupted leaves, and how it goes on."""
        return f"{self.describe_kept('are kept')} in {self.kept.folder}, and the same command goes on from there"
