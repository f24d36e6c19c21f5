"""`profile` on other Pythons and other versions of JAX than the tests': `make test-newest-jax` makes both.

`LEXI_JAX_PYTHONS` names interpreters in whose environments the dependencies of lexi_search are. The judge is one
process: what several make, which takes JAX's private key-value store, has the same bytes.
"""

import os
import socket
import subprocess
from pathlib import Path

import pytest

import lexi_search

ROOT = Path(lexi_search.__file__).parent.parent
PYTHONS = os.environ.get("LEXI_JAX_PYTHONS", "").split()
PROFILE = ["profile", ROOT / "examples" / "tiny-olmoe", "--input", "paper", "--batch", "2", "--length", "32"]
PROFILE += ["--relative-error", "0.2", "--restart"]


def start(python, folder, *arguments):
    signs = ("SLURM_", "OMPI_", "KUBERNETES_", "JAX_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(signs)}
    environment |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(folder)}
    code = "from lexi_search.cli.entry import run; run()"
    command = [python, "-W", "error::DeprecationWarning:lexi_search", "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process):
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err.decode()
    return out, err


@pytest.mark.skipif(not PYTHONS, reason="LEXI_JAX_PYTHONS names no interpreter; see make test-newest-jax")
@pytest.mark.parametrize("python", PYTHONS)
def test_several_processes_make_what_one_makes(python, tmp_path):
    finish(start(python, tmp_path, *PROFILE, "-o", "alone.json"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    together = ["-o", "together.json", "--coordinator", address, "--num-processes", 2, "--process-id"]
    for process in [start(python, tmp_path, *PROFILE, *together, index) for index in range(2)]:
        finish(process)
    assert (tmp_path / "together.json").read_bytes() == (tmp_path / "alone.json").read_bytes()


@pytest.mark.skipif(not PYTHONS, reason="LEXI_JAX_PYTHONS names no interpreter; see make test-newest-jax")
@pytest.mark.parametrize("python", PYTHONS)
def test_the_whole_way_runs_and_cached_kernels_are_loaded_without_a_word(python, tmp_path):
    weights = [*PROFILE[:2], "--samples", 64, "--length", 32, "--batch", 1]
    for name in ("first.json", "second.json"):
        assert finish(start(python, tmp_path, *weights, "-o", name))[1] == b""
    assert (tmp_path / "first.json").read_bytes() == (tmp_path / "second.json").read_bytes()
    assert any((tmp_path / "lexi-search" / "jax").iterdir())
    for command in (
        ["search", "first.json", "--budget", 40, "--resamples", 0],
        ["plot", "first.json"],
        ["front", "first.json"],
    ):
        assert finish(start(python, tmp_path, *command))[1] == b""
