"""The OpenAI server end to end, as `examples/serve_demo.py` starts it and `make serve-demo` shows it."""

import sys
from pathlib import Path

from engine import make_served, start
from tiny import make_checkpoint

DEMO = Path(__file__).parent.parent / "examples" / "serve_demo.py"


def run_demo(folder):
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "HF_HUB_OFFLINE": "1"}
    return start(sys.executable, str(DEMO), str(folder), "--prompt", "t3 t4 t5", "--tokens", "4", **environment)


def test_server_completes_and_shows_the_top_k_of_every_layer(tmp_path):
    served = make_served(tmp_path)
    done = run_demo(served.exported)
    assert done.returncode == 0, done.stderr[-3000:]
    title, head, *rows, blank, text = done.stdout.splitlines()
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
    done = run_demo(served.exported)
    assert done.returncode == 1 and done.stdout == ""
    assert f"{served.exported} holds other router weights than the allocation was made for" in done.stderr
