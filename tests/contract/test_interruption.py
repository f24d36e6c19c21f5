"""Ctrl-C in both commands: exit code 130 and one line, during imports, in a callback, at the end."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import write
from synthetic import make_profile

import lexi_search

ROOT = Path(lexi_search.__file__).parent.parent
HEED = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell may have it ignored
ENTRY = "from {package}.cli.entry import run; run()"
SEND = "import signal; signal.raise_signal(signal.SIGINT)"
IMPORTING = """
import sys
class Finder:
    def find_spec(self, name, *others):
        if name == "{module}":
            {send}
sys.meta_path.insert(0, Finder())
"""
COLLECTING = """
import gc
def interrupt(phase, info):
    import sys
    if phase == "start" and "jax" in sys.modules:
        gc.callbacks.remove(interrupt)
        {send}
gc.callbacks.append(interrupt)
"""
LEAVING = """
import click
def echo(*things, echo=click.echo, **options):
    echo(*things, **options)
    {send}
click.echo = echo
"""


def run(code, *arguments, package="lexi_search", **names):
    code = HEED + code.format(send=SEND, **names) + ENTRY.format(package=package)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(
    "package, module, arguments",
    [
        ("lexi_search", "click", ["--help"]),
        ("lexi_search", "jax", ["search", "profile.json", "--budget", "7"]),
        ("lexi_adapter", "click", ["--help"]),
        ("lexi_adapter", "rich", ["tradeoff", "eval.json", "bench.json"]),
    ],
)
def test_an_interruption_during_imports_is_one_line(folder, package, module, arguments):
    write(Path("profile.json"), make_profile())
    if package == "lexi_adapter" and module != "click":
        pytest.importorskip(module)
        module = "lexi_adapter.evaluation.tradeoff"  # at the top of the command, which is imported first
    done = run(IMPORTING, *arguments, package=package, module=module)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Error: interrupted\n")


def test_an_interruption_in_a_callback_is_not_dropped(folder):
    write(Path("profile.json"), make_profile())
    done = run(COLLECTING, "search", "profile.json", "--budget", "7")
    assert (done.returncode, done.stderr) == (130, "Error: interrupted\n")  # perhaps after the output is written
    assert os.listdir() == ["profile.json"]


def test_an_interruption_at_the_end_is_no_success(folder):
    write(Path("profile.json"), make_profile())
    done = run(LEAVING, "search", "profile.json", "--budget", "7")
    assert (done.returncode, done.stderr) == (130, "Error: interrupted\n")


@pytest.mark.parametrize("package", ["lexi_search", "lexi_adapter"])
def test_the_installed_program_is_the_one_that_heeds_interruptions(package):
    wanted = f'{package.replace("_", "-")} = "{package}.cli.entry:run"'
    assert wanted in (ROOT / "pyproject.toml").read_text()


def test_signals_are_as_before_after_a_command():
    from command_line import succeed

    before = signal.getsignal(signal.SIGINT), sys.unraisablehook
    succeed("--version")
    assert (signal.getsignal(signal.SIGINT), sys.unraisablehook) == before
