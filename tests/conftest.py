"""Strictness for every test: JAX promotes neither element types nor ranks on its own, annotated shapes are checked, and
nothing reaches a network."""

import os

os.environ.update(
    JAX_NUMPY_DTYPE_PROMOTION="strict",
    JAX_NUMPY_RANK_PROMOTION="raise",
    JAX_PLATFORMS="cpu",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TRANSFORMERS_VERBOSITY="error",
    OPENBLAS_NUM_THREADS="1",
)

import multiprocessing  # noqa: E402  (after the environment: plugins of hypothesis may import what reads it)
import pickle  # noqa: E402
from concurrent.futures import ProcessPoolExecutor  # noqa: E402
from functools import partial  # noqa: E402

import hypothesis  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

# Before the first import of lexi_search: every call checks the shapes and types that a signature declares.
jaxtyping.install_import_hook("lexi_search", "typecheck.check")

hypothesis.settings.register_profile("lexi", deadline=None)  # compiling takes as long as it takes
hypothesis.settings.load_profile("lexi")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory of the commands under test. What they compile in this process is not kept."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    return tmp_path


@pytest.fixture(scope="session")
def interpret():
    """A caller of kernels in Triton's interpreter, in a process of its own: it is all of Triton or nothing.

    It takes module, function and arguments, and returns the result; what the function writes, it writes.
    """
    import interpreted
    import torch

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        pool.submit(len, ()).result()  # its process begins, with this environment

    def interpret(module, name, *args, **options):
        data = pool.submit(interpreted.call, module, name, pickle.dumps((args, options))).result()
        result, after = pickle.loads(data)
        for one, other in zip(args, after, strict=True):
            if isinstance(one, torch.Tensor):
                one.copy_(other)
        return result

    with pool:
        yield interpret


@pytest.fixture(scope="session")
def narrow(interpret):
    """`triton_gates.narrow` by Triton's interpreter."""
    return partial(interpret, "triton_gates", "narrow")
