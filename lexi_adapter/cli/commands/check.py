"""`lexi-adapter check`."""

from pathlib import Path

import click

from lexi_adapter.allocation import KEY, Allocation, check_reducible, describe_run, read_allocation
from lexi_adapter.cli.console import echo
from lexi_adapter.environment import find_vllm_version
from lexi_adapter.errors import AllocationError
from lexi_adapter.model.folder import check_folder, has_weights, read_config
from lexi_adapter.serving.vllm_names import check_version
from lexi_adapter.serving.vllm_plugin import check_lm_head


@click.command()
@click.argument("allocation")
@click.option("--model", "folder", required=True, help="Model folder: config.json and safetensors files.")
def check(allocation: str, folder: str) -> None:
    """Check that ALLOCATION fits a model folder and the installed vLLM, before a long start-up.

    Compares model type, layers, experts, top-k, and the bytes of the router tensors.
    """
    wanted = read_allocation(allocation)
    check_folder(wanted.model, Path(folder))
    _check_export(wanted, Path(folder))
    check_reducible(wanted)
    check_lm_head(wanted.model.model_type, Path(folder))
    version = find_vllm_version()
    if version is not None:
        check_version(version)
    unchecked = [] if has_weights(Path(folder)) else ["no safetensors files there, so the weights were not compared"]
    unchecked += [] if version is not None else ["vLLM is not installed here, so its version was not checked"]
    echo(f"fits: {wanted.model.model_type}, {describe_run(wanted, wanted.top_k)}")
    for note in unchecked:
        echo(f"note: {note}")


def _check_export(allocation: Allocation, folder: Path) -> None:
    """Raise AllocationError for a folder that was exported with another allocation."""
    exported = read_config(folder).get(KEY)
    if exported is not None and not allocation.asks_the_same_as(read_allocation(exported)):
        raise AllocationError(f"{folder} was exported with another allocation; name the model's original folder")
