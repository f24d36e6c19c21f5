"""Tampered servings: vLLM does not start, or it has the allocation that lexi_search reads there, for those weights.

In vLLM's own configuration, where the plugin checks; a few of those that start run in engines too. Some in CI;
`LEXI_TAMPERINGS=113` sets another number.
"""

import hashlib
import json
import os
import random
import shutil
import sys
from pathlib import Path

import pytest
from engine import make_job, make_overrides, make_served, run_engines, start
from mutation import VALUES, mutate_bytes, mutate_json, mutate_shard
from tiny import make_checkpoint

from lexi_search.artifacts.serialisation import read_allocation, to_document
from lexi_search.checkpoint.reader import open_checkpoint
from lexi_search.errors import InputError

WORKER = Path(__file__).parents[2] / "helpers" / "tampered.py"
COUNT = int(os.environ.get("LEXI_TAMPERINGS", "20"))
ENGINES = min(5, COUNT // 20)
KEYS = ("lexi-allocation", "Lexi_Allocation", "lexi_alocation", "lexi_allocations", "lexiAllocation", "allocation")
WAYS = {}


def way(make):
    """Register a function that tampers with an exported folder and returns the options of the engine."""
    WAYS[make.__name__] = make
    return make


def change(rng, path, mutate):
    data = path.read_bytes()
    path.unlink()  # a link to the model's own file
    path.write_bytes(mutate(rng, data))


def change_config(rng, folder, mutate):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(mutate(rng, config)))


@way
def bytes_of_the_config(rng, folder, served):
    change(rng, folder / "config.json", mutate_bytes)


@way
def values_of_the_config(rng, folder, served):
    change_config(rng, folder, mutate_json)


@way
def values_of_the_allocation(rng, folder, served):
    change_config(rng, folder, lambda rng, c: c | {"lexi_allocation": mutate_json(rng, c["lexi_allocation"])})


@way
def layers_of_the_allocation(rng, folder, served):
    """Another k in some layers, with its sum, in one of the two places or in both."""

    def mutate(rng, config):
        k = {layer: rng.randrange(1, 6) for layer in config["lexi_allocation"]["top_k"]}
        if rng.random() < 0.7:
            config["lexi_allocation"] |= {"top_k": k, "budget": sum(k.values())}
        if rng.random() < 0.7:
            config["per_layer_config"] = {layer: {"num_experts_per_tok": value} for layer, value in k.items()}
        return config

    change_config(rng, folder, mutate)


@way
def keys_of_the_export(rng, folder, served):
    """Of the three that an export adds, some are gone, null, or renamed."""

    def mutate(rng, config):
        for key in ("lexi_allocation", "per_layer_config", "architectures"):
            match rng.randrange(4):
                case 0:
                    config.pop(key)
                case 1:
                    config[key] = None
                case 2:
                    config[rng.choice(KEYS)] = config.pop(key)
        return config

    change_config(rng, folder, mutate)


@way
def the_shard(rng, folder, served):
    change(rng, folder / "model.safetensors", mutate_shard)


@way
def weights_of_another(rng, folder, served):
    other = served.root / "another"
    if not other.exists():
        make_checkpoint("olmoe", other, seed=1)
    shard = folder / rng.choice(["model.safetensors", "model-00002-of-00002.safetensors", "a.safetensors"])
    shard.unlink(missing_ok=True)
    shutil.copy(other / "model.safetensors", shard)
    if rng.random() < 0.5 and shard.name != "model.safetensors":
        (folder / "model.safetensors").unlink()


@way
def overrides(rng, folder, served):
    keys = ("lexi_allocation", "per_layer_config", "num_experts_per_tok", "num_experts", "num_hidden_layers")
    return {"hf_overrides": {rng.choice((*keys, "architectures", *KEYS)): rng.choice([*VALUES[:-1], 2, 3, 4])}}


@way
def overrides_of_the_model_s_own_folder(rng, folder, served):
    shutil.rmtree(folder)
    shutil.copytree(served.folder, folder)
    return {"hf_overrides": mutate_json(rng, make_overrides(served))}


@way
def additional_config(rng, folder, served):
    if rng.random() < 0.5:
        shutil.rmtree(folder)
        shutil.copytree(served.folder, folder)
    document = mutate_json(rng, to_document(served.allocation)) if rng.random() < 0.5 else rng.choice([None, {}, 1])
    file = folder.parent / f"{folder.name}.json"
    file.write_text(json.dumps(document))
    values = rng.choice([document, str(file), "/nowhere.json", {"lexi_allocation": document}])
    key = rng.choice(["lexi_allocation", *KEYS])
    document = document if isinstance(document, dict) else {}
    return {"additional_config": rng.choice([{key: values}, {key: values}, document, {"a": {key: values}}])}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return make_served(tmp_path_factory.mktemp("tampering"))


@pytest.fixture(scope="module")
def outcomes(served):
    """(way, job, result) of every tampering; the first is of the export as it is."""
    jobs, names = [make_job(served.exported)], ["nothing"]
    for number in range(COUNT):
        rng = random.Random(number)
        name = list(WAYS)[number % len(WAYS)]
        folder = served.root / f"tampered-{number}"
        shutil.copytree(served.exported, folder, symlinks=True)
        jobs.append(make_job(folder, **(WAYS[name](rng, folder, served) or {})))
        names.append(name)
    path = served.root / "results.json"
    done = start(sys.executable, str(WORKER), str(path), input=json.dumps(jobs), timeout=300 + 5 * COUNT)
    assert path.exists(), done.stderr[-3000:]
    return list(zip(names, jobs, json.loads(path.read_text()), strict=True))


def find_documents(job):
    """Everything that was given as an allocation: in the folder's config, by override, and beside."""
    config = json.loads(Path(job["model"], "config.json").read_text())
    config |= job["options"].get("hf_overrides", {})
    given = [config.get("lexi_allocation"), job["options"].get("additional_config", {}).get("lexi_allocation")]
    return config, [value for value in given if value is not None]


def find_remains(config, options):
    """What says that another k than the model's own is asked for."""
    text = json.dumps([config, options["additional_config"] if "additional_config" in options else None])
    yield from (word for word in ("lexi_allocation", *KEYS[:-1]) if f'"{word}":' in text)
    if '"format": "lexi-allocation"' in text:
        yield "an allocation"
    if "Lexi" in str(config.get("architectures")):
        yield "the architecture"
    if "num_experts_per_tok" in str(config.get("per_layer_config")):
        yield "k of layers"


def hash_routers(folder, model):
    """Over the bytes of the folder's routers, as lexi_search reads its checkpoint."""
    arrays, digest = dict(open_checkpoint(folder).items()), hashlib.sha256()
    for layer in model.moe_layers:
        digest.update(arrays[model.router.format(layer)].tobytes())
    return digest.hexdigest()


def read(value, path):
    """The allocation in a document, or in the file of that name, as lexi_search reads it."""
    if isinstance(value, str):
        return read_allocation(value)
    path.write_text(json.dumps(value))
    return read_allocation(path)


def test_what_starts_has_the_allocation_that_was_given(outcomes, served):
    assert outcomes[0][2] == {"top_k": {str(layer): k for layer, k in served.allocation.top_k.items()}}
    started = []
    for number, (name, job, result) in enumerate(outcomes):
        if "error" in result:
            assert "\n" not in result["message"] or result["error"] not in ("AllocationError", "AdapterError"), result
            continue
        config, documents = find_documents(job)
        where = (number, name, job["options"], result)
        if result["top_k"] is None:  # the model's own k: nothing of an export may be left that says otherwise
            assert not list(find_remains(config, job["options"])), where
            continue
        started.append(job)
        try:
            allocations = [read(document, served.root / "document.json") for document in documents]
        except InputError as error:
            pytest.fail(f"{where}: lexi_search refuses it ({error})")
        assert allocations, where
        for allocation in allocations:
            assert {str(layer): k for layer, k in allocation.top_k.items()} == result["top_k"], where
            assert hash_routers(job["model"], allocation.model) == allocation.model.router_sha256, where
    assert 1 < len(started) < len(outcomes)
    for job, result in zip(started[1 : 1 + ENGINES], run_engines(*started[1 : 1 + ENGINES]).results, strict=True):
        _, documents = find_documents(job)
        if "error" not in result:
            assert result["top_k"] == dict(read(documents[0], served.root / "document.json").top_k), job
