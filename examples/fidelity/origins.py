"""What a results file says of the run that made it."""

import os
import platform
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

import lexi_search

VERSIONS = ("torch", "transformers", "jax", "numpy")


def name_call() -> str:
    """This process's command line, every path as its last part alone."""
    return " ".join(Path(word).name if os.sep in word else word for word in sys.argv)


def describe_run(device: str, *, dtype: str = "float32", command: str | None = None) -> dict[str, str]:
    """What the numbers depend on besides the models; `command` where another program called this one."""
    cores = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    return {
        "command": command or name_call(),
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else cores,
        "dtype": dtype,
        **{name: version(name) for name in VERSIONS},
        "lexi-moe": lexi_search.__version__,  # it also runs from its sources, not installed
    }
