"""Commands of both packages in processes that end when told: forked from one that has imported everything before.

A job, a line of JSON on standard input, is {"package", "arguments", "folder", "seconds"}: it is killed after so many,
or not at all for null. Its result is a line, too: {"code", "seconds", "printed"}.
"""

import importlib
import json
import os
import select
import signal
import sys
import time

MODULES = """
jax jax.numpy matplotlib.figure numpy rich.table transformers torch lexi_search.profiling.session
lexi_search.profiling.divergence lexi_search.pruning.prune lexi_search.allocation.allocate
lexi_search.allocation.comparison lexi_search.allocation.export lexi_search.allocation.tradeoff lexi_search.cli.main
lexi_search.cli.entry lexi_search.cli.plots lexi_search.cli.tables lexi_adapter.cli.main lexi_adapter.cli.entry
lexi_adapter.cli.figures lexi_adapter.cli.tables lexi_adapter.evaluation.evaluate
lexi_adapter.evaluation.transformers_backend lexi_adapter.sensitivity.profile lexi_adapter.tasks.registry
"""


def run(job):
    """The process of a job, and the pipe of what it prints; this function returns in the parent alone."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    try:
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        os.chdir(job["folder"])
        sys.argv[:] = ["lexi", *job["arguments"]]
        importlib.import_module(f"{job['package']}.cli.entry").run()
    except SystemExit as end:
        os._exit(end.code or 0)
    finally:
        os._exit(1)


def wait(child, reading, seconds):
    """Exit code, seconds that the process took, and all that it printed; it is killed after `seconds`."""
    start, printed = time.monotonic(), b""
    while True:
        left = None if seconds is None else max(0.0, start + seconds - time.monotonic())
        if not select.select([reading], [], [], left)[0]:
            os.kill(child, signal.SIGKILL)
            seconds = None
        elif data := os.read(reading, 2**16):
            printed += data
        else:
            break
    os.close(reading)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {"code": code, "seconds": time.monotonic() - start, "printed": printed.decode(errors="replace")}


if __name__ == "__main__":
    results = os.fdopen(os.dup(1), "w")
    for module in MODULES.split():
        importlib.import_module(module)
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(wait(*run(job), job["seconds"])), file=results, flush=True)
