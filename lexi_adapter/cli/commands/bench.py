"""`lexi-adapter bench`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from lexi_adapter.cli.console import conclude, echo, print_table
from lexi_adapter.cli.options import (
    Chosen,
    FiniteRange,
    list_read,
    read_engine_options,
    takes_engine_options,
    takes_locks,
    takes_variants,
)
from lexi_adapter.cli.progress import Progress, format_time
from lexi_adapter.engines.options import check_switchable
from lexi_adapter.engines.workload import BALANCED, DECODE_HEAVY, PREFILL_HEAVY, Workload, parse_workload
from lexi_adapter.environment import describe_call
from lexi_adapter.files import check_writable, write_atomically, write_json
from lexi_adapter.model.folder import has_weights


@click.command()
@click.argument("model")
@takes_variants
@click.option(
    "--each-k",
    is_flag=True,
    show_default=False,
    help="Also every --drop-experts and --narrow-experts at every --uniform-k: the paper's figure 2.",
)
@click.option(
    "--workload",
    "workloads",
    multiple=True,
    metavar="BATCHxINPUTxOUTPUT",
    help="Repeat it.  [default: 16x512x512, 16x1024x16, 16x32x512]",
    show_default=False,
)
@click.option("--rounds", type=click.IntRange(1), default=3, help="In each, every variant runs every workload.")
@click.option("--seconds", type=FiniteRange(0), default=0.5, help="A round repeats a short workload for so long.")
@click.option(
    "--in-place",
    is_flag=True,
    show_default=False,
    help="One engine for all variants that differ in k alone: its k is changed while it runs, with its CUDA graphs.",
)
@click.option(
    "--together",
    type=click.IntRange(1),
    help="Engines on the card at once, whose runs are interleaved.  [default: all]",
    show_default=False,
)
@click.option(
    "--kernels",
    is_flag=True,
    show_default=False,
    help="Record every variant's kernels too: time of communication, MoE layers, attention and the rest.",
)
@click.option("--seed", default=0, help="Of the random mixed k.")
@takes_engine_options
@takes_locks
@click.option("-o", "--output", default="bench.json", help="The results, as JSON; written after every round.")
@click.option("--plot", metavar="FILE", help="Also a figure: a .png, .svg or .pdf.")
@click.option(
    "--plot-style",
    type=click.Choice(["bars", "lines"]),
    default="bars",
    help="bars: one a variant; lines: over active experts, one a pruning level, as in the paper's figure 2.",
)
def bench(
    model: str,
    chosen: Chosen,
    workloads: Sequence[str],
    rounds: int,
    seconds: float,
    in_place: bool,
    together: int | None,
    output: str,
    plot: str | None,
    plot_style: str,
    each_k: bool,
    seed: int,
    kernels: bool,
    locks: Sequence[str],
    **engine: Any,
) -> None:
    """Measure the throughput of MODEL, a folder, beside variants of it, in vLLM on this machine.

    Batches of random tokens with fixed lengths; (input + output) tokens over end-to-end seconds.

    \b
    Examples:
      lexi-adapter bench weights/ --allocation allocation.json --budget-share 50% -o bench.json --plot bench.pdf
      lexi-adapter bench config/ --load-format dummy --uniform-k 2 --uniform-k 4 --drop-experts 25% --each-k \\
          --plot figure2.pdf --plot-style lines
    """
    from lexi_adapter.speed import throughput

    read = [model, *list_read(chosen.files), *chosen.folders, *locks]
    figure_format = _check_outputs(output, plot, read)
    parsed = _parse_workloads(workloads)
    options = read_engine_options(**engine)
    variants = chosen.make(model, load_format=options["load_format"], seed=seed, each_k=each_k)
    if in_place:
        check_switchable(options)
    made_by = describe_call()
    echo(_estimate(len(variants), parsed, rounds, seconds), err=True)
    document = throughput.measure(
        variants,
        parsed,
        rounds=rounds,
        together=together,
        in_place=in_place,
        engine=options,
        report=lambda document: write_json(output, {**document, "made_by": made_by}, apart_from=[*read, plot]),
        locks=locks,
        seconds=seconds,
        kernels=kernels,
        progress=Progress("turns"),
    )
    if figure_format:
        from lexi_adapter.cli.figures import draw_bench, draw_bench_lines

        draw = draw_bench if plot_style == "bars" else draw_bench_lines
        write_atomically(plot, draw(document, figure_format), apart_from=[*read, output])
    _show(document, output, model, chosen.files)


def _estimate(variants: int, workloads: Sequence[Workload], rounds: int, seconds: float) -> str:
    names = ", ".join(map(str, workloads))
    least = format_time(variants * len(workloads) * rounds * seconds)
    return (
        f"{variants} variants, {rounds} rounds of {names} (batch x input x output tokens), at least {seconds:g} s "
        f"each: more than {least}, and the start of the engines"
    )


def _show(document: Mapping[str, Any], output: str, model: str, files: Sequence[str]) -> None:
    from lexi_adapter.cli.tables import tabulate_bench, tabulate_compensation, tabulate_kernels

    print_table(tabulate_bench(document))
    if (compensation := tabulate_compensation(document)) is not None:
        print_table(compensation)
    if "kernels" in document:
        print_table(tabulate_kernels(document))
    others = [line for line in document["summary"] if line["variant"] != document["variants"][0]["name"]]
    best = max(others, key=lambda line: line["speedup"], default=None)
    found = f"; fastest: {best['variant']}, {best['speedup']:.2f} times the base at {best['workload']}" if best else ""
    allocations = [word for file in files for word in ("--allocation", file)]
    evaluate = ["lexi-adapter", "eval", model, "--task", "passkey", *allocations]
    real = [evaluate, ["lexi-adapter", "tradeoff", "eval.json", output]] if has_weights(Path(model)) else []
    conclude(f"{output}{found}", *real)


def _check_outputs(output: str, plot: str | None, read: Sequence[str]) -> str | None:
    """The format of the figure, if there is one. AdapterError for an output that cannot be written."""
    from lexi_adapter.cli.figures import find_format

    check_writable(output, apart_from=[*read, plot])
    if not plot:
        return None
    check_writable(plot, apart_from=[*read, output])
    return find_format(plot)


def _parse_workloads(texts: Sequence[str]) -> list[Workload]:
    """The workloads without repetitions, or the default ones."""
    parsed = [parse_workload(text) for text in texts]
    return list(dict.fromkeys(parsed)) or [BALANCED, PREFILL_HEAVY, DECODE_HEAVY]
