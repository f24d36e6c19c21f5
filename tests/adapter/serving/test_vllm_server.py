"""The OpenAI server end to end, as `examples/serve_demo.py` starts it and `make serve-demo` shows it."""

import importlib.util
import json
import sys
import urllib.request
from pathlib import Path

from engine import make_served, start
from tiny import make_checkpoint

import lexi_adapter

DEMO = Path(lexi_adapter.__file__).parent.parent / "examples" / "serve_demo.py"
ARGUMENTS = ["--prompt", "t3 t4 t5", "--tokens", "4"]


def load_demo():
    specification = importlib.util.spec_from_file_location("serve_demo", DEMO)
    demo = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(demo)
    return demo


def test_server_lists_its_model_completes_shows_the_top_k_of_every_layer_and_stops(tmp_path, monkeypatch, capsys):
    served, demo, seen = make_served(tmp_path), load_demo(), {}

    def list_models_and_complete(url, *arguments, complete=demo.complete):
        with urllib.request.urlopen(f"{url}/v1/models", timeout=60) as response:
            seen["models"] = [model["id"] for model in json.load(response)["data"]]
        return complete(url, *arguments)

    def stop(server, stop=demo.stop):
        stop(server)
        seen["running"] = server.poll() is None

    monkeypatch.setattr(demo, "complete", list_models_and_complete)
    monkeypatch.setattr(demo, "stop", stop)
    monkeypatch.setattr(sys, "argv", [str(DEMO), str(served.exported), *ARGUMENTS])
    demo.main()
    assert seen == {"models": ["lexi"], "running": False}
    title, head, *rows, blank, text = capsys.readouterr().out.splitlines()
    assert title == f"served {served.exported}: 6 of 12 active experts per token over 3 MoE layers"
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
