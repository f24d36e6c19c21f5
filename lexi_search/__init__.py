"""LExI search: a top-k for every mixture-of-experts layer, from the weights alone (arXiv 2509.02753).

A tour, in the order in which the wings import one another; each wing's docstring names its rooms:

1. `artifacts`: the files, profile, allocation and cost table; all that is shared with `lexi_adapter`.
2. `solvers`: stage 2, losses and budgets to allocations; start with `solvers.exact`.
3. `layers`: the mathematics of a decoder layer; start with `layers.moe`, every k from one pass.
4. `checkpoint`: a folder of safetensors as logical tensors, quantised or not.
5. `models`: what differs between model families, as data; start with `models.moe_families`.
6. `profiling`: stage 1, the loss of each layer at each k; `profiling.session` runs it from checkpoint to file.
7. `allocation`: from a profile to what people serve.
8. `pruning`: the baseline.
9. `cli`: the command `lexi-search`.

Importing the package costs nothing: a name below loads its module, and with it JAX or NumPy, when it is first used.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_MODULE_OF = {
    "InputError": "errors",
    "Allocation": "artifacts.allocation",
    "LayerLoss": "artifacts.profile",
    "ModelIdentity": "artifacts.identity",
    "Profile": "artifacts.profile",
    "ProfileSettings": "artifacts.profile",
    "read_allocation": "artifacts.serialisation",
    "read_profile": "artifacts.serialisation",
    "read_profile_maps": "artifacts.serialisation",
    "write_allocation": "artifacts.serialisation",
    "write_allocations": "artifacts.serialisation",
    "write_profile": "artifacts.serialisation",
    "open_checkpoint": "checkpoint.reader",
    "describe": "models.model",
    "profile_layers": "profiling.profile",
    "profile_checkpoint": "profiling.session",
    "CostTable": "artifacts.cost_table",
    "read_cost_table": "artifacts.serialisation",
    "Constraints": "solvers.problem",
    "pose": "solvers.problem",
    "search": "solvers.evolution",
    "solve": "solvers.exact",
    "weigh": "allocation.costs",
    "allocate": "allocation.allocate",
    "prepare_checkpoint": "allocation.auto",
    "Target": "allocation.targets",
    "find_front": "allocation.tradeoff",
    "find_best_within": "allocation.tradeoff",
    "find_fastest_within": "allocation.tradeoff",
    "find_knee": "allocation.tradeoff",
    "merge": "artifacts.profile",
}

__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
