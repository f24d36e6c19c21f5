"""The k that a running server's layers have: read from its workers' modules, stated in /v1/models, and asked there.

Every model's card in the answer to `GET /v1/models` of a server with an allocation has an object `lexi`:

    {"sha256": "0123456789ab", "own_top_k": 8, "top_k": {"0": 5, ...}, "gate_exponents": {}, "compensation": {},
     "workers": 2, "engines": 1}

`top_k`, `gate_exponents` and `compensation` (of each layer 12 digits of the SHA-256 of the file it came from) are what
the built layers hold, in all workers of the first data-parallel engine of `engines` (vLLM hands on no other's answer;
each has checked its own layers when it built them). `sha256` is that of the allocation which they were built under. A
server without an allocation answers as vLLM does.
"""

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

from lexi_adapter.allocation import KEY, Allocation, hash_allocation, read_allocation
from lexi_adapter.errors import AdapterError, AllocationError
from lexi_adapter.files import parse_json
from lexi_adapter.serving.vllm_build import SHORT, find_holders, hook, read_top_k
from lexi_adapter.serving.vllm_correction import read_source
from lexi_adapter.serving.vllm_gates import read_gate_exponent

FIELD, METHOD = "lexi", "lexi_describe_layers"  # the object's name in a model's card; the worker's method
SECONDS = 30  # for the workers to answer, and for the server
MOST_BYTES = 2**24  # of an answer


class Status(NamedTuple):
    """What a server states: see the module's docstring; `models` are the names under which it serves."""

    models: tuple[str, ...]
    sha256: str
    own_top_k: int
    top_k: Mapping[int, int]
    gate_exponents: Mapping[int, float]
    compensation: Mapping[int, str]
    workers: int
    engines: int


def hook_worker() -> None:
    """Give this process's vLLM workers the method that describes their layers."""
    from vllm.v1.worker.worker_base import WorkerBase

    setattr(WorkerBase, METHOD, _describe)


def hook_server() -> None:
    """Have an API server in this process state its layers in /v1/models."""
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

    hook(OpenAIServingModels, "show_available_models", _stating)


def _describe(worker: Any) -> str:
    """JSON of one worker's layers. An exception would stop some of vLLM's executors, so its text is returned."""
    try:
        allocation = read_allocation(worker.vllm_config.additional_config[KEY])
        return json.dumps({"sha256": hash_allocation(allocation), **describe_model(worker.get_model(), allocation)})
    except Exception as error:
        return json.dumps({"error": f"{type(error).__name__}: {error}"})


def describe_model(model: Any, allocation: Allocation) -> dict[str, Any]:
    """The k, the gate exponents and the compensation of a built model's MoE layers, read from its modules.

    Raises:
        AdapterError: a layer that holds two different k.
    """
    top_k, exponents, sources = read_top_k(model), {}, {}
    layers = (module for module in model.modules() if find_holders(module))
    for layer, module in zip(top_k, layers, strict=True):
        for holder in find_holders(module):
            if (held := attrgetter(holder)(module)) != top_k[layer]:
                raise AdapterError(f"layer {layer} has {holder} = {held} beside a top-k of {top_k[layer]}")
        if (exponent := read_gate_exponent(module)) is not None:
            exponents[layer] = exponent
        if (source := read_source(module)) is not None:
            sources[layer] = source
    own_top_k = allocation.model.top_k
    return {"own_top_k": own_top_k, "top_k": top_k, "gate_exponents": exponents, "compensation": sources}


def merge(workers: Sequence[str]) -> dict[str, Any]:
    """The statement of all workers of an engine from the JSON of each; {"error": reason} where they do not agree."""
    merged: dict[str, Any] = {}
    for text in workers:
        stated = json.loads(text)
        if "error" in stated:
            return {"error": stated["error"]}
        for name, value in stated.items():
            known = merged.setdefault(name, value)
            both = known.keys() & value.keys() if isinstance(value, dict) else ()
            if not isinstance(value, dict) and known != value:
                return {"error": f"workers differ in {name}: {known} and {value}"}
            if differing := [key for key in both if known[key] != value[key]]:
                return {"error": f"workers differ in {name} of layer {min(differing, key=int)}"}
            if isinstance(value, dict):
                merged[name] = known | value
    return {**merged, "workers": len(workers)}


def _stating(show_available_models: Callable) -> Callable:
    async def stating(self: Any, *args: Any, **kwargs: Any) -> Any:
        listed = await show_available_models(self, *args, **kwargs)
        config = self.engine_client.vllm_config
        if KEY in (config.additional_config or {}):
            statement = vars(self).get("lexi_statement")
            if statement is None:
                statement = await _ask_workers(self.engine_client)
                statement["engines"] = config.parallel_config.data_parallel_size
                if "error" not in statement:  # layers keep their k, and clients may ask often
                    self.lexi_statement = statement
            for card in listed.data:
                setattr(card, FIELD, statement)
        return listed

    return stating


async def _ask_workers(engine_client: Any) -> dict[str, Any]:
    try:
        return merge(await engine_client.collective_rpc(METHOD, timeout=SECONDS))
    except Exception as error:  # a list of models is owed in any case
        return {"error": f"{type(error).__name__}: {error}"}


def ask(url: str, *, api_key: str | None = None) -> Status:
    """The statement of the server at `url`, its address with or without /v1.

    Raises:
        AdapterError: no such server, or one that states no allocation or could not read its layers.
    """
    address = url.rstrip("/").removesuffix("/v1") + "/v1/models"
    try:
        request = urllib.request.Request(address, headers={"Authorization": f"Bearer {api_key}"} if api_key else {})
        with urllib.request.urlopen(request, timeout=SECONDS + 5) as response:
            document = parse_json(response.read(MOST_BYTES).decode())
    except urllib.error.HTTPError as error:
        error.close()
        remedy = "give its key by --api-key" if error.code in (401, 403) else "name the address of a vLLM server"
        raise AdapterError(f"{address} answers {error.code} {error.reason}; {remedy}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise AdapterError(f"cannot ask {address}: {reason}; name the address of a running server") from error
    return _read(document, url)


def _read(document: Any, url: str) -> Status:
    try:
        cards = [card for card in document["data"] if FIELD in card]
        if not cards:
            raise AdapterError(
                f"{url} states no allocation: a vLLM API server without one, or without lexi_adapter, runs the model's "
                "own k in every layer; serve a folder that lexi-search exported, and look into the server's log"
            )
        stated = cards[0][FIELD]
        if "error" in stated:
            raise AdapterError(f"{url} could not read its layers ({stated['error']}); look into the server's log")
        return Status(
            models=tuple(str(card["id"]) for card in cards),
            sha256=str(stated["sha256"]),
            own_top_k=int(stated["own_top_k"]),
            top_k={int(layer): int(k) for layer, k in stated["top_k"].items()},
            gate_exponents={int(layer): float(b) for layer, b in stated["gate_exponents"].items()},
            compensation={int(layer): str(source) for layer, source in stated.get("compensation", {}).items()},
            workers=int(stated["workers"]),
            engines=int(stated["engines"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AdapterError(f"{url} has no list of models as vLLM's servers have ({error!r}); name another") from error


def compare_status(status: Status, allocation: Allocation, place: str) -> None:
    """Raise AllocationError unless the server's layers hold what the allocation in `place` asks for."""
    for layer in sorted(status.top_k.keys() | allocation.top_k.keys()):
        running, wanted = status.top_k.get(layer), allocation.top_k.get(layer)
        if running != wanted:
            raise AllocationError(f"layer {layer} runs k = {running} there, {place} says {wanted}; serve {place}")
        reduced = wanted < allocation.model.top_k
        exponent = allocation.gate_exponent if reduced else None
        source = allocation.compensation.sha256[:SHORT] if reduced and allocation.compensation else None
        for name, running, asked in (
            ("gate exponent", status.gate_exponents.get(layer), exponent),
            ("compensation", status.compensation.get(layer), source),
        ):
            if running != asked:
                there, here = (f"{name} {value}" if value is not None else f"no {name}" for value in (running, asked))
                raise AllocationError(f"layer {layer} runs with {there}, {place} says {here}; serve {place}")
