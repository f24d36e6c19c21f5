"""Loss tables [layers, top_k] of one model: measured here on windows, or by a command into a profile file."""

import math
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from judging import Loaded
from windows import Windows

from lexi_adapter.sensitivity.ablation import measure
from lexi_search.allocation import comparison
from lexi_search.artifacts.serialisation import read_profile
from lexi_search.solvers.exact import solve
from lexi_search.solvers.problem import pose

# Kinds of loss that are told apart; the paper's own, frobenius, is that of its own input alone.
LOCAL = ("squared", "relative", "rms")
WHOLE = ("divergence", "increase")
# Two that err differently, the whole model's and the layer's own: their geometric mean, whose scale is nobody's.
BOTH, PARTS = "both", ("divergence", "relative")


class Command(NamedTuple):
    """A command that writes a profile: its words, and the kinds of loss that are taken from it if it has them."""

    words: tuple[str, ...]
    kinds: tuple[str, ...]


LONGEST = 1e6  # seconds that are waited for a command; the system's own limit is not far above
PRUNE = ("lexi_search.cli.main", "prune")
PROFILE = ("lexi_search.cli.main", "profile", "{model}", "-o", "{output}")
# {model} and {output} are filled in. The kinds that a profile does not hold are left out.
COMMANDS: Mapping[str, Command] = {
    "paper": Command((*PROFILE, "--input", "paper"), ("frobenius", "squared")),
    "weights": Command((*PROFILE, "--input", "weights"), (*LOCAL, *WHOLE)),
    "weights+b": Command((*PROFILE, "--input", "weights", "--gate-exponent", "auto"), (*LOCAL, *WHOLE)),
}


class Failed(Exception):
    """A table that cannot be had; the message says why, in the words of the command that failed."""


class Measured(NamedTuple):
    """What `sensitivity.measure` found with one layer changed at a time, each [layers, top_k - 1, sequences]."""

    squares: np.ndarray
    relative: np.ndarray
    divergence: np.ndarray
    increase: np.ndarray

    def take(self, chosen: np.ndarray) -> "Measured":
        """Some of the sequences."""
        return Measured(*(values[..., chosen] for values in self))


def measure_windows(loaded: Loaded, windows: Windows, *, batch: int) -> Measured:
    """Brute force: every single-layer change of k on every window."""
    row = {layer: index for index, layer in enumerate(loaded.identity.moe_layers)}
    shape = (len(row), loaded.identity.top_k - 1, len(windows.tokens))
    found = Measured(*(np.zeros(shape) for _ in Measured._fields))
    for index, layer, movements in measure(loaded.model, loaded.identity, windows.tokens, batch=batch):
        columns = slice(index * batch, (index + 1) * batch)
        for values, name in zip(found, Measured._fields, strict=True):
            values[row[layer], :, columns] = np.transpose(getattr(movements, name))
    for values, name in zip(found, Measured._fields, strict=True):
        if not np.isfinite(values).all():
            raise Failed(f"{name} is not finite for {(~np.isfinite(values)).sum()} of {values.size} entries")
    return found


def tabulate(measured: Measured, windows: Windows) -> dict[str, np.ndarray]:
    """Kind of loss -> table, averaged over each domain's windows and then over domains; never below zero."""
    length = windows.tokens.shape[1]
    means = {name: windows.average(values)["mean"] for name, values in zip(Measured._fields, measured, strict=True)}
    squares = means.pop("squares") / length
    kinds = means | {"squared": squares, "rms": np.sqrt(squares)}
    return {kind: np.pad(table.clip(0), ((0, 0), (0, 1))) for kind, table in kinds.items()}


def make_profile(name: str, model: Path, output: Path, *, until: float = math.inf) -> None:
    """Have a command of `COMMANDS` write its profile, unless it is there. Raises `Failed`."""
    if not output.is_file():
        output.parent.mkdir(parents=True, exist_ok=True)
        run([word.format(model=model, output=output) for word in COMMANDS[name].words], until=until)


def make_pruned(option: str, share: float, model: Path, output: Path, *, until: float = math.inf) -> None:
    """Have `lexi-search prune` leave out a share of the experts or of their width. Raises `Failed`."""
    run((*PRUNE, str(model), f"--{option}", f"{100 * share:g}%", "-o", str(output)), until=until)


def run(words: Sequence[str], *, until: float = math.inf) -> None:
    """Run the `main` of a module with arguments, until a time on the monotonic clock at most; it gives way to others.

    `Failed` with its own last line if it fails.
    """
    module, *arguments = words
    program = f"import os; os.nice(5); from {module} import main; main()"
    left = max(0.0, min(until - time.monotonic(), LONGEST))
    try:
        done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=left)
    except subprocess.TimeoutExpired:
        raise Failed("no time was left for it; the next run goes on") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
        raise Failed(lines[-1])


def read_tables(name: str, file: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(kind of loss, table) of a profile that a command made."""
    profile = read_profile(file)
    held = {kind: np.array(profile.losses(kind)) for kind in COMMANDS[name].kinds if kind in profile.loss_kinds}
    yield from held.items()
    if set(PARTS) <= set(held):
        yield BOTH, np.sqrt(np.prod([held[kind] for kind in PARTS], axis=0))


def read_exponent(file: Path) -> float | None:
    """The gate exponent that allocations from a profile carry."""
    return read_profile(file).settings.gate_exponent


def search(table: np.ndarray, budgets: list[int]) -> list[tuple[int, ...]]:
    """The k of every layer whose summed loss is least, exactly, at each budget."""
    return [tuple(map(int, top_k)) for top_k in solve(pose(table, np.array(budgets))).top_k]


def predict(table: np.ndarray, top_k: tuple[int, ...]) -> float:
    """The table's loss of an allocation."""
    return float(table[np.arange(len(table)), np.array(top_k) - 1].sum())


def correlate(first: np.ndarray, second: np.ndarray) -> float | None:
    """Spearman's rank correlation; None where either is constant."""
    found = comparison.correlate(first, second) if np.size(first) else math.nan
    return None if math.isnan(found) else found


def compare(table: np.ndarray, truth: np.ndarray) -> dict[str, float | None]:
    """Spearman of a table with the true one: over all its `entries` below the last k, and, which is what moves experts
    from layer to layer, over `layers` at one k, averaged over k."""
    columns = [correlate(table[:, k], truth[:, k]) for k in range(table.shape[1] - 1)]
    known = [value for value in columns if value is not None]
    return {
        "entries": correlate(table[:, :-1], truth[:, :-1]),
        "layers": float(np.mean(known)) if known else None,
    }
