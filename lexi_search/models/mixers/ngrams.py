"""The embeddings of n-grams of one layer of Qwen4-Exp, described from its tensors and the config."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from lexi_search.artifacts.codec import short
from lexi_search.checkpoint.config import LARGEST_COUNT, Config
from lexi_search.checkpoint.dequantise import Plain
from lexi_search.checkpoint.reader import Checkpoint
from lexi_search.errors import InputError
from lexi_search.layers.spec import NGrams
from lexi_search.layers.weights import NGramWeights
from lexi_search.models.finder import Finder
from lexi_search.models.mixers.source import REMEDY, Source

HASHES = ("layer_multipliers", "ngram_heads_vocab_sizes", "ngram_heads_offsets")


class LayerNGrams(NamedTuple):
    """The hashes of n-grams, the parts of the table with their embeddings, and what maps these to residual streams."""

    hashes: NGrams
    table: tuple[str, ...]
    weights: NGramWeights


def describe_ngrams(source: Source, checkpoint: Checkpoint) -> LayerNGrams | None:
    """Those of a layer; None where it has none.

    Raises:
        InputError: a tensor that is missing or does not fit; a quantised table.
    """
    finder, hidden = source.finder.at_module("ple."), source.hidden_size
    if not finder.has("key_proj"):
        return None
    width = source.streams.count * hidden
    key = finder.need(["key_proj"], (width, None))
    inner = finder.get_shape(key.weight)[1]
    weights = NGramWeights(
        key=key,
        value=finder.need(["value_proj"], (hidden, inner)),
        key_norm=finder.need(["norm_key"], (width,)),
        query_norm=finder.need(["norm_query"], (width,)),
        conv_norm=finder.need(["norm_conv"], (width,)),
        conv=finder.need(["conv1d"], (width, 1, None)),
    )
    finder = finder.at_module("ple_embedding.")
    hashes = NGrams(*(_read_numbers(finder, checkpoint, name) for name in HASHES), _find_end(source.config))
    count = len(hashes.sizes)
    if len(hashes.multipliers) < 2 or count % (len(hashes.multipliers) - 1) or inner % count:
        thing = f"{len(hashes.multipliers)} multipliers and {count} hashes of n-grams do not fit {inner} values"
        raise InputError(f"{finder.tensors.folder}: {finder.prefix}: {thing}")
    if len(hashes.offsets) != count or min(hashes.sizes) < 1 or min(hashes.offsets) < 0:
        raise InputError(f"{finder.tensors.folder}: {finder.prefix}: sizes and offsets of n-grams do not fit")
    rows = max(offset + size for offset, size in zip(hashes.offsets, hashes.sizes, strict=True))
    return LayerNGrams(hashes, _find_table(finder, rows, inner // count), weights)


def _read_numbers(finder: Finder, checkpoint: Checkpoint, name: str) -> tuple[int, ...]:
    """A short tensor of whole numbers."""
    entry = finder.tensors.get(finder.prefix + name)
    if entry is None:
        raise InputError(f"{finder.tensors.folder}: tensor {finder.prefix}{name} is missing; {REMEDY}")
    if entry.dtype.name != "int64" or len(entry.shape) != 1 or not 1 <= entry.shape[0] <= 2**10:
        thing = f"{entry.dtype.name} of shape {list(entry.shape)}"
        raise InputError(f"{entry.file}: tensor {finder.prefix}{name} is {thing}, expected a short list of int64")
    finder.used.add(finder.prefix + name)
    return tuple(checkpoint[finder.prefix + name].tolist())


def _find_end(config: Config) -> int:
    end = config.values.get("eos_token_id")
    end = end[0] if isinstance(end, list) and end else end
    if type(end) is not int or not 0 <= end <= LARGEST_COUNT:
        raise InputError(f"{config.place}: eos_token_id is {short(end)}, expected a token, at which n-grams end")
    return end


def _find_table(finder: Finder, rows: int, width: int) -> tuple[str, ...]:
    """The parts of the table, one after the other: one, or as many as there are."""
    modules: Sequence[str] = ["ngram_embedding"]
    if not finder.has(modules[0]):
        numbered = (f"ngram_embedding.shard_{number}" for number in itertools.count())
        modules = list(itertools.takewhile(finder.has, numbered)) or ["ngram_embedding.shard_0"]
    names = [finder.need([module], (None, width)).weight.name for module in modules]
    stored = [finder.tensors[name] for name in names]
    if quantised := next((each for each in stored if each.scheme != Plain()), None):
        raise InputError(f"{quantised.file}: the table of n-grams is quantised, and only a plain one is read; {REMEDY}")
    if (count := sum(each.shape[0] for each in stored)) < rows:
        thing = f"{len(names)} parts of {finder.prefix}ngram_embedding have {count} rows, and its hashes need {rows}"
        raise InputError(f"{stored[0].file}: {thing}; is the download complete?")
    return tuple(names)
