"""What a compensation costs in vLLM: throughput with it over throughput of the same k without.

    python examples/benchmarks/compensation_cost.py CONFIG... [--share 50%] [-o compensation_cost.json]

Each CONFIG is a folder with a config.json; weights and maps are random. One engine a model is started under an
allocation with a gate exponent and maps, and its layers are then switched, round by round, between both and what vLLM
does by itself at the same k. Before that, on a GPU, the kernels are timed alone against those whose place they take, in
CUDA graphs of 50 calls, with the time for which each launch keeps the host, and compared with their definition.
"""

import json
import tempfile
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from statistics import fmean, median, stdev

import click
import torch
from cuda_graphs import time_calls, time_launches
from safetensors.torch import save_file

from lexi_adapter.allocation import CompensationFile
from lexi_adapter.engines.workload import parse_workload
from lexi_adapter.environment import describe_call
from lexi_adapter.files import write_json
from lexi_adapter.model.compensation import FORMAT, VERSION
from lexi_adapter.model.folder import read_config
from lexi_adapter.model.shapes import RANDOM, describe_folder, find_family
from lexi_adapter.model.variants import UNCOMPENSATED, Variant, allocate, draw_top_k
from lexi_adapter.serving.kernels.correction import correct, find_features
from lexi_adapter.speed import throughput

EXPONENT, RANK = 0.5, 32
WORKLOADS = ("16x32x64", "16x1024x8", "256x32x64", "256x256x4")  # decode- and prefill-heavy at both batches
SIZES = (16, 256, 8192)  # tokens for the kernels alone
TIMES = {"us": time_calls, "host_us": time_launches}
HIDDEN, EXPERTS, OWN, KEPT = 2048, 128, 8, 4


def draw_allocation(folder, share, root):
    """A random k for every layer that spends `share` of the budget, with random maps in a file under `root`."""
    model = describe_folder(folder, RANDOM)
    _, text = find_family(read_config(Path(folder)))
    top_k = draw_top_k(model, round(share * model.top_k * len(model.moe_layers)), seed=0)
    generator, tensors = torch.Generator().manual_seed(0), {}
    shapes = {"A": (RANK, 3 * model.num_experts), "B": (text["hidden_size"], RANK), "c": (text["hidden_size"],)}
    for layer, k in top_k.items():
        if k < model.top_k:
            for part, shape in shapes.items():
                value = 0.01 * torch.randn(shape, generator=generator)
                tensors[f"layers.{layer}.top_k.{k}.{part}"] = value if part == "c" else value.bfloat16()
    described = {"model_type": model.model_type, "router_sha256": model.router_sha256, "rank": str(RANK)}
    path = Path(root) / f"{Path(folder).name}.safetensors"
    save_file(tensors, path, metadata={"format": FORMAT, "version": VERSION, **described})
    file = CompensationFile(path.name, RANK, sha256(path.read_bytes()).hexdigest())
    return replace(allocate(model, top_k), gate_exponent=EXPONENT, compensation=file, folder=str(root))


def measure(folder, share, workloads, rounds, kernels, engine, locks, report):
    with tempfile.TemporaryDirectory() as root:
        allocation = draw_allocation(folder, share, root)
        plain = allocate(allocation.model, allocation.top_k)
        variants = (
            Variant("compensated", folder, allocation=allocation),
            Variant("compensated" + UNCOMPENSATED, folder, allocation=plain),
        )
        return throughput.measure(
            variants,
            workloads,
            rounds=rounds,
            together=None,
            in_place=True,
            engine={"load_format": RANDOM, "parallel": {}, **engine},
            report=report,
            locks=locks,
            seconds=0.5,
            kernels=kernels,
        )


def find_ratios(document):
    """Workload -> throughput with compensation over that without, of the rounds: median, mean, its standard error.

    Where kernels were recorded, `gpu` is the same of the time in which any of them ran.
    """
    with_it, without = (variant["name"] for variant in document["variants"])
    spent = {}
    for run in document["runs"]:
        spent.setdefault((run["workload"], run["variant"]), {}).setdefault(run["round"], []).append(run["seconds"])
    busy = {(line["variant"], line["workload"]): line["busy"] for line in document.get("kernels", ())}
    ratios = {}
    for workload in document["workloads"]:
        ours, theirs = (
            {turn: fmean(seconds) for turn, seconds in spent[workload, name].items()} for name in (with_it, without)
        )
        rounds = [theirs[turn] / ours[turn] for turn in sorted(ours.keys() & theirs.keys())]
        error = stdev(rounds) / len(rounds) ** 0.5 if len(rounds) > 1 else None
        ratios[workload] = {"rounds": len(rounds), "median": median(rounds), "mean": fmean(rounds), "error": error}
        whole = parse_workload(workload)
        recorded = str(replace(whole, output_length=min(whole.output_length, throughput.RECORDED_TOKENS)))
        if (with_it, recorded) in busy:
            ratios[workload]["gpu"] = busy[without, recorded] / busy[with_it, recorded]
    return ratios


def time_kernels(tokens):
    """Microseconds of the kernels and of those whose place they take, and differences from the definition."""
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.fused_moe.router.fused_topk_router import fused_topk

    from lexi_adapter.serving.kernels import triton_correction as kernels

    torch.manual_seed(0)
    options = {"device": "cuda", "dtype": torch.bfloat16}
    logits, hidden = torch.randn(tokens, EXPERTS, **options), torch.randn(tokens, HIDDEN, **options)
    outputs = torch.randn(tokens, KEPT, HIDDEN, **options)  # of a token's experts
    A, B = torch.randn(3 * EXPERTS, RANK, **options), torch.randn(RANK, HIDDEN, **options)
    c, output = torch.randn(HIDDEN, device="cuda"), torch.empty_like(hidden)
    rule = {"top_k": KEPT, "exponent": EXPONENT}
    softmax = rule | {"own_top_k": OWN, "renormalize": True, "scale": 1.0, "ids_dtype": torch.int32}
    base, chosen, _ = fused_topk(hidden, logits, OWN, True)
    weights, ids, sums = kernels.route(logits, A, **softmax)
    phi = find_features(logits, base, chosen, chosen[:, :KEPT])
    kernels.add(outputs, sums, B, c, output)
    expected = correct(outputs.float().sum(1), phi, A.T, B.T, c)
    behind = kernels.narrow(logits, base, chosen, A, **rule, ranked=False)
    calls = {
        "router": lambda: fused_topk(hidden, logits, KEPT, True),
        "route": lambda: kernels.route(logits, A, **softmax),
        "narrow": lambda: kernels.narrow(logits, base, chosen, A, **rule, ranked=False),
        "sum": lambda: ops.moe_sum(outputs, output),
        "sum_and_add": lambda: kernels.add(outputs, sums, B, c, output),
        "copy": lambda: output.copy_(hidden),
        "copy_and_add": lambda: kernels.add(hidden, sums, B, c, output),
    }
    return {
        "tokens": tokens,
        "same_experts": float((ids == chosen[:, :KEPT]).float().mean()),
        "relative_error": float((output - expected).abs().max() / expected.abs().max()),
        "relative_error_behind_a_router": float((behind[2] - sums).abs().max() / sums.abs().max()),
    } | {f"{name}_{unit}": find_time(call) for name, call in calls.items() for unit, find_time in TIMES.items()}


@click.command(help=__doc__.splitlines()[0])
@click.argument("folders", nargs=-1)
@click.option("--share", type=click.FloatRange(0, 1, min_open=True), default=0.5, help="Of the model's own budget.")
@click.option("--workload", "workloads", multiple=True, default=WORKLOADS, show_default=True)
@click.option("--rounds", default=4, show_default=True)
@click.option("--kernels", is_flag=True, help="Also the time of kernels by kind, of every variant and workload.")
@click.option("--alone/--not-alone", default=True, help="First, on a GPU, the compensation's kernels by themselves.")
@click.option("--engine", default="{}", help="Other arguments of vllm.LLM, as JSON.")
@click.option("--lock", "locks", multiple=True, help="A file for a card that others use too.")
@click.option("-o", "--output", default="compensation_cost.json", show_default=True)
def main(folders, share, workloads, rounds, kernels, alone, engine, locks, output):
    document = {"made_by": describe_call("python examples/benchmarks/compensation_cost.py"), "models": {}}
    if alone and torch.cuda.is_available():
        document["kernels"] = [time_kernels(tokens) for tokens in SIZES]
        for line in document["kernels"]:
            click.echo(json.dumps(line))
        write_json(output, document)
    for folder in folders:

        def report(measured, folder=folder):
            ratios = find_ratios(measured) if len(measured["variants"]) == 2 else {}
            document["models"][Path(folder).name] = {"ratios": ratios, "bench": measured}
            write_json(output, document)

        measure(folder, share, [*map(parse_workload, workloads)], rounds, kernels, json.loads(engine), locks, report)
        for workload, line in document["models"][Path(folder).name]["ratios"].items():
            error = "" if line["error"] is None else f" ± {line['error']:.4f}"
            found = f"{line['mean']:.4f}{error}, median {line['median']:.4f} of {line['rounds']} rounds"
            click.echo(f"{Path(folder).name}, {workload}: {found}, of the throughput of the same k without")


if __name__ == "__main__":
    main()
