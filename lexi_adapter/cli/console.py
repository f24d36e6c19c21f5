"""Refusals in one line and tables on the terminal, for every command of `lexi-adapter`."""

import _thread
import io
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from lexi_adapter.environment import explain_import
from lexi_adapter.errors import AdapterError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text


class Refusal(click.ClickException):
    """Bad input: one line on stderr and, as for a wrong option, exit code 2."""

    exit_code = 2


class Interruption(click.ClickException):
    """Ctrl-C: one line on stderr and the shells' exit code."""

    exit_code = 130


class Commands(click.Group):
    """The group of all commands: bad input, a missing package, failed I/O and Ctrl-C end in one line on stderr."""

    def main(self, *args: Any, standalone_mode: bool = True, **options: Any) -> Any:
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **options)
        with _heed_interrupts() as interrupts:
            end = self._run(interrupts, *args, **options)
            if interrupts:
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # one is enough: nothing follows but its line
                end = end if isinstance(end, Interruption) else Interruption("interrupted")
            if isinstance(end, click.ClickException):
                _show(end)
        sys.exit(end.exit_code if isinstance(end, click.ClickException) else end)

    def _run(self, interrupts: Sequence[int], *args: Any, **options: Any) -> click.ClickException | int:
        """The exit code of a command, or what it ends with; what is raised besides is a defect of ours."""
        try:
            return super().main(*args, standalone_mode=False, **options) or 0
        except click.ClickException as error:
            return error
        except AdapterError as error:
            return Refusal(str(error))
        except ImportError as error:
            if (explained := explain_import(error)) is None:
                raise
            return Refusal(explained)
        except UnicodeEncodeError as error:
            return Refusal(f"cannot go on: {error.object[:200]!r} is no text in {error.encoding}; name it otherwise")
        except OSError as error:  # click itself handles a pipe that nobody reads any more
            where = f" ({error.filename})" if error.filename else "; make room where the output goes"
            return Refusal(f"cannot go on: {error.strerror or error}{where}")
        except (click.Abort, KeyboardInterrupt):
            return Interruption("interrupted")
        except (Exception, SystemExit):
            if not interrupts:
                raise
            return Interruption("interrupted")  # a library made another exception of it

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # click would print an empty line
            raise Interruption("interrupted") from None


def _show(error: click.ClickException) -> None:
    """Print what ended a command: a line, or for a wrong call how it is called, too."""
    if not isinstance(error, click.UsageError):
        echo(f"Error: {error.message}", err=True)
        return
    if not isinstance(error, click.exceptions.NoArgsIsHelpError):  # its message is the help, in lines
        error.message = spell(error.message)
    error.show(text := io.StringIO())
    with suppress(OSError):
        _write(text.getvalue(), err=True)


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


def spell(text: str) -> str:
    """The text with all that is not printable escaped: terminals obey control characters, and SVG cannot hold them."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def conclude(decided: str, *commands: str | Sequence[str]) -> None:
    """Say on stderr what was decided, and what to type next: a command's words, or a line."""
    echo(f"done: {decided}", err=True)
    for command in commands:
        echo(f"next: {command if isinstance(command, str) else shlex.join(command)}", err=True)


def echo(*lines: object, err: bool = False) -> None:
    """Print lines, spelt; all that is printed passes here, or as cells of a table through `print_table`.

    A note on stderr that finds no room is dropped: the result is as good without it.
    """
    with suppress(*[OSError] if err else []):
        _write("".join(f"{spell(str(line))}\n" for line in lines), err=err)


def rewrite(line: str, *, last: bool) -> None:
    """Write a line of a terminal's stderr anew, spelt; the `last` one is ended."""
    with suppress(OSError):
        _write(f"\r\x1b[K{spell(line)}" + "\n" * last, err=True)


def _write(text: str, *, err: bool = False) -> None:
    """Print text; characters that the stream's encoding lacks are escaped in ASCII."""
    encoding = getattr(sys.stderr if err else sys.stdout, "encoding", None) or "utf-8"
    if not _can_encode("±", encoding):
        text = text.replace("±", "+-")
    click.echo(text.encode(encoding, "backslashreplace").decode(encoding), err=err, nl=False)


def _can_encode(text: str, encoding: str) -> bool:
    try:
        return bool(text.encode(encoding))
    except UnicodeEncodeError:
        return False


def print_table(table: "RenderableType") -> None:
    """Print a table without cutting any cell; cells and titles that are strings are spelt.

    In a pipe nothing is folded, since the reader is a program; a terminal that is too narrow wraps the lines itself.
    """
    from rich.console import Console

    class Speller(Console):
        def render_str(self, text: str, **options: Any) -> "Text":
            return super().render_str(spell(text), **options)

    def make_console(width: int) -> Console:
        return Speller(width=width, markup=False, emoji=False)

    console = make_console(10_000)
    if sys.stdout is not None and sys.stdout.isatty():
        console = make_console(max(Console().width, console.measure(table).minimum))
    with console.capture() as capture:
        console.print(table)
    _write(capture.get())
