"""The exceptions that mean "this cannot be done as asked", as opposed to a bug of ours."""


class AdapterError(Exception):
    """Input or an environment that cannot be used. `str(error)` is one line: the thing, the place and the remedy.

    Not a ValueError: pydantic, which vLLM's configurations are made of, would bury one in a report of its own.
    """


class AllocationError(AdapterError):
    """An allocation that cannot be read, or does not fit the model that it is for."""
