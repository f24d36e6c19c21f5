"""The names of vLLM that the adapter relies on, looked up in the vLLM that is installed; and the range of versions."""

import json
import sys
from functools import cache

import pytest
from engine import start

from lexi_adapter.errors import AdapterError
from lexi_adapter.model.folder import READ_AS_STORED
from lexi_adapter.serving.vllm_names import (
    CUSTOM_ROUTING,
    FACTORY_NAMES,
    HOOKED,
    OWN_BLOCKS,
    ROUTING_AT_TOP_K,
    check_version,
)

# Runs in a process of its own: what is there, as JSON.
LOOK = """
import importlib, inspect, json, pkgutil
from lexi_adapter.serving import vllm_names as names
from vllm.model_executor.layers.fused_moe import router as package
from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER as loaders
from vllm.model_executor.models.cohere2_moe import token_choice_with_bias

def has(module, name):
    value = importlib.import_module(module)
    for part in name.split("."):
        value = getattr(value, part, None)
    return value is not None

factories = importlib.import_module(names.FACTORY_MODULE)
routers = {}
for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
    if module.name.endswith("_router"):
        found = inspect.getmembers(importlib.import_module(module.name), inspect.isclass)
        routers |= {name: list(inspect.signature(c._compute_routing).parameters) for name, c in found
                    if hasattr(c, "_compute_routing")}
print(json.dumps({
    "missing": [(module, name) for module, found in names.HOOKED.items() for name in found if not has(module, name)],
    "factories": [name for name in names.FACTORY_NAMES if hasattr(factories, name)],
    "arguments": [list(inspect.signature(getattr(factories, name)).parameters) for name in names.FACTORY_NAMES
                  if hasattr(factories, name)],
    "blocks": [list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
               for module, name in names.OWN_BLOCKS],
    "routers": routers,
    "loaders": {name: loader.__name__ for name, loader in loaders.items()},
    "obedient": token_choice_with_bias.__qualname__,
}))
"""


@cache
def look():
    done = start(sys.executable, "-c", LOOK)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_everything_that_is_hooked_is_there():
    assert HOOKED and look()["missing"] == []


def test_the_factory_and_the_blocks_take_what_is_changed_and_compared():
    assert len(look()["factories"]) == 1 and set(look()["factories"]) < set(FACTORY_NAMES)
    assert {"top_k", "num_experts", "prefix", *CUSTOM_ROUTING} <= set(look()["arguments"][0])
    assert len(look()["blocks"]) == len(OWN_BLOCKS)
    assert all({"top_k", "num_experts", "prefix"} <= set(block) for block in look()["blocks"])


def test_routers_are_called_as_a_compensating_one_takes_it():
    expected = ["self", "hidden_states", "router_logits", "indices_type", "input_ids"]
    routers = look()["routers"]
    assert {"FusedTopKRouter", "FusedTopKBiasRouter", "GroupedTopKRouter", "CustomRoutingRouter"} <= set(routers)
    assert all(parameters == expected for parameters in routers.values()), routers
    assert look()["obedient"] in ROUTING_AT_TOP_K


def test_the_formats_whose_weights_are_compared_are_those_that_read_safetensors():
    loaders = look()["loaders"]
    assert set(READ_AS_STORED) <= set(loaders)
    default = {name for name, loader in loaders.items() if loader == "DefaultModelLoader"}
    assert set(READ_AS_STORED) == default - {"pt", "npcache", "mistral"} | {"runai_streamer"}


@pytest.mark.parametrize("version", ["0.25.1", "0.9", "0.34.0", "0.34.0rc1", "1.0.0", "dev"])
def test_refuses_versions_out_of_range(version):
    with pytest.raises(AdapterError, match=f"vLLM {version} cannot apply an allocation: .* vLLM 0.26 to 0.33"):
        check_version(version)


@pytest.mark.parametrize("version", ["0.26.0", "0.27", "0.32.0+cpu", "0.33.1rc1.dev5+g1234"])
def test_takes_versions_in_range(version):
    check_version(version)
