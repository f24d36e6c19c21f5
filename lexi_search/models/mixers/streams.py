"""The residual streams of one checkpoint, described from the config, and the tensors that connect layers to them."""

from lexi_search.checkpoint.config import Config
from lexi_search.layers.spec import Norm, Streams
from lexi_search.layers.weights import Connection, GatedConnection
from lexi_search.models.families.decoder import Family
from lexi_search.models.mixers.source import Source, resolve


def describe_streams(config: Config, family: Family, norm: Norm) -> Streams | None:
    """The streams of a family that has several; None for a plain residual stream."""
    keys = family.streams
    if keys is None:
        return None
    numbers = (resolve(config, key) for key in (keys.eps, keys.gain, keys.iterations))
    return Streams(config.read_count(keys.count), norm, *numbers)


def find_connections(source: Source) -> tuple[Connection | GatedConnection, ...] | None:
    """Those of a layer's token mixer and of its MLP or MoE."""
    keys, streams = source.family.streams, source.streams
    if streams is None:
        return None
    names = keys.mixer, keys.ffn
    if keys.gated:
        return tuple(_need_gated(source, name) for name in names)
    mixed = 0 if streams.iterations is None else streams.count**2
    return tuple(_need(source, name, 2 * streams.count + mixed) for name in names)


def find_last_connection(source: Source) -> Connection | GatedConnection | None:
    """That of the model's end."""
    keys = source.family.streams
    if keys is None or keys.last is None:
        return None
    return _need_gated(source, keys.last, last=True) if keys.gated else _need(source, keys.last, source.streams.count)


def _need(source: Source, name: str, rows: int) -> Connection:
    finder, count = source.finder, source.streams.count
    return Connection(
        weight=finder.need_tensor(f"{name}fn", (rows, count * source.hidden_size)),
        base=finder.need_tensor(f"{name}base", (rows,)),
        scale=finder.need_tensor(f"{name}scale", (min(rows // count, 3),)),
    )


def _need_gated(source: Source, name: str, *, last: bool = False) -> GatedConnection:
    finder, width = source.finder.at_module(name), source.streams.count * source.hidden_size
    down = finder.need(["input_mix_weight_down"], (None, width))
    return GatedConnection(
        norm=finder.need(["hc_norm"], (width,)),
        down=down,
        up=finder.need(["input_mix_weight_up"], (width, finder.get_shape(down.weight)[0])),
        written=None if last else finder.need(["block_inject_weight"], (source.streams.count, width)),
    )
