"""Functions that are called in an engine to measure it; each takes the `vllm.LLM` first.

vLLM is imported in the engine's process only.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from lexi_adapter.engines import kernels, worker
from lexi_adapter.engines.locks import measure_alone, start_beside
from lexi_adapter.engines.process import Engine, EngineError, start_engines
from lexi_adapter.engines.workload import Workload, draw_prompts
from lexi_adapter.errors import AdapterError, AllocationError
from lexi_adapter.model.shapes import RANDOM


def _draw(llm: Any, workload: Workload, seed: int) -> list[list[int]]:
    return draw_prompts(workload, vocab_size=llm.llm_engine.model_config.get_vocab_size(), seed=seed)


def _sample(workload: Workload, **others: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(max_tokens=workload.output_length, ignore_eos=True, detokenize=False, **others)


def time_run(llm: Any, workload: Workload, seed: int) -> float:
    """Seconds from when the engine has all of the workload's random prompts to the last token of the last answer.

    The scheduler waits for the prompts: if it began with the first, the number of steps would depend on how fast the
    others arrive. Tokens are sampled at temperature 1: greedy answers of random weights would all be the same token,
    and equal tokens go to equal experts.
    """
    prompts = [{"prompt_token_ids": ids} for ids in _draw(llm, workload, seed)]
    llm.sleep(level=0)  # the scheduler alone
    llm.enqueue(prompts, _sample(workload, temperature=1.0), use_tqdm=False)
    start = time.perf_counter()
    llm.wake_up(tags=["scheduling"])
    outputs = llm.wait_for_completion(use_tqdm=False)
    seconds = time.perf_counter() - start
    lengths = {len(output.outputs[0].token_ids) for output in outputs}
    if lengths != {workload.output_length} or len(outputs) != workload.batch:
        raise EngineError(f"{len(outputs)} answers of {sorted(lengths)} tokens to workload {workload}")
    return seconds


def answer_greedily(llm: Any, workload: Workload) -> list[list[int]]:
    """The tokens of every answer to the workload's prompts; engines with the same model answer the same.

    One prompt at a time, so that each step holds the same tokens in every engine, and rounds alike.
    """
    sampling = _sample(workload, temperature=0.0)
    outputs = [llm.generate({"prompt_token_ids": ids}, sampling, use_tqdm=False) for ids in _draw(llm, workload, 0)]
    return [list(output.outputs[0].token_ids) for (output,) in outputs]


def read_prompts(llm: Any, prompts: list[list[int]]) -> None:
    """Run prompts of token ids through the model, one new token each."""
    llm.generate(
        [{"prompt_token_ids": ids} for ids in prompts], _sample(Workload(1, 1, 1), temperature=0.0), use_tqdm=False
    )


def _ask_workers(llm: Any, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(worker, *args)` of every worker; AdapterError with the reason of the first that refuses."""
    outcomes = llm.collective_rpc(worker.attempt, args=(function, args))
    refusal = next((reason for reason, _ in outcomes if reason is not None), None)
    if refusal is not None:
        raise AdapterError(refusal)
    return [value for _, value in outcomes]


def draw_weights(llm: Any, seed: int = 0) -> None:
    """`worker.draw_weights` in every worker."""
    _ask_workers(llm, worker.draw_weights, seed)


@contextmanager
def measure_engines(
    engines: Sequence[tuple[str, Mapping[str, Any], Mapping[str, str]]], *, load_format: str, locks: Sequence[str] = ()
) -> Iterator[list[Engine]]:
    """`start_engines`, ready to be measured: weights drawn where none are loaded, no other run on the cards of `locks`.

    Other runs that share these cards (see `locks`) may start while these engines do.
    """
    with ExitStack() as stack:
        with start_beside(locks):
            started = stack.enter_context(start_engines(engines))
            if load_format == RANDOM:
                for engine in started:
                    engine.call(draw_weights)
        stack.enter_context(measure_alone(locks))
        yield started


def switch_layers(
    llm: Any,
    top_k: Mapping[int, int] | None,
    kept: Mapping[str, tuple[int, int]] | None = None,
    compensated: bool | None = None,
) -> dict[int, int]:
    """`worker.switch` in every worker; AdapterError unless `top_k` has the model's layers and no others."""
    switched = _merge(_ask_workers(llm, worker.switch, top_k, dict(kept or {}), compensated))
    others = sorted(set(top_k or ()) - set(switched))
    if others:
        raise AllocationError(f"layers {others} are no MoE layers of this model, which has {sorted(switched)}")
    return switched


def describe_engine(llm: Any) -> dict[str, Any]:
    """`worker.describe` of the first worker, with the k of all, and vLLM's version."""
    import vllm

    workers = _ask_workers(llm, worker.describe)
    return workers[0] | {
        "top_k": _merge([w["top_k"] for w in workers]),
        "workers": len(workers),
        "vllm": vllm.__version__,
    }


def record_kernels(llm: Any, workload: Workload, seed: int) -> dict[str, Any]:
    """`kernels.combine` of every worker's record of one run of the workload.

    The run is recorded twice and the second record counts: in the first, the profiler's preparations delay workers
    unequally, and their peers wait for them.
    """
    for _ in range(2):
        _ask_workers(llm, kernels.start_recording)
        time_run(llm, workload, seed)
        workers = _ask_workers(llm, kernels.stop_recording)
    return kernels.combine(workers)


def watch_experts(llm: Any, dropped: Mapping[int, list[int]]) -> None:
    """`worker.watch` in every worker."""
    _ask_workers(llm, worker.watch, dict(dropped))


def read_expert_counts(llm: Any) -> dict[int, list[list[int]]]:
    """`worker.read_counts`, of the first worker that has the layer: tensor-parallel workers route alike."""
    return _merge(_ask_workers(llm, worker.read_counts))


def _merge(workers: Sequence[Mapping[int, Any]]) -> dict[int, Any]:
    """Layer -> value, of the first worker that has the layer."""
    return dict(sorted((layer, value) for layers in reversed(workers) for layer, value in layers.items()))
