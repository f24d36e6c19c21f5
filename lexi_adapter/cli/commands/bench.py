"""`lexi-adapter bench`."""

from collections.abc import Sequence
from typing import Any

import click

from lexi_adapter.allocation import read_allocation
from lexi_adapter.cli.console import print_table
from lexi_adapter.cli.options import (
    PRUNED_SHARE,
    SHARE,
    FiniteRange,
    read_engine_options,
    takes_engine_options,
    takes_locks,
)
from lexi_adapter.engines.workload import BALANCED, DECODE_HEAVY, PREFILL_HEAVY, Workload, parse_workload
from lexi_adapter.environment import describe_call
from lexi_adapter.files import check_writable, write_atomically, write_json


@click.command()
@click.argument("model")
@click.option("--allocation", "files", multiple=True, metavar="FILE", help="An allocation to compare; repeat it.")
@click.option(
    "--budget-share",
    "shares",
    multiple=True,
    type=SHARE,
    help="A random mixed k and the uniform k, at this share of the model's own budget; repeat it.",
)
@click.option(
    "--drop-experts",
    "dropped",
    multiple=True,
    type=PRUNED_SHARE,
    help="Inter-pruning by config: drop this share of the experts; repeat it.",
)
@click.option(
    "--narrow-experts",
    "narrowed",
    multiple=True,
    type=PRUNED_SHARE,
    help="Intra-pruning by config: drop this share of their width; repeat it.",
)
@click.option(
    "--folder", "folders", multiple=True, help="Another folder to compare, such as a pruned checkpoint; repeat it."
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
@click.option("--plot", help="Also a bar chart, like the paper's figure 2: a .png, .svg or .pdf.")
def bench(
    model: str,
    files: Sequence[str],
    workloads: Sequence[str],
    rounds: int,
    seconds: float,
    in_place: bool,
    together: int | None,
    output: str,
    plot: str | None,
    shares: Sequence[float],
    dropped: Sequence[float],
    narrowed: Sequence[float],
    folders: Sequence[str],
    seed: int,
    kernels: bool,
    locks: Sequence[str],
    **engine: Any,
) -> None:
    """Measure the throughput of MODEL, a folder, beside variants of it, in vLLM on this machine.

    Batches of random tokens with fixed lengths; (input + output) tokens over end-to-end seconds.
    """
    from lexi_adapter.cli.figures import draw_bench
    from lexi_adapter.cli.tables import tabulate_bench, tabulate_kernels
    from lexi_adapter.model.variants import make_variants
    from lexi_adapter.speed import throughput

    read = [model, *files, *folders, *locks]
    figure_format = _check_outputs(output, plot, read)
    parsed_workloads = _parse_workloads(workloads)
    options = read_engine_options(**engine)
    variants = make_variants(
        model,
        load_format=options["load_format"],
        allocations={file: read_allocation(file) for file in files},
        shares=shares,
        dropped=dropped,
        narrowed=narrowed,
        folders=folders,
        seed=seed,
    )
    made_by = describe_call()
    document = throughput.measure(
        variants,
        parsed_workloads,
        rounds=rounds,
        together=together,
        in_place=in_place,
        engine=options,
        report=lambda document: write_json(output, {**document, "made_by": made_by}, apart_from=[*read, plot]),
        locks=locks,
        seconds=seconds,
        kernels=kernels,
    )
    if plot:
        write_atomically(plot, draw_bench(document, figure_format), apart_from=[*read, output])
    print_table(tabulate_bench(document))
    if kernels:
        print_table(tabulate_kernels(document))


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
