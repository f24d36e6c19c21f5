"""Tasks of lm-eval (EleutherAI's language model evaluation harness), through its own model classes.

lm-eval is imported only where one of its tasks is asked for. `run` is called where the model lives.
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

from lexi_adapter.errors import AllocationError
from lexi_adapter.tasks.scores import Outcome, Score, Task

PREFIX = "lm-eval:"
# What `lm-eval:NAME` stands for where it is more than one task. LExI (section 3 and figure 4) averages accuracy over
# "nine" tasks of lm-eval and names these eight, in the text and in the figure alike; shots are lm-eval's defaults.
SUITES: Mapping[str, tuple[str, ...]] = {
    "paper": ("arc_challenge", "arc_easy", "boolq", "hellaswag", "mmlu", "openbookqa", "rte", "winogrande")
}
SOURCES = (".yaml", ".yml", ".py")  # of tasks
SAME = 1e-9  # two means of the same values, added up in another order


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

    All are loaded once, so that one without data stops here and not hours later.

    Args:
        include_paths: folders with task files of the user's own.
        max_length: tokens of the longest prompt with its answer.
        max_items: of every task, only so many documents from the beginning.

    Raises:
        AllocationError: lm-eval is not installed, does not know a task, or cannot load its data.
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
    """Load the tasks and forget them; the version of lm-eval."""
    for path in include_paths:
        if not os.path.isdir(path):
            raise AllocationError(f"--include-path {path} is not a folder; name one with task files")
    try:
        import lm_eval

        if backend == "transformers":
            import lm_eval.models.huggingface  # noqa: F401  (asks for more packages than lm-eval itself)
    except ImportError as error:
        raise AllocationError(f"lm-eval cannot be imported ({error}); pip install '.[eval]'") from error
    manager = _index_tasks(tuple(include_paths))
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise AllocationError(
            f"lm-eval {lm_eval.__version__} has no task {unknown[0]!r}; `lm_eval ls tasks` lists them"
        )
    for name in names:
        with _in_one_line(name):
            manager.load([name])
    return lm_eval.__version__


def hash_sources(folders: Sequence[str]) -> str:
    """Hex SHA-256 over names and bytes of the task files, and of the code beside them, in folders and those below."""
    digest = hashlib.sha256()
    for folder in map(Path, folders):
        for path in sorted(path for path in folder.rglob("*") if path.suffix in SOURCES and path.is_file()):
            digest.update(repr((str(path.relative_to(folder)), path.read_bytes())).encode())
    return digest.hexdigest()


@functools.cache
def _index_tasks(include_paths: tuple[str, ...]) -> Any:
    """lm-eval's index of all task files that it finds, which takes seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(include_paths))


@contextmanager
def _in_one_line(task: str) -> Iterator[None]:
    """Turns whatever lm-eval and the data sets' library raise for a task into one line."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise AllocationError(f"{PREFIX}{task}: {type(error).__name__}: {reason}") from error


def run(lm: Any, task: str, include_paths: Sequence[str], max_items: int | None, num_fewshot: int | None) -> Outcome:
    """One task with an lm-eval model: its metrics, each with lm-eval's standard error and the values of its documents.

    A group of tasks gives its own metrics, or those of its members if it has none.
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
    """Metric -> score, from what `simple_evaluate` returns."""
    own = list(_list_metrics(results, task))
    members = [name for name in results["results"] if name != task]
    for name in (task,) if own else members:
        for metric, label in _list_metrics(results, name):
            value, stderr = (
                results["results"][name].get(key) for key in (f"{metric},{label}", f"{metric}_stderr,{label}")
            )
            values = tuple(_list_values(results, name, metric, label))
            same = values and math.isclose(statistics.fmean(values), value, rel_tol=SAME, abs_tol=SAME)
            stated = isinstance(stderr, int | float) and math.isfinite(stderr)
            place = metric if own else f"{name} {metric}"
            place = place if label == "none" else f"{place},{label}"
            yield place, Score(float(value), float(stderr) if stated else None, values if same else ())


def _list_metrics(results: Mapping[str, Any], name: str) -> Iterator[tuple[str, str]]:
    for key, value in results["results"].get(name, {}).items():
        metric, _, label = key.partition(",")
        if label and not metric.endswith("_stderr") and isinstance(value, int | float):
            yield metric, label


def _list_values(results: Mapping[str, Any], name: str, metric: str, label: str) -> Iterator[float]:
    """The metric of every document of a task, or of a group's tasks one after the other."""
    for child in results.get("group_subtasks", {}).get(name, ()):
        yield from _list_values(results, child, metric, label)
    documents = [sample for sample in results["samples"].get(name, ()) if sample["filter"] == label]
    for sample in sorted(documents, key=lambda sample: sample["doc_id"]):
        if isinstance(sample.get(metric), int | float):
            yield float(sample[metric])
