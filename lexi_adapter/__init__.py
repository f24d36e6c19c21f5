"""Apply a LExI allocation where models run: in vLLM through a plugin, in transformers through `apply`.

An allocation (arXiv 2509.02753) gives every mixture-of-experts layer its own number of active experts. Importing this
package loads neither torch nor vLLM nor transformers.
"""

from typing import Any

__all__ = ["apply"]


def __getattr__(name: str) -> Any:
    if name == "apply":
        from lexi_adapter.serving.transformers_patch import apply

        return apply
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
