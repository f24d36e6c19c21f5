"""k above the model's own: profiles whose reference is the output at `--max-k`, and what is made of them."""

import dataclasses
import json

import numpy as np
import pytest
import tiny
import torch
from blocks import compute_reference
from command_line import refuse, succeed

from lexi_search.artifacts import serialisation
from lexi_search.artifacts.codec import encode
from lexi_search.artifacts.profile import ProfileSettings
from lexi_search.checkpoint.reader import open_checkpoint
from lexi_search.errors import InputError
from lexi_search.models.model import describe
from lexi_search.profiling.paper.gaussian import draw

QUICK = ("--input", "paper", "--batch", 2, "--length", 32, "--samples", 128, "--relative-error", 0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.make_checkpoint("llama4_text", tmp_path_factory.mktemp("llama4"))


@pytest.fixture(scope="module")
def profile(llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    succeed("profile", llama, "-o", path, "--max-k", 3, *QUICK)
    return path


def test_losses_are_relative_to_the_output_at_max_k(llama, profile):
    found = serialisation.read_profile(profile)
    assert (found.model.top_k, found.settings.max_k, found.max_k) == (1, 3, 3)
    described, settings = describe(open_checkpoint(llama), max_k=3), found.settings
    for layer, block in tiny.find_moe_blocks(tiny.build_reference("llama4_text")).items():
        norms = []
        for iteration in range(found.layers[layer].iterations):
            x = torch.tensor(np.asarray(draw(described, layer, iteration, 1, settings)))
            outputs = [compute_reference(block, x, k) for k in (1, 2, 3)]
            norms.append([np.linalg.norm(output - outputs[-1]) for output in outputs])
        np.testing.assert_allclose(found.layers[layer].frobenius, np.mean(norms, axis=0), rtol=1e-4)


def test_allocations_may_have_more_than_the_models_own_k(profile, tmp_path):
    layers = len(serialisation.read_profile(profile).layers)
    succeed("search", profile, "--budget", 3 * layers, "-o", tmp_path / "allocation.json")
    allocation = serialisation.read_allocation(tmp_path / "allocation.json")
    assert (set(allocation.top_k.values()), allocation.max_k, allocation.loss) == ({3}, 3, 0.0)
    assert "of 3" in succeed("show", tmp_path / "allocation.json")
    with pytest.raises(InputError, match="top_k of layer .* is 3, expected between 1 and the model's own 1"):
        dataclasses.replace(allocation, max_k=None)
    with pytest.raises(InputError, match="top_k of layer .* is 3, expected between 1 and max_k = 2"):
        dataclasses.replace(allocation, max_k=2)


def test_a_profile_has_losses_up_to_max_k(profile):
    found = serialisation.read_profile(profile)
    for wrong, message in ((2, "losses for 3 values of k, 2 expected"), (17, "max_k is 17, expected between")):
        with pytest.raises(InputError, match=message):
            dataclasses.replace(found, settings=dataclasses.replace(found.settings, max_k=wrong))


def test_settings_without_max_k_have_the_bytes_they_had():
    settings = ProfileSettings("paper", 0, 4, 512, "float32", 0.01, 2**20)
    assert "max_k" not in json.dumps(encode(settings))


def test_the_command_refuses(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "; --input paper --max-k 2 profiles" in refuse("profile", llama)
    assert "max_k 17 is not between 2 and 16" in refuse("profile", llama, "--input", "paper", "--max-k", 17)
