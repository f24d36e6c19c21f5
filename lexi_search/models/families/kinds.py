"""The kind of attention of each layer, as configs say it."""

from collections.abc import Callable, Sequence
from functools import partial

from lexi_search.artifacts.codec import short
from lexi_search.checkpoint.config import Config, Key
from lexi_search.errors import InputError

# Kinds of attention, as configs call them.
FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
Kinds = Callable[[Config, int], Sequence[str]]  # config, number of layers -> the kind of each layer


def attend_to_all(config: Config, num_layers: int) -> Sequence[str]:
    return [FULL] * num_layers


def attend_in_window(config: Config, num_layers: int) -> Sequence[str]:
    return [SLIDING if config.values.get("sliding_window") else FULL] * num_layers


def attend_in_window_if_used(config: Config, num_layers: int) -> Sequence[str]:
    return (attend_in_window if config.values.get("use_sliding_window") else attend_to_all)(config, num_layers)


def read_types(config: Config) -> Sequence[str]:
    types = config.values[config.find_key(("layer_types",))]
    if not isinstance(types, list) or not all(isinstance(kind, str) for kind in types):
        raise InputError(f"{config.place}: layer_types is {short(types)}, expected a list of names")
    return types


def attend_by_type(config: Config, num_layers: int, *, otherwise: Kinds = attend_to_all) -> Sequence[str]:
    """The config's `layer_types`, where it has a window; without, the kinds that `otherwise` gives."""
    if not config.values.get("sliding_window"):
        return attend_to_all(config, num_layers)
    return (read_types if config.values.get("layer_types") else partial(otherwise, num_layers=num_layers))(config)


def attend_to_all_in_every(config: Config, num_layers: int, *, period: int | str) -> Sequence[str]:
    """Windows but in every n-th layer: n is `period` or, of a text, the config's value under that key."""
    every = config.read_count(period) if isinstance(period, str) else period
    return [FULL if (i + 1) % every == 0 else SLIDING for i in range(num_layers)]


def by_type_or_every(period: int | str) -> Kinds:
    return partial(attend_by_type, otherwise=partial(attend_to_all_in_every, period=period))


def attend_in_each_sixth(config: Config, num_layers: int) -> Sequence[str]:
    """The config's `layer_types`, or windows but in every sixth layer; the last one attends to all (Gemma 4)."""
    config.read_choice("use_bidirectional_attention", {None: None, "vision": None})  # of images
    if config.values.get("layer_types"):
        return [*read_types(config)[:-1], FULL]
    return [*attend_to_all_in_every(config, num_layers - 1, period=6), FULL]


def attend_by_longer_types(config: Config, num_layers: int) -> Sequence[str]:
    """The config's `layer_types`, which may go on with those of prediction layers (Step)."""
    if not config.values.get("layer_types"):
        raise InputError(f"{config.place}: layer_types is missing; fetch the config again")
    if config.values.get("use_rope_layers") and False in config.values["use_rope_layers"]:
        raise InputError(f"{config.place}: use_rope_layers leaves layers out, and what these compute is not known")
    return read_types(config)[:num_layers]


def attend_in_last_windows(config: Config, num_layers: int) -> Sequence[str]:
    first = config.resolve(Key("max_window_layers", 0))
    return [SLIDING if i >= first else FULL for i in range(num_layers)]


def attend_alternately(config: Config, num_layers: int) -> Sequence[str]:
    """The config's `layer_types`; without, windows, if used, in even layers below `max_window_layers` (Qwen2-MoE)."""
    values = config.values
    if values.get("layer_types") or not values.get("use_sliding_window"):
        return read_types(config) if values.get("layer_types") else attend_to_all(config, num_layers)
    last = config.resolve(Key("max_window_layers", 28))
    return [SLIDING if i % 2 == 0 and i < last else FULL for i in range(num_layers)]


def attend_in_chunks(config: Config, num_layers: int) -> Sequence[str]:
    """Chunks where `no_rope_layers`, or every n-th layer without it, does not say otherwise (Llama 4)."""
    flags = config.values.get("no_rope_layers")
    if not flags:
        every = config.resolve(Key("no_rope_layer_interval", 4)) or 4
        flags = [(i + 1) % every != 0 for i in range(num_layers)]
    if not isinstance(flags, list):
        raise InputError(f"{config.place}: no_rope_layers is {short(flags)}, expected a list")
    return [CHUNKED if flag else FULL for flag in flags]


def attend_by_pattern(config: Config, num_layers: int) -> Sequence[str]:
    """The config's `hybrid_layer_pattern`, as vLLM reads it, or `layer_types`; else all in each sixth (MiMo)."""
    pattern = config.values.get("hybrid_layer_pattern")
    if isinstance(pattern, list) and pattern:
        return [SLIDING if flag == 1 else FULL for flag in pattern]
    if config.values.get("layer_types"):
        return read_types(config)
    return [FULL if i == 0 or (i + 1) % 6 == 0 else SLIDING for i in range(num_layers)]


def attend_after_dense(config: Config, num_layers: int) -> Sequence[str]:
    """The config's `layer_types`; else windows but in every n-th layer, counted anew after the dense ones (Cohere)."""
    if config.values.get("layer_types"):
        return read_types(config)
    dense = min(config.resolve(Key("first_k_dense_replace", 0)), num_layers)
    first = attend_to_all_in_every(config, dense, period="prefix_dense_sliding_window_pattern")
    return [*first, *attend_to_all_in_every(config, num_layers - dense, period="sliding_window_pattern")]


def attend_in_three_windows(config: Config, num_layers: int) -> Sequence[str]:
    """The config's `layer_types`, or windows but in every fourth layer from the first (Granite)."""
    if config.values.get("layer_types"):
        return read_types(config)
    return [SLIDING if i % 4 else FULL for i in range(num_layers)]


def attend_with_plain_head(config: Config, num_layers: int) -> Sequence[str]:
    """To all; a `norm_head`, whose rows vLLM normalises, is refused (Ling)."""
    config.read_choice("norm_head", {False: None})
    return attend_to_all(config, num_layers)
