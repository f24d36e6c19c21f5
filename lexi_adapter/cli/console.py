"""What every command of `lexi-adapter` shares with the terminal: refusals in one line, tables."""

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
    """A group of commands whose `AdapterError` is a refusal, as are a package that lacks and a disk that is full."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AdapterError as error:
            raise Refusal(str(error)) from error
        except ImportError as error:
            if (explained := explain_import(error)) is None:
                raise
            raise Refusal(explained) from error
        except OSError as error:  # whoever stops reading a pipe is click's business
            if error.errno == errno.EPIPE:
                raise
            where = f" ({error.filename})" if error.filename else "; make room where the output goes"
            raise Refusal(f"cannot go on: {error.strerror or error}{where}") from error


def print_table(table: "RenderableType") -> None:
    """In a pipe nothing is folded: the reader is a program. On a terminal that is too narrow, it breaks lines itself
    rather than having numbers cut. Names are shown as they are, and in ASCII what stdout's encoding lacks."""
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
    if not _can_show("±", encoding):
        text = text.replace("±", "+-")
    click.echo(text.encode(encoding, "backslashreplace").decode(encoding), nl=False)


def _can_show(text: str, encoding: str) -> bool:
    try:
        return bool(text.encode(encoding))
    except UnicodeEncodeError:
        return False
