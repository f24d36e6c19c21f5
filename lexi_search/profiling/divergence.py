"""Stage 1 on a text: how much the whole model's KL divergence changes with the k of one layer.

The paper's input, N(0, 1), is unlike the hidden states that a layer sees, and the change of one layer's output says
little of what later layers make of it. Here the model runs on text that it sampled itself (`sampling`), or on a
user's (`text`), with every layer at every k in turn (`forward`). The first takes no data, but for both every
computation of the model has to be known.

All other layers are at their own k meanwhile, or at a smaller one, the background. An allocation reduces all layers,
and what one adds to the loss of the others is less than it loses alone, near the model's own k by far: alone, the first
change of any layer moves tokens to other experts in all later ones (`examples/benchmarks/RESULTS.md`, Background).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int

from lexi_search.artifacts.compensation import Maps
from lexi_search.artifacts.profile import LayerLoss, ProfileSettings
from lexi_search.checkpoint.reader import Checkpoint
from lexi_search.errors import InputError, explain_overflow
from lexi_search.models.decoder_stack import describe_decoder
from lexi_search.models.loading.residence import Residence, Room
from lexi_search.models.model import Model
from lexi_search.profiling.compensation import choose_ks, split, try_exponents
from lexi_search.profiling.forward.losses import Losses, measure_losses
from lexi_search.profiling.forward.sampling import draw_tokens
from lexi_search.profiling.forward.variants import Run, Variant, check_room

EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # tried without corrections
Report = Callable[[int], None]


class Judgement(NamedTuple):
    """The KL divergence of a variant from the unreduced model, in nats per token, and its standard error."""

    divergence: float
    stderr: float


def open_run(checkpoint: Checkpoint, model: Model, dtype: str, *, room: Room | None = None) -> Run:
    """The checkpoint, described for forward passes in `dtype`; InputError where a part of the model is not known.

    Weights stay in memory between passes as far as `room` says, by default as far as there is memory.
    """
    decoder = describe_decoder(checkpoint, model)
    return Run(checkpoint, model, decoder, dtype, Residence(checkpoint, model, decoder, dtype=dtype, room=room))


def measure_layers(
    run: Run,
    tokens: Int[np.ndarray, "sequences length"],
    layers: Sequence[int],
    settings: ProfileSettings,
    *,
    maps: Maps | None = None,
    report: Report = lambda layer: None,
) -> Iterator[tuple[int, LayerLoss]]:
    """Yield (decoder-layer index, losses on `tokens`) for each of `layers`, after the last of them is measured.

    With `maps`, of all those layers, and of all others at the background's k, they are losses of corrected outputs.

    Raises:
        InputError: hidden states that overflow in `settings.dtype`.
    """
    full, model_layers = run.model.top_k, run.model.layers
    around = settings.background_k or full
    tops = [(around,) * len(model_layers)]  # first, so that it has the same bits whatever layers are measured
    for layer in layers:
        tops += [tuple(k if other == layer else around for other in model_layers) for k in range(1, full + 1)]
    variants = [Variant(top_k, settings.gate_exponent, maps) for top_k in tops]
    own = maps and {key: each for key, each in maps.items() if key[0] in set(layers)}
    losses = measure_losses(run, tokens, variants, maps=own, apart=1, report=report)
    if not np.isfinite(losses.divergence).all():
        raise explain_overflow(f"{run.checkpoint.folder}: hidden states overflow", settings.dtype)
    divergence = losses.divergence[1:].reshape(len(layers), full, -1)
    for layer, each in zip(layers, divergence - divergence[:, -1:], strict=True):
        yield layer, summarise(losses, model_layers.index(layer), each, settings)


def judge_variants(
    run: Run,
    settings: ProfileSettings,
    variants: Sequence[Variant],
    *,
    tokens: Int[np.ndarray, "sequences length"] | None = None,
    report: Report = lambda layer: None,
) -> list[Judgement]:
    """The divergence of each variant from the unreduced model, on `tokens`, or on text sampled as `settings` say."""
    return average(measure_variants(run, settings, variants, tokens=tokens, report=report))


def measure_variants(
    run: Run,
    settings: ProfileSettings,
    variants: Sequence[Variant],
    *,
    tokens: Int[np.ndarray, "sequences length"] | None = None,
    report: Report = lambda layer: None,
) -> Float64[np.ndarray, "variants sequences"]:
    """What `judge_variants` averages: the divergence on each sequence, to compare variants on the same text."""
    if tokens is None:
        tokens = draw_samples(run, settings, report=report)
    return measure_losses(run, tokens, variants, report=report).divergence


def average(divergence: Float64[np.ndarray, "variants sequences"]) -> list[Judgement]:
    """The mean over sequences, and its standard error, of each variant's divergence, or of differences of them."""
    means, errors = _estimate(divergence.T)
    return [Judgement(*pair) for pair in zip(means.tolist(), errors.tolist(), strict=True)]


def draw_samples(
    run: Run, settings: ProfileSettings, *, layers: int = 0, report: Report = lambda layer: None
) -> Int[np.ndarray, "sequences length"]:
    """Text sampled from the model: as many sequences as `count_sequences` says.

    Raises InputError for fewer than two sequences, or too many to measure so many `layers` on.
    """
    sequences = count_sequences(settings)
    check_text_room(run, settings, layers=layers)
    return draw_tokens(run, sequences=sequences, length=settings.length, seed=settings.seed, report=report)


def count_sequences(settings: ProfileSettings) -> int:
    """The sequences of a text: whole iterations of `batch`, as many as `max_samples` tokens hold.

    Raises InputError for fewer than two.
    """
    sequences = settings.max_samples // (settings.batch * settings.length) * settings.batch
    if sequences < 2:
        size = f"batch {settings.batch} x length {settings.length}"
        raise InputError(
            f"{settings.max_samples} samples are fewer than two sequences in iterations of {size}; raise --samples"
        )
    return sequences


def check_text_room(run: Run, settings: ProfileSettings, *, layers: int) -> None:
    """Raise InputError where memory does not hold the states of a text with each of `layers` at each k."""
    tokens = count_sequences(settings) * settings.length
    check_room(run, tokens * count_states(settings, run.model.top_k, layers=layers))


def count_states(settings: ProfileSettings, top_k: int, *, layers: int) -> int:
    """The states of a token after the last layer: of the model, the background, and each of `layers` at each k."""
    return 1 + (layers > 0 and settings.background_k is not None) + layers * (top_k - 1)


class Compensation(NamedTuple):
    """The compensation with which uniform k diverges least: a gate exponent, with corrections or without."""

    exponent: float
    corrected: bool


def find_compensation(
    run: Run, tokens: Int[np.ndarray, "sequences length"], *, rank: int | None, alone: bool, report: Report
) -> Compensation:
    """The best compensation on this text: an exponent, with corrections of `rank` where that is not None.

    Corrections are tried on another half of the text than they are fitted on, so that they have no advantage over an
    exponent `alone`.
    """
    if rank is None:
        return choose_compensation(run, tokens, report=report)
    fitted, other = split(tokens)
    corrected = try_exponents(run, fitted, rank=rank, report=report)
    return choose_compensation(run, other, corrected=corrected, alone=alone, report=report)


def choose_compensation(
    run: Run,
    tokens: Int[np.ndarray, "sequences length"],
    *,
    corrected: Mapping[float, Maps] = MappingProxyType({}),
    alone: bool = True,
    report: Report = lambda layer: None,
) -> Compensation:
    """The compensation with which uniform k diverges least from the model, at a few k taken together.

    Tried are the exponents of `corrected`, each with its maps for every layer and each of `choose_ks`, and unless
    `alone` is false `EXPONENTS` without any. Each k counts alike: the divergence is taken relative to the smallest that
    any of them leads to. The exponent has two digits: between those that are tried it is the vertex of a parabola.
    """
    layers, ks = len(run.model.layers), choose_ks(run.model.top_k)
    tried = [Compensation(exponent, True) for exponent in corrected]
    tried += [Compensation(exponent, False) for exponent in EXPONENTS] if alone else []
    variants = [
        Variant((k,) * layers, exponent, corrected[exponent] if with_maps else None)
        for exponent, with_maps in tried
        for k in ks
    ]
    losses = measure_losses(run, tokens, variants, report=report)
    divergence = losses.divergence.mean(axis=1).reshape(len(tried), len(ks))
    least = divergence.min(axis=0)
    relative = np.divide(divergence, least, where=least > 0, out=np.ones_like(divergence)).mean(axis=1)
    best = tried[int(relative.argmin())]
    alike = [index for index, one in enumerate(tried) if one.corrected == best.corrected]
    exponent = _refine([tried[index].exponent for index in alike], relative[alike])
    return Compensation(exponent, best.corrected)


def _refine(exponents: Sequence[float], losses: Float64[np.ndarray, " exponents"]) -> float:
    """Where a parabola through the least loss and its neighbours is least; an end where that has the least."""
    best = int(losses.argmin())
    if best in (0, len(exponents) - 1):
        return exponents[best]
    curve = np.polyfit(exponents[best - 1 : best + 2], losses[best - 1 : best + 2], 2)
    return exponents[best] if curve[0] <= 0 else round(float(-curve[1] / (2 * curve[0])), 2)


def summarise(
    losses: Losses, index: int, divergence: Float64[np.ndarray, "K sequences"], settings: ProfileSettings
) -> LayerLoss:
    """The losses of the MoE layer number `index`; standard errors over sequences, whose tokens are not independent.

    `divergence` is that with this layer at k = 1..K.
    """
    squares, relative = losses.squares[index], losses.relative[index]
    sequences = len(squares)
    iterations = sequences // settings.batch
    mean, error = _estimate(squares)
    rms = np.sqrt(mean)
    share = np.divide(error, 2 * mean, where=mean > 0, out=np.zeros_like(mean))  # of a root mean square
    norms = np.sqrt(squares.reshape(iterations, settings.batch, -1).sum(axis=1) * settings.length).mean(axis=0)
    divergence, divergence_error = _estimate(divergence.T)
    relative, relative_error = _estimate(relative)
    return LayerLoss(
        iterations=iterations,
        samples=sequences * settings.length,
        frobenius=tuple(norms.tolist()),
        frobenius_stderr=tuple((norms * share).tolist()),
        rms=tuple(rms.tolist()),
        rms_stderr=tuple((rms * share).tolist()),
        relative=tuple(relative.tolist()),
        relative_stderr=tuple(relative_error.tolist()),
        divergence=tuple(np.maximum(divergence, 0.0).tolist()),  # rounding alone could make one negative
        divergence_stderr=tuple(divergence_error.tolist()),
    )


def _estimate(
    values: Float64[np.ndarray, "sequences K"],
) -> tuple[Float64[np.ndarray, " K"], Float64[np.ndarray, " K"]]:
    """The mean over sequences, and its standard error."""
    return values.mean(axis=0), values.std(axis=0, ddof=1) / np.sqrt(len(values))
