"""What a loss increase is worth: uniform k at any budget, and the share of the way from it to the oracle."""

from collections.abc import Sequence

LEAST_GAIN = 0.1  # where the oracle gains less over uniform, relative to it, a share of that gain says little


def interpolate_uniform(increases: Sequence[float], budget: int, layers: int) -> float:
    """What uniform k loses at a budget; `increases[k - 1]` is that of k in every layer.

    Between two k as if a share of the layers had the larger one: linear from budget `layers * k` to the next.
    """
    k, rest = divmod(budget, layers)
    low = increases[k - 1]
    return low + (increases[k] - low) * rest / layers if rest else low


def find_closed(increase: float, uniform: float, oracle: float) -> float | None:
    """(uniform - x) / (uniform - oracle): 0 is uniform, 1 the oracle; None where the oracle gains nothing."""
    return (uniform - increase) / (uniform - oracle) if uniform > oracle else None


def find_gain(uniform: float, oracle: float) -> float:
    """How much less the oracle loses than uniform, relative to uniform."""
    return (uniform - oracle) / uniform if uniform > 0 else 0.0


def find_budgets(shares: Sequence[float], layers: int, top_k: int) -> dict[str, int]:
    """Share of the model's own sum -> budget; those below one expert a layer are left out, as are repeated ones."""
    budgets = {f"{share:g}": round(share * layers * top_k) for share in shares}
    return {share: budget for share, budget in budgets.items() if layers < budget < layers * top_k}
