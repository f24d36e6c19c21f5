"""Every family in vLLM's CPU engine under a mixed allocation, judged by transformers under the same allocation."""

from dataclasses import replace

import pytest
import torch
from engine import CHANGES, MORE, OPTIONS, PROMPTS, allocate, compensate, export, make_job, make_servable, run_engines
from tiny import FAMILIES, build_reference

import lexi_adapter
from lexi_search.artifacts.serialisation import to_document

EXPONENT = 0.5
# One family for every way to weigh: as scored, renormalised, scaled after a choice by groups, in a block of its own.
SHIFTED = ("olmoe", "qwen3_moe", "deepseek_v2", "minicpm")
# As they are, without and with shared experts, for what an engine does without an allocation.
PLAIN = ("olmoe", "deepseek_v2")
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
    """Family -> allocation, and (family, variant) -> result; all from one process, in turn."""
    root = tmp_path_factory.mktemp("families")
    folders = {family: make_servable(family, root / family) for family in (*FAMILIES, *MORE)}
    allocations = {family: allocate(folder) for family, folder in folders.items()}
    jobs = {}
    for family, folder in folders.items():
        jobs[family, "mixed"] = make_job(export(allocations[family], folder, root / f"{family}-mixed"), family)
        if family in MORE:
            continue
        compensated = str(compensate(allocations[family], root / f"{family}-compensated"))
        jobs[family, "compensated"] = make_job(folder, family, additional_config={"lexi_allocation": compensated})
        if family in PLAIN:
            jobs[family, "base"] = make_job(folder, family)
        if family in SHIFTED:
            shifted = replace(allocations[family], gate_exponent=EXPONENT)
            jobs[family, "shifted"] = make_job(export(shifted, folder, root / f"{family}-shifted"), family)
    return allocations, dict(zip(jobs, run_engines(*jobs.values()).results, strict=True))


def run_transformers(family, allocation, corrected=None):
    """Log-probabilities of the prompts by transformers, under the allocation, with corrections in a new folder."""
    model = build_reference(family, **CHANGES.get(family, {}))
    if allocation is not None:
        inner = replace(allocation.model, model_type=INNER.get(family, allocation.model.model_type))
        allocation = replace(allocation, model=inner)
        lexi_adapter.apply(model, compensate(allocation, corrected) if corrected else to_document(allocation))
    return run_reference(model)


def assert_near(result, expected):
    torch.testing.assert_close(flatten(result), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_engine_runs_what_transformers_runs(engines, family):
    allocation, mixed = engines[0][family], engines[1][family, "mixed"]
    assert mixed.get("top_k") == allocation.top_k, mixed
    assert_near(mixed, run_transformers(family, allocation))


@pytest.mark.parametrize("family", MORE)
def test_engine_runs_more_families_as_transformers_does(engines, family):
    """In sixteen bits, nearer to the allocation than to the model itself."""
    allocation, mixed = engines[0][family], engines[1][family, "mixed"]
    assert mixed.get("top_k") == allocation.top_k, mixed
    expected = run_transformers(family, allocation)
    if "dtype" not in OPTIONS.get(family, {}):
        assert_near(mixed, expected)
        return
    found, base = flatten(mixed), run_transformers(family, None)
    assert (found - expected).abs().mean() < 0.25 * (expected - base).abs().mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_engine_corrects_as_transformers_corrects(engines, family, tmp_path):
    allocation, mixed, corrected = engines[0][family], *(engines[1][family, v] for v in ("mixed", "compensated"))
    assert corrected.get("top_k") == allocation.top_k, corrected
    assert_near(corrected, run_transformers(family, allocation, tmp_path / "corrections"))
    assert (flatten(corrected) - flatten(mixed)).abs().max() > 0.1


@pytest.mark.parametrize("family", PLAIN)
def test_engine_without_an_allocation_runs_the_model_itself(engines, family):
    allocation, mixed, base = engines[0][family], *(engines[1][family, name] for name in ("mixed", "base"))
    assert base["top_k"] == dict.fromkeys(allocation.top_k, 4)
    assert_near(base, run_transformers(family, None))
    assert (flatten(mixed) - flatten(base)).abs().max() > 0.1


@pytest.mark.parametrize("family", SHIFTED)
def test_engine_weighs_as_transformers_weighs(engines, family):
    allocation, mixed, shifted = engines[0][family], *(engines[1][family, name] for name in ("mixed", "shifted"))
    assert shifted.get("top_k") == allocation.top_k, shifted
    assert_near(shifted, run_transformers(family, replace(allocation, gate_exponent=EXPONENT)))
    assert (flatten(shifted) - flatten(mixed)).abs().max() > 0.1
