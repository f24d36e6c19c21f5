"""The examples that users copy from do what they say."""

import importlib.util
from pathlib import Path

import numpy as np
from synthetic import make_profile

from lexi_search.evolution import search
from lexi_search.problems import pose

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pipeline_stages_are_balanced_and_the_loss_is_the_least_that_allows_it():
    losses = np.array(make_profile(6, 3).losses("squared"))
    fitness, stage = load("pipeline_stages").make_fitness(6, 11, 2, price=float(losses.max()))
    found = search(pose(losses, np.array([11])), fitness=fitness, generations=100)
    sums = [found.top_k[0][stage == index].sum() for index in (0, 1)]
    assert sorted(sums) == [5, 6]
    everything = np.array([k for k in np.ndindex(*[3] * 6) if sum(k) + 6 == 11]) + 1
    balanced = everything[np.abs(everything[:, :3].sum(axis=1) - 5.5) < 1]
    least = losses[np.arange(6), balanced - 1].sum(axis=1).min()
    np.testing.assert_allclose(found.loss[0], least)
