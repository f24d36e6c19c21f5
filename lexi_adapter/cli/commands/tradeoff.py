"""`lexi-adapter tradeoff`."""

from collections.abc import Sequence

import click

from lexi_adapter.cli.console import conclude, echo, print_table
from lexi_adapter.cli.options import Chosen, takes_variants
from lexi_adapter.files import check_writable, write_atomically


@click.command()
@click.argument("evaluation")
@click.argument("benchmark")
@click.option("--task", "tasks", multiple=True, help="Only this task, by its name in EVALUATION's table; repeat it.")
@click.option("--workload", "workloads", multiple=True, help="Only this workload of BENCHMARK; repeat it.")
@takes_variants
@click.option("-o", "--output", default="tradeoff.png", help="The figure: a .png, .svg or .pdf.")
def tradeoff(
    evaluation: str,
    benchmark: str,
    tasks: Sequence[str],
    workloads: Sequence[str],
    output: str,
    chosen: Chosen,
) -> None:
    """Draw quality over throughput, like the paper's figures 4 to 8.

    EVALUATION is the JSON of `lexi-adapter eval`, BENCHMARK that of `lexi-adapter bench`. Variants are the same if they
    have the same name, or the same k in every layer. All are drawn, or the base and those that options name as they
    were named to eval or bench.

    \b
    Examples:
      lexi-adapter tradeoff eval.json bench.json -o tradeoff.pdf
      lexi-adapter tradeoff eval.json bench.json --workload 16x512x512 --allocation allocation.json --uniform-k 4
    """
    from lexi_adapter.cli.figures import draw_tradeoff, find_format
    from lexi_adapter.cli.tables import tabulate_tradeoff
    from lexi_adapter.evaluation.results import read_results
    from lexi_adapter.evaluation.tradeoff import join, match

    check_writable(output, apart_from=[evaluation, benchmark])
    file_format = find_format(output)
    quality = read_results(evaluation, "lexi-eval")
    speed = read_results(benchmark, "lexi-bench")
    panels = join(quality, speed, tasks=tasks, workloads=workloads, wanted=chosen.names)
    drawn = draw_tradeoff(str(quality["model"]), panels, file_format)
    write_atomically(output, drawn, apart_from=[evaluation, benchmark])
    matched = match(quality, speed)
    left_out = [v["name"] for v in quality["variants"] if v["name"] not in matched and chosen.names(v["name"])]
    if left_out:
        echo(f"without throughput, and so left out: {', '.join(left_out)}", err=True)
    print_table(tabulate_tradeoff(panels))
    others = [point for point in panels[0].points if point.kind != "base"]
    best = max(others, key=lambda point: point.throughput, default=panels[0].points[0])
    served = next((point.variant for point in others if point.kind == "allocation"), "allocation.json")
    conclude(
        f"{output}; fastest at {panels[0].workload}: {best.variant}, {panels[0].metric} {best.value:.4g}",
        ["lexi-search", "export", served, "--to", "vllm", "--model", quality["model"], "-o", "served/"],
    )
