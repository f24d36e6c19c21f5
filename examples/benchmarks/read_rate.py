"""Bytes per second from disk into device memory, beside a plain sequential read of the same files.

    python examples/benchmarks/read_rate.py FOLDER [--size 8] [--layers 8] [--experts 64] [--format bf16] [--readers 8]

FOLDER is made, and holds a synthetic checkpoint of `--size` GB afterwards: `--layers` MoE layers of `--experts` experts
in shards of a layer each, bf16 or FP8 in blocks of 128 x 128. Make it on the disk that is to be measured. Both readings
go over the same files: `plain` reads each from its start into one reused buffer of 16 MB; `streamed` runs
`stream_layers` over every layer, whose weights are on the device when it is yielded. Cold: the files are dropped from
the page cache before (posix_fadvise; a file system may ignore that, and a cold rate far above the disk's is a warm
one). A rate is the bytes of the files over the seconds of the fastest of `--repeats`, taken in turn. Host memory is the
process' peak after it has streamed everything once, less its peak before; on a CPU that includes the weights, as the
device's memory is the host's.
"""

import json
import os
import platform
import resource
import struct
import time
from datetime import date
from pathlib import Path

import click
import jax
import numpy as np

from lexi_search.checkpoint.reader import INDEX, open_checkpoint
from lexi_search.models.loading import reader as loading
from lexi_search.models.loading.streaming import stream_layers
from lexi_search.models.model import describe

HIDDEN, BLOCK = 2048, 128
PLAIN_BYTES = 16 << 20


def make_checkpoint(folder, size, layers, experts, format):
    """Write config, index and shards; every weight is 1."""
    item = 2 if format == "bf16" else 1
    width = max(round(size * 1e9 / (layers * experts * 3 * HIDDEN * item) / BLOCK), 1) * BLOCK
    config = {
        "model_type": "qwen3_moe", "num_hidden_layers": layers, "num_experts": experts, "num_experts_per_tok": 8,
        "hidden_size": HIDDEN, "norm_topk_prob": True, "hidden_act": "silu", "dtype": "bfloat16",
    }  # fmt: skip
    if format == "fp8":
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    weight_map = {}
    for layer in range(layers):
        shard, stem = f"layer-{layer}.safetensors", f"model.layers.{layer}.mlp."
        tensors = {stem + "gate.weight": ("BF16", (experts, HIDDEN), b"\x80\x3f")}
        for expert in range(experts):
            for name, shape in (("down", (HIDDEN, width)), ("gate", (width, HIDDEN)), ("up", (width, HIDDEN))):
                name = f"{stem}experts.{expert}.{name}_proj.weight"
                if format == "fp8":
                    tensors[name] = ("F8_E4M3", shape, b"\x38")
                    scale = tuple(extent // BLOCK for extent in shape)
                    tensors[name + "_scale_inv"] = ("F32", scale, b"\0\0\x80\x3f")
                else:
                    tensors[name] = ("BF16", shape, b"\x80\x3f")
        write_shard(folder / shard, tensors)
        weight_map |= dict.fromkeys(tensors, shard)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def write_shard(path, tensors):
    header, position = {}, 0
    for name, (dtype, shape, one) in tensors.items():
        end = position + int(np.prod(shape)) * len(one)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for _, shape, one in tensors.values():
            file.write(one * int(np.prod(shape)))
        file.flush()
        os.fsync(file.fileno())


def read_plainly(files):
    buffer = memoryview(bytearray(PLAIN_BYTES))
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def stream(checkpoint, model):
    for _ in stream_layers(checkpoint, model, model.layers):
        pass


def drop_from_cache(files):
    for path in files:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def time_read(read, files, cold):
    if cold:
        drop_from_cache(files)
    start = time.perf_counter()
    read()
    return time.perf_counter() - start


def peak_memory():
    """Bytes; ru_maxrss is in KiB on Linux."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--size", default=8.0, help="GB of weights.")
@click.option("--layers", default=8)
@click.option("--experts", default=64)
@click.option("--format", type=click.Choice(("bf16", "fp8")), default="bf16")
@click.option("--repeats", default=3)
@click.option("--readers", default=loading.READERS, help="Threads that read.")
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(folder, size, layers, experts, format, repeats, readers, output):
    loading.READERS = readers
    make_checkpoint(folder, size, layers, experts, format)
    checkpoint = open_checkpoint(folder)
    model = describe(checkpoint)
    files = sorted(folder.glob("*.safetensors"))
    total = sum(path.stat().st_size for path in files)
    jax.block_until_ready(jax.numpy.zeros(8))  # the runtime itself
    before = peak_memory()
    readings = {"plain": lambda: read_plainly(files), "streamed": lambda: stream(checkpoint, model)}
    stream_once = time_read(readings["streamed"], files, cold=False)
    memory = peak_memory() - before
    seconds = {
        f"{name}, {state}": []
        for state in ("cold", "warm")
        for name in readings
    }  # fmt: skip
    for state in ("cold", "warm"):
        for _ in range(repeats):
            for name, read in readings.items():
                seconds[f"{name}, {state}"].append(time_read(read, files, cold=state == "cold"))
    rates = {name: total / min(taken) / 1e9 for name, taken in seconds.items()}
    shares = {state: rates[f"streamed, {state}"] / rates[f"plain, {state}"] for state in ("cold", "warm")}
    layer_bytes = total // layers
    for name, rate in rates.items():
        click.echo(f"{name:15} {rate:6.2f} GB/s")
    click.echo(f"streamed is {shares['cold']:.0%} of plain cold, {shares['warm']:.0%} warm")
    click.echo(f"peak host memory {memory / 1e9:.2f} GB more than before; a layer is {layer_bytes / 1e9:.2f} GB")
    if output:
        device = jax.devices()[0]
        result = {
            "command": f"python examples/benchmarks/read_rate.py FOLDER --size {size:g} --layers {layers} "
            f"--experts {experts} --format {format} --repeats {repeats} --readers {readers}",
            "date": str(date.today()),
            "device": device.device_kind,
            "cpu_count": os.cpu_count(),
            "platform": platform.machine(),
            "jax": jax.__version__,
            "bytes": total,
            "bytes_per_layer": layer_bytes,
            "first_stream_seconds": stream_once,
            "seconds": seconds,
            "gigabytes_per_second": rates,
            "share_of_plain": shares,
            "peak_host_bytes": memory,
        }
        output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
