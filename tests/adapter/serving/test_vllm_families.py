"""Every family in vLLM's CPU engine under a mixed allocation, judged by transformers under the same allocation."""

from dataclasses import replace

import pytest
import torch
from engine import CHANGES, PROMPTS, allocate, export, make_job, make_servable, run_engines
from tiny import FAMILIES, build_reference

import lexi_adapter
from lexi_search.artifacts.serialisation import to_document

EXPONENT = 0.5
# One family for every way to weigh: as scored, renormalised, scaled after a choice by groups, in a block of its own.
SHIFTED = ("olmoe", "qwen3_moe", "deepseek_v2", "minicpm")
# transformers has no classes for these: their language models are those of other families.
INNER = {"deepseek": "deepseek_ocr2", "deepseek_vl2": "deepseek_v2", "minicpm": "mixtral"}


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
    """Family -> allocation, and (family, export or model itself) -> result; all from one process, in turn."""
    root = tmp_path_factory.mktemp("families")
    folders = {family: make_servable(family, root / family) for family in FAMILIES}
    allocations = {family: allocate(folder) for family, folder in folders.items()}
    jobs = {}
    for family, folder in folders.items():
        jobs[family, "mixed"] = make_job(export(allocations[family], folder, root / f"{family}-mixed"), family)
        jobs[family, "base"] = make_job(folder, family)
        if family in SHIFTED:
            shifted = replace(allocations[family], gate_exponent=EXPONENT)
            jobs[family, "shifted"] = make_job(export(shifted, folder, root / f"{family}-shifted"), family)
    return allocations, dict(zip(jobs, run_engines(*jobs.values()).results, strict=True))


def run_transformers(family, allocation, exponent=None):
    """Log-probabilities of the prompts by transformers, under the allocation or without one."""
    model = build_reference(family, **CHANGES.get(family, {}))
    if allocation is not None:
        inner = replace(allocation.model, model_type=INNER.get(family, allocation.model.model_type))
        lexi_adapter.apply(model, to_document(replace(allocation, model=inner, gate_exponent=exponent)))
    return run_reference(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_engine_runs_what_transformers_runs(engines, family):
    allocation, mixed, base = engines[0][family], *(engines[1][family, name] for name in ("mixed", "base"))
    assert mixed.get("top_k") == allocation.top_k, mixed
    assert base["top_k"] == dict.fromkeys(allocation.top_k, 4)
    torch.testing.assert_close(flatten(base), run_transformers(family, None), rtol=0, atol=1e-3)
    torch.testing.assert_close(flatten(mixed), run_transformers(family, allocation), rtol=0, atol=1e-3)
    assert (flatten(mixed) - flatten(base)).abs().max() > 0.1


@pytest.mark.parametrize("family", SHIFTED)
def test_engine_weighs_as_transformers_weighs(engines, family):
    allocation, mixed, shifted = engines[0][family], *(engines[1][family, name] for name in ("mixed", "shifted"))
    assert shifted.get("top_k") == allocation.top_k, shifted
    torch.testing.assert_close(flatten(shifted), run_transformers(family, allocation, EXPONENT), rtol=0, atol=1e-3)
    assert (flatten(shifted) - flatten(mixed)).abs().max() > 0.1
