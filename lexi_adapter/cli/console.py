"""Refusals in one line and tables on the terminal, for every command of `lexi-adapter`."""

import _thread
import errno
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from lexi_adapter.environment import explain_import
from lexi_adapter.errors import AdapterError

if TYPE_CHECKING:
    from rich.console import RenderableType


class Refusal(click.ClickException):
    """Bad input: one line on stderr and, as for a wrong option, exit code 2."""

    exit_code = 2


class Interruption(click.ClickException):
    """Ctrl-C: one line on stderr and the shells' exit code."""

    exit_code = 130


class Commands(click.Group):
    """A group of commands in which an `AdapterError`, a missing package and a full disk are refusals."""

    _interrupts: Sequence[int] = ()

    def main(self, *args: Any, **options: Any) -> Any:
        with _heed_interrupts() as self._interrupts:
            try:
                return super().main(*args, **options)
            except SystemExit as end:
                if not self._interrupts or end.code not in (0, None, 1):
                    raise
                if end.code != 1:  # click's own line for 1 is out
                    click.echo("Error: interrupted", err=True)
                sys.exit(Interruption.exit_code)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return self._invoke(ctx)
        except KeyboardInterrupt:
            raise Interruption("interrupted") from None
        except Exception as error:
            if not self._interrupts or isinstance(error, click.exceptions.Exit | Interruption):
                raise
            raise Interruption("interrupted") from error  # a library made another exception of it

    def _invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AdapterError as error:
            raise Refusal(str(error)) from error
        except ImportError as error:
            if (explained := explain_import(error)) is None:
                raise
            raise Refusal(explained) from error
        except OSError as error:  # click handles a pipe that is closed by its reader
            if error.errno == errno.EPIPE:
                raise
            where = f" ({error.filename})" if error.filename else "; make room where the output goes"
            raise Refusal(f"cannot go on: {error.strerror or error}{where}") from error


@contextmanager
def _heed_interrupts() -> Iterator[list[int]]:
    """A context in which no Ctrl-C is lost; the list tells of those that came.

    Python drops an exception that is raised inside a callback, such as JAX's at garbage collection, and native code
    that is being imported may abort at one: there KeyboardInterrupt comes a little later.
    """
    seen: list[int] = []
    if (
        threading.current_thread() is not threading.main_thread()  # only the main thread can handle signals
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield seen
        return

    def repeat() -> None:
        timer = threading.Timer(0.05, _thread.interrupt_main)
        timer.daemon = True
        timer.start()

    def interrupt(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        if not _is_importing(frame):
            raise KeyboardInterrupt
        repeat()

    def look(dropped: Any, report: Any = sys.unraisablehook) -> None:
        if isinstance(dropped.exc_value, KeyboardInterrupt):
            repeat()
        else:
            report(dropped)

    hook, sys.unraisablehook = sys.unraisablehook, look
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.unraisablehook = hook


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    return frame is not None


def conclude(decided: str, *commands: str | Sequence[str]) -> None:
    """Say on stderr what was decided, and what to type next: a command's words, or a line."""
    click.echo(f"done: {decided}", err=True)
    for command in commands:
        click.echo(f"next: {command if isinstance(command, str) else shlex.join(command)}", err=True)


def print_table(table: "RenderableType") -> None:
    """Print a table, without folding or cutting cells.

    In a pipe lines are as long as they need to be, because the reader is a program; a terminal that is too narrow
    breaks them itself. Names are shown as they are, and escaped in ASCII where stdout's encoding lacks a letter.
    """
    from rich.console import Console

    def make_console(width: int) -> Console:
        return Console(width=width, markup=False, emoji=False)

    console = make_console(10_000)
    if sys.stdout is not None and sys.stdout.isatty():
        console = make_console(max(Console().width, console.measure(table).minimum))
    with console.capture() as capture:
        console.print(table)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    text = capture.get()
    if not _can_encode("±", encoding):
        text = text.replace("±", "+-")
    click.echo(text.encode(encoding, "backslashreplace").decode(encoding), nl=False)


def _can_encode(text: str, encoding: str) -> bool:
    try:
        return bool(text.encode(encoding))
    except UnicodeEncodeError:
        return False
