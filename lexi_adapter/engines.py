"""vLLM engines, each in a process of its own: start several at once, call functions in them, stop them.

A function that is called in an engine takes the `vllm.LLM` first; those for measuring are here. All are safe to name
from anywhere: vLLM is imported in the engine's process only.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from lexi_adapter import kernels, vllm_live
from lexi_adapter.allocation import KEY, AllocationError, to_document
from lexi_adapter.turns import measure_alone, start_beside
from lexi_adapter.variants import RANDOM, Variant
from lexi_adapter.workloads import Workload, draw_prompts

# Functions travel to the workers by name; without this vLLM sends none. And no report of use leaves a benchmark.
ENVIRONMENT = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_NO_USAGE_STATS": "1"}
SMALLEST_BLOCK = 16  # tokens of a block of the key-value cache; larger blocks only make the cache larger than needed


class EngineError(AllocationError):
    """An engine that did not start or did not answer; its own log, on stderr, says more."""


class Engine:
    """A process with one `vllm.LLM`. Use it through `start_engines`, which stops it again."""

    def __init__(self, name: str, options: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        context = multiprocessing.get_context("spawn")  # a forked child could not use CUDA
        self.name = name
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, dict(options), ENVIRONMENT | dict(environment)))
        self._process.start()
        theirs.close()

    def wait(self) -> Any:
        """What the function called last returned; the first time, whether the engine came up.

        Raises:
            EngineError: with the reason in one line.
        """
        try:
            outcome, value = self._connection.recv()
        except EOFError:
            outcome, value = "failed", "its process ended"
        if outcome == "failed":
            raise EngineError(f"engine of {self.name!r}: {value}")
        return value

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(llm, *args)` in the engine's process."""
        self._connection.send((function, args))
        return self.wait()

    def hang_up(self) -> None:
        """Let it end; `stop` waits for that."""
        self._connection.close()

    def stop(self) -> None:
        """Let it end and wait until its memory is free."""
        self.hang_up()
        self._process.join(60)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()


@contextmanager
def start_engines(engines: Sequence[tuple[str, Mapping[str, Any], Mapping[str, str]]]) -> Iterator[list[Engine]]:
    """Start engines (name, options of `vllm.LLM`, environment) side by side; all are up inside the block."""
    with ExitStack() as stack:
        started = []
        for engine in engines:
            started.append(Engine(*engine))
            stack.callback(started[-1].stop)
        stack.callback(lambda: [engine.hang_up() for engine in started])  # first, so that all end side by side
        for engine in started:
            engine.wait()
        yield started


@contextmanager
def measure_engines(
    engines: Sequence[tuple[str, Mapping[str, Any], Mapping[str, str]]], *, load_format: str, locks: Sequence[str] = ()
) -> Iterator[list[Engine]]:
    """`start_engines`, ready to be measured: weights drawn where none are loaded, and nobody else on the cards `locks`.

    Others that share these cards (`turns`) may start while these do.
    """
    with ExitStack() as stack:
        with start_beside(locks):
            started = stack.enter_context(start_engines(engines))
            if load_format == RANDOM:
                for engine in started:
                    engine.call(draw_weights)
        stack.enter_context(measure_alone(locks))
        yield started


def _serve(connection: Any, options: dict[str, Any], environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    os.dup2(2, 1)  # what vLLM prints is a log; standard output is for results
    try:
        from vllm import LLM

        llm = LLM(**options)
        connection.send(("done", None))
    except Exception as error:
        connection.send(("failed", _shorten(error)))
        return
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            llm.llm_engine.engine_core.shutdown()  # else this process would wait for its child, and that for this one
            return
        try:
            connection.send(("done", function(llm, *args)))
        except Exception as error:
            connection.send(("failed", _shorten(error)))


def _shorten(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def make_options(
    variant: Variant, workloads: Sequence[Workload], *, load_format: str, parallel: Mapping[str, Any], **others: Any
) -> dict[str, Any]:
    """Arguments of `vllm.LLM` for measuring `workloads`; `others` are the user's own and win.

    The key-value cache is as large as the largest workload needs, so that several engines fit on one card and none has
    to look how much memory there is; CUDA graphs are captured for the measured batches alone. Neither changes the
    speed of a step. Prefix caching is off: a repeated prompt must cost what it cost the first time.
    """
    longest = max(workload.input_length + workload.output_length for workload in workloads)
    blocks = max(w.batch * (2 + (w.input_length + w.output_length) // SMALLEST_BLOCK) for w in workloads)
    compilation = {"cudagraph_capture_sizes": sorted({workload.batch for workload in workloads})}
    options = {
        "model": variant.folder,
        "load_format": load_format,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "max_model_len": longest + 1,
        "max_num_seqs": max(workload.batch for workload in workloads),
        "num_gpu_blocks_override": blocks + 1,
        "kv_cache_memory_bytes": 2**30,  # any number: with one, vLLM takes the blocks above without measuring memory
        "gpu_memory_utilization": 0.05,
        **parallel,
        **others,
        "compilation_config": compilation | dict(others.get("compilation_config") or {}),
    }
    if variant.overrides:
        options["hf_overrides"] = dict(variant.overrides)
    if variant.allocation is not None:
        options["additional_config"] = {KEY: to_document(variant.allocation)}
    return options


def time_run(llm: Any, workload: Workload, seed: int) -> float:
    """Seconds from handing over the workload's random prompts to the last token of the last answer.

    Tokens are sampled at temperature 1: greedy answers of random weights would all be the same token, and a batch of
    equal tokens goes to equal experts.
    """
    prompts = [{"prompt_token_ids": ids} for ids in _draw(llm, workload, seed)]
    sampling = _sample(workload, temperature=1.0)
    start = time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - start
    lengths = {len(output.outputs[0].token_ids) for output in outputs}
    if lengths != {workload.output_length} or len(outputs) != workload.batch:
        raise EngineError(f"{len(outputs)} answers of {sorted(lengths)} tokens to workload {workload}")
    return seconds


def answer_greedily(llm: Any, workload: Workload) -> list[list[int]]:
    """The tokens of every answer to the workload's prompts; engines that are the same model answer the same.

    One prompt at a time, so that what shares a step, and with it the rounding, is the same in every engine.
    """
    sampling = _sample(workload, temperature=0.0)
    outputs = [llm.generate({"prompt_token_ids": ids}, sampling, use_tqdm=False) for ids in _draw(llm, workload, 0)]
    return [list(output.outputs[0].token_ids) for (output,) in outputs]


def read_prompts(llm: Any, prompts: list[list[int]]) -> None:
    """Run prompts of token ids through the model, one new token each."""
    llm.generate(
        [{"prompt_token_ids": ids} for ids in prompts], _sample(Workload(1, 1, 1), temperature=0.0), use_tqdm=False
    )


def _draw(llm: Any, workload: Workload, seed: int) -> list[list[int]]:
    return draw_prompts(workload, vocab_size=llm.llm_engine.model_config.get_vocab_size(), seed=seed)


def _sample(workload: Workload, **others: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(max_tokens=workload.output_length, ignore_eos=True, detokenize=False, **others)


def switch_layers(
    llm: Any, top_k: Mapping[int, int] | None, kept: Mapping[str, tuple[int, int]] | None = None
) -> dict[int, int]:
    """`vllm_live.switch` in every worker."""
    return _merge(llm.collective_rpc(vllm_live.switch, args=(top_k, dict(kept or {}))))


def draw_weights(llm: Any, seed: int = 0) -> None:
    """`vllm_live.draw_weights` in every worker."""
    llm.collective_rpc(vllm_live.draw_weights, args=(seed,))


def describe_engine(llm: Any) -> dict[str, Any]:
    """`vllm_live.describe` of the first worker, with the k of all, and vLLM's version."""
    import vllm

    workers = llm.collective_rpc(vllm_live.describe)
    return workers[0] | {
        "top_k": _merge([w["top_k"] for w in workers]),
        "workers": len(workers),
        "vllm": vllm.__version__,
    }


def record_kernels(llm: Any, workload: Workload, seed: int) -> dict[str, Any]:
    """`kernels.combine` of what every worker records while the workload runs once.

    Twice, for the second time: what the profiler does at first delays workers unequally, and their peers wait for them.
    """
    for _ in range(2):
        llm.collective_rpc(kernels.start_recording)
        time_run(llm, workload, seed)
        workers = llm.collective_rpc(kernels.stop_recording)
    return kernels.combine(workers)


def watch_experts(llm: Any, dropped: Mapping[int, list[int]]) -> None:
    """`vllm_live.watch` in every worker."""
    llm.collective_rpc(vllm_live.watch, args=(dict(dropped),))


def read_expert_counts(llm: Any) -> dict[int, list[list[int]]]:
    """`vllm_live.read_counts`, of the first worker that has the layer: tensor-parallel workers route alike."""
    return _merge(llm.collective_rpc(vllm_live.read_counts))


def _merge(layers: Sequence[Mapping[int, Any]]) -> dict[int, Any]:
    return dict(sorted((layer, value) for worker in reversed(layers) for layer, value in worker.items()))
