"""What a server states of its layers, and how it is asked: with stand-ins; `test_vllm_server` has a real server."""

import asyncio
import json
import threading
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from engine import allocate
from tiny import make_checkpoint

from lexi_adapter.allocation import CompensationFile, hash_allocation, read_allocation
from lexi_adapter.allocation import to_document as write_document
from lexi_adapter.cli.main import main
from lexi_adapter.errors import AdapterError, AllocationError
from lexi_adapter.serving.vllm_correction import _correct_block
from lexi_adapter.serving.vllm_gates import _compensate_block
from lexi_adapter.serving.vllm_status import METHOD, _describe, _stating, ask, compare_status, merge
from lexi_search.artifacts.serialisation import to_document, write_allocation


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    return allocate(make_checkpoint("olmoe", tmp_path_factory.mktemp("status") / "olmoe"))


@pytest.fixture(scope="module")
def allocation(searched):
    return read_allocation(to_document(searched))


class MiniCPMMoE(torch.nn.Module):
    """A block that holds its k itself, by the name under which the adapter knows it."""

    def __init__(self, top_k):
        super().__init__()
        self.top_k = top_k


class MoERunner(torch.nn.Module):
    """A layer of the common kind, which holds its k in five places."""

    def __init__(self, top_k):
        super().__init__()
        config = SimpleNamespace(experts_per_token=top_k)
        self.router = SimpleNamespace(top_k=top_k)
        self.moe_config = config
        self.routed_experts = SimpleNamespace(
            top_k=top_k, moe_config=config, expert_map_manager=SimpleNamespace(top_k=top_k)
        )


def make_worker(allocation, layers):
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleDict({str(layer): module for layer, module in layers.items()})
    config = SimpleNamespace(additional_config={"lexi_allocation": write_document(allocation)})
    return SimpleNamespace(vllm_config=config, get_model=lambda: model)


def test_a_worker_describes_what_its_modules_hold_and_not_what_the_file_says(allocation):
    block = MiniCPMMoE(2)
    block.forward = None
    _compensate_block(block, 2, 4, 0.5)
    _correct_block(block, 2, 4, "0123456789ab")
    stated = json.loads(_describe(make_worker(allocation, {0: MoERunner(3), 1: block, 2: MoERunner(4)})))
    assert stated == {
        "sha256": hash_allocation(allocation),
        "own_top_k": 4,
        "top_k": {"0": 3, "1": 2, "2": 4},
        "gate_exponents": {"1": 0.5},
        "compensation": {"1": "0123456789ab"},
    }


def test_a_layer_that_holds_two_numbers_is_an_error_and_no_exception(allocation):
    layer = MoERunner(3)
    layer.routed_experts.top_k = 2
    stated = json.loads(_describe(make_worker(allocation, {0: layer})))
    assert stated == {"error": "AdapterError: layer 0 has routed_experts.top_k = 2 beside a top-k of 3"}
    assert (
        "KeyError" in json.loads(_describe(SimpleNamespace(vllm_config=SimpleNamespace(additional_config={}))))["error"]
    )


def describe(top_k, sha256="a", **gate_exponents):
    exponents = {name[1:]: value for name, value in gate_exponents.items()}
    return json.dumps({"sha256": sha256, "own_top_k": 4, "top_k": top_k, "gate_exponents": exponents})


def test_stages_are_joined_and_workers_that_differ_are_named():
    first, second = describe({"0": 1, "1": 2}, _0=0.5), describe({"2": 3})
    assert merge([first, first, second, second]) == {
        "sha256": "a",
        "own_top_k": 4,
        "top_k": {"0": 1, "1": 2, "2": 3},
        "gate_exponents": {"0": 0.5},
        "workers": 4,
    }
    assert merge([first, describe({"1": 3})]) == {"error": "workers differ in top_k of layer 1"}
    assert merge([first, describe({"2": 3}, sha256="b")]) == {"error": "workers differ in sha256: a and b"}
    assert merge([first, json.dumps({"error": "no"})]) == {"error": "no"}


class Engine:
    """An engine client whose workers answer `answers`, in turn."""

    def __init__(self, config, *answers):
        self.vllm_config, self.answers, self.asked = config, list(answers), []

    async def collective_rpc(self, method, timeout):
        self.asked.append(method)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def list_models(engine, times=1):
    async def show(self):
        return SimpleNamespace(data=[SimpleNamespace(id="one"), SimpleNamespace(id="two")])

    handler = SimpleNamespace(engine_client=engine)
    return [[vars(card) for card in asyncio.run(_stating(show)(handler)).data] for _ in range(times)][-1]


def configure(additional, engines=1):
    return SimpleNamespace(additional_config=additional, parallel_config=SimpleNamespace(data_parallel_size=engines))


def test_workers_are_asked_until_they_answer_and_every_card_says_so(allocation):
    config = configure({"lexi_allocation": write_document(allocation)}, engines=2)
    engine = Engine(config, RuntimeError("asleep"), [describe({"0": 1})])
    cards = list_models(engine, times=3)
    assert engine.asked == [METHOD, METHOD]
    assert [card["lexi"]["top_k"] for card in cards] == [{"0": 1}, {"0": 1}]
    assert cards[0]["lexi"]["engines"] == 2
    failed = list_models(Engine(config, RuntimeError("asleep")))
    assert failed[0]["lexi"]["error"] == "RuntimeError: asleep"


def test_without_an_allocation_the_list_is_as_vllm_gives_it():
    for additional in ({}, None, {"other": 1}):
        assert list_models(Engine(configure(additional))) == [{"id": "one"}, {"id": "two"}]


@contextmanager
def answering(body, code=200):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            keys.append((self.path, self.headers.get("Authorization")))
            self.send_response(code)
            self.end_headers()
            self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

        def log_message(self, *_):
            pass

    keys = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", keys
        finally:
            server.shutdown()


def list_cards(allocation, **changes):
    stated = {
        "sha256": hash_allocation(allocation),
        "own_top_k": 4,
        "top_k": {str(layer): k for layer, k in allocation.top_k.items()},
        "gate_exponents": {},
        "workers": 2,
        "engines": 1,
    }
    return {"data": [{"id": "lexi", "lexi": stated | changes}]}


def test_a_server_is_asked_with_its_key_and_compared(allocation):
    with answering(list_cards(allocation)) as (url, keys):
        for address in (url, f"{url}/", f"{url}/v1", f"{url}/v1/"):
            status = ask(address, api_key="secret")
        assert set(keys) == {("/v1/models", "Bearer secret")}
        ask(url)
        assert keys[-1] == ("/v1/models", None)
    assert status.top_k == allocation.top_k and status.models == ("lexi",)
    compare_status(status, allocation, "a.json")
    with pytest.raises(AllocationError, match=r"layer 2 runs k = 4 there, a.json says 2; serve a.json"):
        compare_status(status._replace(top_k={**status.top_k, 2: 4}), allocation, "a.json")
    with pytest.raises(AllocationError, match=r"layer 3 runs k = 1 there, a.json says None"):
        compare_status(status._replace(top_k={**status.top_k, 3: 1}), allocation, "a.json")
    exponent = replace(allocation, gate_exponent=0.5)
    with pytest.raises(AllocationError, match=r"layer 0 runs with no gate exponent, a.json says gate exponent 0.5"):
        compare_status(status, exponent, "a.json")
    status = status._replace(gate_exponents=dict.fromkeys(allocation.top_k, 0.5))
    compare_status(status, exponent, "a.json")
    compensated = replace(exponent, compensation=CompensationFile("a.safetensors", 4, "ab" * 32))
    with pytest.raises(AllocationError, match=r"layer 0 runs with no compensation, a.json says compensation (ab){6}"):
        compare_status(status, compensated, "a.json")
    compare_status(status._replace(compensation=dict.fromkeys(allocation.top_k, "ab" * 6)), compensated, "a.json")


@pytest.mark.parametrize(
    "body, code, expected",
    [
        ({"data": [{"id": "lexi"}]}, 200, "states no allocation"),
        ({"data": [{"id": "lexi", "lexi": {"error": "asleep"}}]}, 200, r"could not read its layers \(asleep\)"),
        ({"data": [{"id": "lexi", "lexi": {}}]}, 200, "has no list of models as vLLM's servers have"),
        ({"data": 3}, 200, "has no list of models"),
        ([], 200, "has no list of models"),
        (b"<html>", 200, "cannot ask .*/v1/models"),
        (b"\xff", 200, "cannot ask .*/v1/models"),
        ({}, 401, "answers 401 Unauthorized; give its key by --api-key"),
        ({}, 404, "answers 404 Not Found; name the address of a vLLM server"),
    ],
)
def test_a_server_that_does_not_say_is_a_refusal_in_one_line(body, code, expected):
    with answering(body, code) as (url, _), pytest.raises(AdapterError, match=expected) as caught:
        ask(url)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "localhost:8000", "nonsense", ""])
def test_no_server_there(url):
    with pytest.raises(AdapterError, match="cannot ask .*; name the address of a running server"):
        ask(url)


def test_the_command_says_what_runs_and_whose_it_is(searched, allocation, tmp_path):
    write_allocation(tmp_path / "a.json", searched)
    write_allocation(tmp_path / "again.json", replace(searched, made_by={"another": "run"}))
    exponents = {"0": 0.5, "1": 0.5}
    with answering(list_cards(allocation, workers=1, engines=3)) as (url, _):
        says = [
            CliRunner().invoke(main, ["check", *map(str, words), "--url", url]).output.splitlines()
            for words in ([], [tmp_path / "a.json"], [tmp_path / "again.json"])
        ]
    assert says[0][0].startswith(f"{url} runs lexi: 6 of 12 active experts per token over 3 MoE layers, sha256 ")
    assert ", read from 1 worker of engine 1 of 3; top-k of each: 0:1 1:3 2:2" in says[0][0]
    assert says[0][1:] == [f"done: {url} runs an allocation", f"next: lexi-adapter check served/ --url {url}"]
    assert says[1][-1] == f"done: {url} runs {tmp_path}/a.json"
    assert says[2][-1].startswith(f"done: {url} runs the k of {tmp_path}/again.json, whose sha256 is ")
    sources = dict.fromkeys(exponents, "0123456789ab")
    with answering(list_cards(allocation, gate_exponents=exponents, compensation=sources)) as (url, _):
        assert (
            ", gate exponent 0.5, compensation 0123456789ab, sha256"
            in CliRunner().invoke(main, ["check", "--url", url]).output
        )
