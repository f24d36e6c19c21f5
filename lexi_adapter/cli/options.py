"""Options that several commands take."""

import functools
import math
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from fractions import Fraction
from typing import Any, NamedTuple

import click

from lexi_adapter.allocation import KEY, read_allocation
from lexi_adapter.errors import AdapterError
from lexi_adapter.files import parse_json
from lexi_adapter.model.compensation import find_file
from lexi_adapter.model.variants import Variant, is_one_of, make_variants

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


class Share(click.ParamType):
    """A share as both tools write one, 12.5%, as a number from 0 to 1; of both ends only `allowed` is one."""

    name = "share"

    def __init__(self, allowed: float) -> None:
        self.allowed = allowed

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        written = re.fullmatch(r"(\d{1,3}(?:\.\d{1,9})?)%", value, re.ASCII)
        share = float(Fraction(written[1]) / 100) if written else -1.0
        if not (0 < share < 1 or share == self.allowed):
            limits = "above 0% to 100%" if self.allowed else "from 0% to below 100%"
            self.fail(f"{value!r} is not a share {limits}, such as 50%.", param, ctx)
        return share


SHARE = Share(1.0)  # of the budget that remains
PRUNED_SHARE = Share(0.0)  # of experts or width that is dropped

VARIANTS = (
    click.option("--allocation", "files", multiple=True, metavar="FILE", help="An allocation to compare; repeat it."),
    click.option(
        "--uniform-k", "uniform", multiple=True, type=click.IntRange(1), help="This k in every layer; repeat it."
    ),
    click.option(
        "--budget-share",
        "shares",
        multiple=True,
        type=SHARE,
        help="A random mixed k and the uniform k, at this share of the model's own budget, such as 50%; repeat it.",
    ),
    click.option(
        "--drop-experts",
        "dropped",
        multiple=True,
        type=PRUNED_SHARE,
        help="Inter-pruning by config, of random weights: drop this share of the experts, such as 25%; repeat it.",
    ),
    click.option(
        "--narrow-experts",
        "narrowed",
        multiple=True,
        type=PRUNED_SHARE,
        help="Intra-pruning by config, of random weights: drop this share of their width, such as 25%; repeat it.",
    ),
    click.option(
        "--folder", "folders", multiple=True, help="Another folder to compare, such as a pruned checkpoint; repeat it."
    ),
    click.option(
        "--uncompensated",
        is_flag=True,
        show_default=False,
        help="What has a compensation once more without, at the same k: what it costs and gains.",
    ),
)


class Chosen(NamedTuple):
    """The values of `VARIANTS`."""

    files: Sequence[str]
    uniform: Sequence[int]
    shares: Sequence[float]
    dropped: Sequence[float]
    narrowed: Sequence[float]
    folders: Sequence[str]
    uncompensated: bool

    def make(self, model: str, **others: Any) -> tuple[Variant, ...]:
        """`make_variants` of these."""
        allocations = {file: read_allocation(file) for file in self.files}
        if self.uncompensated and not any(allocation.compensation for allocation in allocations.values()):
            raise AdapterError("--uncompensated: no --allocation here has a compensation; leave it out")
        named = self._spell(allocations)
        return make_variants(model, **named, uncompensated=self.uncompensated, **others)

    def names(self, variant: str) -> bool:
        """Whether these name the variant of this name; if there are none, they name all."""
        return not any(self[:-1]) or is_one_of(variant, **self._spell(self.files))

    def _spell(self, allocations: Any) -> dict[str, Any]:
        return {
            "allocations": allocations,
            "uniform": list(dict.fromkeys(self.uniform)),
            "shares": self.shares,
            "dropped": self.dropped,
            "narrowed": self.narrowed,
            "folders": list(dict.fromkeys(self.folders)),
        }


def list_read(files: Sequence[str]) -> list[str]:
    """The files of allocations and those of corrections that they name; what cannot be read is refused later."""
    named = []
    for file in files:
        with suppress(AdapterError):
            allocation = read_allocation(file)
            named += [str(find_file(allocation))] if allocation.compensation is not None else []
    return [*files, *named]


def takes_variants(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of every command about variants of a model; it gets their values as `chosen`."""

    @functools.wraps(command)
    def gather(**options: Any) -> None:
        return command(chosen=Chosen(**{name: options.pop(name) for name in Chosen._fields}), **options)

    for option in reversed(VARIANTS):
        gather = option(gather)
    return gather


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
