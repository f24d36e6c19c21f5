"""What tests of models share."""

import pytest

from lexi_search.checkpoint.reader import Checkpoint


@pytest.fixture
def reads(monkeypatch):
    """The names of the tensors read, in order of their reading."""
    names, read = [], Checkpoint.read

    def spy(self, name, buffer, **options):
        names.append(name)
        return read(self, name, buffer, **options)

    monkeypatch.setattr(Checkpoint, "read", spy)
    return names
