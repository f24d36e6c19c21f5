"""The OpenAI server end to end, as `examples/serve_demo.py` starts it and `make serve-demo` shows it."""

import importlib.util
import json
import sys
import urllib.request
from pathlib import Path

from click.testing import CliRunner
from engine import allocate, make_served, start
from tiny import make_checkpoint

import lexi_adapter
from lexi_adapter.allocation import hash_allocation, read_allocation
from lexi_adapter.cli.main import main
from lexi_search.artifacts.serialisation import to_document, write_allocation

DEMO = Path(lexi_adapter.__file__).parent.parent / "examples" / "serve_demo.py"
ARGUMENTS = ["--prompt", "t3 t4 t5", "--tokens", "4"]


def load_demo():
    specification = importlib.util.spec_from_file_location("serve_demo", DEMO)
    demo = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(demo)
    return demo


def test_server_lists_its_model_completes_shows_the_top_k_of_every_layer_and_stops(tmp_path, monkeypatch, capsys):
    served, demo, seen = make_served(tmp_path), load_demo(), {}
    other = tmp_path / "other.json"
    write_allocation(other, allocate(served.folder, (1, 2, 3)))

    def list_models_and_complete(url, *arguments, complete=demo.complete):
        with urllib.request.urlopen(f"{url}/v1/models", timeout=60) as response:
            seen["models"] = [model["id"] for model in json.load(response)["data"]]
        for words in (["--url", url], [str(served.exported), "--url", f"{url}/v1"], [str(other), "--url", url]):
            seen.setdefault("checks", []).append(CliRunner().invoke(main, ["check", *words]))
        return complete(url, *arguments)

    def stop(server, stop=demo.stop):
        stop(server)
        seen["running"] = server.poll() is None

    monkeypatch.setattr(demo, "complete", list_models_and_complete)
    monkeypatch.setattr(demo, "stop", stop)
    monkeypatch.setattr(sys, "argv", [str(DEMO), str(served.exported), *ARGUMENTS])
    demo.main()
    bare, same, differing = seen.pop("checks")
    assert seen == {"models": ["lexi"], "running": False}
    sha256 = hash_allocation(read_allocation(to_document(served.allocation)))
    for stated in (bare, same):
        assert stated.exit_code == 0, stated.output
        assert "runs lexi: 6 of 12 active experts per token over 3 MoE layers" in stated.output
        assert f"sha256 {sha256}, read from 1 worker; top-k of each: 0:1 1:3 2:2\n" in stated.output
    assert same.stderr.startswith("done: ") and same.stderr.endswith(f" runs {served.exported}\n")
    assert differing.exit_code == 2
    assert differing.output == f"Error: layer 1 runs k = 3 there, {other} says 2; serve {other}\n"
    title, head, *rows, blank, text = capsys.readouterr().out.splitlines()
    assert title == f"served {served.exported}: 6 of 12 active experts per token over 3 MoE layers, sha256 {sha256}"
    assert head.split() == ["layer", "top-k"]
    assert {int(layer): int(k) for layer, k in map(str.split, rows)} == served.allocation.top_k
    assert text.startswith("t3 t4 t5") and len(text.split()) > 3


def test_server_does_not_come_up_with_the_allocation_of_another_model(tmp_path):
    served = make_served(tmp_path)
    other = make_checkpoint("olmoe", tmp_path / "other", seed=1)
    weights = served.exported / "model.safetensors"
    weights.unlink()
    weights.symlink_to(other / "model.safetensors")
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    done = start(sys.executable, str(DEMO), str(served.exported), *ARGUMENTS, **environment)
    assert done.returncode == 1 and done.stdout == ""
    assert f"{served.exported} holds other router weights than the allocation was made for" in done.stderr


def test_the_last_line_of_the_log_says_why_an_override_of_the_k_stops_the_server(tmp_path):
    exported = make_served(tmp_path).exported
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(exported), "--port", "0"]
    command += ["--skip-tokenizer-init", "--hf-overrides", '{"num_experts_per_tok": 2}']
    done = start(*command, VLLM_ENABLE_V1_MULTIPROCESSING="1")
    assert done.returncode != 0
    reason = "num_experts_per_tok, after --hf-overrides, is 2, the allocation was made for 4; leave the override out"
    assert reason in (done.stdout + done.stderr).splitlines()[-1]
