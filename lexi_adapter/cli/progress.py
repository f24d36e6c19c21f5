"""Progress of long commands on stderr: how many parts of how many are done, the time elapsed, and the time left."""

import sys
import time
from collections.abc import Callable

from lexi_adapter.cli.console import echo, rewrite

SECONDS = 10.0  # between lines in a pipe


class Progress:
    """Called with the number of parts done, their total, and words for the last: first with those done before.

    In a pipe the first call writes a line and the last one, and between them one at most every ten seconds, less often
    the longer it runs. A terminal has one line, which is written anew. Calls before a part is done write a line, too,
    and the time left is taken from the last of them: an engine's start says nothing about it.
    """

    def __init__(self, what: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.what, self.clock = what, clock
        self.first: int | None = None
        self.started = self.begun = self.told = 0.0
        self.rewrites = sys.stderr is not None and sys.stderr.isatty()

    def __call__(self, done: int, total: int, part: str = "") -> None:
        now = self.clock()
        if self.first is None:
            self.first, self.started = done, now
        if done == self.first:
            self.begun = now
        elif not self.rewrites and done < total and now - self.told < max(SECONDS, (now - self.begun) / 10):
            return
        self.told, elapsed = now, now - self.started
        left = (now - self.begun) / (done - self.first) * (total - done) if done > self.first else None
        times = f", elapsed {format_time(elapsed)}" + (f", left {format_time(left)}" if left is not None else "")
        line = f"{self.what}: {done} of {total}{times}" + (f" ({part})" if part else "")
        if self.rewrites:
            rewrite(line, last=done >= total)
        else:
            echo(line, err=True)


def format_time(seconds: float) -> str:
    """Seconds as hours, minutes and seconds: 0:02:05."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
