"""`lexi-adapter latency`."""

from collections.abc import Sequence
from typing import Any

import click

from lexi_adapter.cli.console import echo, print_table
from lexi_adapter.cli.options import read_engine_options, takes_engine_options, takes_locks
from lexi_adapter.environment import describe_call
from lexi_adapter.files import check_writable, write_json


@click.command()
@click.argument("model")
@click.option(
    "--workload",
    "workloads",
    multiple=True,
    metavar="BATCHxINPUTxOUTPUT",
    default=("16x512x128",),
    help="Measure steps of BATCH x INPUT tokens and of BATCH tokens; repeat it.",
)
@click.option("--rounds", type=click.IntRange(1), default=3)
@click.option(
    "--checks",
    type=click.IntRange(0),
    default=0,
    help="Random allocations to run end to end, against the prediction.",
)
@takes_engine_options
@takes_locks
@click.option("-o", "--output", default="cost.json", help="The cost table, for lexi-search search --cost.")
def latency(
    model: str, workloads: Sequence[str], rounds: int, checks: int, output: str, locks: Sequence[str], **engine: Any
) -> None:
    """Measure the time of MODEL's MoE layers at each k on this card, as a cost table for a search."""
    from lexi_adapter.cli.tables import tabulate_checks, tabulate_latency
    from lexi_adapter.engines.workload import parse_workload
    from lexi_adapter.model.shapes import describe_folder
    from lexi_adapter.speed import latency as measuring

    check_writable(output, apart_from=[model, *locks])
    options = read_engine_options(**engine)
    identity = describe_folder(model, options["load_format"])
    steps, checked, facts = measuring.measure(
        model,
        identity,
        [parse_workload(text) for text in workloads],
        rounds=rounds,
        checks=checks,
        engine=options,
        progress=lambda text: echo(text, err=True),
        locks=locks,
    )
    write_json(
        output, measuring.make_document(identity, steps, checked, facts, describe_call()), apart_from=[model, *locks]
    )
    print_table(tabulate_latency(steps))
    if checked:
        print_table(tabulate_checks(checked))
