"""`lexi-search judge`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from lexi_search.artifacts.allocation import Allocation
from lexi_search.artifacts.compensation import Maps
from lexi_search.artifacts.identity import ModelIdentity
from lexi_search.artifacts.profile import Profile, ProfileSettings, find_missing
from lexi_search.artifacts.serialisation import read_allocation, read_allocation_maps, read_profile, read_profile_maps
from lexi_search.cli.console import (
    conclude,
    format_share,
    json_option,
    prepare_environment,
    print_json,
    print_table,
)
from lexi_search.cli.options import dtype_option
from lexi_search.cli.progress import make_progress
from lexi_search.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Int32

    from lexi_search.profiling.divergence import Judgement
    from lexi_search.profiling.forward.variants import Run, Variant


EXAMPLES = """\b
Examples:
  lexi-search judge weights/ allocation.json
  lexi-search judge weights/ allocation.json front-allocation.json --seed 2
  lexi-search judge weights/ allocation.json --text mine.txt
"""


@click.command(epilog=EXAMPLES)
@click.argument("weights")
@click.argument("allocations", nargs=-1, required=True)
@click.option(
    "--text",
    metavar="FILE",
    help="Judge on a text of yours instead: the beginning of this UTF-8 file; not of the one that the profile took.",
)
@click.option("--batch", default=4, type=click.IntRange(1), help="Sequences per iteration.")
@click.option("--length", default=512, type=click.IntRange(1), help="Tokens per sequence.")
@click.option("--samples", default=2**12, help="Tokens in all.")
@click.option(
    "--seed", default=1, type=click.IntRange(0, 2**32 - 1), help="Seed of the model's text; that of a profile is 0."
)
@click.option(
    "--profile",
    help="Profile with corrections for every k: the same k in every layer is judged with them, too.",
)
@dtype_option
@json_option
def judge(
    weights: str,
    allocations: tuple[str, ...],
    text: str | None,
    batch: int,
    length: int,
    samples: int,
    seed: int,
    profile: str | None,
    dtype: str,
    as_json: bool,
) -> None:
    """Measure how far ALLOCATIONS move the predictions of WEIGHTS, on text that the model generates itself, or on
    one of yours.

    What layers lose together is not the sum of what each loses, and the text is not that of the profile: this
    shows whether an allocation is better than the same k in every layer, which is listed beside it, and without --text
    takes no data.
    """
    by_path = {path: read_allocation(path) for path in allocations}
    measured = None if profile is None else read_profile(profile)
    prepare_environment()
    from lexi_search.checkpoint.reader import open_checkpoint
    from lexi_search.cli.tables import list_judgements, tabulate_judgements
    from lexi_search.models.model import describe, find_dtype
    from lexi_search.profiling.divergence import judge_variants, open_run
    from lexi_search.profiling.forward.sampling import PASSES
    from lexi_search.profiling.profile import choose_dtype

    checkpoint = open_checkpoint(weights)
    model = describe(checkpoint)
    _check_models(model.identity, weights, by_path, profile, measured)
    settings = ProfileSettings(
        input="weights" if text is None else "text",
        seed=seed,
        batch=batch,
        length=length,
        dtype=choose_dtype(dtype, "weights", find_dtype(checkpoint, model)),
        relative_error=0.0,
        max_samples=samples,
    )
    variants = {path: _read_variant(path, allocation) for path, allocation in by_path.items()}
    own = None if measured is None else read_profile_maps(profile, measured)
    variants |= _list_uniform(by_path, model.top_k, measured, own)
    run = open_run(checkpoint, model, settings.dtype)
    tokens = None if text is None else _read_tokens(run, settings, text, by_path)
    with make_progress() as progress:
        passes = (PASSES if tokens is None else 0) + 1  # to sample the text, and to measure on it
        task = progress.add_task("decoder layers, in passes", total=passes * len(run.decoder.blocks))
        told = {"tokens": tokens, "report": lambda layer: progress.advance(task)}
        judgements = judge_variants(run, settings, list(variants.values()), **told)
    judged = dict(zip(variants, judgements, strict=True))
    if as_json:
        print_json(list_judgements(variants, judged))
    else:
        print_table(tabulate_judgements(variants, judged))
        _conclude(variants, judged, by_path)


def _check_models(
    model: ModelIdentity, weights: str, by_path: Mapping[str, Allocation], profile: str | None, measured: Profile | None
) -> None:
    """Raise InputError for an allocation or a profile that cannot be judged on `model`, in `weights`."""
    for path, allocation in by_path.items():
        if allocation.model != model:
            raise InputError(f"{path} is for another model than {weights}")
        if allocation.max_k is not None:
            raise InputError(f"{path} has layers with more experts than the model's own k, which cannot be judged yet")
    if measured is not None and (measured.model != model or measured.settings.gate_exponent is None):
        raise InputError(f"{profile} is no profile of {weights} with compensation; leave --profile out")
    if measured is not None and find_missing(measured):
        raise InputError(f"{profile} lacks layers, the first is {find_missing(measured)[0]}; merge its parts first")


def _read_variant(path: str, allocation: Allocation) -> "Variant":
    """What an allocation makes of the model, with the corrections that its file names."""
    from lexi_search.profiling.forward.variants import Variant

    top_k = tuple(allocation.top_k[layer] for layer in allocation.model.moe_layers)
    return Variant(top_k, allocation.gate_exponent, read_allocation_maps(path, allocation))


def _read_tokens(
    run: "Run", settings: ProfileSettings, file: str, by_path: Mapping[str, Allocation]
) -> "Int32[np.ndarray, 'sequences length']":
    """The tokens of a text. InputError where an allocation was found on it, which it would favour."""
    from lexi_search.profiling.divergence import count_sequences
    from lexi_search.profiling.forward.text import read_text

    size = {"sequences": count_sequences(settings), "length": settings.length}
    text = read_text(run.checkpoint, run.model, run.decoder, file, **size)
    for path, allocation in by_path.items():
        if allocation.made_by.get("text_sha256") == text.file_sha256:
            raise InputError(f"{path} was found on {file} itself; judge on another text, such as one that follows it")
    return text.tokens


def _list_uniform(
    by_path: Mapping[str, Allocation], top_k: int, measured: Profile | None, maps: Maps | None
) -> dict[str, "Variant"]:
    """The uniform k next to the budgets; with the profile that was `measured` also as that compensates."""
    from lexi_search.profiling.forward.variants import Variant

    layers = len(next(iter(by_path.values())).top_k)
    ks = {k for one in by_path.values() for k in (one.budget // layers, -(-one.budget // layers))} - {top_k}
    variants = {f"k = {k} in every layer": Variant((k,) * layers) for k in sorted(ks)}
    if measured is not None:
        exponent = measured.settings.gate_exponent
        named = ((f"k = {k} in every layer, compensated", k) for k in sorted(ks))
        variants |= {name: Variant((k,) * layers, exponent, maps) for name, k in named}
    return variants


def _conclude(
    variants: Mapping[str, "Variant"], judged: Mapping[str, "Judgement"], by_path: Mapping[str, Allocation]
) -> None:
    """Say of each budget of an allocation which of its like is best, and whether its lead is more than noise."""
    said, chosen = [], []
    for budget in sorted({allocation.budget for allocation in by_path.values()}):
        alike = [name for name in judged if sum(variants[name].top_k) == budget]
        best, *others = sorted(alike, key=lambda name: judged[name].divergence)
        chosen += [name for name in (best, *others) if name in by_path][:1]
        divergence = f"{judged[best].divergence:.4f} nats per token"
        if not others:
            said.append(f"{best} is the only one with budget {budget}, {divergence}")
            continue
        lead = judged[others[0]].divergence - judged[best].divergence
        error = (judged[others[0]].stderr ** 2 + judged[best].stderr ** 2) ** 0.5
        if lead < 2 * error:
            than = f"within the noise of {others[0]}: more --samples would tell them apart"
        else:
            than = f"{format_share(lead / judged[others[0]].divergence)} less than {others[0]}"
        said.append(f"with budget {budget} the least divergence has {best}, {divergence}, {than}")
    words = ["lexi-search", "export", chosen[0], "--to", "vllm", "--model", "WEIGHTS", "-o", "served"]
    conclude("; ".join(said), words)
