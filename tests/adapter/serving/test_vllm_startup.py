"""The ways of an allocation into vLLM, its workers and its compile cache, and vLLM without one; with real engines."""

import hashlib
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from engine import (
    allocate,
    compensate,
    export,
    export_compensated,
    job_with,
    make_job,
    make_overrides,
    make_served,
    run_engines,
    two_workers,
)
from tiny import FAMILIES, make_checkpoint

import lexi_adapter
from lexi_adapter.allocation import hash_allocation, read_allocation
from lexi_adapter.serving.vllm_plugin import Document
from lexi_search.artifacts.serialisation import to_document, write_allocation

CHUNKED = dict(max_num_batched_tokens=4, max_num_seqs=2, enable_chunked_prefill=True, enable_prefix_caching=True)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return make_served(tmp_path_factory.mktemp("startup"))


@pytest.fixture(scope="module")
def ways(served):
    """Way in -> result, and the log of the process that ran them all in turn."""
    path = served.root / "allocation.json"
    write_allocation(path, served.allocation)
    document = to_document(served.allocation)
    corrected = str(compensate(served.allocation, served.root / "compensated"))
    draft = {"method": "draft_model", "model": str(served.folder), "num_speculative_tokens": 2}
    jobs = {
        "exported folder": make_job(served.exported),
        "hf-overrides": make_job(served.folder, hf_overrides=make_overrides(served)),
        "additional-config, document": job_with(served, document),
        "additional-config, file": job_with(served, str(path)),
        "two ways that agree": make_job(served.exported, additional_config={"lexi_allocation": document}),
        "moe draft model": make_job(served.exported, speculative_config=draft),
        "transformers backend": make_job(served.exported, model_impl="transformers"),
        "none": make_job(served.folder),
        "chunked prefill, prefix caching": make_job(served.exported, **CHUNKED),
        "gate exponent that changes nothing": job_with(served, document | {"gate_exponent": 0.0}),
        "compensated": job_with(served, corrected),
        "compensated, exported folder": make_job(
            export_compensated(served.allocation, served.folder, served.root / "exported-compensated")
        ),
        "compensated, chunked prefill": job_with(served, corrected, **CHUNKED),
        "full k in every layer": job_with(served, to_document(allocate(served.folder, (4,)))),
    }
    run = run_engines(*jobs.values())
    return dict(zip(jobs, run.results, strict=True)), run.log


def measure_distance(one, other):
    """The largest difference between two results' prompt log-probabilities."""
    pairs = zip(sum(one["logprobs"], []), sum(other["logprobs"], []), strict=True)
    return max(abs(a - b) for a, b in pairs)


@pytest.mark.parametrize(
    "way",
    [
        "hf-overrides",
        "additional-config, document",
        "additional-config, file",
        "two ways that agree",
        "moe draft model",  # of the same class, with the same layer indices: it must run its own k
    ],
)
def test_every_way_in_gives_the_same(served, ways, way):
    results, _ = ways
    assert results["exported folder"].get("top_k") == served.allocation.top_k, results["exported folder"]
    assert results[way] == results["exported folder"]


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("transformers backend", "exported folder"),
        ("chunked prefill, prefix caching", "exported folder"),
        ("compensated, exported folder", "compensated"),
        ("compensated, chunked prefill", "compensated"),
    ],
)
def test_other_ways_to_run_it_come_to_the_same(ways, name, reference):
    other, native = ways[0][name], ways[0][reference]
    assert (other.get("top_k"), other.get("tokens")) == (native["top_k"], native["tokens"]), other
    assert measure_distance(other, native) < 1e-3


def test_log_states_the_allocation_once_an_engine(served, ways):
    results, log = ways
    lines = [line for line in log.splitlines() if "LExI" in line]
    assert len(lines) == sum(name != "none" for name in results)
    path = served.root / "allocation.json"
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    expected = "LExI allocation applied: 6 of 12 active experts per token over 3 MoE layers"
    assert lines[0].endswith(f"{expected}, sha256 {sha256}; top-k of each: 0:1 1:3 2:2")
    assert sum("over 3 MoE layers, gate exponent 0, sha256 " in line for line in lines) == 1
    assert sum("gate exponent 0.5, compensation of rank 4 (" in line for line in lines) == 3


def test_a_gate_exponent_of_nought_is_what_a_family_that_does_not_renormalise_runs(ways):
    shifted, plain = (ways[0][name] for name in ("gate exponent that changes nothing", "exported folder"))
    assert (shifted["top_k"], shifted["tokens"]) == (plain["top_k"], plain["tokens"])
    assert measure_distance(shifted, plain) < 1e-5


@pytest.fixture(scope="module")
def without_plugin(served):
    """Results with the plugin switched off: the model's own folder, then everything that asks for an allocation."""
    root = served.root / "without"
    exports = {}
    for family in FAMILIES:
        folder = make_checkpoint(family, root / family)
        exports[family] = make_job(export(allocate(folder), folder, root / f"{family}-exported"), family)
    overrides = make_job(served.folder, hf_overrides=make_overrides(served))
    return run_engines(make_job(served.folder), overrides, *exports.values(), VLLM_PLUGINS="").results


def test_without_an_allocation_vllm_is_as_without_the_plugin(ways, without_plugin):
    results, _ = ways
    assert results["none"] == without_plugin[0] == results["full k in every layer"]
    assert results["none"] != results["exported folder"]


@pytest.mark.parametrize("place", range(1, 2 + len(FAMILIES)))
def test_without_the_plugin_vllm_stops(without_plugin, place):
    # vLLM refuses latent attention in layers that differ before it looks at the architecture's name.
    message = without_plugin[place].get("message", "")
    assert "Lexi" in message or "Heterogeneous" in message, without_plugin[place]


def test_where_the_plugin_cannot_be_imported_vllm_stops(served):
    """vLLM only logs that and goes on, so the name of the architecture has to stop it."""
    broken = shutil.copytree(Path(lexi_adapter.__file__).parent, served.root / "broken" / "lexi_adapter")
    (broken / "serving" / "vllm_plugin.py").write_text("raise ImportError('something is missing')")
    run = run_engines(make_job(served.exported), PYTHONPATH=str(broken.parent))
    assert "something is missing" in run.log
    assert "LexiOlmoeForCausalLM" in run.results[0]["message"]


def test_workers_of_their_own_run_the_same_or_stop_with_the_reason(served, ways):
    environment, options = two_workers()
    path = served.root / "vanishing.json"  # the configuration carries its content to the workers
    write_allocation(path, served.allocation)
    vanishing = job_with(served, str(path), substitute="vanishing_file", status=True, **options)
    corrected = job_with(served, str(served.root / "compensated" / "allocation.json"), **options)
    broken = make_job(served.exported, load_format="dummy", hf_overrides={"num_experts": 8})
    run = run_engines(vanishing, corrected, broken, **environment)
    assert not path.exists()
    (parallel, corrected, failed), alone = run.results, ways[0]["exported folder"]
    assert corrected.get("tokens") == ways[0]["compensated"]["tokens"], corrected
    assert measure_distance(corrected, ways[0]["compensated"]) < 1e-3  # two workers add the correction once
    assert (parallel.get("top_k"), parallel.get("tokens")) == (alone["top_k"], alone["tokens"]), parallel
    assert measure_distance(parallel, alone) < 1e-3
    assert parallel["status"] == {
        "sha256": hash_allocation(read_allocation(to_document(served.allocation))),
        "own_top_k": 4,
        "top_k": {"0": 1, "1": 3, "2": 2},
        "gate_exponents": {},
        "compensation": {},
        "workers": 2,
    }
    assert run.log.count("LExI allocation applied") == 2
    assert "error" in failed
    reason = "vLLM builds model.layers.0.mlp.experts with num_experts = 8, but the allocation was made for 16"
    assert reason in run.log


def test_a_worker_without_the_adapter_cannot_receive_an_allocation(served):
    data = pickle.dumps({"lexi_allocation": Document(to_document(served.allocation))})
    code = f"import pickle, sys; sys.modules['lexi_adapter'] = None; pickle.loads({data!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and "lexi_adapter" in done.stderr.splitlines()[-1]


def test_two_allocations_share_a_compile_cache(served, ways):
    other = replace(allocate(served.folder, (3, 1, 4)), gate_exponent=0.5)
    path = compensate(other, served.root / "changing")  # one path for both: what differs is the file's content
    corrected, compiled = path.read_text(), []
    for allocation in (served.allocation, other):
        path.write_text(corrected)
        if allocation is not other:
            write_allocation(path, allocation)
        job = job_with(served, str(path), enforce_eager=False)
        compiled += run_engines(job, VLLM_CACHE_ROOT=str(served.root / "cache")).results
        assert compiled[-1].get("top_k") == allocation.top_k, compiled[-1]
    eager = [ways[0]["exported folder"], *run_engines(job_with(served, str(path))).results]
    for one, two in zip(compiled, eager, strict=True):
        assert one["tokens"] == two["tokens"]
        assert measure_distance(one, two) < 1e-3
    assert measure_distance(*compiled) > 0.1
