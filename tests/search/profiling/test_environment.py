"""JAX in the user's environment: its variables change no byte of a profile, and its private modules are left alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from command_line import list_warnings

import lexi_search

ROOT = Path(lexi_search.__file__).parent.parent
PAPER = ["--input", "paper", "--batch", "2", "--length", "32", "--relative-error", "0.2"]
WEIGHTS = ["--batch", "2", "--length", "16", "--samples", "64", "--compensation", "full"]
CHANGED = {
    "JAX_ENABLE_X64": "1",
    "JAX_DEFAULT_PRNG_IMPL": "rbg",
    "JAX_THREEFRY_PARTITIONABLE": "0",
    "JAX_RANDOM_SEED_OFFSET": "7",
    "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16",
}


def run(code, *arguments, **changes):
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | changes
    for name in CHANGED.keys() - changes.keys():
        environment.pop(name, None)
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], env=environment, capture_output=True)
    assert done.returncode == 0 and list_warnings(done.stderr.decode()) == [], done.stderr.decode()
    return done.stdout.decode()


@pytest.mark.parametrize("settings", [PAPER, WEIGHTS], ids=["paper", "weights"])
def test_a_profile_has_the_same_bytes_whatever_the_environment_says(settings, tmp_path):
    checkpoint = tiny.make_checkpoint("qwen3_moe", tmp_path / "model", num_hidden_layers=1)
    code, made = "from lexi_search.cli.main import main; main()", []
    for number, changes in enumerate(({}, CHANGED)):
        (place := tmp_path / str(number)).mkdir()
        run(code, "profile", checkpoint, *settings, "-o", place / "p.json", **changes)
        made.append({path.name: path.read_bytes() for path in place.iterdir()})
    assert made[0] == made[1] and len(made[0]) == (1 if settings is PAPER else 2)


def test_cached_kernels_are_loaded_without_a_word(tmp_path):
    """JAX 0.10.0 wrote screens of warnings about the machine's features."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    checkpoint = tiny.make_checkpoint("qwen3_moe", tmp_path / "model", num_hidden_layers=1)
    for name in ("first", "second"):
        code = "from lexi_search.cli.main import main; main()"
        run(code, "profile", checkpoint, *PAPER, "-o", tmp_path / name, **cache)
    assert any((tmp_path / "cache").iterdir())
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_one_process_imports_no_private_module_of_jax():
    """JAX's own modules do; here none is asked for by name."""
    code = """
import builtins, sys
asked, original = [], builtins.__import__
def record(name, globals=None, *others):
    if name.startswith("jax._src") and (globals or {}).get("__name__", "").startswith("lexi_search"):
        asked.append(name)
    return original(name, globals, *others)
builtins.__import__ = record
import lexi_search.profiling.session, lexi_search.profiling.distributed
print(asked)
"""
    assert run(code).strip() == "[]"
