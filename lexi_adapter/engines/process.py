"""vLLM engines, each in a process of its own: start several at once, call functions in them, stop them.

A function that is called in an engine takes the `vllm.LLM` first; those for measuring are in `measuring`. vLLM is
imported in the engine's process only.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NoReturn

from lexi_adapter.environment import explain_import
from lexi_adapter.errors import AdapterError

# vLLM sends functions to its workers only with the first; the second turns its usage reports off.
ENVIRONMENT = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_NO_USAGE_STATS": "1"}
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class EngineError(AdapterError):
    """An engine that did not start or did not answer; its own log, on stderr, says more."""


class Engine:
    """A process with one `vllm.LLM`. Use it through `start_engines`, which stops it again."""

    def __init__(self, name: str, options: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        context = multiprocessing.get_context("spawn")  # a forked child could not use CUDA
        self.name = name
        self._connection, remote = context.Pipe()
        self._process = context.Process(target=_serve, args=(remote, dict(options), ENVIRONMENT | dict(environment)))
        self._process.start()
        remote.close()

    def wait(self) -> Any:
        """The result of the function that was called last; the first time, None once the engine is up.

        Raises:
            EngineError: the engine did not come up or the function failed, with the reason in one line.
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
        """Tell the process to end; `stop` waits for that."""
        self._connection.close()

    def terminate(self) -> None:
        """Have the process end even while it works."""
        self._process.terminate()

    def stop(self) -> None:
        """End the process and wait until its memory is free."""
        self.hang_up()
        for force in (self._process.terminate, self._process.kill):
            self._process.join(60)
            if self._process.is_alive():
                force()
        self._process.join()


@contextmanager
def start_engines(engines: Sequence[tuple[str, Mapping[str, Any], Mapping[str, str]]]) -> Iterator[list[Engine]]:
    """A context with engines (name, options of `vllm.LLM`, environment), started side by side and all up.

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
    for engine in engines:  # all of them before waiting for the first, so that they end side by side
        engine.hang_up()
        if at_once:
            engine.terminate()
    for engine in engines:
        engine.stop()


@contextmanager
def _end_on_sigterm() -> Iterator[None]:
    """A context in which SIGTERM is an exception, as Ctrl-C is; by default it would leave the engines behind."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
        yield
        return
    before = signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # None: not set from Python, so it cannot be restored


def _exit(number: int, _: Any) -> NoReturn:
    raise SystemExit(128 + number)


def _serve(connection: Any, options: dict[str, Any], environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    os.dup2(2, 1)  # what vLLM prints is a log; standard output is for results
    for number in STOP_SIGNALS:
        signal.signal(number, _exit_once)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        from vllm import LLM

        llm = LLM(**options)
    except Exception as error:
        with suppress(OSError):  # the parent is gone
            connection.send(("failed", _shorten(error)))
        return
    try:
        with suppress(EOFError, OSError):
            _answer(connection, llm)
    finally:
        try:
            _ignore_stop_signals()
        finally:  # a signal may still come in between
            llm.llm_engine.engine_core.shutdown()  # otherwise this process and its child would wait for each other


def _exit_once(number: int, frame: Any) -> NoReturn:
    _ignore_stop_signals()  # a second signal would interrupt the cleaning up
    _exit(number, frame)


def _ignore_stop_signals() -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: None)  # with SIG_IGN, Python complains of a pending signal


def _answer(connection: Any, llm: Any) -> NoReturn:
    """Run the functions that the parent sends; EOFError or OSError once it is gone."""
    connection.send(("done", None))
    while True:
        function, args = connection.recv()
        try:
            connection.send(("done", function(llm, *args)))
        except Exception as error:
            connection.send(("failed", _shorten(error)))


def _end_with_parent() -> None:
    """End this process as soon as its parent is gone, whatever it is doing."""
    multiprocessing.parent_process().join()
    signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)


def _shorten(error: Exception) -> str:
    if isinstance(error, ImportError) and (explained := explain_import(error)):
        return explained
    kind = "" if isinstance(error, AdapterError) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())[:400]
