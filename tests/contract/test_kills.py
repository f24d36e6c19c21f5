"""Commands that are killed at random: nothing is lost, and the same command then makes what it would have made.

A few kills in CI; `LEXI_KILLS=150` sets another number. Left out are `bench`, `latency` and `loads`, which need an
engine, and `judge`, which writes nothing.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny
from command_line import write
from corrections import draw_maps
from engine import allocate
from results import make_quality, make_speed
from synthetic import make_allocation, make_profile

import lexi_search
from lexi_search.artifacts.compensation import write_maps
from lexi_search.artifacts.serialisation import write_allocation, write_allocations

ROOT = Path(lexi_search.__file__).parent.parent
EXAMPLE = ROOT / "examples" / "tiny-olmoe"
KILLS = int(os.environ.get("LEXI_KILLS", "4"))
SMALL = "--batch 2 --length 16"
COMMANDS = {
    "lexi_search": [
        f"profile model --input paper --relative-error 0.3 {SMALL} -o out.json",
        f"profile model --samples 64 {SMALL} -o out.json",
        f"profile model --samples 64 {SMALL} --compensation none -o out.json",
        "search p.json --budgets 8:10:1 --resamples 20 --history history.json -o out",
        "search c.json --budgets 8:10:1 --resamples 20 -o out",
        "front p.json -o out.json -o out.csv --knee",
        "front c.json --max-loss 50% --allocation chosen.json",
        "plot p.json a.json -o out.png",
        "compare p.json q.json",
        "merge p.json -o out.json",
        "merge c.json -o out.json",
        "export own.json --to vllm --model model -o out",
        "export corrected.json --to vllm --model model -o out",
        "export own.json --to transformers --model model -o out --force",
        "export a.json --to json -o out.json",
        "prune model --experts 50% --samples 64 -o out",
        "show p.json",
        "show c.json",
    ],
    "lexi_adapter": [
        "sensitivity model --tokens t.json --length 8 --batch 1 -o out.json",
        "eval model --task perplexity --text text --window 16 --max-windows 3 --uniform-k 2 -o out.json",
        "tradeoff e.json b.json -o out.svg",
        "check own.json --model model",
    ],
}
CALLS = [(package, call) for package, calls in COMMANDS.items() for call in calls]


class Bench(NamedTuple):
    """A folder that is made anew for every run, its template, and the process that runs the commands in it."""

    folder: Path
    template: Path
    driver: subprocess.Popen

    def renew(self):
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.template, self.folder, symlinks=True)

    def run(self, package, call, seconds=None):
        job = {"package": package, "arguments": call.split(), "folder": str(self.folder), "seconds": seconds}
        self.driver.stdin.write(json.dumps(job) + "\n")
        self.driver.stdin.flush()
        return json.loads(self.driver.stdout.readline())

    def look(self):
        """Path -> content of every file and link."""
        paths = {path.relative_to(self.folder): path for path in self.folder.rglob("*")}
        files = {name: path for name, path in paths.items() if path.is_symlink() or path.is_file()}
        return {str(name): os.readlink(p) if p.is_symlink() else p.read_bytes() for name, p in files.items()}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    root = tmp_path_factory.mktemp("kills")
    template = root / "template"
    template.mkdir()
    tiny.make_checkpoint("olmoe", template / "model", num_hidden_layers=2, vocab_size=2048)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (EXAMPLE / name).exists():
            shutil.copy(EXAMPLE / name, template / "model")
    for seed, name in enumerate(("p.json", "q.json")):
        write(template / name, make_profile(seed=seed))
    write(template / "a.json", make_allocation())
    own = allocate(template / "model")
    write_allocation(template / "own.json", own)
    maps = draw_maps(own.model, own.corrected, hidden=64)
    write_allocations([template / "corrected.json"], [replace(own, gate_exponent=0.5)], maps)
    profile = make_profile()
    pairs = [(layer, k) for layer in profile.layers for k in range(1, profile.model.top_k)]
    named = write_maps(template / "c.safetensors", draw_maps(profile.model, pairs, hidden=8), profile.model)
    settings = replace(profile.settings, gate_exponent=0.5, compensation_rank=named.rank)
    write(template / "c.json", replace(profile, settings=settings, compensation=named))
    (template / "t.json").write_text(json.dumps([list(range(3, 11)), list(range(13, 21))]))
    (template / "text").write_text("def method(self):\n    return self.value\n" * 20)
    for name, document in (("e.json", make_quality()), ("b.json", make_speed())):
        (template / name).write_text(json.dumps(document))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(root / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-W", "ignore", Path(__file__).parent.parent / "helpers" / "killed.py"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as driver:
        yield Bench(root / "here", template, driver)
        driver.stdin.close()


@pytest.fixture(scope="module")
def whole(bench):
    """(package, call) -> seconds and files of an uninterrupted run, made when it is asked for."""
    made = {}

    def find(package, call):
        if (package, call) not in made:
            for _ in range(2):  # what the first compiles, the second finds
                bench.renew()
                done = bench.run(package, call)
                assert done["code"] == 0, done
            made[package, call] = done["seconds"], bench.look()
        return made[package, call]

    return find


def check_killed(before, after, whole, call):
    """Nothing that was read has changed, and what is written is whole; a model folder is all there, or not at all."""
    assert before.items() <= after.items(), call
    visible = {name for name in after.keys() - before.keys() if not name.startswith(".") and ".partial" not in name}
    for name in visible:
        # The results of eval are written after every task.
        assert after[name] == whole[name] or "eval" in call and json.loads(after[name])["pieces"], (call, name)
    if call.startswith(("export", "prune")):
        assert visible in (set(), {name for name in whole.keys() - before.keys()}), call


@pytest.mark.parametrize("kill", range(KILLS))
def test_a_killed_command_loses_nothing_and_goes_on(bench, whole, kill):
    rng = random.Random(kill)
    package, call = CALLS[kill % len(CALLS)] if KILLS >= len(CALLS) else rng.choice(CALLS)
    seconds, expected = whole(package, call)
    bench.renew()
    before = bench.look()
    for _ in range(rng.choice((1, 1, 2))):
        killed = bench.run(package, call, rng.uniform(0.0, seconds))
        assert killed["code"] in (-9, 0) and "Traceback" not in killed["printed"], (call, killed)
        if killed["code"] == 0:
            bench.renew()
        check_killed(before, bench.look(), expected, call)
    if call.startswith(("export", "prune")) and expected.items() <= bench.look().items():
        return  # the folder is there, and is not replaced without being asked for
    done = bench.run(package, call)
    assert done["code"] == 0, (call, done)
    assert bench.look() == expected, call
