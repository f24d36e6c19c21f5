"""`lexi-adapter latency`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from lexi_adapter.cli.console import conclude, echo, print_table
from lexi_adapter.cli.options import read_engine_options, takes_engine_options, takes_locks
from lexi_adapter.cli.progress import Progress
from lexi_adapter.engines.workload import STEPS, fit, parse_workload
from lexi_adapter.environment import describe_call
from lexi_adapter.files import check_writable, write_json
from lexi_adapter.model.folder import find_limit, read_config


@click.command()
@click.argument("model")
@click.option(
    "--workload",
    "workloads",
    multiple=True,
    metavar="BATCHxINPUTxOUTPUT",
    help="Measure steps of BATCH x INPUT tokens and of BATCH tokens; repeat it.  [default: 16x1024x128, or with "
    "as much input as the model has positions for]",
    show_default=False,
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
    """Measure the time of MODEL's MoE layers at each k on this card, as a cost table for a search.

    One engine runs every k in turn, so vLLM must not have compiled k into the model, as its build for CPUs does.

    \b
    Examples:
      lexi-adapter latency weights/ -o cost.json
      lexi-adapter latency config/ --load-format dummy --workload 16x1024x1024 --workload 64x512x256 --rounds 5
    """
    from lexi_adapter.cli.tables import tabulate_checks, tabulate_latency
    from lexi_adapter.model.shapes import describe_folder
    from lexi_adapter.speed import latency as measuring

    check_writable(output, apart_from=[model, *locks])
    options = read_engine_options(**engine)
    identity = describe_folder(model, options["load_format"])
    parsed = [parse_workload(text) for text in workloads] or [fit(STEPS, find_limit(read_config(Path(model))))]
    steps, checked, facts = measuring.measure(
        model,
        identity,
        parsed,
        rounds=rounds,
        checks=checks,
        engine=options,
        progress=Progress("states"),
        locks=locks,
    )
    write_json(
        output, measuring.make_document(identity, steps, checked, facts, describe_call()), apart_from=[model, *locks]
    )
    print_table(tabulate_latency(steps))
    if checked:
        print_table(tabulate_checks(checked))
    for line in measuring.find_dips(steps):
        echo(f"note: {line}", err=True)
    workload, half = parsed[0], max(1, identity.top_k // 2)
    whole, less = (
        measuring.predict(steps, workload, dict.fromkeys(identity.moe_layers, k)) for k in (identity.top_k, half)
    )
    mix = f"{workload.batch}:{workload.output_length - 1},{workload.batch * workload.input_length}:1"
    conclude(
        f"{output}; {workload} takes {whole:.3g} s, and with k = {half} in every layer {less:.3g} s",
        ["lexi-search", "search", "profile.json", "--cost", output, "--mix", mix, "--target-speedup", "1.2"],
    )
