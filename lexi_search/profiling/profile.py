"""Stage 1 (LExI section 3.1, Algorithm 1): the loss of each layer at each k, streamed from a checkpoint."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from lexi_search.artifacts.codec import require, require_gate_exponent
from lexi_search.artifacts.compensation import Maps
from lexi_search.artifacts.profile import LayerLoss, ProfileSettings
from lexi_search.checkpoint.reader import Checkpoint
from lexi_search.errors import InputError, check_memory, explain_overflow
from lexi_search.layers.ffn import ACTIVATIONS
from lexi_search.layers.spec import Routing
from lexi_search.layers.weights import find_memory
from lexi_search.models.loading.streaming import stream_layers
from lexi_search.models.model import Model
from lexi_search.profiling.divergence import draw_samples, measure_layers, open_run
from lexi_search.profiling.forward.variants import Run
from lexi_search.profiling.paper.gaussian import find_needed, measure_layer
from lexi_search.profiling.paper.moments import summarise

AUTO = "auto"
BATCH, LENGTH = 4, 512
RELATIVE_ERROR = {"weights": 0.0, "text": 0.0, "paper": 0.01}  # by input
SAMPLES = {"weights": 2**12, "text": 2**12, "paper": 2**20}
COMPENSATIONS = ("full", "exponent", "none")


def profile_layers(
    checkpoint: Checkpoint,
    model: Model,
    *,
    layers: Sequence[int],
    settings: ProfileSettings,
    tokens: Int[np.ndarray, "sequences length"] | None = None,
    maps: Maps | None = None,
    run: Run | None = None,
    report: Callable[[int], None] = lambda layer: None,
) -> Iterator[tuple[int, LayerLoss]]:
    """Yield (decoder-layer index, losses) for each of `layers`: on `paper` input as each is done, else all at the end.

    The losses of a layer depend on the weights, its index and `settings`, not on which other layers are measured, or in
    what order. On `paper` input the device holds the weights of two layers at most, as stored, and an expert that gets
    no token is not read. On other input the text is `tokens`, if it is sampled already, outputs are corrected by
    `maps`, if given, weights are where `run` keeps them, and `report` is called with the index of every decoder layer
    in every pass over the model.

    Raises:
        InputError: a layer that is no MoE layer, an activation that is not known, NaN or Inf in a weight or output,
            a sample cap below one iteration; on input other than `paper` a model with an unknown part.
    """
    check_layers(checkpoint, model, layers)
    if model.activation.name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise InputError(f"{checkpoint.folder}: hidden_act {model.activation.name!r} is not known; known are {known}")
    if settings.input == "paper":
        return _profile_each(checkpoint, model, layers, settings)
    run = open_run(checkpoint, model, settings.dtype) if run is None else run._replace(model=model)
    return _profile_text(run, layers, settings, tokens, maps, report)


def choose_dtype(dtype: str, source: str, stored: str) -> str:
    """The element type `dtype`; where that is "auto", the one that suits the input `source` and the `stored` weights.

    CPUs multiply 16-bit floats several times slower, which a pass over the whole model makes felt.
    """
    if dtype != "auto":
        return dtype
    return "float32" if source != "paper" and jax.default_backend() == "cpu" else stored


def decide_compensation(compensation: str | None, exponent: float | str | None, input: str, routing: Routing) -> str:
    """One of `COMPENSATIONS`: the one that is asked for, or the most that the input and the family's routing allow.

    Without one asked for, a gate exponent on the paper's input is taken as it is. Raises InputError for what is not
    possible, or contradicts itself.
    """
    if compensation not in (None, *COMPENSATIONS):
        raise InputError(f"compensation {compensation!r} is not known; known are {', '.join(COMPENSATIONS)}")
    if compensation == "none" and exponent is not None:
        raise InputError("--gate-exponent is a part of compensation; take --compensation exponent, or leave it out")
    if input == "paper":
        if compensation in ("full", "exponent"):
            raise InputError(f"--compensation {compensation} is found on a text; leave --input paper out")
        return "none" if exponent is None else "exponent"
    proportional = not (routing.scales_input or routing.scales_output) and routing.scoring != "sparsemixer"
    if compensation in ("full", "exponent") and not proportional:
        raise InputError(
            f"--compensation {compensation}: this family's gate weights are not the scores up to one factor a token; "
            "take --compensation none"
        )
    return compensation or ("full" if proportional else "none")


def choose_background(background_k: int | None, compensation: str, input: str, top_k: int) -> int | None:
    """The k of all other layers while one is measured: the one that is asked for, or with a compensation half of the
    model's own; None for the model's own. InputError for the paper's input, which has no other layers."""
    if background_k is None:
        return None if compensation == "none" or input == "paper" or top_k == 1 else top_k // 2
    require(input != "paper", "--background-k is of other layers, which --input paper has none of; leave it out")
    if not 1 <= background_k <= top_k:
        raise InputError(f"--background-k is {background_k}, expected 1 to {top_k}, the model's own")
    return None if background_k == top_k else background_k


def check_layers(checkpoint: Checkpoint, model: Model, layers: Sequence[int]) -> None:
    """Raise InputError for a layer that is no MoE layer, or has no k to choose."""
    if extra := [layer for layer in layers if layer not in model.layers]:
        known = ", ".join(map(str, model.layers))
        fixed = "looks its experts up by token, and keeps its k; others are"
        thing = fixed if extra[0] in model.tensors else "is no MoE layer; those are"
        raise InputError(f"{checkpoint.folder}: layer {extra[0]} {thing} {known}")


def _profile_text(
    run: Run,
    layers: Sequence[int],
    settings: ProfileSettings,
    tokens: Int[np.ndarray, "sequences length"] | None,
    maps: Maps | None,
    report: Callable[[int], None],
) -> Iterator[tuple[int, LayerLoss]]:
    if not layers:
        return
    if tokens is None:
        tokens = draw_samples(run, settings, layers=len(layers), report=report)
    yield from measure_layers(run, tokens, layers, settings, maps=maps, report=report)


def _profile_each(
    checkpoint: Checkpoint, model: Model, layers: Sequence[int], settings: ProfileSettings
) -> Iterator[tuple[int, LayerLoss]]:
    if settings.max_samples < settings.batch * settings.length:
        size = f"batch {settings.batch} x length {settings.length}"
        raise InputError(f"at most {settings.max_samples} samples allow no iteration of {size}; raise the cap")
    row = model.hidden_size * jnp.dtype(settings.dtype).itemsize
    check_memory(
        f"tokens and expert outputs of batch {settings.batch} x length {settings.length}",
        float(settings.batch) * settings.length * (1 + model.top_k) * row,
        "lower --batch or --length",
        most=find_memory(),
    )
    needed = partial(find_needed, model, settings)
    with closing(stream_layers(checkpoint, model, layers, needed=needed)) as streamed:
        for layer, weights in streamed:
            moments = measure_layer(model, weights, layer, settings)
            if not np.isfinite(moments.squares).all():
                raise explain_overflow(f"{checkpoint.folder}: the output of layer {layer} overflows", settings.dtype)
            yield layer, summarise(moments)


def read_settings(
    input: str,
    iterations: int | None,
    samples: int | None,
    *,
    text: str | os.PathLike[str] | None = None,
    batch: int,
    length: int,
    seed: int,
    **paper: Any,
) -> dict[str, Any]:
    """Keywords for `ProfileSettings`, of which `paper` are for that input alone; InputError where they do not fit.

    With the file `text` the input is text, and not without.
    """
    require(input != "text" or text is not None, "input text needs a file; name it by --text")
    if text is not None:
        both = "--text goes through the whole model, and --input paper does not; leave one of them out"
        require(input != "paper", both)
        input = "text"
    _check_settings(input, iterations=iterations, **paper)
    require(input != "text" or seed == 0, "--seed is of random input, which --text has none of; leave it out")
    end = _find_end(input, paper["relative_error"], samples, iterations, batch * length)
    return {"input": input, "seed": seed, "batch": batch, "length": length} | paper | end


def _check_settings(input: str, **settings: object) -> None:
    """Raise InputError for an input that is not known, or one of the paper's `settings` with another input."""
    if input not in SAMPLES:
        raise InputError(f"input {input!r} is not known; known are {', '.join(SAMPLES)}")
    given = [f"--{name.replace('_', '-')}" for name, value in settings.items() if value is not None]
    if input != "paper" and given:
        raise InputError(f"{given[0]} is for --input paper; add that, or leave {given[0]} out")


def _find_end(
    input: str, relative_error: float | None, samples: int | None, iterations: int | None, size: int
) -> dict[str, Any]:
    """The settings that say when to stop; `iterations` of `size` tokens stand for both of them."""
    if iterations is None:
        error = RELATIVE_ERROR[input] if relative_error is None else relative_error
        return {"relative_error": error, "max_samples": SAMPLES[input] if samples is None else samples}
    if (relative_error, samples) != (None, None):
        other = "--samples" if relative_error is None else "--relative-error"
        raise InputError(f"--iterations and {other} both say when to stop; give one of them")
    if not 1 <= iterations < 2**31:
        raise InputError(f"--iterations is {iterations}, at least 1 expected")
    return {"relative_error": 0.0, "max_samples": iterations * size}


def read_exponent(value: float | str | None, input: str) -> float | str | None:
    """The gate exponent that is asked for: a number, `AUTO` or None; InputError for anything else."""
    if value == AUTO and input == "paper":
        raise InputError("--gate-exponent auto is found on a text; leave --input paper out")
    if value in (None, AUTO):
        return value
    try:
        exponent = float(value)
    except ValueError:
        raise InputError(f"--gate-exponent {value!r} is neither a number nor auto") from None
    require_gate_exponent(exponent)
    return exponent
