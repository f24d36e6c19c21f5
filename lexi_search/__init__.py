"""LExI search: a top-k for every mixture-of-experts layer, from the weights alone (arXiv 2509.02753).

Importing the package costs nothing: a name below loads its module, and with it JAX or NumPy, when it is first used.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_MODULE_OF = {
    "InputError": "errors",
    "Allocation": "artifacts",
    "LayerLoss": "artifacts",
    "ModelIdentity": "artifacts",
    "Profile": "artifacts",
    "ProfileSettings": "artifacts",
    "read_allocation": "artifacts",
    "read_profile": "artifacts",
    "write_allocation": "artifacts",
    "write_profile": "artifacts",
    "open_checkpoint": "checkpoint",
    "describe": "models",
    "profile_layers": "profiling",
    "CostTable": "artifacts",
    "read_cost_table": "artifacts",
    "Constraints": "problems",
    "pose": "problems",
    "search": "evolution",
    "solve": "exact",
    "weigh": "costs",
    "allocate": "allocations",
    "find_front": "fronts",
    "find_best_within": "fronts",
    "find_fastest_within": "fronts",
    "find_knee": "fronts",
    "merge": "merging",
}

__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
