"""Options that several commands take."""

import json
import math
from collections.abc import Callable
from typing import Any

import click

from lexi_adapter.allocation import KEY
from lexi_adapter.errors import AllocationError

# What --engine may not name: arguments of `make_options` that the commands give, the model among them.
GIVEN = ("model", "parallel", "variant", "workloads")
OBJECTS = ("additional_config", "compilation_config", "hf_overrides")


class FiniteRange(click.FloatRange):
    """A range of finite numbers: nan is in every `click.FloatRange`, and inf in those without an upper end."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number.", param, ctx)
        return number


SHARE = FiniteRange(0, 1, min_open=True)  # of what remains
PRUNED_SHARE = FiniteRange(0, 1, max_open=True)  # of what is gone

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
    """Keyword arguments of `engines.make_options` from the options above; what `engine` says wins.

    Raises:
        AllocationError: `engine` is no JSON object, or names what is not its to say, or not as an object.
    """
    try:
        others = json.loads(engine)
    except (ValueError, RecursionError) as error:
        raise AllocationError(f"--engine is not JSON ({error})") from error
    if not isinstance(others, dict):
        raise AllocationError("--engine is not a JSON object")
    given = [name for name in GIVEN if name in others]
    if given:
        raise AllocationError(f"--engine: {given[0]} is not for it to say, but for other options; leave it out")
    for name in OBJECTS:
        if not isinstance(others.get(name, {}), dict):
            raise AllocationError(f"--engine: {name} is {others[name]!r}, a JSON object expected")
    if KEY in others.get("additional_config", {}):
        raise AllocationError(f"--engine: {KEY} would be in every engine, the base's too; give it by --allocation")
    parallel = {
        "tensor_parallel_size": tensor_parallel_size,
        "pipeline_parallel_size": pipeline_parallel_size,
        "enable_expert_parallel": enable_expert_parallel,
    }
    parallel = {name: others.pop(name, value) for name, value in parallel.items()}
    return {"load_format": load_format, "parallel": parallel, **others}
