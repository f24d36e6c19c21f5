"""Loss tables [layers, top_k] of one model: measured on windows by brute force, or by a command into a profile file."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from judging import Loaded
from windows import Windows

from lexi_adapter.sensitivity.ablation import measure
from lexi_search.allocation.allocate import allocate
from lexi_search.artifacts.profile import Profile
from lexi_search.artifacts.serialisation import read_profile
from lexi_search.solvers.exact import solve
from lexi_search.solvers.problem import pose

# Source of a profile -> the options of `lexi-search profile` that make it, and the losses that are taken from it.
PROFILES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "paper": (("--input", "paper"), ("frobenius", "squared")),
    "weights": (("--compensation", "none"), ("divergence", "relative", "squared")),
    "weights+b": (("--compensation", "exponent"), ("divergence", "relative", "squared")),
    "compensated": ((), ("divergence",)),
}


class Failed(Exception):
    """A table that cannot be had; the message says why, in the words of the command that failed."""


def measure_windows(loaded: Loaded, windows: Windows, *, batch: int) -> dict[str, np.ndarray]:
    """Brute force: what every single-layer change of k moves in every window, each [layers, top_k - 1, sequences].

    `squares` and `relative` are of the layer's own output, `divergence` and `increase` of the whole model. Raises
    `Failed` if something is not finite.
    """
    row = {layer: index for index, layer in enumerate(loaded.identity.moe_layers)}
    shape = (len(row), loaded.identity.top_k - 1, len(windows.tokens))
    found = {name: np.zeros(shape) for name in ("squares", "relative", "divergence", "increase")}
    for index, layer, movements in measure(loaded.model, loaded.identity, windows.tokens, batch=batch):
        for name, values in found.items():
            values[row[layer], :, index * batch : (index + 1) * batch] = np.transpose(getattr(movements, name))
    for name, values in found.items():
        if not np.isfinite(values).all():
            raise Failed(f"{name} is not finite for {(~np.isfinite(values)).sum()} of {values.size} entries")
    return found


def tabulate(measured: Mapping[str, np.ndarray], windows: Windows) -> dict[str, np.ndarray]:
    """Kind of loss -> table, averaged over each domain's windows and then over domains; never below zero."""
    means = {name: windows.average(values)["mean"] for name, values in measured.items()}
    kinds = {"squared": means.pop("squares") / windows.tokens.shape[1], **means}
    return {kind: np.pad(table.clip(0), ((0, 0), (0, 1))) for kind, table in kinds.items()}


def make_profile(source: str, model: Path, output: Path) -> Path:
    """The file with a profile of `PROFILES`, which a command writes unless it is there. Raises `Failed`."""
    if not output.is_file():
        output.parent.mkdir(parents=True, exist_ok=True)
        run_search(("profile", str(model), "-o", str(output), *PROFILES[source][0]))
    return output


def run_search(arguments: Sequence[str]) -> None:
    """Run `lexi-search` on the CPU, giving way to others. Raises `Failed` with its own last line if it fails."""
    program = "import os; os.nice(5); from lexi_search.cli.main import main; main()"
    words, environment = [sys.executable, "-c", program, *arguments], os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
        raise Failed(lines[-1])


def read_tables(source: str, file: Path) -> tuple[dict[str, np.ndarray], float | None]:
    """Kind of loss -> table, of a profile, and the gate exponent that its allocations carry."""
    profile = read_profile(file)
    held = {kind: np.array(profile.losses(kind)) for kind in PROFILES[source][1] if kind in profile.loss_kinds}
    return held, profile.settings.gate_exponent


def search_default(profile: Profile, budgets: Sequence[int]) -> list[tuple[int, ...]]:
    """The k of every layer that `lexi-search search` chooses at each budget, by its default loss and rules."""
    results = allocate(profile, list(budgets), method="exact")
    return [tuple(result.allocation.top_k[layer] for layer in profile.model.moe_layers) for result in results]


def search(table: np.ndarray, budgets: Sequence[int]) -> list[tuple[int, ...]]:
    """The k of every layer whose summed loss is least, exactly, at each budget."""
    return [tuple(map(int, top_k)) for top_k in solve(pose(table, np.array(budgets))).top_k]
