"""The exception for input that cannot be used, as opposed to a bug in this package, and what makes and raises it."""

import os


class InputError(ValueError):
    """Input that cannot be used. `str(error)` is one line: the thing, the place and the remedy."""


def explain_overflow(what: str, dtype: str) -> InputError:
    """The exception for `what`, such as "the output of layer 0 overflows", in the element type `dtype`."""
    return InputError(f"{what} in {dtype}{'' if dtype == 'float32' else '; try --dtype float32'}")


def check_memory(what: str, size: float | int, remedy: str, *, most: int | None = None) -> None:
    """Raise InputError, with the estimate, for `what` of more bytes than `most`, by default the machine's memory."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if most is None else most
    if size > memory:
        place = "this machine" if most is None else "the device"
        raise InputError(f"{what} take {size / 1e9:.1f} GB, {place} has {memory / 1e9:.1f} GB; {remedy}")
