"""Options that several commands take."""

import json
from collections.abc import Callable
from typing import Any

import click

from lexi_adapter.allocation import AllocationError

ENGINE_OPTIONS = (
    click.option("--load-format", default="auto", help="dummy for random weights: config.json alone is enough."),
    click.option("--tensor-parallel-size", type=click.IntRange(1), default=1),
    click.option("--pipeline-parallel-size", type=click.IntRange(1), default=1),
    click.option("--enable-expert-parallel", is_flag=True, show_default=False),
    click.option("--engine", default="{}", metavar="JSON", help="Other arguments of vllm.LLM, as a JSON object."),
)
takes_locks = click.option(
    "--lock",
    "locks",
    multiple=True,
    metavar="FILE",
    help="A card that runs share, as a file: none is measured while another starts or is measured; repeat it.",
)


def takes_engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add what every command that starts engines takes; `read_engine_options` reads it."""
    for option in reversed(ENGINE_OPTIONS):
        command = option(command)
    return command


def read_engine_options(
    load_format: str, tensor_parallel_size: int, pipeline_parallel_size: int, enable_expert_parallel: bool, engine: str
) -> dict[str, Any]:
    """Arguments of `engines.Engine` from the options above; `AllocationError` if `engine` is no JSON object."""
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
