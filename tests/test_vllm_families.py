"""Every family in vLLM's CPU engine under a mixed allocation, judged by transformers under the same allocation."""

from dataclasses import replace

import pytest
import torch
from engine import CHANGES, PROMPTS, allocate, export, make_job, make_servable, run_engines
from tiny import FAMILIES, build_reference

import lexi_adapter
from lexi_search.artifacts import to_document

# transformers has no classes for these two: their language models are those of other families.
INNER = {"deepseek_vl2": "deepseek_v2", "minicpm": "mixtral"}


def run_reference(model):
    """Log-probability of every prompt token after the first."""
    logprobs = []
    for prompt in map(torch.tensor, PROMPTS):
        with torch.no_grad():
            scores = model(prompt[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        logprobs.append(scores.gather(1, prompt[1:, None])[:, 0])
    return torch.cat(logprobs)


def flatten(result):
    return torch.tensor([value for prompt in result["logprobs"] for value in prompt])


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """Family -> allocation, the exported folder's result, the model's own; all from one process, in turn."""
    root = tmp_path_factory.mktemp("families")
    folders = {family: make_servable(family, root / family) for family in FAMILIES}
    allocations = {family: allocate(folder) for family, folder in folders.items()}
    jobs = []
    for family, folder in folders.items():
        exported = export(allocations[family], folder, root / f"{family}-exported")
        jobs += [make_job(exported, family), make_job(folder, family)]
    results = run_engines(*jobs).results
    return dict(zip(FAMILIES, zip(allocations.values(), results[::2], results[1::2], strict=True), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_engine_runs_what_transformers_runs(engines, family):
    allocation, mixed, base = engines[family]
    assert mixed.get("top_k") == allocation.top_k, mixed
    assert base["top_k"] == dict.fromkeys(allocation.top_k, 4)

    model = build_reference(family, **CHANGES.get(family, {}))
    inner = replace(allocation.model, model_type=INNER.get(family, allocation.model.model_type))
    torch.testing.assert_close(flatten(base), run_reference(model), rtol=0, atol=1e-3)
    lexi_adapter.apply(model, to_document(replace(allocation, model=inner)))
    torch.testing.assert_close(flatten(mixed), run_reference(model), rtol=0, atol=1e-3)
    assert (flatten(mixed) - flatten(base)).abs().max() > 0.1
