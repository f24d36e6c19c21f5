"""The observer of a profile's run that shows it on stderr."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lexi_search.cli.console import PlainProgress, echo, format_size
from lexi_search.profiling.resume import Partials

if TYPE_CHECKING:
    from rich.progress import Progress

    from lexi_search.profiling.session import Plan


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

    def choose_exponent(self, exponent: float) -> None:
        echo(f"gate exponent {exponent:g}", err=True)

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
