"""The one exception that means "your input is wrong", as opposed to a bug of ours."""


class InputError(ValueError):
    """Input that cannot be used. `str(error)` is one line: the thing, the place, and what to do about it."""
