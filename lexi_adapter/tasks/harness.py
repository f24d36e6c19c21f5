"""Tasks of lm-eval (EleutherAI's language model evaluation harness), through its own model classes.

lm-eval is imported only if one of its tasks is asked for. `run` is called in the process that holds the model.
"""

import functools
import hashlib
import math
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lexi_adapter.errors import AdapterError
from lexi_adapter.tasks.scores import Outcome, Score, Task, find_interval

PREFIX = "lm-eval:"
# Names after `lm-eval:` that stand for several tasks. LExI (section 3 and figure 4) averages accuracy over
# "nine" tasks of lm-eval and names these eight, in the text and in the figure alike; shots are lm-eval's defaults.
SUITES: Mapping[str, tuple[str, ...]] = {
    "paper": ("arc_challenge", "arc_easy", "boolq", "hellaswag", "mmlu", "openbookqa", "rte", "winogrande")
}
SOURCES = (".yaml", ".yml", ".py")  # suffixes of task files
SAME = 1e-9  # tolerance between means of the same values that are summed in another order


def make_tasks(
    names: Sequence[str],
    *,
    backend: str,
    include_paths: Sequence[str],
    max_length: int,
    max_items: int | None,
    num_fewshot: int | None,
    batch_size: int,
) -> list[Task]:
    """The tasks called `names`, without `PREFIX`, in their order.

    All are loaded once, so that a task without data fails here and not hours later.

    Args:
        include_paths: folders with task files that the user wrote.
        max_length: tokens of the longest prompt with its answer.
        max_items: at most so many documents of every task, from the beginning.

    Raises:
        AdapterError: lm-eval is not installed, does not know a task, or cannot load its data.
    """
    suites = {task: name for name in names for task in SUITES.get(name, ())}
    wanted = {task: suites.get(task) for name in names for task in SUITES.get(name, (name,))}
    version = _load(list(wanted), include_paths, backend)
    settings = {
        "include_paths": [os.path.realpath(path) for path in include_paths],
        "include_sha256": hash_sources(include_paths),
        "limit": max_items,
        "num_fewshot": num_fewshot,
    }
    arguments = (list(include_paths), max_items, num_fewshot, max_length, batch_size)

    def make(task: str, suite: str | None) -> Task:
        return Task(
            PREFIX + task,
            {"kind": "lm-eval", "task": task, "lm_eval": version, "max_length": max_length, **settings},
            max_length,
            lambda model: model.run_harness(task, *arguments),
            group=PREFIX + suite if suite else None,
        )

    return [make(task, suite) for task, suite in wanted.items()]


def _load(names: Sequence[str], include_paths: Sequence[str], backend: str) -> str:
    """The version of lm-eval, once all tasks could be loaded."""
    for path in include_paths:
        if not os.path.isdir(path):
            raise AdapterError(f"--include-path {path} is not a folder; name one with task files")
    try:
        import lm_eval

        if backend == "transformers":
            import lm_eval.models.huggingface  # noqa: F401  (needs more packages than lm-eval itself)
    except ImportError as error:
        raise AdapterError(f"lm-eval cannot be imported ({error}); pip install '.[eval]'") from error
    manager = _index_tasks(tuple(include_paths))
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise AdapterError(f"lm-eval {lm_eval.__version__} has no task {unknown[0]!r}; `lm_eval ls tasks` lists them")
    for name in names:
        with _in_one_line(name):
            manager.load([name])
    return lm_eval.__version__


def hash_sources(folders: Sequence[str]) -> str:
    """Hex SHA-256 over names and bytes of the task files, and of the code beside them, in folders and subfolders."""
    digest = hashlib.sha256()
    for folder in map(Path, folders):
        for path in sorted(path for path in folder.rglob("*") if path.suffix in SOURCES and path.is_file()):
            digest.update(repr((str(path.relative_to(folder)), path.read_bytes())).encode())
    return digest.hexdigest()


@functools.cache
def _index_tasks(include_paths: tuple[str, ...]) -> Any:
    """lm-eval's index of all task files; making it takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(include_paths))


@contextmanager
def _in_one_line(task: str) -> Iterator[None]:
    """Turn whatever lm-eval and the data sets' library raise for a task into an AdapterError of one line."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise AdapterError(f"{PREFIX}{task}: {type(error).__name__}: {reason}") from error


def run(lm: Any, task: str, include_paths: Sequence[str], max_items: int | None, num_fewshot: int | None) -> Outcome:
    """The metrics of one task on an lm-eval model, with lm-eval's standard errors and the values of the documents.

    A group of tasks has its own metrics, or those of its members if it has none.
    """
    from lm_eval import simple_evaluate

    with _in_one_line(task):
        results = simple_evaluate(
            model=lm,
            tasks=[task],
            task_manager=_index_tasks(tuple(include_paths)),
            limit=max_items,
            num_fewshot=num_fewshot,
            log_samples=True,
        )
        return Outcome(dict(read_scores(results, task)), {"n-shot": results["n-shot"], "versions": results["versions"]})


def read_scores(results: Mapping[str, Any], task: str) -> Iterator[tuple[str, Score]]:
    """Metric and score, for every metric of a task in the results of `simple_evaluate`."""
    has_metrics = any(_list_metrics(results, task))
    members = [name for name in results["results"] if name != task]
    for name in (task,) if has_metrics else members:
        for metric, label in _list_metrics(results, name):
            value, stderr = (
                results["results"][name].get(key) for key in (f"{metric},{label}", f"{metric}_stderr,{label}")
            )
            values = tuple(_list_values(results, name, metric, label))
            is_mean = values and math.isclose(statistics.fmean(values), value, rel_tol=SAME, abs_tol=SAME)
            has_stderr = isinstance(stderr, int | float) and math.isfinite(stderr)
            full_name = metric if has_metrics else f"{name} {metric}"
            full_name = full_name if label == "none" else f"{full_name},{label}"
            items = values if is_mean else ()
            yield full_name, Score(float(value), float(stderr) if has_stderr else None, items, find_interval(items))


def _list_metrics(results: Mapping[str, Any], name: str) -> Iterator[tuple[str, str]]:
    """(metric, label of its filter) for every metric of one task or group."""
    for key, value in results["results"].get(name, {}).items():
        metric, _, label = key.partition(",")
        if label and not metric.endswith("_stderr") and isinstance(value, int | float):
            yield metric, label


def _list_values(results: Mapping[str, Any], name: str, metric: str, label: str) -> Iterator[float]:
    """The metric's value of every document of a task, or of a group's tasks one after the other."""
    for child in results.get("group_subtasks", {}).get(name, ()):
        yield from _list_values(results, child, metric, label)
    documents = [sample for sample in results["samples"].get(name, ()) if sample["filter"] == label]
    for sample in sorted(documents, key=lambda sample: sample["doc_id"]):
        if isinstance(sample.get(metric), int | float):
            yield float(sample[metric])
