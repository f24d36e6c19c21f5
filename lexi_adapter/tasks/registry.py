"""The tasks that a call asks for, by name, with all that they need read and checked before any model is loaded."""

from collections.abc import Sequence
from pathlib import Path

from lexi_adapter.errors import AllocationError
from lexi_adapter.model.folder import find_limit, find_vocabulary, read_config
from lexi_adapter.tasks import harness, hooks, passkey, perplexity, qasper
from lexi_adapter.tasks.scores import Task
from lexi_adapter.tasks.texts import check_length, load_tokenizer

DEFAULT_LENGTH, DEFAULT_PASSKEY_LENGTH = 4096, 1024
OUR_TASKS = ("perplexity", "passkey", "qasper")


def make_tasks(
    model: str,
    *,
    names: Sequence[str],
    backend: str,
    tokenizer: str,
    trust_remote_code: bool,
    batch_size: int,
    texts: Sequence[str],
    window: int | None,
    max_windows: int | None,
    lengths: Sequence[int],
    depths: int,
    trials: int,
    seed: int,
    questions: str | None,
    include_paths: Sequence[str],
    num_fewshot: int | None,
    max_items: int | None,
    max_length: int | None,
) -> list[Task]:
    """Tasks in the order in which they were asked for, those of lm-eval last; the arguments are options of `eval`.

    Raises:
        AllocationError: a name that is none, or a task without its data.
    """
    names = list(dict.fromkeys(names))
    for name in names:
        if name not in OUR_TASKS and ":" not in name:
            raise AllocationError(f"no task {name!r}; {', '.join(OUR_TASKS)}, lm-eval:TASK or module:function")
    for option, given, name in (("--text", texts, "perplexity"), ("--qasper", questions, "qasper")):
        if name in names and not given:
            raise AllocationError(f"--task {name} needs {option} FILE")
    config = read_config(Path(model))
    limit, vocabulary = find_limit(config), find_vocabulary(config)
    longest = max_length or min(DEFAULT_LENGTH, limit or DEFAULT_LENGTH)
    check_length("--max-length", longest, limit)
    ours = any(name in OUR_TASKS for name in names)
    reader = load_tokenizer(tokenizer, trust_remote_code=trust_remote_code) if ours else None
    tasks = []
    for name in names:
        if name == "perplexity":
            for text in dict.fromkeys(texts):
                task = perplexity.make_task(
                    text, reader, window=window, limit=limit, max_windows=max_windows, vocabulary=vocabulary
                )
                tasks.append(task)
        elif name == "passkey":
            for length in dict.fromkeys(lengths or (min(DEFAULT_PASSKEY_LENGTH, limit or DEFAULT_PASSKEY_LENGTH),)):
                shape = {"length": length, "depths": depths, "trials": trials, "seed": seed}
                task = passkey.make_task(reader, **shape, limit=limit, vocabulary=vocabulary)
                tasks.append(task)
        elif name == "qasper":
            task = qasper.make_task(questions, reader, max_length=longest, max_items=max_items, vocabulary=vocabulary)
            tasks.append(task)
        elif not name.startswith(harness.PREFIX):
            tasks.append(hooks.make_task(name, max_length=longest))
    suites = [name.removeprefix(harness.PREFIX) for name in names if name.startswith(harness.PREFIX)]
    if suites:
        tasks += harness.make_tasks(
            suites,
            backend=backend,
            include_paths=include_paths,
            max_length=longest,
            max_items=max_items,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
        )
    return tasks
