"""Several processes over loopback: the same bytes as one, and one clear line when one of them is gone."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from command_line import list_warnings, read_warnings
from command_line import run as run_here
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import lexi_search
from lexi_search.artifacts.serialisation import read_profile
from lexi_search.checkpoint.reader import open_checkpoint
from lexi_search.models.model import describe
from lexi_search.profiling.distributed import estimate_costs, spread

FAST = ["--input", "paper", "--batch", "2", "--length", "32", "--relative-error", "0.2"]
CALL = "from lexi_search.cli.main import main; main()"
# The same with a shorter patience, and a process that dies as soon as it has measured a layer, before it tells.
CALL_AND_DIE = """
import os, signal, lexi_search.cli.console as console
def prepare(prepare=console.prepare_environment):
    prepare()
    import lexi_search.profiling.distributed as distribution
    distribution.HEARTBEAT_SECONDS = 8
    def gather(group, measured, layers, gather=distribution.gather):
        def die(measured):
            for item in measured:
                if group.index == DYING:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield item
        return gather(group, die(measured), layers)
    distribution.gather = gather
console.prepare_environment = prepare
"""


def make_environment(**changes):
    """Without signs of a cluster, and without what JAX has set in this process."""
    signs = ("SLURM_", "OMPI_", "KUBERNETES_", "TPU_", "JAX_COORDINATOR", "TF_CPP_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(signs)}
    return kept | {"PYTHONPATH": str(Path(lexi_search.__file__).parent.parent)} | changes


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("checkpoint") / "qwen3_moe")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, checkpoint):
    """The bytes of the profile that one process makes."""
    path = tmp_path_factory.mktemp("alone") / "profile.json"
    assert run_here("profile", checkpoint, *FAST, "-o", path).exit_code == 0
    return path.read_bytes()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def start(tmp_path, cache):
    """Runs two processes, each in a folder of its own, with its own arguments; -> [(exit code, stdout, stderr)]."""

    def run(*arguments, code=CALL):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = ["--coordinator", f"127.0.0.1:{free.getsockname()[1]}", "--num-processes", str(len(arguments))]
        environment = make_environment(JAX_COMPILATION_CACHE_DIR=str(cache))
        processes = []
        for index, own in enumerate(arguments):
            (tmp_path / str(index)).mkdir(exist_ok=True)
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", code, "profile", *map(str, own), *place, "--process-id", str(index)],
                    cwd=tmp_path / str(index),
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        try:
            outputs = [process.communicate(timeout=240) for process in processes]
            outputs = [(said, "".join(f"{line}\n" for line in list_warnings(told))) for said, told in outputs]
        finally:
            for process in processes:
                process.kill()
        return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]

    return run


def test_two_processes_make_what_one_makes(start, checkpoint, alone, tmp_path):
    assert start([checkpoint, *FAST], [checkpoint, *FAST]) == [(0, "profile.json\n", ""), (0, "", "")]
    assert (tmp_path / "0" / "profile.json").read_bytes() == alone
    assert os.listdir(tmp_path / "0") == ["profile.json"] and os.listdir(tmp_path / "1") == []


@pytest.mark.parametrize("compensation", ["full", "exponent"])
def test_two_processes_share_a_text_and_measure_their_layers_on_it(start, checkpoint, tmp_path, compensation):
    """Equal up to rounding: what goes through a layer together decides in what order it is summed.

    Corrections are of sums over the text alone: they have the same bytes.
    """
    call = [checkpoint, "--batch", 2, "--length", 16, "--samples", 64, "--compensation", compensation]
    (tmp_path / "alone").mkdir()
    alone = run_here("profile", *call, "-o", tmp_path / "alone/profile.json")
    assert start(call, call) == [(0, "profile.json\n", read_warnings(alone)), (0, "", "")]
    whole, shared = (read_profile(tmp_path / path / "profile.json") for path in ("alone", "0"))
    assert (shared.settings, shared.layers.keys()) == (whole.settings, whole.layers.keys())
    for layer, loss in shared.layers.items():
        assert loss.rms == pytest.approx(whole.layers[layer].rms, rel=1e-5)
        assert loss.divergence == pytest.approx(whole.layers[layer].divergence, rel=1e-3)
    names = ["profile.json", *(["profile.safetensors"] if compensation == "full" else [])]
    assert sorted(os.listdir(tmp_path / "0")) == sorted(os.listdir(tmp_path / "alone")) == names
    assert os.listdir(tmp_path / "1") == [] and shared.compensation == whole.compensation
    if compensation == "full":
        assert (tmp_path / "0" / names[1]).read_bytes() == (tmp_path / "alone" / names[1]).read_bytes()


def test_a_lost_process_ends_the_others_and_the_rest_is_kept(start, checkpoint, alone, tmp_path):
    call = [checkpoint, *FAST]
    one_line = "Error: another process was lost; what is finished is kept, start all again\n"
    first, second = start(call, call, code=CALL_AND_DIE.replace("DYING", "1") + CALL)
    assert first == (-signal.SIGABRT, "", one_line)
    assert second == (-signal.SIGKILL, "", "")
    store = tmp_path / "0" / "profile.json.partial"
    assert sorted(path.name.partition("-")[0] for path in store.glob("*.json")) == ["0", "2"]
    first, second = start(call, call, code=CALL_AND_DIE.replace("DYING", "0") + CALL)
    assert second == (-signal.SIGABRT, "", one_line)
    assert first == (-signal.SIGKILL, "", f"2 of 3 layers are finished in {store}\n")
    assert start(call, call) == [(0, "profile.json\n", f"2 of 3 layers are finished in {store}\n"), (0, "", "")]
    assert (tmp_path / "0" / "profile.json").read_bytes() == alone


def test_a_refusal_in_one_process_is_told_by_all(start, checkpoint, tmp_path):
    spoiled = Path(shutil.copytree(checkpoint, tmp_path / "spoiled"))
    tensors = load_file(spoiled / "model.safetensors")
    name = next(name for name in tensors if "layers.1." in name and "experts.0.down" in name)
    tensors[name][0, 0] = float("nan")  # where no sample is taken
    save_file(tensors, spoiled / "model.safetensors", {"format": "pt"})
    first, second = start([checkpoint, *FAST], [spoiled, *FAST])
    reason = f"{spoiled / 'model.safetensors'}: tensor {name} holds NaN or Inf; is the file damaged?\n"
    assert second == (2, "", f"Error: {reason}")
    assert first == (2, "", f"Error: process 1 has stopped: {reason}")


def test_processes_that_disagree_are_refused(start, checkpoint):
    first, second = start([checkpoint, *FAST], [checkpoint, *FAST, "--seed", "1"])
    reason = "process 1: its settings.seed is 1, not 0 as in process 0; start all alike\n"
    assert second == (2, "", f"Error: {reason}")
    assert first == (2, "", f"Error: process 1 has stopped: {reason}")


@pytest.mark.parametrize(
    "options, reason",
    [
        (["--distributed"], "coordinator_address should be defined"),
        (["--coordinator", "nowhere", "--num-processes", "1", "--process-id", "0"], "list index out of range"),
        (["--coordinator", "localhost:1", "--num-processes", "2", "--process-id", "2"], "process_id < num_processes"),
    ],
)
def test_no_cluster_is_refused(checkpoint, tmp_path, options, reason):
    command = [sys.executable, "-c", CALL, "profile", str(checkpoint), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=make_environment())
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert reason in done.stderr and "give --coordinator HOST:PORT, --num-processes and --process-id" in done.stderr


@given(st.dictionaries(st.integers(0, 99), st.integers(1, 1000), max_size=40), st.integers(1, 9), st.randoms())
def test_layers_are_spread_evenly(costs, size, random):
    shares = spread(costs, size)
    assert len(shares) == size
    assert sorted(layer for share in shares for layer in share) == sorted(costs)
    assert all(share == tuple(sorted(share)) for share in shares)
    loads = [sum(costs[layer] for layer in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs.values(), default=0)
    shuffled = list(costs.items())
    random.shuffle(shuffled)
    assert spread(dict(shuffled), size) == shares


def test_the_cost_of_a_layer_is_its_bytes_or_the_layers_after_it(checkpoint):
    opened = open_checkpoint(checkpoint)
    model = describe(opened)
    assert estimate_costs(opened, model, [0, 2], "weights") == {0: 3, 2: 1}
    costs = estimate_costs(opened, model, [0, 2], "paper")
    assert costs.keys() == {0, 2}
    assert costs[2] == sum(opened[name].nbytes for name in opened if name.startswith("model.layers.2."))


def test_the_scaling_benchmark_runs(tmp_path):
    script = Path(lexi_search.__file__).parent.parent / "examples" / "benchmarks" / "profile_scaling.py"
    options = ["--model", "tiny", "--gpus", "1", "--gpus", "2", "--tokens", "4096", "-o", "scaling.json"]
    command = [sys.executable, str(script), *options]
    subprocess.run(command, check=True, cwd=tmp_path, env=make_environment(), capture_output=True, timeout=120)
    rows = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    assert [(row["gpus"], row["layers"], row["balance"]) for row in rows] == [(1, 6, 1.0), (2, 6, 1.0)]
    assert all(row["tokens_per_s"] == 6 * 4096 / row["seconds"] for row in rows)
    assert rows[1]["efficiency"] == rows[1]["tokens_per_s"] / 2 / rows[0]["tokens_per_s"]
