"""Serve an exported folder with `vllm serve`, let it write a few words, and show the top-k that each layer runs.

    python examples/serve_demo.py FOLDER [--prompt TEXT] [--tokens N]

The top-k come from the engine: the plugin reads them from the modules that vLLM built and states them in the log.
"""

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import torch

STATED = re.compile(r"LExI allocation applied: (.*); top-k of each: (.*)")
START_SECONDS = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="made by `lexi-search export ... --to vllm -o FOLDER`")
    parser.add_argument("--prompt", default="If the file does not exist, ")
    parser.add_argument("--tokens", type=int, default=48)
    arguments = parser.parse_args()
    if not Path(arguments.folder, "config.json").is_file():
        raise SystemExit(f"{arguments.folder} is no model folder: it has no config.json; export one with lexi-search")
    with serving(arguments.folder) as (url, log):
        text = complete(url, arguments.prompt, arguments.tokens)
        stated = STATED.search(log.read_text())
    if stated is None:
        raise SystemExit(f"{arguments.folder} was served without an allocation: export it with lexi-search first")
    print(f"served {arguments.folder}: {stated[1]}")
    print("layer  top-k")
    for layer, k in (pair.split(":") for pair in stated[2].split()):
        print(f"{layer:>5}  {k:>5}")
    print(f"\n{arguments.prompt}\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{arguments.prompt}{text}")


@contextmanager
def serving(folder: str, *options: str):
    """A vLLM server for the folder on a free port of this machine: its address and its log's path."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # `vllm serve` by its module: the command itself does not find its own version in vLLM's build for CPUs.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "lexi"]
    command += ["--max-model-len", "auto", "--enforce-eager", "--gpu-memory-utilization", "0.3", *options]
    # vLLM's CPU build (0.32) never asks Linux for the AMX tiles that its attention uses in bfloat16; it is killed.
    command += [] if torch.cuda.is_available() else ["--dtype", "float32"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"} | os.environ
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "vllm.log"
        with log.open("wb") as output:
            server = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        try:
            wait_until_ready(server, f"http://127.0.0.1:{port}", log)
            yield f"http://127.0.0.1:{port}", log
        finally:
            stop(server)


def wait_until_ready(server: subprocess.Popen, url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise SystemExit(f"{log.read_text()[-4000:]}\nvLLM did not start; its last words are above")


def complete(url: str, prompt: str, tokens: int) -> str:
    body = {"model": "lexi", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)["choices"][0]["text"]


def stop(server: subprocess.Popen) -> None:
    """Ask the server to end, then end whatever is left of its process group."""
    server.send_signal(signal.SIGINT)
    try:
        server.wait(timeout=30)
    except subprocess.TimeoutExpired:
        pass
    try:
        os.killpg(server.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    server.wait()


if __name__ == "__main__":
    main()
