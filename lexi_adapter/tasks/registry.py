"""The tasks that a command asks for, by name; their options and data are checked before any model is loaded."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lexi_adapter.errors import AdapterError
from lexi_adapter.model.folder import find_limit, find_vocabulary, read_config
from lexi_adapter.tasks import harness, hooks, passkey, perplexity, qasper
from lexi_adapter.tasks.scores import Task
from lexi_adapter.tasks.texts import check_length, load_tokenizer

DEFAULT_LENGTH, DEFAULT_PASSKEY_LENGTH = 4096, 1024
BUILT_IN = ("perplexity", "passkey", "qasper")


class TaskOptions(NamedTuple):
    """The options of `lexi-adapter eval` that say what is measured; None for a default that depends on the model."""

    names: Sequence[str]
    texts: Sequence[str]
    window: int | None
    max_windows: int | None
    lengths: Sequence[int]
    depths: int
    trials: int
    seed: int
    questions: str | None
    include_paths: Sequence[str]
    num_fewshot: int | None
    max_items: int | None
    max_length: int | None


class _Limits(NamedTuple):
    """Positions and vocabulary of the model, None where unknown, and tokens of the longest prompt with its answer."""

    positions: int | None
    vocabulary: int | None
    longest: int


def make_tasks(
    model: str, options: TaskOptions, *, backend: str, tokenizer: str, trust_remote_code: bool, batch_size: int
) -> list[Task]:
    """Tasks in the order of their names, without repetitions, those of lm-eval last.

    Raises:
        AdapterError: a name that is no task's, or a task without its data.
    """
    names = list(dict.fromkeys(options.names))
    _check_names(names, options)
    limits = _find_limits(model, options.max_length)
    built_in = any(name in BUILT_IN for name in names)
    reader = load_tokenizer(tokenizer, trust_remote_code=trust_remote_code) if built_in else None
    tasks = []
    for name in names:
        if name in BUILT_IN:
            tasks += _make_built_in(name, reader, options, limits)
        elif not name.startswith(harness.PREFIX):
            tasks.append(hooks.make_task(name, max_length=limits.longest))
    suites = [name.removeprefix(harness.PREFIX) for name in names if name.startswith(harness.PREFIX)]
    if suites:
        tasks += harness.make_tasks(
            suites,
            backend=backend,
            include_paths=options.include_paths,
            max_length=limits.longest,
            max_items=options.max_items,
            num_fewshot=options.num_fewshot,
            batch_size=batch_size,
        )
    return tasks


def _check_names(names: Sequence[str], options: TaskOptions) -> None:
    for name in names:
        if name not in BUILT_IN and ":" not in name:
            raise AdapterError(f"no task {name!r}; {', '.join(BUILT_IN)}, lm-eval:TASK or module:function")
    for option, given, name in (("--text", options.texts, "perplexity"), ("--qasper", options.questions, "qasper")):
        if name in names and not given:
            raise AdapterError(f"--task {name} needs {option} FILE")


def _find_limits(model: str, max_length: int | None) -> _Limits:
    config = read_config(Path(model))
    positions, vocabulary = find_limit(config), find_vocabulary(config)
    longest = max_length or min(DEFAULT_LENGTH, positions or DEFAULT_LENGTH)
    check_length("--max-length", longest, positions)
    return _Limits(positions, vocabulary, longest)


def _make_built_in(name: str, tokenizer: Any, options: TaskOptions, limits: _Limits) -> Iterator[Task]:
    """The tasks of one name: perplexity has one for every text, passkey one for every length."""
    shared = {"limit": limits.positions, "vocabulary": limits.vocabulary}
    match name:
        case "perplexity":
            for text in dict.fromkeys(options.texts):
                yield perplexity.make_task(
                    text, tokenizer, window=options.window, max_windows=options.max_windows, **shared
                )
        case "passkey":
            default = min(DEFAULT_PASSKEY_LENGTH, limits.positions or DEFAULT_PASSKEY_LENGTH)
            shape = {"depths": options.depths, "trials": options.trials, "seed": options.seed}
            for length in dict.fromkeys(options.lengths or (default,)):
                yield passkey.make_task(tokenizer, length=length, **shape, **shared)
        case "qasper":
            yield qasper.make_task(
                str(options.questions),
                tokenizer,
                max_length=limits.longest,
                max_items=options.max_items,
                vocabulary=limits.vocabulary,
            )
