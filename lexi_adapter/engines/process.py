"""vLLM engines, each in a process of its own: start several at once, call functions in them, stop them.

A function that is called in an engine takes the `vllm.LLM` first; those for measuring are here. All are safe to name
from anywhere: vLLM is imported in the engine's process only.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NoReturn

from lexi_adapter.environment import explain_import
from lexi_adapter.errors import AllocationError

# Functions travel to the workers by name; without this vLLM sends none. And no report of use leaves a benchmark.
ENVIRONMENT = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_NO_USAGE_STATS": "1"}
ENDING = (signal.SIGINT, signal.SIGTERM)


class EngineError(AllocationError):
    """An engine that did not start or did not answer; its own log, on stderr, says more."""


class Engine:
    """A process with one `vllm.LLM`. Use it through `start_engines`, which stops it again."""

    def __init__(self, name: str, options: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        context = multiprocessing.get_context("spawn")  # a forked child could not use CUDA
        self.name = name
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, dict(options), ENVIRONMENT | dict(environment)))
        self._process.start()
        theirs.close()

    def wait(self) -> Any:
        """What the function called last returned; the first time, whether the engine came up.

        Raises:
            EngineError: with the reason in one line.
        """
        try:
            outcome, value = self._connection.recv()
        except (EOFError, OSError):
            outcome, value = "failed", "its process ended"
        if outcome == "failed":
            raise EngineError(f"engine of {self.name!r}: {value}")
        return value

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(llm, *args)` in the engine's process."""
        with suppress(OSError):  # its process ended, as `wait` says
            self._connection.send((function, args))
        return self.wait()

    def hang_up(self) -> None:
        """Let it end; `stop` waits for that."""
        self._connection.close()

    def interrupt(self) -> None:
        """Have it end although it may be at work."""
        self._process.terminate()

    def stop(self) -> None:
        """Let it end and wait until its memory is free."""
        self.hang_up()
        for force in (self._process.terminate, self._process.kill):
            self._process.join(60)
            if self._process.is_alive():
                force()
        self._process.join()


@contextmanager
def start_engines(engines: Sequence[tuple[str, Mapping[str, Any], Mapping[str, str]]]) -> Iterator[list[Engine]]:
    """Start engines (name, options of `vllm.LLM`, environment) side by side; all are up inside the block.

    However the block is left, SIGTERM included, the engines are gone after it.
    """
    with ExitStack() as stack:
        stack.enter_context(_end_on_sigterm())
        started: list[Engine] = []
        stack.push(lambda *raised: _stop(started, at_once=raised[0] is not None))
        for engine in engines:
            started.append(Engine(*engine))
        for engine in started:
            engine.wait()
        yield started


def _stop(engines: Sequence[Engine], *, at_once: bool) -> None:
    for engine in engines:  # all before the first is waited for, so that they end side by side
        engine.hang_up()
        if at_once:
            engine.interrupt()
    for engine in engines:
        engine.stop()


@contextmanager
def _end_on_sigterm() -> Iterator[None]:
    """Inside, SIGTERM is an exception, as Ctrl-C is; by default it would leave the engines behind."""
    if threading.current_thread() is not threading.main_thread():  # which alone can handle signals
        yield
        return
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # None: set by other than Python, and out of reach


def _leave(number: int, _: Any) -> NoReturn:
    raise SystemExit(128 + number)


def _serve(connection: Any, options: dict[str, Any], environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    os.dup2(2, 1)  # what vLLM prints is a log; standard output is for results
    for number in ENDING:
        signal.signal(number, _leave_once)
    threading.Thread(target=_outlive_nobody, daemon=True).start()
    try:
        from vllm import LLM

        llm = LLM(**options)
    except Exception as error:
        with suppress(OSError):  # nobody is there to read it
            connection.send(("failed", _shorten(error)))
        return
    try:
        with suppress(EOFError, OSError):
            _answer(connection, llm)
    finally:
        try:
            _ignore_ending()
        finally:  # a signal may still come in between
            llm.llm_engine.engine_core.shutdown()  # else this process would wait for its child, and that for this one


def _leave_once(number: int, frame: Any) -> NoReturn:
    _ignore_ending()  # a second signal would stop what the first began to clean up
    _leave(number, frame)


def _ignore_ending() -> None:
    for number in ENDING:
        signal.signal(number, lambda *_: None)  # Python complains of one on its way where SIG_IGN is set


def _answer(connection: Any, llm: Any) -> NoReturn:
    """Run what is asked for; EOFError or OSError once nobody is there to ask."""
    connection.send(("done", None))
    while True:
        function, args = connection.recv()
        try:
            connection.send(("done", function(llm, *args)))
        except Exception as error:
            connection.send(("failed", _shorten(error)))


def _outlive_nobody() -> None:
    """End this process as soon as the one that started it is gone, whatever it is doing."""
    multiprocessing.parent_process().join()
    signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)


def _shorten(error: Exception) -> str:
    if isinstance(error, ImportError) and (explained := explain_import(error)):
        return explained
    kind = "" if isinstance(error, AllocationError) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())[:400]
