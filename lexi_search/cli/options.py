"""Options shared by commands: constraints on an allocation, its cost, budgets, layers, and what may be replaced."""

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import click

from lexi_search.artifacts.profile import DTYPES, Profile
from lexi_search.artifacts.serialisation import read_cost_table
from lexi_search.cli.console import echo
from lexi_search.errors import InputError

if TYPE_CHECKING:
    from lexi_search.allocation.costs import Cost
    from lexi_search.solvers.problem import Constraints

_LIMIT = 10**6  # no model has as many layers or active experts
_NUMBER = r"(\d{1,9}(?:\.\d{1,9})?)"
CONSTRAINTS = (
    click.option("--min-k", default=1, help="Smallest k of a layer, the paper's k_min."),
    click.option(
        "--max-k", type=int, help="Largest k of a layer, the paper's k_max.  [default: the profile's, mostly k_base]"
    ),
    click.option("--allowed-k", multiple=True, help="Only these values of k, such as 1,2,4,8; repeatable."),
    click.option("--bounds", multiple=True, help="LAYERS=LOW:HIGH, such as 0:3=4:8: for some layers; repeatable."),
    click.option("--protect", multiple=True, help="LAYERS that keep the model's k_base, such as 0,31; repeatable."),
    click.option("--group", "groups", multiple=True, help="LAYERS that must have equal k, such as 0:7; repeatable."),
    click.option("--group-size", type=click.IntRange(1), help="Equal k in every run of this many MoE layers."),
)
COSTS = (
    click.option("--cost", "cost_file", help="Cost table that `lexi-adapter latency` wrote: measured time for k."),
    click.option(
        "--mix",
        help="Steps of the cost table by tokens, and how many: 16:1024,16384:1 for 1024 decode steps of 16 tokens and "
        "a prefill of 16384.  [default: the table's only step]",
    ),
)


class Size(click.ParamType):
    """Bytes, as a number with a decimal unit, such as 500MB or 20GB."""

    name = "size"

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(_NUMBER + r" ?([kMGT]?)B", value)
        if match is None:
            self.fail(f"{value!r} is no size; take a number and a unit, such as 20GB", param, ctx)
        return int(Fraction(match[1]) * 1000 ** " kMGT".index(match[2] or " "))


SIZE = Size()
force_option = click.option("--force", is_flag=True, help="Replace files of another model or of another kind, too.")
dtype_option = click.option(
    "--dtype",
    type=click.Choice(("auto", *DTYPES)),
    default="auto",
    help="Element type of the tokens; auto: the weights', or on a CPU float32 where they go through the whole model.",
)


def add_options(options: Sequence[Callable]) -> Callable:
    """A decorator that adds each of `options` to a command, in order."""

    def add(command: Callable) -> Callable:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def make_constraints(
    profile: Profile,
    *,
    min_k: int,
    max_k: int | None,
    allowed_k: Sequence[str],
    bounds: Sequence[str],
    protect: Sequence[str],
    groups: Sequence[str],
    group_size: int | None,
) -> "Constraints":
    """The constraints that the options state, by rows of the profile's table."""
    from lexi_search.solvers.problem import Constraints

    layers, full_k = profile.model.moe_layers, profile.model.top_k
    low, high = [min_k] * len(layers), [profile.max_k if max_k is None else max_k] * len(layers)
    option_of: dict[int, str] = {}  # row -> the option that bounds it

    def bind(row: int, least: int, most: int, option: str) -> None:
        if row in option_of and (low[row], high[row]) != (least, most):
            raise InputError(
                f"{option_of[row]} and {option} disagree about layer {layers[row]}; give each layer one of them"
            )
        low[row], high[row], option_of[row] = least, most, option

    for text in bounds:
        named, _, ends = text.partition("=")
        try:
            least, most = map(int, ends.split(":"))
        except ValueError:
            raise InputError(f"--bounds {text!r} is not understood; write LAYERS=LOW:HIGH, such as 0:3=4:8") from None
        if not 1 <= least <= most <= profile.max_k:
            raise InputError(f"--bounds {text!r}: LOW:HIGH must rise within 1:{profile.max_k}, the k of the profile")
        for row in _find_rows(named, layers, "--bounds"):
            bind(row, least, most, f"--bounds {text}")
    for text in protect:
        for row in _find_rows(text, layers, "--protect"):
            bind(row, full_k, full_k, f"--protect {text}")
    if groups and group_size:
        raise InputError("--group and --group-size say the same thing twice; give one")
    rows = range(len(layers))
    together = [tuple(rows[i : i + group_size]) for i in rows[::group_size]] if group_size else []
    together += [_find_rows(text, layers, "--group") for text in groups]
    uniform = not bounds and not protect
    return Constraints(
        min_k=min_k if uniform else tuple(low),
        max_k=max_k if uniform else tuple(high),
        allowed_k=_parse_values(",".join(allowed_k)) if allowed_k else None,
        groups=tuple(together),
    )


def parse_layers(text: str, option: str = "--layers") -> tuple[int, ...]:
    """Ascending layer indices from `0:15` (both ends included), `3`, `0,2,5` or a mix of them."""
    try:
        ends = [[int(end) for end in part.split(":")] for part in text.split(",")]
    except ValueError:
        ends = []
    if not ends or any(len(part) > 2 or not 0 <= part[0] <= part[-1] < _LIMIT for part in ends):
        raise InputError(f"{option} {text!r} is not understood; write 0:15 (both ends included), 3, or 0,2,5")
    return tuple(sorted({layer for part in ends for layer in range(part[0], part[-1] + 1)}))


def parse_share(text: str, option: str) -> Fraction:
    """The fraction that a percentage such as 12.5% stands for."""
    match = re.fullmatch(rf"{_NUMBER}%", text, re.ASCII)
    if match is None:
        raise InputError(f"{option} {text!r} is not understood; write a share such as 25%")
    return Fraction(match[1]) / 100


def parse_budget(text: str, *, layers: int, top_k: int, option: str = "--budget") -> int:
    """The budget in experts that `text` stands for: a sum (80), a share (50%) or an average over layers (k=4.5).

    A share is of `layers` x `top_k`, the budget at the model's own k. What is no whole number is rounded to the nearest
    one, as in `lexi-adapter bench --budget-share`. Whether layers can spend the budget is not checked here.

    Raises InputError for another text, for a share outside 0 to 100 %, and for an average outside 0 to `top_k`.
    """
    return round(_parse_amount(text, layers, top_k, option))


def parse_budgets(text: str, *, layers: int, top_k: int) -> tuple[int, ...]:
    """The ascending budgets of START:STOP:STEP, each written as for `parse_budget`: 64:128:8, 25%:75%:12.5%.

    STOP is one of them where the steps reach it. Steps are added before rounding.
    """
    parts = text.split(":")
    if len(parts) != 3:
        raise InputError(f"--budgets {text!r} is not understood; write START:STOP:STEP, such as 64:128:8 or 25%:75%:5%")
    start, stop, step = (_parse_amount(part, layers, top_k, f"--budgets {text}:") for part in parts)
    if step <= 0 or stop < start or (stop - start) / step > _LIMIT:
        raise InputError(f"--budgets {text!r} does not rise; write START:STOP:STEP, such as 64:128:8 or 25%:75%:5%")
    return tuple(sorted({round(start + number * step) for number in range(int((stop - start) / step) + 1)}))


def _parse_amount(text: str, layers: int, top_k: int, option: str) -> Fraction:
    match = re.fullmatch(rf"(\d{{1,9}})|{_NUMBER}%|k={_NUMBER}", text, re.ASCII)
    if match is None:
        raise InputError(
            f"{option} {text!r} is not understood; write a sum over layers such as 80, a share such as 50%, or an "
            "average such as k=4"
        )
    total, share, average = match.groups()
    if total:
        return Fraction(total)
    if share and Fraction(share) > 100:
        raise InputError(f"{option} {text}: a share is of the model's own budget, {layers * top_k}, and at most 100%")
    if average and Fraction(average) > top_k:
        raise InputError(f"{option} {text}: an average is at most {top_k}, the k that every layer has")
    return Fraction(share) * layers * top_k / 100 if share else Fraction(average) * layers


def _find_rows(text: str, layers: Sequence[int], option: str) -> tuple[int, ...]:
    """The rows of the table for the decoder layers that `text` names; a range stands for the MoE layers in it."""
    named = set(parse_layers(text, option))
    rows = tuple(row for row, layer in enumerate(layers) if layer in named)
    single = {int(part) for part in text.split(",") if ":" not in part}
    if not rows or single - set(layers):
        known = ", ".join(map(str, layers))
        raise InputError(f"{option} {text!r} names a layer that is no MoE layer; those are {known}")
    return rows


def read_cost(profile: Profile, cost_file: str | None, mix: str | None) -> "Cost | None":
    """The cost from the options, checked against the profile's model; None without --cost."""
    if cost_file is None:
        if mix:
            raise InputError("--mix needs --cost, the table whose steps it mixes")
        return None
    from lexi_search.allocation.costs import weigh

    table = read_cost_table(cost_file)
    try:
        cost = weigh(table, profile.model, mix=parse_mix(mix) if mix else None)
    except InputError as error:
        raise InputError(f"{cost_file}: {error}") from error
    if falls := cost.list_falls():
        echo(
            f"{cost_file}: a layer takes less time at k = {', '.join(map(str, falls))} than with one expert fewer; if "
            "that is noise, measure again with more --rounds",
            err=True,
        )
    return cost


def parse_loss(text: str, option: str = "--max-loss") -> tuple[float, bool]:
    """A loss, and whether it is a share of another one: 12.5 is (12.5, False), and 20% is (0.2, True)."""
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise InputError(f"{option} {text!r} is not understood; write a loss such as 12.5, or a share such as 20%")
    return (value / 100, True) if text.endswith("%") else (value, False)


def _parse_values(text: str) -> tuple[int, ...]:
    """The ascending integers of 1,2,4,8."""
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise InputError(f"--allowed-k {text!r} is not understood; write 1,2,4,8") from None


def parse_mix(text: str) -> dict[int, float]:
    """The mix {16: 1024.0, 16384: 1.0} from 16:1024,16384:1; a missing count is 1."""
    mix: dict[int, Any] = {}
    try:
        for part in text.split(","):
            tokens, _, count = part.partition(":")
            mix[int(tokens)] = mix.get(int(tokens), 0.0) + (float(count) if count else 1.0)
    except ValueError:
        raise InputError(f"--mix {text!r} is not understood; write TOKENS:STEPS, such as 16:1024,16384:1") from None
    return mix


def find_time(cost: "Cost", ms: float | None, speedup: float | None) -> float:
    """The milliseconds that a target allows; InputError where every allocation takes longer."""
    value = ms if speedup is None else speedup
    name = "--target-ms" if speedup is None else "--target-speedup"
    if not 0 < value < float("inf"):
        raise InputError(f"{name} {value:g} must be above 0, and finite")
    limit = ms if speedup is None else cost.base_ms / speedup
    fastest = cost.other_ms + float(cost.ms.min(axis=1).sum())
    if limit < fastest:
        raise InputError(
            f"{name} {value:g} is out of reach: the fastest k in every layer takes {fastest:g} ms, "
            f"a speed-up of {cost.base_ms / fastest:.3f}"
        )
    return limit
