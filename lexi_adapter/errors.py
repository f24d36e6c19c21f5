"""The exceptions that mean "this cannot be done as asked", as opposed to a bug of ours, and a check that raises one."""

import os


class AdapterError(Exception):
    """Input or an environment that cannot be used. `str(error)` is one line: the thing, the place and the remedy.

    Not a ValueError: pydantic, which vLLM's configurations are made of, would bury one in a report of its own.
    """


class AllocationError(AdapterError):
    """An allocation that cannot be read, or does not fit the model that it is for."""


def check_memory(what: str, size: float, remedy: str, *, most: int | None = None) -> None:
    """Raise AdapterError, with the estimate, for `what` of more bytes than `most`, by default the machine's memory."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if most is None else most
    if size > memory:
        place = "this machine" if most is None else "the device"
        raise AdapterError(f"{what} take {size / 1e9:.1f} GB, {place} has {memory / 1e9:.1f} GB; {remedy}")
