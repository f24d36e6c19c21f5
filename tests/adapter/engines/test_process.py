"""Processes with engines in them end when nobody needs them any more; a package of this test stands in for vLLM."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

import lexi_adapter

# As vLLM does, the stand-in has a process of its own for the model, which only `shutdown` ends.
STAND_IN = """
import os
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace


class LLM:
    def __init__(self, state):
        self.model = subprocess.Popen(["sleep", "600"])
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=self.model.kill))
        if state == "starting":
            try:
                wait(self)
            finally:
                self.model.kill()


def wait(llm):
    Path("reached").touch()
    while True:  # a signal between two statements would not end a single long sleep
        time.sleep(0.05)


def die(llm):
    llm.model.kill()
    os.kill(os.getpid(), 9)


def fail(llm):
    raise ValueError("two\\nlines")
"""
# What the commands do, to engines and on Ctrl-C.
COMMAND = """
import signal
import sys
import vllm
from lexi_adapter.engines.process import start_engines

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs in the background
try:
    with start_engines([("base", {"state": sys.argv[1]}, {})]) as (engine,):
        if sys.argv[1] == "idle":
            vllm.wait(None)
        engine.call(vllm.wait)
except KeyboardInterrupt:
    sys.exit("Aborted!")
"""


@pytest.fixture
def start(folder):
    """Start the command in a group of its own, with pipes that stay open as long as any process of it lives."""
    (folder / "vllm.py").write_text(STAND_IN)
    path = os.pathsep.join([str(folder), str(Path(lexi_adapter.__file__).parent.parent)])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    started = []

    def start(code, state):
        command = [sys.executable, "-c", code, state]
        started.append(subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, **pipes))
        return started[0]

    yield start
    with suppress(ProcessLookupError):  # as it should be
        os.killpg(started[0].pid, signal.SIGKILL)


def wait_until_reached(process):
    while not Path("reached").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)


@pytest.mark.parametrize("state", ["starting", "idle", "busy"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_engine_outlives_the_process_that_started_it(start, state, number):
    process = start(COMMAND, state)
    wait_until_reached(process)
    process.send_signal(number)
    _, log = process.communicate(timeout=60)  # until every process has closed its end, so until all are gone
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
    assert log == ""


@pytest.mark.parametrize("state", ["starting", "idle", "busy"])
def test_ctrl_c_ends_all_in_one_word(start, state):
    process = start(COMMAND, state)
    wait_until_reached(process)
    os.killpg(process.pid, signal.SIGINT)
    _, log = process.communicate(timeout=60)
    assert log == "Aborted!\n" and process.returncode == 1


DIE_TWICE = """try:
            engine.call(vllm.die)
        except Exception:
            engine.call(vllm.die)"""


@pytest.mark.parametrize(
    "calls, line",
    [
        ("engine.call(vllm.fail)", "ValueError: two lines"),
        ("engine.call(vllm.die)", "its process ended"),
        (DIE_TWICE, "its process ended"),
    ],
)
def test_what_fails_in_an_engine_is_one_line(start, calls, line):
    _, log = start(COMMAND.replace("engine.call(vllm.wait)", calls), "busy").communicate(timeout=60)
    assert log.endswith(f"lexi_adapter.engines.process.EngineError: engine of 'base': {line}\n")
