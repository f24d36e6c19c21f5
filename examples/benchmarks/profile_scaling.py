"""Stage 1 over 1..N GPUs of one host, through JAX's distributed runtime: how much faster do N make it?

    python examples/benchmarks/profile_scaling.py [--gpus 1 --gpus 4 ...] [--model deepseek-v3 ...] [-o scaling.json]

For each number of GPUs the layers of a model are spread over as many processes, one GPU each, just as
`lexi-search profile --distributed` does it; `--one-process` gives one process all of them instead. Weights are those
of `profile_shapes.py`, drawn on the device, one layer for all layers; every layer draws its own tokens. Timed is the
second of two rounds, when all is compiled, from when all processes are ready until process 0 has every layer's losses:

- tokens per second over all layers, and efficiency: tokens/s over that of the smallest number of GPUs, per GPU;
- balance: the efficiency that whole layers allow, since 58 layers on 4 GPUs take as long as 60.

Where there is no GPU, the same runs on the CPU, which shows that it works and not how fast: `--model tiny`.
"""

import json
import os
import platform
import socket
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import click

MODELS = ("mixtral-8x7b", "deepseek-v3")
COUNT = "import jax; d = jax.local_devices(); print(len(d), jax.default_backend(), d[0].device_kind, sep='|')"


def work(name, tokens, place):
    """One process: both rounds; in process 0 the seconds of the second."""
    import profile_shapes

    from lexi_search.artifacts.profile import ProfileSettings
    from lexi_search.layers.spec import Routing
    from lexi_search.profiling.distributed import gather, join, spread
    from lexi_search.profiling.paper.gaussian import measure_layer
    from lexi_search.profiling.paper.moments import summarise

    profile_shapes.SHAPES["tiny"] = (64, 32, 8, 2, 6, Routing())
    settings = ProfileSettings("paper", 0, 4, 512, "bfloat16", 1e-9, tokens)
    with join(*place) as group:
        model, weights = profile_shapes.make_layer(name)
        layers = len(model.layers)
        for turn in range(2):
            chosen = range(turn * layers, (turn + 1) * layers)  # its own draws, and its own names among the processes
            own = spread(dict.fromkeys(chosen, 1), group.size)[group.index]
            group.store.wait_at_barrier(f"turn {turn}", 600_000)
            start = time.perf_counter()
            measured = ((layer, summarise(measure_layer(model, weights, layer, settings))) for layer in own)
            losses = dict(gather(group, measured, chosen))
            seconds = time.perf_counter() - start
        if group.index == 0:
            assert len(losses) == layers
            print(json.dumps({"layers": layers, "seconds": seconds}))


def start(name, tokens, gpus, backend, one_process):
    """Start the processes of one measurement; what process 0 has printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    visible = list(map(str, range(gpus)))
    if backend != "cpu" and "CUDA_VISIBLE_DEVICES" in os.environ:
        visible = os.environ["CUDA_VISIBLE_DEVICES"].split(",")[:gpus]
    shares = [",".join(visible)] if one_process else visible
    processes = []
    for index, share in enumerate(shares):
        devices = {"CUDA_VISIBLE_DEVICES": share}
        if backend == "cpu":
            devices = {"JAX_NUM_CPU_DEVICES": str(share.count(",") + 1)}
        command = [sys.executable, __file__, "--model", name, "--tokens", str(tokens)]
        command += ["--worker", coordinator, str(len(shares)), str(index)]
        processes.append(subprocess.Popen(command, env=os.environ | devices, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise click.ClickException(f"{name} on {gpus} GPUs failed")
    return json.loads(outputs[0])


@click.command(help=__doc__.splitlines()[0])
@click.option("--model", "names", multiple=True, help=f"[default: {', '.join(MODELS)}]")
@click.option("--gpus", "numbers", multiple=True, type=click.IntRange(1), help="[default: 1, 2, 4, .. all there are]")
@click.option("--tokens", default=2**17, show_default=True, help="Tokens a layer, a multiple of 2048.")
@click.option("--one-process", is_flag=True, help="All GPUs in one process, instead of one in each.")
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Write the numbers here as JSON.")
@click.option("--worker", nargs=3, hidden=True)
def main(names, numbers, tokens, one_process, output, worker):
    if worker:
        coordinator, count, index = worker
        return work(names[0], tokens, (coordinator, int(count), int(index)))
    counted = subprocess.run([sys.executable, "-c", COUNT], stdout=subprocess.PIPE, text=True, check=True).stdout
    there, backend, device = counted.strip().split("|")
    numbers = sorted(set(numbers)) or [2**i for i in range(int(there).bit_length()) if 2**i <= int(there)]
    if backend != "cpu" and numbers[-1] > int(there):
        raise click.ClickException(f"--gpus {numbers[-1]}: this host shows {there}")
    result = {
        "command": " ".join(["python", "examples/benchmarks/profile_scaling.py", *sys.argv[1:]]),
        "device": device,
        "host": platform.processor() or platform.machine(),
        "date": date.today().isoformat(),
        "tokens_per_layer": tokens,
        "processes": "one" if one_process else "one per GPU",
        "rows": [],
    }
    click.echo(f"{device}, processes: {result['processes']}, {tokens} tokens a layer")
    click.echo("model          GPUs layers  seconds   tokens/s efficiency  balance")
    for name in names or MODELS:
        base = None
        for gpus in numbers:
            done = start(name, tokens, gpus, backend, one_process)
            rate = done["layers"] * tokens / done["seconds"]
            base = base or rate / gpus
            most = -(-done["layers"] // gpus)
            row = {"model": name, "gpus": gpus, **done, "tokens_per_s": rate, "efficiency": rate / gpus / base}
            row["balance"] = 1.0 if one_process else done["layers"] / gpus / most
            result["rows"].append(row)
            click.echo(
                f"{name:14} {gpus:4} {row['layers']:6} {row['seconds']:8.2f} {rate:10.0f} {row['efficiency']:10.3f} "
                f"{row['balance']:8.3f}"
            )
            if output:
                Path(output).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
