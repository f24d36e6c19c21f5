"""Options that ask for more memory than there is are refused with the estimate, before it is asked for."""

import re

import pytest
import tiny
from command_line import refuse, write
from synthetic import make_profile


@pytest.mark.parametrize("options", [("--population", 10**9), ("--generations", 10**11), ("--resamples", 10**8)])
def test_a_search_that_fits_no_memory(folder, options):
    write(folder / "p", make_profile(48, 8))
    said = refuse("search", "p", "--budget", 200, "--generations", 2, *options)
    assert re.search(rf"{options[1]} .*take [\d.]+ GB, this machine has [\d.]+ GB; lower {options[0]}", said)


@pytest.mark.parametrize("source", ["paper", "weights"])
def test_a_batch_that_fits_no_memory(folder, source):
    tiny.make_checkpoint("olmoe", folder / "model")
    said = refuse("profile", "model", "--input", source, "--batch", 10**6, "--samples", 10**10)
    lower = "--batch or --length" if source == "paper" else "--samples"
    assert re.search(rf"take [\d.]+ GB, this machine has [\d.]+ GB; lower {lower}", said)
