"""Strictness for every test: JAX promotes neither element types nor ranks on its own, and nothing reaches a network."""

import os

os.environ.update(
    JAX_NUMPY_DTYPE_PROMOTION="strict",
    JAX_NUMPY_RANK_PROMOTION="raise",
    JAX_PLATFORMS="cpu",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TRANSFORMERS_VERBOSITY="error",
)

import hypothesis  # noqa: E402  (after the environment: plugins of hypothesis may import what reads it)

hypothesis.settings.register_profile("lexi", deadline=None)  # compiling takes as long as it takes
hypothesis.settings.load_profile("lexi")
