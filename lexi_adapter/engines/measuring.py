"""Functions that are called in an engine to measure it; each takes the `vllm.LLM` first.

All are safe to name from anywhere: vLLM is imported in the engine's process only.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from lexi_adapter.engines import kernels
from lexi_adapter.engines import worker as vllm_live
from lexi_adapter.engines.locks import measure_alone, start_beside
from lexi_adapter.engines.process import Engine, EngineError, start_engines
from lexi_adapter.engines.workload import Workload, draw_prompts
from lexi_adapter.errors import AllocationError
from lexi_adapter.model.shapes import RANDOM


def _draw(llm: Any, workload: Workload, seed: int) -> list[list[int]]:
    return draw_prompts(workload, vocab_size=llm.llm_engine.model_config.get_vocab_size(), seed=seed)


def _sample(workload: Workload, **others: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(max_tokens=workload.output_length, ignore_eos=True, detokenize=False, **others)


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


def _ask_workers(llm: Any, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(worker, *args)` of every worker; AllocationError with the reason of the first that refuses."""
    outcomes = llm.collective_rpc(vllm_live.attempt, args=(function, args))
    refusal = next((reason for reason, _ in outcomes if reason is not None), None)
    if refusal is not None:
        raise AllocationError(refusal)
    return [value for _, value in outcomes]


def draw_weights(llm: Any, seed: int = 0) -> None:
    """`vllm_live.draw_weights` in every worker."""
    _ask_workers(llm, vllm_live.draw_weights, seed)


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


def switch_layers(
    llm: Any, top_k: Mapping[int, int] | None, kept: Mapping[str, tuple[int, int]] | None = None
) -> dict[int, int]:
    """`vllm_live.switch` in every worker; AllocationError unless `top_k` has the model's layers and no others."""
    found = _merge(_ask_workers(llm, vllm_live.switch, top_k, dict(kept or {})))
    others = sorted(set(top_k or ()) - set(found))
    if others:
        raise AllocationError(f"layers {others} are no MoE layers of this model, which has {sorted(found)}")
    return found


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


def _merge(layers: Sequence[Mapping[int, Any]]) -> dict[int, Any]:
    return dict(sorted((layer, value) for worker in reversed(layers) for layer, value in worker.items()))
