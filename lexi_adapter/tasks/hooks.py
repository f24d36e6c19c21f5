"""Tasks that users write: `--task package.module:function`, such as a vision benchmark for DeepSeek-VL2.

The function is called once for every model, with one argument, and returns its metrics:

    def measure(generate):
        answers = generate(prompts, max_new_tokens=32)
        return {"accuracy": [float(answer.strip() == right) for answer, right in zip(answers, expected)]}

`generate(prompts, max_new_tokens)` continues every prompt greedily and returns texts. A prompt is a text, a list of
token ids, or, with `--backend vllm`, whatever `vllm.LLM.generate` takes: `{"prompt": "<image>\\nWhat is this?",
"multi_modal_data": {"image": picture}}` asks a vision model, which is all that VLMEvalKit's data sets need of one.
Prompt and answer together may take `--max-length` tokens. A metric is a list with one number an item, which is compared
with the base's item by item, or a single number.

Results hold a hash of the module's source, and are refused once it changes. Changes in imported modules or data files
are not detected; `--restart` throws the results away.
"""

import hashlib
import importlib
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lexi_adapter.errors import AdapterError
from lexi_adapter.tasks.scores import LARGEST, Model, Outcome, Score, Task, average


def make_task(name: str, *, max_length: int) -> Task:
    """The task of the function `package.module:function`. AdapterError if there is none on PYTHONPATH."""
    function = find_function(name)
    settings = {
        "kind": "hook",
        "function": name,
        "source_sha256": hash_source(name, function),
        "max_length": max_length,
    }
    return Task(name, settings, max_length, lambda model: measure(model, function, name, max_length))


def find_function(name: str) -> Callable[[Callable[..., list[str]]], Mapping[str, Any]]:
    """The function called `package.module:function`. AdapterError for none, or a module that cannot be imported."""
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # a module may raise anything
        reason = f"{type(error).__name__}: {_shorten(error)}"
        raise AdapterError(f"no task {name} ({reason}); a module on PYTHONPATH and a function in it") from error
    if not callable(function):
        raise AdapterError(f"task {name} is not a function")
    return function


def find_sources(name: str, function: Callable[..., Any]) -> list[str]:
    """The files of the module in `name` and of the module that defines its function."""
    modules = dict.fromkeys([name.partition(":")[0], getattr(function, "__module__", None)])
    return list(filter(None, (getattr(sys.modules.get(module), "__file__", None) for module in modules)))


def hash_source(name: str, function: Callable[..., Any]) -> str:
    """Hex SHA-256 over the files of `find_sources`."""
    digest = hashlib.sha256()
    for file in find_sources(name, function):
        try:
            digest.update(Path(file).read_bytes())
        except OSError as error:
            raise AdapterError(
                f"task {name}: cannot read {file} ({error.strerror}); put the module into a plain file"
            ) from error
    return digest.hexdigest()


def measure(model: Model, function: Callable[..., Any], name: str, max_length: int) -> Outcome:
    """The metrics that the function returns, as scores.

    Raises:
        AdapterError: the function raises something, gives prompts that the model cannot take or, with their answers, of
            more than `max_length` tokens, or returns no metrics.
    """
    failures = []  # of the model itself: the caller, who opened it, explains them

    def generate(prompts: Any, max_new_tokens: int) -> list[str]:
        if isinstance(prompts, str | Mapping):
            raise AdapterError("generate takes a list of prompts; put the one into a list")
        if type(max_new_tokens) is not int or max_new_tokens < 1:
            raise AdapterError(f"max_new_tokens is {max_new_tokens!r}, an integer of at least 1 expected")
        prompts = list(prompts)
        try:
            return model.generate(prompts, max_new_tokens, max_length)
        except Exception as error:
            failures.append(error)
            raise

    try:
        metrics = function(generate)
    except AdapterError as error:
        raise AdapterError(f"task {name}: {error}") from error
    except (Exception, SystemExit) as error:
        if error in failures:
            raise
        raise AdapterError(
            f"task {name} raised {type(error).__name__}: {_shorten(error)} ({_find_line(error, function)})"
        ) from error
    if not isinstance(metrics, Mapping) or not metrics:
        raise AdapterError(f"task {name} returned {type(metrics).__name__}, not metrics with their numbers")
    return Outcome({str(metric): _read(value, f"task {name}, metric {metric}") for metric, value in metrics.items()})


def _shorten(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _find_line(error: BaseException, function: Callable[..., Any]) -> str:
    """File and line of the innermost call in the function's own file, or of the innermost call at all."""
    frames = traceback.extract_tb(error.__traceback__)
    file = getattr(getattr(function, "__code__", None), "co_filename", None)
    innermost = ([frame for frame in frames if frame.filename == file] or frames)[-1]
    return f"{innermost.filename}, line {innermost.lineno}"


def _read(value: Any, place: str) -> Score:
    try:
        values = [float(item) for item in value] if isinstance(value, list | tuple) else None
        score = average(values) if values is not None else Score(float(value))
    except (TypeError, ValueError, OverflowError) as error:
        raise AdapterError(f"{place}: neither a number nor a list of numbers ({error})") from error
    except AdapterError as error:
        raise AdapterError(f"{place}: {error}") from error
    if not abs(score.value) <= LARGEST:
        raise AdapterError(f"{place}: {score.value} is not finite, or too large")
    return score
