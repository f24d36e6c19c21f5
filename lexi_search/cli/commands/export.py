"""`lexi-search export`."""

import os

import click

from lexi_search.artifacts.allocation import Allocation
from lexi_search.artifacts.files import check_writable, find_nature, write_atomically
from lexi_search.artifacts.serialisation import read_allocation
from lexi_search.checkpoint.folder import find_folder
from lexi_search.cli.console import conclude, echo
from lexi_search.errors import InputError

EXAMPLES = """\b
Examples:
  lexi-search export allocation.json --to vllm --model weights/ -o served
  lexi-search export allocation.json --to vllm --model weights/
  lexi-search export allocation.json --to transformers --model weights/ -o loaded
"""


@click.command(epilog=EXAMPLES)
@click.argument("allocation")
@click.option("--to", "form", required=True, type=click.Choice(("vllm", "transformers", "json", "csv")), help="Format.")
@click.option("--model", help="The model's original folder; for vllm without -o a hub id will do.")
@click.option("-o", "--output", help="Model folder to make (vllm, transformers with --model), or file to write.")
@click.option("--force", is_flag=True, help="Replace an earlier export, or any file.")
@click.option("--copy", is_flag=True, help="Copy the weights into the model folder, in place of links to them.")
def export(allocation: str, form: str, model: str | None, output: str | None, force: bool, copy: bool) -> None:
    """Export an ALLOCATION for a serving engine.

    \b
    vllm          the command to run; with -o a model folder for it, which needs the LExI plugin
    transformers  the overlay for config.json; with --model and -o a model folder,
                  and the call that loads it and applies the allocation
    json, csv     the k per layer
    """
    from lexi_search.allocation import export as exporters

    exported, files = exporters.carry(read_allocation(allocation), allocation)

    folder = find_folder(model, ["config.json"]) if model else None  # once: for a hub id it asks the hub
    config = exporters.read_config(str(folder)) if folder else {}
    writes_folder = form == "vllm" or (form == "transformers" and bool(model))
    inputs = [allocation, folder]
    if copy and not (output and writes_folder):
        raise InputError("--copy is for a model folder; name one by -o, with --model")
    if output and not writes_folder:
        check_writable(output, apart_from=inputs)
    if folder:
        exporters.check_config(exported.model, config)
        if reason := exporters.check_weights(exported.model, model, folder):
            echo(f"note: the router weights of {model} were not compared ({reason})", err=True)
    elif form == "vllm":
        raise InputError("--to vllm needs --model, the model's folder or hub id")
    if form == "vllm":
        place = None if output else os.path.abspath(allocation)
        overrides = exporters.make_vllm_overrides(exported, config, place=place)
        if output:
            exporters.write_folder(output, model, overrides, files=files, force=force, copy=copy)
            echo(exporters.format_vllm_command(output, exported.model.model_type))
        else:
            echo(exporters.format_vllm_command(model, exported.model.model_type, overrides))
        _conclude(exported, allocation, model, output)
    elif writes_folder and output:
        overrides = exporters.make_transformers_overrides(exported)
        exporters.write_folder(output, model, overrides, files=files, force=force, copy=copy)
        echo(exporters.format_transformers_call(output, allocation))
        _conclude(exported, allocation, model, output)
    elif output:
        data = exporters.format_text(exported, form).encode()
        check_writable(output, nature=None if force else find_nature(data))
        write_atomically(output, data, apart_from=inputs, force=force)
        echo(output)
        _conclude(exported, allocation, None, output)
    else:
        echo(*exporters.format_text(exported, form).splitlines())


def _conclude(exported: Allocation, allocation: str, model: str | None, output: str | None) -> None:
    """Say what was exported, and how to go on beside the command that is printed."""
    from lexi_search.cli.tables import describe_budget

    place = f"{output} has " if output else "the printed command serves "
    check = ["lexi-adapter", "check", allocation, "--model", model or "WEIGHTS"]
    back = f"; to roll back, serve {model} as it is" if model else ""
    conclude(f"{place}{describe_budget(exported)}{back}", check)
