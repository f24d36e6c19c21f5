"""The exception for input that cannot be used, as opposed to a bug in this package."""


class InputError(ValueError):
    """Input that cannot be used. `str(error)` is one line: the thing, the place and the remedy."""
