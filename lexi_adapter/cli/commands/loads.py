"""`lexi-adapter loads`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from lexi_adapter.allocation import read_allocation
from lexi_adapter.cli.console import conclude, print_table
from lexi_adapter.cli.options import PRUNED_SHARE, list_read, read_engine_options, takes_engine_options
from lexi_adapter.cli.progress import Progress
from lexi_adapter.environment import describe_call
from lexi_adapter.errors import AdapterError
from lexi_adapter.files import MOST_DATA_BYTES, check_writable, read_json, write_json
from lexi_adapter.model.folder import find_vocabulary, read_config
from lexi_adapter.tasks.texts import check_tokens, encode, load_tokenizer, read_text


@click.command()
@click.argument("model")
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False),
    help="A text, cut into prompts with the model's tokenizer.",
)
@click.option(
    "--tokens",
    type=click.Path(exists=True, dir_okay=False),
    help="Or a JSON list of prompts, each a list of token ids.",
)
@click.option("--prompts", type=click.IntRange(1), default=16, help="Prompts to cut the text into.")
@click.option("--length", type=click.IntRange(1), default=256, help="Tokens of such a prompt.")
@click.option("--allocation", "files", multiple=True, metavar="FILE", help="An allocation to compare; repeat it.")
@click.option(
    "--drop-experts",
    "dropped",
    multiple=True,
    type=PRUNED_SHARE,
    help="Inter-pruning: this share of the experts, the least used, can no longer be chosen, such as 25%; repeat it.",
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
    """Count the tokens of a text that go to each expert of MODEL, with fewer active experts or fewer experts.

    \b
    Examples:
      lexi-adapter loads weights/ --text prose.txt --allocation allocation.json
      lexi-adapter loads weights/ --tokens prompts.json --drop-experts 25%
    """
    from lexi_adapter.cli.tables import tabulate_loads
    from lexi_adapter.speed import expert_load

    read = [model, text, tokens, *list_read(files)]
    check_writable(output, apart_from=read)
    if (text is None) == (tokens is None):
        raise AdapterError("give either --text or --tokens")
    ids = _read_prompts(tokens) if tokens else _cut_prompts(model, text, prompts, length)
    check_tokens(tokens or text, ids, find_vocabulary(read_config(Path(model))))
    measured, facts = expert_load.measure(
        model,
        ids,
        allocations={file: read_allocation(file) for file in files},
        dropped=dropped,
        engine=read_engine_options(**engine),
        progress=Progress("variants"),
    )
    write_json(output, expert_load.make_document(measured, facts, describe_call()), apart_from=read)
    print_table(tabulate_loads(measured))
    worst = max(load.max_over_mean for load in measured["base"].values())
    conclude(
        f"{output}; the busiest expert of the base gets {worst:.1f} times the mean of its layer",
        ["lexi-adapter", "bench", model, *(word for file in files for word in ("--allocation", file))],
    )


def _read_prompts(path: str) -> list[list[int]]:
    try:
        prompts = read_json(path, most=MOST_DATA_BYTES)
    except OSError as error:
        raise AdapterError(f"cannot read {path}: {error.strerror}; name a file of token ids") from error
    except ValueError as error:
        raise AdapterError(f"{path} is not JSON ({error})") from error
    lists = isinstance(prompts, list) and prompts and all(isinstance(ids, list) and ids for ids in prompts)
    if not lists or not all(type(token) is int for ids in prompts for token in ids):
        raise AdapterError(f"{path} is not a list of prompts, each a list of token ids")
    return prompts


def _cut_prompts(model: str, path: str, prompts: int, length: int) -> list[list[int]]:
    ids = encode(load_tokenizer(model), read_text(path))
    if len(ids) < prompts * length:
        raise AdapterError(f"{path} has {len(ids)} tokens, {prompts} prompts of {length} need {prompts * length}")
    return [ids[start : start + length] for start in range(0, prompts * length, length)]
