"""Refusals in one line and tables on the terminal, for every command of `lexi-adapter`."""

import errno
import sys
from typing import TYPE_CHECKING, Any

import click

from lexi_adapter.environment import explain_import
from lexi_adapter.errors import AdapterError

if TYPE_CHECKING:
    from rich.console import RenderableType


class Refusal(click.ClickException):
    """Bad input: one line on stderr and, as for a wrong option, exit code 2."""

    exit_code = 2


class Commands(click.Group):
    """A group of commands in which an `AdapterError`, a missing package and a full disk are refusals."""

    def invoke(self, ctx: click.Context) -> Any:
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
