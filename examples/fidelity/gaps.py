"""What a loss increase is worth: uniform k at any budget, and the share of the way from it to the oracle."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

MEASURES = ("increase", "divergence")  # of what an allocation loses, as the judge names them
LEAST_GAIN = 0.1  # where the oracle gains less over uniform, relative to it, a share of that gain says little

Loss = TypeVar("Loss", float, np.ndarray)


def interpolate_uniform(losses: Mapping[int, Loss], budget: int, layers: int) -> Loss:
    """What uniform k loses at a budget; `losses[k]` is that of k in every layer, of all the text or of each window.

    Between two k as if a share of the layers had the larger one: linear from budget `layers * k` to the next.
    """
    k, rest = divmod(budget, layers)
    return losses[k] + (losses[k + 1] - losses[k]) * rest / layers if rest else losses[k]


def find_closed(loss: float, uniform: float, oracle: float) -> float | None:
    """(uniform - x) / (uniform - oracle): 0 is uniform, 1 the oracle; None where the oracle gains too little."""
    return (uniform - loss) / (uniform - oracle) if is_wide(uniform, oracle) else None


def is_wide(uniform: float, oracle: float) -> bool:
    """Whether the oracle gains enough over uniform for a share of that gain to say something."""
    return find_gain(uniform, oracle) >= LEAST_GAIN


def find_gain(uniform: float, loss: float) -> float:
    """How much less is lost than by uniform, relative to uniform."""
    return (uniform - loss) / uniform if uniform > 0 else 0.0


def find_budgets(shares: Sequence[float], layers: int, top_k: int) -> dict[str, int]:
    """Share of the model's own sum -> budget; those below one expert a layer are left out, as are repeated ones."""
    budgets = {f"{share:g}": round(share * layers * top_k) for share in shares}
    return {share: budget for share, budget in budgets.items() if layers < budget < layers * top_k}
