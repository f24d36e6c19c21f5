"""Functions for a process in which Triton interprets its kernels; it imports them by name."""

import importlib
import pickle


def call(module, name, data):
    """A function of `serving.kernels` with the pickled arguments; pickled, its result and the arguments after it."""
    args, options = pickle.loads(data)
    function = getattr(importlib.import_module(f"lexi_adapter.serving.kernels.{module}"), name)
    return pickle.dumps((function(*args, **options), args))
