"""Held-out tokens as windows to measure on and windows to judge on, of every domain alike."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch


class Windows(NamedTuple):
    """`tokens` [sequences, length]; window i is of `domains[i]`, and the domains take turns."""

    tokens: torch.Tensor
    domains: tuple[str, ...]

    def average(self, values: np.ndarray) -> dict[str, np.ndarray]:
        """Mean of values [..., sequences] over the windows of each domain, and under "mean" over the domains."""
        domains = np.array(self.domains)
        means = {name: values[..., domains == name].mean(-1) for name in dict.fromkeys(self.domains)}
        return means | {"mean": np.mean(list(means.values()), axis=0)}

    def find_error(self, values: np.ndarray) -> float:
        """Standard error of the mean over domains of values [sequences], windows drawn at random within each domain."""
        domains = np.array(self.domains)
        parts = [values[domains == name] for name in dict.fromkeys(self.domains)]
        return math.sqrt(sum(part.var(ddof=1) / len(part) for part in parts)) / len(parts)


def cut(streams: Mapping[str, np.ndarray], *, measure: int, judge: int, length: int) -> tuple[Windows, Windows]:
    """So many windows of each domain to measure on, from its first half, and to judge on, from the middle onwards.

    Raises ValueError if a domain has too few tokens.
    """
    halves = []
    for name, count in (("measure", measure), ("judge", judge)):
        parts = []
        for domain, stream in streams.items():
            first = 0 if name == "measure" else len(stream) // 2
            room = (len(stream) // 2 if name == "measure" else len(stream) - first) // length
            if room < count:
                raise ValueError(f"{domain} has room for {room} windows of {length} to {name} on, not {count}")
            taken = stream[first : first + count * length].astype(np.int64)
            parts.append(torch.from_numpy(taken.reshape(count, length)))
        tokens = torch.stack(parts, dim=1).flatten(0, 1)
        halves.append(Windows(tokens, tuple(streams) * count))
    return halves[0], halves[1]


def cut_what_fits(
    streams: Mapping[str, np.ndarray], *, measure: int, judge: int, least: int, length: int
) -> tuple[Windows, Windows, dict[str, str]]:
    """As `cut`, without the domains that have no room for `measure` and `least` windows, and these with the reason.

    Those to judge on are `judge` of each domain, or as many as the shortest has. ValueError if no domain is left.
    """
    kept, short = {}, {}
    for domain, stream in streams.items():
        try:
            cut({domain: stream}, measure=measure, judge=least, length=length)
            kept[domain] = stream
        except ValueError as error:
            short[domain] = str(error)
    if not kept:
        raise ValueError("; ".join(short.values()) or "there are no held-out tokens")
    room = min(len(stream) - len(stream) // 2 for stream in kept.values()) // length
    return *cut(kept, measure=measure, judge=min(judge, room), length=length), short


def read_streams(file: Path) -> dict[str, np.ndarray]:
    """Domain -> token ids [tokens]."""
    with np.load(file) as held:
        return dict(held)
