"""The profile of a model by brute force on tokens: the whole run, and a file that a search reads like any other.

It holds the losses that profiles from weights alone estimate, so it is their reference, and better where there is text.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch

from lexi_adapter.allocation import ModelIdentity
from lexi_adapter.errors import check_memory
from lexi_adapter.evaluation.transformers_backend import explain_full_memory, find_device, find_memory, load_model
from lexi_adapter.files import check_writable, write_json
from lexi_adapter.model.folder import find_limit, find_vocabulary, read_config
from lexi_adapter.model.identity import describe_checkpoint
from lexi_adapter.sensitivity.ablation import LayerLosses, measure
from lexi_adapter.sensitivity.journal import find_path, keep_journal
from lexi_adapter.sensitivity.windows import check_vocabulary, cut, generate, read_tokens
from lexi_adapter.tasks.texts import check_length, encode, load_tokenizer, read_text

FORMAT, VERSION = "lexi-profile", 1


class ProfileOptions(NamedTuple):
    """The options of `lexi-adapter sensitivity`: exactly one of `texts`, `token_files` and `generated` is given."""

    model: str
    texts: Sequence[str]
    token_files: Sequence[str]
    generated: bool
    length: int
    sequences: int
    batch: int
    local: bool
    gate_exponent: float | None
    tokenizer: str | None
    device: str | None
    dtype: str
    seed: int


def write_profile(
    options: ProfileOptions,
    output: str | os.PathLike[str],
    *,
    restart: bool,
    progress: Callable[[int, int, str], None],
) -> None:
    """Measure a model and write its profile to `output`, resuming from the journal of an earlier run.

    Args:
        restart: discard that journal.
        progress: gets the finished parts, their total, and words for the last: at the start, and after every part.

    Raises:
        AdapterError: a model, text or file that cannot be used, too little text, or a device that is too small.
    """
    read = [options.model, options.tokenizer, *options.texts, *options.token_files]
    for path in (output, find_path(output)):
        check_writable(path, apart_from=read)
    identity = describe_checkpoint(Path(options.model))
    check_length("--length", options.length, find_limit(read_config(Path(options.model))))
    windows = None if options.generated else _cut_windows(options)
    _check_memory(options, options.sequences if windows is None else len(windows))
    model = load_model(options.model, device=options.device, dtype=options.dtype)
    with explain_full_memory(str(model.device), f"a --batch below {options.batch}"):
        if windows is None:
            windows = generate(
                model, length=options.length, sequences=options.sequences, batch=options.batch, seed=options.seed
            )
        check_vocabulary(windows, model.config)
        settings = make_settings(
            "generated" if options.generated else "text",
            sequences=len(windows),
            length=options.length,
            dtype=options.dtype,
            seed=options.seed,
            gate_exponent=options.gate_exponent,
        )
        kinds = _choose_kinds(options)
        made_by = describe_run(model, windows, options.batch)
        run = {"model": asdict(identity), "settings": settings, "made_by": made_by, "losses": kinds}
        with keep_journal(output, run, restart=restart) as journal:
            total = len(identity.moe_layers) * len(windows.split(options.batch))
            progress(len(journal.parts), total, f"finished in {journal.path}" if journal.parts else "")
            parts = measure(
                model,
                identity,
                windows,
                batch=options.batch,
                local=options.local,
                gate_exponent=options.gate_exponent,
                finished=tuple(journal.parts),
            )
            for index, layer, losses in parts:
                journal.add(index, layer, losses)
                progress(len(journal.parts), total, f"sequences {index * options.batch} on, layer {layer}")
            document = make_document(identity, settings, journal.parts, made_by, kinds=kinds)
            write_json(output, document, apart_from=read)


def _check_memory(options: ProfileOptions, sequences: int) -> None:
    """Raise AdapterError where all tokens, or the logits of a pass and those to compare with, fit no memory."""
    check_memory(f"{sequences} sequences of tokens", 8 * sequences * options.length, "lower --sequences or --length")
    batch, vocabulary = min(options.batch, sequences), find_vocabulary(read_config(Path(options.model))) or 1
    size, memory = 2 * 4 * batch * options.length * vocabulary, find_memory(find_device(options.device))
    check_memory(f"the logits of {batch} sequences at once", size, "lower --batch or --length", most=memory)


def _cut_windows(options: ProfileOptions) -> torch.Tensor:
    """The windows of the texts or of the files with token ids."""
    tokenizer = load_tokenizer(options.tokenizer or options.model) if options.texts else None
    streams = [encode(tokenizer, read_text(path)) for path in options.texts]
    streams += [stream for path in options.token_files for stream in read_tokens(path)]
    source = ", ".join((*options.texts, *options.token_files))
    return cut(streams, length=options.length, sequences=options.sequences, source=source)


def _choose_kinds(options: ProfileOptions) -> tuple[str, ...]:
    """The losses of the whole model that are measured."""
    if options.local:
        return ()
    # On the model's own samples the expected increase of the cross-entropy is the divergence, and is noisier.
    return ("divergence",) if options.generated else ("divergence", "increase")


def make_settings(
    source: str, *, sequences: int, length: int, dtype: str, seed: int, gate_exponent: float | None
) -> dict[str, Any]:
    """The settings of a profile on `source`: an iteration is a sequence, and all are measured, whatever the error."""
    settings = {
        "input": source,
        "seed": seed,
        "batch": 1,
        "length": length,
        "dtype": dtype,
        "relative_error": 0.0,
        "max_samples": sequences * length,
    }
    return settings if gate_exponent is None else settings | {"gate_exponent": gate_exponent}


def describe_run(model: torch.nn.Module, windows: torch.Tensor, batch: int) -> dict[str, Any]:
    """The versions, device and tokens that a profile's numbers depend on; no date, so that it can be made again."""
    device = model.device
    return {
        "lexi_adapter": metadata.version("lexi-moe"),
        "transformers": metadata.version("transformers"),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "sequences_per_pass": batch,
        "tokens_sha256": hashlib.sha256(windows.cpu().numpy().astype("<i8").tobytes()).hexdigest(),
    }


def make_document(
    model: ModelIdentity,
    settings: Mapping[str, Any],
    parts: Mapping[tuple[int, int], LayerLosses],
    made_by: Mapping[str, Any],
    *,
    kinds: Sequence[str],
) -> dict[str, Any]:
    """The JSON object of a profile from its parts by batch and layer; `kinds` are the losses of the whole model."""
    ordered = sorted(parts.items())
    layers = {layer: [losses for (_, index), losses in ordered if index == layer] for layer in model.moe_layers}
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": asdict(model),
        "settings": dict(settings),
        "layers": {str(layer): summarise(batches, settings["length"], kinds) for layer, batches in layers.items()},
        "made_by": dict(made_by),
    }


def summarise(parts: Sequence[LayerLosses], length: int, kinds: Iterable[str]) -> dict[str, Any]:
    """The losses of one layer, for k = 1 to the model's own, with standard errors over sequences.

    Tokens of one sequence depend on each other, sequences hardly do. `frobenius` is the mean over them of
    ||Y_k - Y_base||_F for one sequence, `rms` the root mean square over tokens of ||y_k - y_base||, whose error is that
    of the mean square by the delta method.
    """
    squares = _join(parts, "squares")
    means = [_estimate([value / length for value in column]) for column in squares]
    losses = {
        "frobenius": [_estimate([sqrt(value) for value in column]) for column in squares],
        "rms": [(sqrt(mean), error / (2 * sqrt(mean)) if mean else 0.0) for mean, error in means],
    }
    losses |= {kind: [_estimate(column) for column in _join(parts, kind)] for kind in ("relative", *kinds)}
    sequences = len(squares[0])
    summary: dict[str, Any] = {"iterations": sequences, "samples": sequences * length}
    for kind, estimates in losses.items():
        summary[kind] = [mean for mean, _ in estimates] + [0.0]
        summary[f"{kind}_stderr"] = [error for _, error in estimates] + [0.0]
    return summary


def _join(parts: Sequence[LayerLosses], kind: str) -> list[tuple[float, ...]]:
    """The values of all sequences for each k: [k - 1][sequence]."""
    return list(zip(*(row for part in parts for row in getattr(part, kind)), strict=True))


def _estimate(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error."""
    return fmean(values), stdev(values) / sqrt(len(values))
