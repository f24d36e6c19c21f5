"""`lexi-search auto`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from lexi_search.artifacts.serialisation import read_cost_table
from lexi_search.cli.console import Interruption, conclude, echo, prepare_environment, print_table
from lexi_search.cli.options import dtype_option, parse_budget, parse_loss, parse_mix
from lexi_search.cli.progress import Reporter, make_progress
from lexi_search.errors import InputError

if TYPE_CHECKING:
    from lexi_search.allocation.auto import Outcome
    from lexi_search.profiling.session import Observer

CARDS = ("a100", "h100", "h200", "b200", "l4", "l40s", "rtx4090", "mi300x")
REPORTS = ("report.html", "report.md")


EXAMPLES = """\b
Examples:
  lexi-search auto weights/ --budget 62% -o leaner
  lexi-search auto weights/ --cost cost.json --mix 16 --target-speedup 1.2 -o faster
  lexi-search auto weights/ --max-loss 20% -o good
"""


@click.command(epilog=EXAMPLES)
@click.argument("weights")
@click.option("-o", "--output", required=True, help="Model folder to make, for vLLM.")
@click.option("--budget", help="Experts per token over all layers: a sum (80), a share (50%) or an average (k=4).")
@click.option("--target-speedup", type=float, help="Times as fast as the model's own k, such as 1.3.")
@click.option(
    "--max-loss",
    metavar="LOSS",
    help="The most that the layers may lose in sum, in the profile's unit (nats per token by default), or a share of "
    "what they lose in sum with one expert each: 2%. The fastest allocation within it is taken.",
)
@click.option("--cost", "cost_file", help="Cost table that `lexi-adapter latency` wrote.  [default: an estimate]")
@click.option("--mix", help="With --cost: steps of the table by tokens, and how many, such as 16:1024,16384:1.")
@click.option("--card", type=click.Choice(CARDS), help="Without --cost: GPU to estimate the speed of.  [default: h100]")
@click.option("--concurrency", type=click.IntRange(1), default=16, help="For the estimate: sequences in a decode step.")
@click.option("--context", type=click.IntRange(1), default=1024, help="For the estimate: tokens behind each sequence.")
@click.option("--input", type=click.Choice(("weights", "paper")), default="weights", help="As for `profile`.")
@click.option("--text", metavar="FILE", help="As for `profile`; --judge takes as much again of what follows there.")
@click.option("--batch", default=4, help="As for `profile`: sequences per iteration.")
@click.option("--length", default=512, help="As for `profile`: tokens per sequence.")
@click.option("--samples", type=int, help="As for `profile`: tokens of text.  [default: 4096; paper: 1048576]")
@click.option("--gate-exponent", metavar="NUMBER|auto", help="As for `profile`.")
@click.option("--compensation", type=click.Choice(("full", "exponent", "none")), help="As for `profile`.")
@click.option("--rank", type=click.IntRange(1), help="As for `profile`.  [default: 32]")
@click.option("--seed", default=0, type=click.IntRange(0, 2**32 - 1), help="Seed of the profile's text.")
@dtype_option
@click.option("--paper/--no-paper", default=True, help="Compare with the paper's method, which profiles a second time.")
@click.option("--judge/--no-judge", default=True, help="Measure the whole model under the allocation and its like.")
@click.option("--force", is_flag=True, help="Replace what an earlier run for another target left; the profile stays.")
@click.option("--restart", is_flag=True, help="Throw away the layers that a run cut short has finished.")
def auto(
    weights: str,
    output: str,
    budget: str | None,
    target_speedup: float | None,
    max_loss: str | None,
    cost_file: str | None,
    mix: str | None,
    card: str | None,
    **options: Any,
) -> None:
    """Make a folder that vLLM serves, of the model in the folder WEIGHTS: profile, search, judge, export.

    OUTPUT.lexi beside OUTPUT keeps profile.json, allocation.json and what else led there, and report.html and
    report.md: one page that says what was chosen, what it loses, how sure that is, and how to serve, check and roll
    back. Speed is measured if --cost is given, else an estimate from bytes and FLOPs.

    A loss is the divergence of predictions in nats per token, measured one layer at a time and summed; the report says
    what the whole model loses.

    Cut short, the same command goes on; over again, it takes seconds. Another target with --force takes the profile
    that is there. Without --force nothing is replaced, and another model's files never are.
    """
    wishes = {"--budget": budget, "--target-speedup": target_speedup, "--max-loss": max_loss}
    given = [name for name, value in wishes.items() if value is not None]
    if len(given) != 1:
        raise InputError(f"give exactly one of {', '.join(wishes)}, not {' and '.join(given) or 'none'}")
    if cost_file is not None and card is not None:
        raise InputError("--card is for an estimate, and --cost is measured: give one of them")
    if mix is not None and cost_file is None:
        raise InputError("--mix needs --cost, the table whose steps it mixes")
    loss = None if max_loss is None else parse_loss(max_loss)
    table = None if cost_file is None else read_cost_table(cost_file)
    steps = parse_mix(mix) if mix else None
    prepare_environment()
    from lexi_search.allocation.auto import prepare_checkpoint
    from lexi_search.allocation.targets import Target

    if budget is not None:
        target = Target("budget", _count_experts(budget, weights))
    else:
        target = Target("speedup", target_speedup) if loss is None else Target("max_loss", *loss)
    if card is not None:
        options["card"] = card
    try:
        outcome = prepare_checkpoint(weights, output, target, table=table, mix=steps, listen=_listen, **options)
    except KeyboardInterrupt:
        raise Interruption("interrupted; what is finished is kept, and the same command goes on from there") from None
    _report(outcome, options["rank"])


def _count_experts(budget: str, weights: str) -> int:
    """The experts of a budget of the model in the folder `weights`."""
    from lexi_search.checkpoint.folder import require_folder
    from lexi_search.checkpoint.reader import open_checkpoint
    from lexi_search.models.model import describe

    model = describe(open_checkpoint(require_folder(weights)))
    return parse_budget(budget, layers=len(model.layers), top_k=model.top_k)


@contextmanager
def _listen(step: str) -> "Iterator[Observer]":
    """The observer of a step, shown on stderr while the step runs."""
    with make_progress() as progress:
        yield Reporter(progress, from_text=step != "paper", step=f"{step}: ")


def _report(outcome: "Outcome", rank: int | None) -> None:
    """Write both forms of the report; say what was decided, and what to type next; `rank` was asked for."""
    from lexi_search.cli.report.facts import gather
    from lexi_search.cli.report.pages import format_html, format_markdown
    from lexi_search.cli.tables import explain_fallbacks, explain_rank, tabulate_rows

    for name, text in zip(REPORTS, (format_html(outcome), format_markdown(outcome)), strict=True):
        outcome.job.keep(name, text.encode())
    if line := explain_rank(outcome.profile, rank):
        echo(line, err=True)
    facts = gather(outcome)
    print_table(tabulate_rows(facts.columns, facts.rows, title=facts.title))
    if line := explain_fallbacks({str(outcome.result.allocation.budget): outcome.result}):
        echo(line)
    echo(facts.verdict)
    echo(f"report: {outcome.job.folder / REPORTS[0]} and {REPORTS[1]}")
    conclude(facts.decision, outcome.command)
