"""A task of the user's own: `--task package.module:function`, such as a vision benchmark for DeepSeek-VL2.

The function is called once for every model, with one argument, and returns its metrics:

    def measure(generate):
        answers = generate(prompts, max_new_tokens=32)
        return {"accuracy": [float(answer.strip() == right) for answer, right in zip(answers, expected)]}

`generate(prompts, max_new_tokens)` continues every prompt greedily and returns texts. A prompt is a text, a list of
token ids, or, with `--backend vllm`, whatever `vllm.LLM.generate` takes: `{"prompt": "<image>\\nWhat is this?",
"multi_modal_data": {"image": picture}}` asks a vision model, which is all that VLMEvalKit's data sets need of one.
A metric is a list with one number an item, which is compared with the base's item by item, or a single number.
"""

import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any

from lexi_adapter.allocation import AllocationError
from lexi_adapter.scores import Model, Outcome, Score, Task, average


def make_task(name: str, *, max_length: int) -> Task:
    """The task of a function, by its place. AllocationError if there is no such function on PYTHONPATH."""
    function = find_function(name)
    settings = {"kind": "hook", "function": name, "max_length": max_length}
    return Task(name, settings, max_length, lambda model: measure(model, function, name))


def find_function(name: str) -> Callable[[Callable[..., list[str]]], Mapping[str, Any]]:
    """The function at `package.module:function`."""
    place, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(place), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise AllocationError(f"no task {name} ({error}); a module on PYTHONPATH and a function in it") from error
    if not callable(function):
        raise AllocationError(f"task {name} is not a function")
    return function


def measure(model: Model, function: Callable[..., Any], name: str) -> Outcome:
    """What the function returns, as scores."""
    found = function(lambda prompts, max_new_tokens: model.generate(list(prompts), max_new_tokens))
    if not isinstance(found, Mapping) or not found:
        raise AllocationError(f"task {name} returned {type(found).__name__}, not metrics with their numbers")
    return Outcome({str(metric): _read(value, f"task {name}, metric {metric}") for metric, value in found.items()})


def _read(value: Any, place: str) -> Score:
    try:
        values = [float(item) for item in value] if isinstance(value, list | tuple) else None
        score = average(values) if values is not None else Score(float(value))
    except (TypeError, ValueError) as error:
        raise AllocationError(f"{place}: neither a number nor a list of numbers ({error})") from error
    if not all(map(math.isfinite, score.values or (score.value,))):
        raise AllocationError(f"{place}: not finite")
    return score
