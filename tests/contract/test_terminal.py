"""Whatever is in files and their names, and wherever output goes: the right output or one line, no control character.

A terminal obeys control characters, rich its markup, matplotlib formulas; and what is no text cannot be encoded.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from command_line import write
from results import make_quality, make_speed
from synthetic import make_allocation, make_cost_table, make_profile

import lexi_search
from lexi_adapter.cli.console import spell as adapter_spell
from lexi_search.cli.console import spell

ROOT = Path(lexi_search.__file__).parent.parent
EXAMPLE = ROOT / "examples" / "tiny-olmoe"
ODD = "$\\frac$[red]\x1b[31m\r\u202e caf\u00e9\n\udce9"  # the last is a byte that is not UTF-8
ENTRY = "from {package}.cli.entry import run; run()"
FORKING = """
import os, sys
import click, jax, matplotlib.figure, numpy, rich.table
from lexi_adapter.cli import entry, main
import lexi_search.cli.entry, lexi_search.cli.main
for number, (package, arguments) in enumerate({calls!r}):
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        sys.argv[:] = ["lexi", *map(os.fsdecode, arguments)]
        try:
            sys.modules[package + ".cli.entry"].run()
        except SystemExit as end:
            os._exit(end.code or 0)
    os.close(writing)
    with open(reading, "rb") as printed, open("done" + str(number), "wb") as file:
        data = printed.read()
        file.write(b"%03d" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) + data)
"""
LOGGING = """
import os
def log(file, fsync=os.fsync):
    os.write(2, b"log")
    fsync(file)
os.fsync = log
"""
NOBODY = "import pwd\ndef nobody(uid):\n    raise KeyError(uid)\npwd.getpwuid = nobody\n"
ENCODINGS = {
    "utf-8": {"PYTHONIOENCODING": "utf-8"},
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "C": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
}
SEARCH = [
    "show {p}",
    "show {p} --json",
    "show {a}",
    "search {p} --budgets 8:9:1 -o {o}s",
    "search {p} --cost {c} --mix 16 --target-speedup 1.1 -o {o}",
    "search {p} --budget 9 --method exact -o {o} --json",
    "search {a} --budget 9",
    "search {p} --budget 9 -o {o}/{o}",
    "search {p} {o} --budget 9",
    "front {p} -o {o}.svg -o {o}.csv",
    "plot {p} {q} {a} -o {o}.svg",
    "plot {p} -o {o}.png",
    "compare {p} {q}",
    "merge {p} {q} -o {o}",
    "export {a} --to csv",
    "export {a} --to vllm --model {m}",
    "export {own} --to vllm --model {m}",
    "export {own} --to vllm --model {m} -o {o}m",
    "export {own} --to transformers --model {m} -o {o}t",
    "profile {o}",
    "--{o}",
    "{o}",
]
QUICK = ("show", "plot", "compare", "export", "check", "tradeoff", "{o}")
ADAPTER = ["check {own} --model {m}", "check {a} --model {m}", "check {o} --model {o}"]
ADAPTER += ["tradeoff {e} {b} -o {o}.svg", "tradeoff {e} {b} -o {o}.pdf", "tradeoff {e} {e}", "sensitivity {o}", "{o}"]
REFUSED = (
    *("search {a} --budget 9", "search {p} --budget 9 -o {o}/{o}", "search {p} {o} --budget 9", "merge {p} {q} -o {o}"),
    *("export {a} --to vllm --model {m}", "profile {o}", "--{o}", "{o}", "check {a} --model {m}"),
    *("check {o} --model {o}", "tradeoff {e} {e}", "sensitivity {o}"),
)
CALLS = [("lexi_search", call) for call in SEARCH] + [("lexi_adapter", call) for call in ADAPTER]


def run(package, *arguments, before="", code="", closed=(), **options):
    """The finished command, its output as bytes; a shell closes the streams with the numbers `closed` before it."""
    code = code or before + ENTRY.format(package=package)
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | options.pop("env", {})
    environment = {name: value for name, value in environment.items() if value is not None}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    shell = ["sh", "-c", 'exec "$0" "$@" ' + " ".join(f"{stream}>&-" for stream in closed)] if closed else []
    words = [*shell, sys.executable, "-c", code, *arguments]
    return subprocess.run(words, env=environment, timeout=300, **streams | options)


@pytest.fixture
def odd(folder):
    """Files with an odd name and odd names in them, by letters."""
    names = {letter: letter + ODD for letter in "pqacebo"} | {"m": "m" + ODD, "own": "own" + ODD}
    model = {"model_type": "olmoe" + ODD.replace("\udce9", "\ud800")}
    for letter, seed in (("p", 0), ("q", 1)):
        write(Path(names[letter]), make_profile(seed=seed, **model))
    write(Path(names["a"]), make_allocation(**model))
    write(Path(names["c"]), make_cost_table(**model))
    variants = ("base", ODD, "\ud800$x", "pruned")
    for letter, make in (("e", make_quality), ("b", make_speed)):
        document = make(variants)
        document["summary"] = (
            [line | {"workload": ODD} for line in document["summary"][::2]]
            if letter == "b"
            else [line | {"task": ODD, "metric": ODD} for line in document["summary"][::3]]
        )
        document |= {"model": ODD} if letter == "e" else {"workloads": [ODD]}
        Path(names[letter]).write_text(json.dumps(document))
    shutil.copytree(EXAMPLE, names["m"])
    from lexi_search.checkpoint.reader import open_checkpoint
    from lexi_search.models.model import describe

    identity = describe(open_checkpoint(EXAMPLE)).identity
    k = dict.fromkeys(identity.moe_layers, 1)
    write(Path(names["own"]), replace(make_allocation(), model=identity, top_k=k, budget=len(k)))
    return names


def run_all(calls, **environment):
    """The finished commands, one for each of `calls`: their processes are forked from one that has imported all."""
    code = FORKING.format(calls=calls)
    done = run("", code=code, env=environment)
    assert done.returncode == 0, done.stderr
    results = [Path(f"done{number}").read_bytes() for number in range(len(calls))]
    return [(int(result[:3]), result[3:]) for result in results]


def check_lines(data):
    """Lines of printable UTF-8, and no traceback."""
    assert all(line.isprintable() for line in data.decode().split("\n")), data
    assert b"Traceback" not in data and b"Exception ignored" not in data, data


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_odd_names_end_in_the_right_output_or_one_line(odd, encoding):
    chosen = [(package, call) for package, call in CALLS if encoding == "utf-8" or call.split()[0] in QUICK]
    calls = [(package, [os.fsencode(word.format(**odd)) for word in call.split()]) for package, call in chosen]
    for (_, call), (code, printed) in zip(chosen, run_all(calls, **ENCODINGS[encoding]), strict=True):
        check_lines(printed)
        if encoding != "utf-8":
            assert printed.isascii(), call
        assert code == (2 if call in REFUSED else 0), (call, printed)
        *usage, last = printed.decode().splitlines()
        if code == 2:
            assert last.startswith("Error: "), call
            assert not usage or usage[0].startswith("Usage: "), call
    for figure in Path().glob("*.svg"):
        texts = "".join(ElementTree.parse(figure).getroot().itertext())
        assert all(line.isprintable() for line in texts.split("\n"))


@pytest.mark.parametrize("spell", [spell, adapter_spell])
def test_spelling_escapes_what_is_not_printable_and_nothing_else(spell):
    assert spell(ODD) == "$\\frac$[red]\\x1b[31m\\r\\u202e caf\u00e9\\n\\udce9"
    for text in ("", "plain", "a\\b", "\u00b1 \u4e2d\u6587 \U0001f600"):
        assert spell(text) == text


def test_the_command_to_serve_an_odd_name_names_that_folder(odd):
    done = run("lexi_search", "export", odd["own"], "--to", "vllm", "--model", odd["m"])
    command = done.stdout.decode().partition(" --hf-overrides")[0].replace("vllm serve", "printf %s")
    assert subprocess.run(["bash", "-c", command], stdout=subprocess.PIPE).stdout == os.fsencode(odd["m"])


@pytest.mark.parametrize("package", ["lexi_search", "lexi_adapter"])
def test_all_output_passes_the_console(package):
    """Nothing in a package prints but by `echo` and `print_table` of its console."""
    for path in (ROOT / package).glob("**/*.py"):
        if path.stem != "console":
            text = path.read_text()
            assert not [word for word in ("click.echo", "click.secho", " print(", "sys.stdout.w") if word in text], path


@pytest.mark.parametrize("package", ["lexi_search", "lexi_adapter"])
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["no-such"], []], ids=str)
def test_streams_that_are_full_or_closed(folder, package, arguments):
    whole = run(package, *arguments)
    code = 0 if arguments and arguments[0].startswith("-") else 2
    assert whole.returncode == code
    with open("/dev/full", "w") as full:
        done = run(package, *arguments, stdout=full)
        line = b"Error: cannot go on: No space left on device; make room where the output goes\n"
        assert (done.returncode, done.stderr) == ((code, whole.stderr) if code else (2, line))
        done = run(package, *arguments, stderr=full)
        assert (done.returncode, done.stdout) == (code, whole.stdout)
    for closed in ([1], [2], [0, 1, 2]):
        done = run(package, *arguments, closed=closed)
        assert done.returncode == code
        assert done.stdout == (b"" if 1 in closed else whole.stdout)
        assert done.stderr == (b"" if 2 in closed else whole.stderr)


@pytest.mark.parametrize("closed", [[1], [2], [0, 1, 2]], ids=str)
def test_no_output_is_mixed_into_what_is_written(folder, closed):
    """With stderr closed the file that is written would be file 2, and what libraries print there part of it."""
    write(Path("p"), make_profile())
    done = run("lexi_search", "merge", "p", "-o", "out", before=LOGGING, closed=closed)
    assert done.returncode == 0
    assert Path("out").read_bytes() == Path("p").read_bytes()


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("lexi_search", "profile MODEL --samples 64 --length 32 --batch 1"),
        ("lexi_search", "plot p -o a.png"),
        ("lexi_adapter", "tradeoff e b -o a.png"),
        ("lexi_adapter", "sensitivity MODEL --tokens t --length 8 --local"),
    ],
)
def test_a_user_without_home_or_name(folder, package, call):
    write(Path("p"), make_profile())
    Path("e").write_text(json.dumps(make_quality()))
    Path("b").write_text(json.dumps(make_speed()))
    Path("t").write_text(json.dumps([list(range(3, 11))] * 2))
    nobody = dict.fromkeys(("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"))
    done = run(package, *call.replace("MODEL", str(EXAMPLE)).split(), before=NOBODY, env=nobody)
    assert b"Traceback" not in done.stderr and done.returncode == 0, done.stderr
