"""`lexi-adapter loads`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from lexi_adapter.allocation import read_allocation
from lexi_adapter.cli.console import print_table
from lexi_adapter.cli.options import PRUNED_SHARE, read_engine_options, takes_engine_options
from lexi_adapter.environment import describe_call
from lexi_adapter.errors import AllocationError
from lexi_adapter.files import check_writable, write_json
from lexi_adapter.model.folder import find_vocabulary, read_config
from lexi_adapter.tasks.texts import check_tokens, encode, load_tokenizer, read_text


@click.command()
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
    type=PRUNED_SHARE,
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
    from lexi_adapter.cli.tables import tabulate_loads
    from lexi_adapter.speed import expert_load as counting

    check_writable(output, apart_from=[model, text, tokens, *files])
    if (text is None) == (tokens is None):
        raise AllocationError("give either --text or --tokens")
    chosen = _read_tokens(tokens) if tokens else _cut(model, text, prompts, length)
    check_tokens(tokens or text, chosen, find_vocabulary(read_config(Path(model))))
    found, facts = counting.measure(
        model,
        chosen,
        allocations={file: read_allocation(file) for file in files},
        dropped=dropped,
        engine=read_engine_options(**engine),
    )
    write_json(output, counting.make_document(found, facts, describe_call()))
    print_table(tabulate_loads(found))


def _read_tokens(path: str) -> list[list[int]]:
    try:
        prompts = json.loads(Path(path).read_text())
    except (ValueError, RecursionError) as error:
        raise AllocationError(f"{path} is not JSON ({error})") from error
    lists = isinstance(prompts, list) and prompts and all(isinstance(ids, list) and ids for ids in prompts)
    if not lists or not all(type(token) is int for ids in prompts for token in ids):
        raise AllocationError(f"{path} is not a list of prompts, each a list of token ids")
    return prompts


def _cut(model: str, path: str, prompts: int, length: int) -> list[list[int]]:
    ids = encode(load_tokenizer(model), read_text(path))
    if len(ids) < prompts * length:
        raise AllocationError(f"{path} has {len(ids)} tokens, {prompts} prompts of {length} need {prompts * length}")
    return [ids[place * length : (place + 1) * length] for place in range(prompts)]
