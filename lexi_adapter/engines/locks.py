"""Locks of runs that share cards: engines start side by side, and none is measured while another starts or is measured.

A file stands for a card, and is locked as flock(1) locks it, so that other programs can take part. It is made where it
does not exist; AdapterError where it cannot be.
"""

import fcntl
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from lexi_adapter.errors import AdapterError


@contextmanager
def start_beside(files: Sequence[str]) -> Iterator[None]:
    """A context in which other runs may start on these cards, and none measures."""
    with _lock(files, fcntl.LOCK_SH):
        yield


@contextmanager
def measure_alone(files: Sequence[str]) -> Iterator[None]:
    """A context in which no other run starts or measures on these cards."""
    with _lock(files, fcntl.LOCK_EX):
        yield


@contextmanager
def _lock(files: Sequence[str], kind: int) -> Iterator[None]:
    with ExitStack() as stack:
        for path in sorted(set(files)):  # the same order in every run, so that no two wait for each other
            try:
                fcntl.flock(stack.enter_context(open(path, "a")), kind)  # closing lets go
            except OSError as error:
                raise AdapterError(f"cannot lock {path} ({error.strerror}); name a file that can be made") from error
        yield
