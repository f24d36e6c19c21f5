"""A variant in vLLM: an engine in its own process, and the functions that are called there."""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from types import ModuleType
from typing import Any
from unittest.mock import patch

from lexi_adapter.engines.measuring import describe_engine
from lexi_adapter.engines.options import check_plugin, check_top_k, make_options
from lexi_adapter.engines.process import Engine, start_engines
from lexi_adapter.engines.workload import Workload
from lexi_adapter.environment import find_vllm_version
from lexi_adapter.model.variants import Variant
from lexi_adapter.tasks.scores import Outcome
from lexi_adapter.tasks.texts import check_prompt

# vLLM needs a length of one token more than the longest prompt, which may be more than the model has positions. No
# token is read beyond the positions: tasks are checked against them.
ENVIRONMENT = {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}


class VllmModel:
    """A running engine; see `scores.Model` for the methods."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def score(self, windows: Sequence[Sequence[int]]) -> list[list[float]]:
        return self.engine.call(score_windows, [list(window) for window in windows])

    def generate(self, prompts: Sequence[Any], max_new_tokens: int, max_length: int | None = None) -> list[str]:
        return self.engine.call(generate_answers, list(prompts), max_new_tokens, max_length)

    def run_harness(self, *arguments: Any) -> Outcome:
        return self.engine.call(run_harness, *arguments)


@contextmanager
def open_model(
    variant: Variant,
    tokenizer: str,
    *,
    dtype: str,
    batch_size: int,
    longest: int,
    trust_remote_code: bool,
    engine: Mapping[str, Any],
) -> Iterator[VllmModel]:
    """The variant's engine, running inside the block.

    Args:
        tokenizer: the folder of the tokenizer.
        longest: tokens of the longest prompt with its answer.
        engine: arguments of `make_options`.

    Raises:
        AdapterError: vLLM is told not to load the plugin that the variant needs.
        EngineError: the engine did not start, as with an allocation that does not fit, or runs with another k.
    """
    check_plugin([variant])
    defaults = {
        "dtype": dtype,
        "tokenizer": tokenizer,
        "skip_tokenizer_init": False,
        "trust_remote_code": trust_remote_code,
    }
    options = make_options(variant, [Workload(batch_size, longest, 1)], **{**defaults, **engine})
    with start_engines([(variant.name, options, ENVIRONMENT | dict(variant.environment))]) as (running,):
        check_top_k(variant, running.call(describe_engine)["top_k"])
        yield VllmModel(running)


def score_windows(llm: Any, windows: list[list[int]]) -> list[list[float]]:
    """`scores.Model.score`, in the engine's process."""
    from vllm import SamplingParams

    # With 0 vLLM returns the log-probability of every prompt token, and of no other token.
    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": window} for window in windows], sampling, use_tqdm=False)
    return [
        [logprobs[token].logprob for logprobs, token in zip(output.prompt_logprobs[1:], window[1:], strict=True)]
        for output, window in zip(outputs, windows, strict=True)
    ]


def generate_answers(llm: Any, prompts: list[Any], max_new_tokens: int, max_length: int | None = None) -> list[str]:
    """`scores.Model.generate`, in the engine's process."""
    from vllm import SamplingParams

    inputs = [{"prompt_token_ids": prompt} if isinstance(prompt, list) else prompt for prompt in prompts]
    outputs = llm.generate(inputs, SamplingParams(max_tokens=max_new_tokens, temperature=0.0), use_tqdm=False)
    for number, output in enumerate(outputs, 1):  # only vLLM knows how many tokens an image takes
        check_prompt(number, len(output.prompt_token_ids), max_new_tokens, max_length)
    return [output.outputs[0].text for output in outputs]


def run_harness(
    llm: Any,
    task: str,
    include_paths: Sequence[str],
    max_items: int | None,
    num_fewshot: int | None,
    max_length: int,
    batch_size: int,
) -> Outcome:
    """`harness.run` with lm-eval's class for vLLM, in the engine's process."""
    from lexi_adapter.tasks import harness

    vllm_causallms = _import_harness_model()
    config = llm.llm_engine.model_config
    # The class would start another engine; here it gets the running one.
    with patch.object(vllm_causallms, "LLM", lambda **options: llm):
        lm = vllm_causallms.VLLM(
            pretrained=config.model,
            tokenizer=config.tokenizer,
            trust_remote_code=config.trust_remote_code,
            max_model_len=max_length,
            batch_size=batch_size,
        )
    return harness.run(lm, task, include_paths, max_items, num_fewshot)


def _import_harness_model() -> ModuleType:
    """lm-eval's module for vLLM, which looks up the version of "vllm"; the wheel for CPUs has another name."""
    version = metadata.version
    with patch.object(metadata, "version", lambda name: find_vllm_version() if name == "vllm" else version(name)):
        return importlib.import_module("lm_eval.models.vllm_causallms")
