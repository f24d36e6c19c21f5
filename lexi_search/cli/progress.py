"""The observer of a profile's run that shows it on stderr."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from lexi_search.profiling.resume import Partials

if TYPE_CHECKING:
    from rich.progress import Progress


class Reporter:
    """The observer of a run that shows it on stderr; `kept` is what a run that is interrupted leaves behind."""

    def __init__(self, progress: "Progress", *, from_text: bool, step: str = "") -> None:
        self.progress = progress
        self.passes = progress.add_task(f"{step}decoder layers, in passes", total=None, visible=from_text)
        self.bar = progress.add_task(f"{step}layers", total=None, visible=False)
        self.kept: Partials | None = None
        self.layers: Sequence[int] = ()

    def open(self, partials: Partials, layers: Sequence[int]) -> None:
        self.kept, self.layers = partials, layers
        if partials.layers or partials.findings or partials.damaged:
            damaged = f"; files that are damaged there, and made again: {partials.damaged}" if partials.damaged else ""
            click.echo(f"{self.describe_kept('are finished')} in {partials.folder}{damaged}", err=True)
        self.progress.update(self.bar, total=len(layers), completed=self.count_finished(), visible=True)

    def choose_exponent(self, exponent: float) -> None:
        click.echo(f"gate exponent {exponent:g}", err=True)

    def advance_pass(self, layer: int) -> None:
        self.progress.advance(self.passes)

    def finish_layer(self, layer: int) -> None:
        self.progress.update(self.bar, completed=self.count_finished())

    def count_finished(self) -> int:
        return sum(layer in self.kept.layers for layer in self.layers) if self.kept else 0

    def describe_kept(self, verb: str) -> str:
        text = "the text and " if "text" in self.kept.findings else ""
        return f"{text}{self.count_finished()} of {len(self.layers)} layers {verb}"
