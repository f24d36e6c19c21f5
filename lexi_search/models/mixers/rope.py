"""Rotary position embeddings (arXiv 2104.09864) as configs describe them: the frequency of each pair of values.

Frequencies and their scaling for long contexts are those of transformers, float32.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import numpy as np

from lexi_search.artifacts.codec import short
from lexi_search.checkpoint.config import LARGEST_FLOAT, Config
from lexi_search.errors import InputError
from lexi_search.layers.spec import Rope

DEFAULT_THETA = 1e4
RopeParameters = Mapping[str, Any]  # as `rope_parameters` in a config holds them


def read_parameters(config: Config, *, layer_type: str | None = None, theta: Any = None) -> RopeParameters:
    """The config's rotary parameters for layers of `layer_type`: new (`rope_parameters`) and old keys together.

    `theta` is the layer's own base, if it has one.

    Raises:
        InputError: an unknown kind of scaling, or a parameter that is not of its type.
    """
    values = config.values
    given = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if isinstance(given, dict) and layer_type in given:
        given = given[layer_type] or {}
    if not isinstance(given, dict):
        raise InputError(f"{config.place}: the rope parameters are {short(given)}, expected an object")
    outer = {key: values[key] for key in _OUTER_KEYS if values.get(key) is not None}
    parameters = {"rope_theta": DEFAULT_THETA} | outer | given | ({} if theta is None else {"rope_theta": theta})
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if not isinstance(kind, str) or kind not in _SCALINGS:
        known = ", ".join(_SCALINGS)
        raise InputError(
            f"{config.place}: rope_type {short(kind)} is not known; use lexi-search profile --input paper, which does "
            f"without; known are {known}"
        )
    length = values.get("max_position_embeddings")
    original = values.get("original_max_position_embeddings") or parameters.get("original_max_position_embeddings")
    parameters |= {
        "rope_type": kind,
        "max_position_embeddings": length,
        "original_max_position_embeddings": original or length,
    }
    for name in _NUMBERS & parameters.keys():
        value = parameters[name]
        if value is not None and not (type(value) in (int, float) and 0 <= value <= LARGEST_FLOAT):
            raise InputError(f"{config.place}: {name} is {short(value)}, expected a number of at least 0")
    return parameters


def make_rope(parameters: RopeParameters, dim: int, *, place: str, interleaved: bool = False) -> Rope:
    """The rotary embedding of a head's first values, of `dim`: all, or the share `partial_rotary_factor` of them.

    Raises:
        InputError: a parameter that the kind of scaling needs is missing, or out of the range that it works with.
    """
    with _refuse_failure(parameters, place):
        share = 1.0 if parameters["rope_type"] == "proportional" else parameters.get("partial_rotary_factor", 1.0)
        rotary = int(parameters.get("rotary_dim") or dim * share)
        if not 1 <= rotary <= dim - dim % 2:
            raise ValueError(f"{rotary} of {dim} values of a head")
        exponents = np.arange(0, rotary, 2, dtype=np.float32) / np.float32(rotary)
        frequencies = np.float32(1) / np.float32(parameters["rope_theta"]) ** exponents
        scaled, scale = _SCALINGS[parameters["rope_type"]](frequencies, parameters)
        scaled = scaled.astype(np.float32)
        if not (np.isfinite(scaled).all() and 0 < scale <= LARGEST_FLOAT):
            raise ValueError("not finite")
    limit = _LIMITS.get("llama_4" if parameters.get("llama_4_scaling_beta") else parameters["rope_type"])
    return Rope(tuple(scaled.tolist()), float(scale), interleaved, parameters.get(limit))


def find_temperature(parameters: RopeParameters, *, place: str) -> float:
    """DeepSeek's factor on attention scores where the context was extended (YaRN's `mscale_all_dim`).

    Raises:
        InputError: it needs the `factor` of the extension, and there is none.
    """
    if parameters["rope_type"] == "default" or not parameters.get("mscale_all_dim"):
        return 1.0
    with _refuse_failure(parameters, place):
        return _find_mscale(parameters["factor"], parameters["mscale_all_dim"]) ** 2


@contextmanager
def _refuse_failure(parameters: RopeParameters, place: str) -> Iterator[None]:
    """Raise InputError for whatever arithmetic fails on: a missing parameter, or one of a wrong type or range."""
    try:
        with np.errstate(over="raise", divide="raise", invalid="raise"):
            yield
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        kind = parameters["rope_type"]
        raise InputError(f"{place}: rope parameters of type {kind!r} are incomplete or wrong ({error!r})") from error


def _find_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's scale of queries and keys for a context extended by `factor` (arXiv 2309.00071, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _leave_unscaled(frequencies: np.ndarray, parameters: RopeParameters) -> tuple[np.ndarray, float]:
    return frequencies, 1.0


def _scale_dynamic(frequencies: np.ndarray, parameters: RopeParameters) -> tuple[np.ndarray, float]:
    """Dynamic scaling, which leaves sequences within the trained length alone, except for Hunyuan's `alpha`."""
    dim, exponents = 2 * len(frequencies), np.arange(len(frequencies)) * 2
    return frequencies * (parameters.get("alpha") or 1.0) ** (-exponents / (dim - 2)), 1.0


def _scale_longrope(frequencies: np.ndarray, parameters: RopeParameters) -> tuple[np.ndarray, float]:
    """LongRoPE (arXiv 2402.13753) for sequences within the original context length."""
    original = parameters["original_max_position_embeddings"]
    factor = parameters.get("factor") or parameters["max_position_embeddings"] / original
    scale = parameters.get("short_mscale") or parameters.get("attention_factor")
    if scale is None:
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    divisors = np.asarray(parameters["short_factor"], np.float32)
    if divisors.shape != frequencies.shape:
        raise ValueError(f"short_factor of shape {list(divisors.shape)} for {len(frequencies)} pairs")
    return frequencies / divisors, scale


def _scale_linear(frequencies: np.ndarray, parameters: RopeParameters) -> tuple[np.ndarray, float]:
    return frequencies / np.float32(parameters["factor"]), 1.0


def _scale_proportional(frequencies: np.ndarray, parameters: RopeParameters) -> tuple[np.ndarray, float]:
    """Gemma 4: the frequencies of a whole head, of which the last pairs are not rotated at all."""
    kept = np.arange(len(frequencies)) < int(parameters.get("partial_rotary_factor", 1.0) * 2 * len(frequencies) // 2)
    return np.where(kept, frequencies, np.float32(0)) / np.float32(parameters.get("factor") or 1.0), 1.0


def _scale_llama3(frequencies: np.ndarray, parameters: RopeParameters) -> tuple[np.ndarray, float]:
    """Llama 3.1: low frequencies are divided by the factor, high ones kept, those between interpolated."""
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    rotations = parameters["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = np.clip((rotations - low) / (high - low), 0, 1)
    return (1 - kept) * frequencies / parameters["factor"] + kept * frequencies, 1.0


def _scale_yarn(frequencies: np.ndarray, parameters: RopeParameters) -> tuple[np.ndarray, float]:
    """YaRN (arXiv 2309.00071, section 3.2), with DeepSeek's two `mscale`."""
    theta, original = parameters["rope_theta"], parameters["original_max_position_embeddings"]
    factor = parameters.get("factor") or parameters["max_position_embeddings"] / original
    dim = 2 * len(frequencies)
    betas = parameters.get("beta_fast") or 32, parameters.get("beta_slow") or 1
    low, high = (dim * math.log(original / (beta * 2 * math.pi)) / (2 * math.log(theta)) for beta in betas)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low if high != low else 0.001), 0, 1)
    scale, mscales = parameters.get("attention_factor"), (parameters.get("mscale"), parameters.get("mscale_all_dim"))
    if scale is None:
        scale = (
            _find_mscale(factor, mscales[0]) / _find_mscale(factor, mscales[1])
            if all(mscales)
            else _find_mscale(factor)
        )
    return frequencies / factor * ramp + frequencies * (1 - ramp), scale


_SCALINGS: Mapping[str, Callable[[np.ndarray, RopeParameters], tuple[np.ndarray, float]]] = MappingProxyType(
    {
        "default": _leave_unscaled,
        "mrope": _leave_unscaled,  # for images; text has the same position on every axis
        "linear": _scale_linear,
        "dynamic": _scale_dynamic,
        "llama3": _scale_llama3,
        "yarn": _scale_yarn,
        "deepseek_yarn": _scale_yarn,  # vLLM's name where there are two `mscale`
        "longrope": _scale_longrope,
        "proportional": _scale_proportional,
    }
)
# The parameter that holds the longest sequence for which a scaling is computed correctly here.
_LIMITS = MappingProxyType(
    {
        "dynamic": "max_position_embeddings",
        "longrope": "original_max_position_embeddings",
        "llama_4": "original_max_position_embeddings",  # beyond it, queries are scaled by their position
    }
)
_OUTER_KEYS = ("rope_theta", "partial_rotary_factor", "rotary_dim")  # may be in the config itself
# The parameters that are numbers, whatever the kind.
_NUMBERS = frozenset(
    (
        *(*_OUTER_KEYS, "factor", "alpha", "max_position_embeddings", "original_max_position_embeddings"),
        *("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "short_mscale"),
        *("low_freq_factor", "high_freq_factor", "llama_4_scaling_beta"),
    )
)
