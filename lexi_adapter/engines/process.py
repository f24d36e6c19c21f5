"""vLLM engines, each in a process of its own: start several at once, call functions in them, stop them.

A function that is called in an engine takes the `vllm.LLM` first; those for measuring are here. All are safe to name
from anywhere: vLLM is imported in the engine's process only.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NoReturn

from lexi_adapter import kernels, vllm_live
from lexi_adapter.allocation import KEY, AllocationError, to_document
from lexi_adapter.packages import explain_import
from lexi_adapter.turns import measure_alone, start_beside
from lexi_adapter.variants import RANDOM, Variant
from lexi_adapter.workloads import Workload, draw_prompts

# Functions travel to the workers by name; without this vLLM sends none. And no report of use leaves a benchmark.
ENVIRONMENT = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_NO_USAGE_STATS": "1"}
PLUGIN = "lexi"  # this package's entry point among vLLM's plugins, as VLLM_PLUGINS names it
ENDING = (signal.SIGINT, signal.SIGTERM)
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
        except (EOFError, OSError):
            outcome, value = "failed", "its process ended"
        if outcome == "failed":
            raise EngineError(f"engine of {self.name!r}: {value}")
        return value

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(llm, *args)` in the engine's process."""
        with suppress(OSError):  # its process ended, as `wait` says
            self._connection.send((function, args))
        return self.wait()

    def hang_up(self) -> None:
        """Let it end; `stop` waits for that."""
        self._connection.close()

    def interrupt(self) -> None:
        """Have it end although it may be at work."""
        self._process.terminate()

    def stop(self) -> None:
        """Let it end and wait until its memory is free."""
        self.hang_up()
        for force in (self._process.terminate, self._process.kill):
            self._process.join(60)
            if self._process.is_alive():
                force()
        self._process.join()


def check_plugin(variants: Iterable[Variant]) -> None:
    """Refuse variants whose allocation vLLM would not even see, because it is told to leave this package's plugin out.

    Raises:
        AllocationError: naming the variant and VLLM_PLUGINS.
    """
    for variant in variants:
        chosen = variant.environment.get("VLLM_PLUGINS", os.environ.get("VLLM_PLUGINS"))
        if variant.allocation is not None and chosen is not None and PLUGIN not in chosen.split(","):
            raise AllocationError(
                f"VLLM_PLUGINS is {chosen!r} and leaves out {PLUGIN!r}, without which vLLM runs {variant.name!r} with "
                f"the model's own k; set VLLM_PLUGINS={PLUGIN} or unset it"
            )


def check_top_k(variant: Variant, found: Mapping[int, int]) -> None:
    """Raise EngineError unless the layers of its engine, with `found` active experts, run the variant's allocation."""
    asked = {} if variant.allocation is None else variant.allocation.top_k
    differing = sorted(layer for layer, k in asked.items() if found.get(layer) != k)
    if differing:
        layer = differing[0]
        raise EngineError(
            f"engine of {variant.name!r}: layer {layer} runs k = {found.get(layer)} and not the allocation's "
            f"{asked[layer]}: vLLM did not load the plugin {PLUGIN!r}; install lexi-moe beside this vLLM, and if "
            f"VLLM_PLUGINS is set, name {PLUGIN!r} in it"
        )


@contextmanager
def start_engines(engines: Sequence[tuple[str, Mapping[str, Any], Mapping[str, str]]]) -> Iterator[list[Engine]]:
    """Start engines (name, options of `vllm.LLM`, environment) side by side; all are up inside the block.

    However the block is left, SIGTERM included, the engines are gone after it.
    """
    with ExitStack() as stack:
        stack.enter_context(_end_on_sigterm())
        started: list[Engine] = []
        stack.push(lambda *raised: _stop(started, at_once=raised[0] is not None))
        for engine in engines:
            started.append(Engine(*engine))
        for engine in started:
            engine.wait()
        yield started


def _stop(engines: Sequence[Engine], *, at_once: bool) -> None:
    for engine in engines:  # all before the first is waited for, so that they end side by side
        engine.hang_up()
        if at_once:
            engine.interrupt()
    for engine in engines:
        engine.stop()


@contextmanager
def _end_on_sigterm() -> Iterator[None]:
    """Inside, SIGTERM is an exception, as Ctrl-C is; by default it would leave the engines behind."""
    if threading.current_thread() is not threading.main_thread():  # which alone can handle signals
        yield
        return
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # None: set by other than Python, and out of reach


def _leave(number: int, _: Any) -> NoReturn:
    raise SystemExit(128 + number)


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
    for number in ENDING:
        signal.signal(number, _leave_once)
    threading.Thread(target=_outlive_nobody, daemon=True).start()
    try:
        from vllm import LLM

        llm = LLM(**options)
    except Exception as error:
        with suppress(OSError):  # nobody is there to read it
            connection.send(("failed", _shorten(error)))
        return
    try:
        with suppress(EOFError, OSError):
            _answer(connection, llm)
    finally:
        try:
            _ignore_ending()
        finally:  # a signal may still come in between
            llm.llm_engine.engine_core.shutdown()  # else this process would wait for its child, and that for this one


def _leave_once(number: int, frame: Any) -> NoReturn:
    _ignore_ending()  # a second signal would stop what the first began to clean up
    _leave(number, frame)


def _ignore_ending() -> None:
    for number in ENDING:
        signal.signal(number, lambda *_: None)  # Python complains of one on its way where SIG_IGN is set


def _answer(connection: Any, llm: Any) -> NoReturn:
    """Run what is asked for; EOFError or OSError once nobody is there to ask."""
    connection.send(("done", None))
    while True:
        function, args = connection.recv()
        try:
            connection.send(("done", function(llm, *args)))
        except Exception as error:
            connection.send(("failed", _shorten(error)))


def _outlive_nobody() -> None:
    """End this process as soon as the one that started it is gone, whatever it is doing."""
    multiprocessing.parent_process().join()
    signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)


def _shorten(error: Exception) -> str:
    if isinstance(error, ImportError) and (explained := explain_import(error)):
        return explained
    kind = "" if isinstance(error, AllocationError) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())[:400]


def make_options(
    variant: Variant, workloads: Sequence[Workload], *, load_format: str, parallel: Mapping[str, Any], **others: Any
) -> dict[str, Any]:
    """Arguments of `vllm.LLM` for measuring `workloads`; `others` are the user's own and win, but for the variant's.

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
        options["hf_overrides"] = {**others.get("hf_overrides", {}), **variant.overrides}
    if variant.allocation is not None:
        options["additional_config"] = {
            **others.get("additional_config", {}),
            KEY: to_document(variant.allocation),
        }
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
    """`vllm_live.switch` in every worker; AllocationError unless `top_k` has the model's layers and no others."""
    found = _merge(_ask_workers(llm, vllm_live.switch, top_k, dict(kept or {})))
    others = sorted(set(top_k or ()) - set(found))
    if others:
        raise AllocationError(f"layers {others} are no MoE layers of this model, which has {sorted(found)}")
    return found


def draw_weights(llm: Any, seed: int = 0) -> None:
    """`vllm_live.draw_weights` in every worker."""
    _ask_workers(llm, vllm_live.draw_weights, seed)


def describe_engine(llm: Any) -> dict[str, Any]:
    """`vllm_live.describe` of the first worker, with the k of all, and vLLM's version."""
    import vllm

    workers = _ask_workers(llm, vllm_live.describe)
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
        _ask_workers(llm, kernels.start_recording)
        time_run(llm, workload, seed)
        workers = _ask_workers(llm, kernels.stop_recording)
    return kernels.combine(workers)


def watch_experts(llm: Any, dropped: Mapping[int, list[int]]) -> None:
    """`vllm_live.watch` in every worker."""
    _ask_workers(llm, vllm_live.watch, dict(dropped))


def read_expert_counts(llm: Any) -> dict[int, list[list[int]]]:
    """`vllm_live.read_counts`, of the first worker that has the layer: tensor-parallel workers route alike."""
    return _merge(_ask_workers(llm, vllm_live.read_counts))


def _ask_workers(llm: Any, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(worker, *args)` of every worker; AllocationError with the reason of the first that refuses."""
    outcomes = llm.collective_rpc(vllm_live.attempt, args=(function, args))
    refusal = next((reason for reason, _ in outcomes if reason is not None), None)
    if refusal is not None:
        raise AllocationError(refusal)
    return [value for _, value in outcomes]


def _merge(layers: Sequence[Mapping[int, Any]]) -> dict[int, Any]:
    return dict(sorted((layer, value) for worker in reversed(layers) for layer, value in worker.items()))
