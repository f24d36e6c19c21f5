"""Options that several commands take."""

import math
from collections.abc import Callable
from typing import Any

import click

from lexi_adapter.allocation import KEY
from lexi_adapter.errors import AdapterError
from lexi_adapter.files import parse_json

# Names that --engine may not set: arguments of `make_options` that the commands set, and the model.
RESERVED = ("model", "parallel", "variant", "workloads")
OBJECTS = ("additional_config", "compilation_config", "hf_overrides")


class FiniteRange(click.FloatRange):
    """A range of finite numbers: nan is in every `click.FloatRange`, and inf in those without an upper end."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number.", param, ctx)
        return number


SHARE = FiniteRange(0, 1, min_open=True)  # of the budget that remains
PRUNED_SHARE = FiniteRange(0, 1, max_open=True)  # of experts or width that is dropped

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
    help="A file that stands for a card shared with other runs: none is measured while another starts or is measured; "
    "repeat it.",
)


def takes_engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of every command that starts engines; `read_engine_options` reads them."""
    for option in reversed(ENGINE_OPTIONS):
        command = option(command)
    return command


def read_engine_options(
    load_format: str, tensor_parallel_size: int, pipeline_parallel_size: int, enable_expert_parallel: bool, engine: str
) -> dict[str, Any]:
    """Keyword arguments of `make_options` from `ENGINE_OPTIONS`; the entries of `engine` win.

    Raises:
        AdapterError: `engine` is no JSON object, has a reserved name, or has no object where one is expected.
    """
    try:
        others = parse_json(engine)
    except ValueError as error:
        raise AdapterError(f"--engine is not JSON ({error})") from error
    if not isinstance(others, dict):
        raise AdapterError("--engine is not a JSON object")
    reserved = [name for name in RESERVED if name in others]
    if reserved:
        raise AdapterError(f"--engine: {reserved[0]} is set by other arguments; leave it out")
    for name in OBJECTS:
        if not isinstance(others.get(name, {}), dict):
            raise AdapterError(f"--engine: {name} is {others[name]!r}, a JSON object expected")
    if KEY in others.get("additional_config", {}):
        raise AdapterError(f"--engine: {KEY} would be in every engine, the base's too; give it by --allocation")
    parallel = {
        "tensor_parallel_size": tensor_parallel_size,
        "pipeline_parallel_size": pipeline_parallel_size,
        "enable_expert_parallel": enable_expert_parallel,
    }
    parallel = {name: others.pop(name, value) for name, value in parallel.items()}
    return {"load_format": load_format, "parallel": parallel, **others}
