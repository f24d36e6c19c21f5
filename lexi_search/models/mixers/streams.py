"""The residual streams of one checkpoint, described from the config, and the tensors that connect layers to them."""

from lexi_search.checkpoint.config import Config
from lexi_search.layers.spec import Norm, Streams
from lexi_search.layers.weights import Connection
from lexi_search.models.families.decoder import Family
from lexi_search.models.mixers.source import Source, resolve


def describe_streams(config: Config, family: Family, norm: Norm) -> Streams | None:
    """The streams of a family that has several; None for a plain residual stream."""
    keys = family.streams
    if keys is None:
        return None
    numbers = (resolve(config, key) for key in (keys.eps, keys.gain, keys.iterations))
    return Streams(config.read_count(keys.count), Norm(norm.eps), *numbers)


def find_connections(source: Source) -> tuple[Connection, Connection] | None:
    """Those of a layer's token mixer and of its MLP or MoE."""
    keys, streams = source.family.streams, source.streams
    if streams is None:
        return None
    mixed = 0 if streams.iterations is None else streams.count**2
    return tuple(_need(source, name, 2 * streams.count + mixed) for name in (keys.mixer, keys.ffn))


def find_last_connection(source: Source) -> Connection | None:
    """That of the model's end."""
    keys = source.family.streams
    return None if keys is None or keys.last is None else _need(source, keys.last, source.streams.count)


def _need(source: Source, name: str, rows: int) -> Connection:
    finder, count = source.finder, source.streams.count
    return Connection(
        weight=finder.need_tensor(f"{name}fn", (rows, count * source.hidden_size)),
        base=finder.need_tensor(f"{name}base", (rows,)),
        scale=finder.need_tensor(f"{name}scale", (min(rows // count, 3),)),
    )
