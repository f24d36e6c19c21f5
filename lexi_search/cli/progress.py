"""Progress of long commands on stderr, and the observer of a profile's run that shows it."""

import resource
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lexi_search.cli.console import echo, format_size
from lexi_search.profiling.resume import Partials

if TYPE_CHECKING:
    from rich.progress import Progress

    from lexi_search.profiling.observer import Plan


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


def describe_process() -> list[str]:
    """Lines on what this process has read from files, as far as Linux tells, and the most memory that it has had."""
    from jax import local_devices

    try:
        counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        lines = [f"read: {format_size(int(counts['rchar']))}, from disk {format_size(int(counts['read_bytes']))}"]
    except OSError:
        lines = []
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    lines.append(f"host memory: at most {format_size(host)}")
    for device in local_devices():
        if memory := device.memory_stats():
            lines.append(f"{device.device_kind} {device.id}: at most {format_size(memory['peak_bytes_in_use'])}")
    return lines


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


def _describe_staying(plan: "Plan") -> str:
    """Where weights stay between passes, if there are several."""
    if plan.staying is None or sum(passes for _, passes in plan.phases) < 2:
        return ""
    if plan.copies > 1:
        return f"; weights stay on the devices, in {plan.copies} copies of {format_size(plan.staying.device)}"
    places = zip(plan.staying, ("on the device", "in host memory", "in the files, read in every pass"), strict=True)
    return "; weights stay " + ", ".join(f"{where} ({format_size(size)})" for size, where in places if size)


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
        self.planned: Plan | None = None
        self.times = [time.monotonic()]  # of the start, and of the end of each pass

    def open(self, partials: Partials, layers: Sequence[int]) -> None:
        self.kept, self.layers = partials, layers
        if partials.layers or partials.findings or partials.damaged:
            damaged = f"; files that are damaged there, and made again: {partials.damaged}" if partials.damaged else ""
            echo(f"{self.describe_kept('are finished')} in {partials.folder}{damaged}", err=True)

    def plan(self, plan: "Plan") -> None:
        count = len(plan.work) // plan.decoder_layers
        passes = (
            f" in {count} {'passes' if count > 1 else 'pass'} over {plan.decoder_layers} decoder layers"
            if count
            else ""
        )
        self.work, self.planned = plan.work, plan
        self.times.append(time.monotonic())
        memory, layers = format_size(plan.memory_bytes), format_size(plan.weights_bytes)
        echo(
            f"plan: read {format_size(plan.read_bytes)} of weights{passes}; memory for {memory}, of which {layers} are "
            f"two layers as stored{_describe_staying(plan)}",
            err=True,
        )
        if self.passes is not None:
            self.progress.update(self.passes, total=100, visible=True)
        if self.bar is not None:
            self.progress.update(self.bar, total=len(self.layers), completed=self.count_finished(), visible=True)

    def advance_pass(self, layer: int) -> None:
        if self.passes is not None:
            self.reported += 1
            if self.planned is not None and self.reported % self.planned.decoder_layers == 0:
                self.times.append(time.monotonic())
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

    def list_phases(self) -> list[str]:
        """A line for each phase that is over: its passes, and the seconds of each."""
        seconds = [after - before for before, after in pairwise((*self.times, time.monotonic()))]
        lines, at = [f"opening: {seconds[0]:.2f} s"], 1
        dropped = self.kept is not None and self.kept.header.settings.compensation_rank is None
        for name, passes in self.planned.phases if self.planned else ():
            if name == "corrections" and dropped:
                continue
            own, at = seconds[at : at + passes], at + passes
            each = f" ({', '.join(f'{one:.2f}' for one in own)})" if passes > 1 else ""
            lines.append(f"{name}: {passes} {'passes' if passes > 1 else 'pass'}, {sum(own):.2f} s{each}")
        return [*lines, f"the rest: {sum(seconds[at:]):.2f} s"]

    def describe_end(self) -> str:
        """What a run that is interrupted leaves, and how it goes on."""
        return f"{self.describe_kept('are kept')} in {self.kept.folder}, and the same command goes on from there"
