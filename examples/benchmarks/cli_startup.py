"""CPU time that `lexi-search --help` takes: the median of some runs, in fresh processes. The goal is below 0.3 s.

python examples/benchmarks/cli_startup.py
"""

import platform
import resource
import statistics
import subprocess
import sys

RUNS = 20
COMMAND = [sys.executable, "-c", "from lexi_search.cli.main import main; main(['--help'])"]


def measure_cpu_seconds() -> float:
    """User and system time of one run of the command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(COMMAND, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    measure_cpu_seconds()  # the first run compiles bytecode
    times = [measure_cpu_seconds() for _ in range(RUNS)]
    print(f"lexi-search --help: median {statistics.median(times):.3f} s CPU of {RUNS} runs (goal: below 0.3 s)")
    print(f"from {min(times):.3f} to {max(times):.3f} s; Python {platform.python_version()}, {platform.machine()}")
