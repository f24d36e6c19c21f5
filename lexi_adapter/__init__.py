"""Apply a LExI allocation where models run, and measure what it costs and gains.

An allocation (arXiv 2509.02753) gives every mixture-of-experts (MoE) layer of a model its own top-k, the number of
experts that are active for a token. `lexi_search` writes it to a file, which is all that the two packages share.

The order in which to read, and in which modules import one another:

- `errors`, `files` (how they are read and written), `allocation` (checked on reading), `environment` (versions);
- `model`: the config and weights of a folder, and the variants of one model that are compared;
- `serving`: an allocation applied, in vLLM by a plugin and in transformers by `apply`;
- `engines`: vLLM engines in processes of their own, to be measured;
- `speed`: throughput, step times and the experts' load;
- `tasks`: the questions that a model is asked;
- `evaluation`: quality of all variants, on those tasks;
- `sensitivity`: the loss of fewer experts in each layer, measured by brute force;
- `cli`: the commands of `lexi-adapter`, the only part that prints.

To see an allocation at work, read `allocation` and `serving.vllm_build`. Importing this package loads neither torch
nor vLLM nor transformers.
"""

from typing import Any

__all__ = ["apply"]


def __getattr__(name: str) -> Any:
    if name == "apply":
        from lexi_adapter.serving.transformers_patch import apply

        return apply
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
