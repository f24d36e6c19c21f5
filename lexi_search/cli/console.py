"""Shared by the commands: refusal of bad input, printing, progress, and the environment."""

import _thread
import io
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from lexi_search.artifacts.files import json_bytes
from lexi_search.artifacts.profile import LOSS_KINDS
from lexi_search.errors import InputError

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
    """The group of all commands: bad input, failed I/O and Ctrl-C end in one line on stderr."""

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
        except InputError as error:
            return Refusal(str(error))
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


loss_option = click.option(
    "--loss",
    type=click.Choice(LOSS_KINDS),
    show_default=False,
    help="One of the profile's losses.  [default: divergence if the profile has it, else frobenius, the paper's]",
)
normalised_option = click.option(
    "--normalised/--absolute", default=True, help="Relative to the largest loss of the table, or as measured."
)
# JAX's own defaults for what changes its numbers.
_NUMBERS = {
    "JAX_ENABLE_X64": "0",
    "JAX_DEFAULT_PRNG_IMPL": "threefry2x32",
    "JAX_THREEFRY_PARTITIONABLE": "1",
    "JAX_RANDOM_SEED_OFFSET": "0",
}
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


def conclude(decided: str, *commands: str | Sequence[str | os.PathLike[str]]) -> None:
    """Say on stderr what was decided, and what to type next: a command's words, or a line."""
    echo(f"done: {decided}", err=True)
    for command in commands:
        line = command if isinstance(command, str) else shlex.join(map(os.fspath, command))
        echo(f"next: {line}", err=True)


def format_share(share: float) -> str:
    """A share as all output has it, in percent with at most three digits: 62.5 %, 0.7 %."""
    return f"{100 * share:.2g} %" if abs(share) < 0.0995 else f"{100 * share:.3g} %"


def format_size(size: float) -> str:
    """Bytes in the largest decimal unit of which there is one."""
    power = next((power for power in (4, 3, 2, 1) if size >= 1000**power), 0)
    return f"{size / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def spell(text: str) -> str:
    """The text with all that is not printable escaped: terminals obey control characters, and SVG cannot hold them."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def echo(*lines: object, err: bool = False) -> None:
    """Print lines, spelt; all that is printed passes here, or as cells of a table through `print_table`.

    A note on stderr that finds no room is dropped: the result is as good without it.
    """
    with suppress(*[OSError] if err else []):
        _write("".join(f"{spell(str(line))}\n" for line in lines), err=err)


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


def print_json(document: Any) -> None:
    echo(*json_bytes(document).decode().splitlines())


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


# Trying out kernels for each product of a new shape takes longer than the best of them saves; untried, only those of
# the vendor's library are fast.
_COMPILING = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"


def prepare_environment() -> None:
    """Set what JAX and NumPy read from the environment; call before importing them.

    Numbers do not depend on the user's environment. Compiled code goes to the user's cache folder, or where the user
    says.
    """
    os.environ.update(_NUMBERS)
    os.environ.pop("JAX_DEFAULT_MATMUL_PRECISION", None)
    flags = os.environ.get("XLA_FLAGS", "").removeprefix(_COMPILING).strip()
    os.environ["XLA_FLAGS"] = f"{_COMPILING} {flags}".strip()  # the user's come last, and the last of a flag counts
    sys.setswitchinterval(1e-3)  # threads that read files would wait long for one that traces programs
    # Taking most of a GPU's memory at the start costs seconds; JAX takes it as it needs it, up to the same limit.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # Corrections are solved in threads of this program: BLAS's own would get in their way.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    caches = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or os.path.expanduser("~/.cache")
    if not os.path.isabs(caches):  # nobody knows a home
        return
    folder = Path(caches) / "lexi-search" / "jax"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # without a cache, only time is lost
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def explain_lost_process() -> None:
    """Have one line printed where JAX aborts this process because another one died; call before importing JAX.

    JAX aborts in C++, with a stack trace, out of Python's reach. So a child process copies everything that is written
    to stderr up to there. Python's own stderr stays what it was, such as a terminal.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # hides JAX's own log of the same event
    reading, writing = os.pipe()
    if os.fork() == 0:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.close(writing)
        with open(reading, "rb") as lines:
            for line in lines:
                if b"JAX distributed service detected fatal errors" in line:
                    os.write(2, b"Error: another process was lost; what is finished is kept, start all again\n")
                    break
                os.write(2, line)
            lines.read()
        os._exit(0)
    os.close(reading)
    sys.stderr = open(os.dup(2), "w", buffering=1)
    os.dup2(writing, 2)
    os.close(writing)
