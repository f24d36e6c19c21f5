"""The quality of a model's variants: tasks on the base, and on the same model with fewer active experts or pruned.

Every variant is loaded afresh, one after the other, and runs all tasks; each adds one piece to the document. The
document holds everything that its pieces depend on, so that an interrupted run resumes from its own pieces only.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from lexi_adapter.errors import AdapterError
from lexi_adapter.files import is_result
from lexi_adapter.model.variants import Variant
from lexi_adapter.tasks.scores import LARGEST, Model, Outcome, Score, Task, combine, compare, find_interval

FORMAT, VERSION = "lexi-eval", 1
WORDS = {"files_sha256": "state of its files", "source_sha256": "source"}  # keys of a document, for messages
# Suffixes of weights, configs, tokenizers, and code that --trust-remote-code runs.
MODEL_SUFFIXES = (".safetensors", ".bin", ".json", ".model", ".txt", ".jinja", ".py")

# (variant, task) -> outcome.
Pieces = Mapping[tuple[str, str], Outcome]
# A score and its difference from the base's, if there is one.
_Line = tuple[Score, Score | None]


def hash_state(folder: str) -> str:
    """Hex SHA-256 over name, size and modification time of the files that make up a model or its tokenizer."""
    candidates = (path for path in Path(folder).iterdir() if path.suffix in MODEL_SUFFIXES and path.is_file())
    files = sorted(path for path in candidates if not is_result(path))
    state = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(state).encode()).hexdigest()


def describe(variant: Variant) -> dict[str, Any]:
    """The JSON object that identifies a variant: its folder, the state of its files, and the k of its layers."""
    facts: dict[str, Any] = {
        "name": variant.name,
        "folder": str(Path(variant.folder).resolve()),
        "files_sha256": hash_state(variant.folder),
    }
    if variant.allocation is not None:
        facts["top_k"] = {str(layer): k for layer, k in sorted(variant.allocation.top_k.items())}
        facts["gate_exponent"] = variant.allocation.gate_exponent
        if variant.allocation.compensation is not None:
            facts["compensation"] = variant.allocation.compensation.sha256
    return facts


def evaluate(
    variants: Sequence[Variant],
    tasks: Sequence[Task],
    *,
    setting: Mapping[str, Any],
    finished: Pieces,
    open_model: Callable[[Variant], AbstractContextManager[Model]],
    report: Callable[[Mapping[str, Any]], None],
    progress: Callable[[int, int, str], None] = lambda done, total, part: None,
) -> dict[str, Any]:
    """Run every task on every variant, call `report` with the document after each, and return the last document.

    Args:
        setting: JSON with everything that all outcomes depend on: the backend, its dtype and options.
        finished: the pieces of an earlier run; a variant that lacks none is not loaded.
        progress: gets the number of results, their total, and words for the last: at the start, and after each.

    Raises:
        AdapterError: two tasks of one name.
    """
    names = [task.name for task in tasks]
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise AdapterError(f"task {double[0]} is asked for twice; name it once")
    pieces = dict(finished)
    document, total = make_document(variants, tasks, setting, pieces), len(variants) * len(tasks)
    progress(len(pieces), total, "")
    for variant in variants:
        missing = [task for task in tasks if (variant.name, task.name) not in pieces]
        if not missing:
            continue
        with open_model(variant) as model:
            for task in missing:
                pieces[variant.name, task.name] = _require_finite(task.evaluate(model), variant.name, task.name)
                document = make_document(variants, tasks, setting, pieces)
                report(document)
                progress(len(pieces), total, f"{task.name}, {variant.name}")
    return document


def _require_finite(outcome: Outcome, variant: str, task: str) -> Outcome:
    """The outcome; AdapterError for a score that is not finite, which no JSON file can hold."""
    for metric, score in outcome.scores.items():
        if not max(abs(score.value), score.stderr or 0.0) <= LARGEST:
            raise AdapterError(f"task {task}: {metric} of {variant!r} is {score.value}, not finite; leave the task out")
    return outcome


def make_document(
    variants: Sequence[Variant], tasks: Sequence[Task], setting: Mapping[str, Any], pieces: Pieces
) -> dict[str, Any]:
    """The JSON object of all pieces so far and their summary."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": variants[0].folder,
        "setting": dict(setting),
        "variants": [describe(variant) for variant in variants],
        "tasks": [{"name": task.name, **task.settings} for task in tasks],
        "pieces": [_make_piece(variant, task, outcome) for (variant, task), outcome in sorted(pieces.items())],
        "summary": list(summarise([v.name for v in variants], tasks, pieces)),
    }


def _make_piece(variant: str, task: str, outcome: Outcome) -> dict[str, Any]:
    scores = [
        {"metric": metric, "value": score.value, "stderr": score.stderr, "values": list(score.values)}
        for metric, score in outcome.scores.items()
    ]
    piece = {"variant": variant, "task": task, "scores": scores, "details": dict(outcome.details)}
    return {**piece, "sha256": _hash_piece(json.loads(json.dumps(piece)))}  # as it is read again: keys are strings


def _hash_piece(piece: Mapping[str, Any]) -> str:
    """Hex SHA-256 over everything else in a piece of a document that was read."""
    content = {key: value for key, value in piece.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def find_finished(document: Any, place: str, expected: Mapping[str, Any]) -> dict[tuple[str, str], Outcome]:
    """The pieces of an earlier document, if all belong to this run, whose document without pieces is `expected`.

    Raises:
        AdapterError: `document` has another format, or holds a piece that this run would not make, or that is not as
            it was written.
    """
    remedy = "name another file by --output, or throw them away by --restart"
    if not isinstance(document, dict) or (document.get("format"), document.get("version")) != (FORMAT, VERSION):
        raise AdapterError(f"{place} is not a {FORMAT} file of version {VERSION}; name another by --output")
    try:
        if differing := _list_differences(document["setting"], expected["setting"]):
            earlier, current = (settings.get(differing[0]) for settings in (document["setting"], expected["setting"]))
            raise AdapterError(f"{place} holds results with {differing[0]} {earlier!r}, not {current!r}; {remedy}")
        for kind in ("variants", "tasks"):
            used = {piece[kind[:-1]] for piece in document["pieces"]}
            wanted = {entry["name"]: entry for entry in expected[kind]}
            for entry in document[kind]:
                name = entry["name"]
                if name in used and name not in wanted:
                    raise AdapterError(f"{place} holds results of {name!r}, which is not asked for; {remedy}")
                if name in used and (differing := _list_differences(entry, wanted[name])):
                    difference = f"(another {', '.join(differing)})"
                    raise AdapterError(f"{place} holds other results of {name!r} than these {difference}; {remedy}")
        for piece in document["pieces"]:
            if piece.get("sha256") != _hash_piece(piece):
                which = f"the results of {piece['variant']!r} in {piece['task']!r}"
                raise AdapterError(f"{place}: {which} are not as they were written (SHA-256 differs); {remedy}")
        return {(piece["variant"], piece["task"]): _read_outcome(piece) for piece in document["pieces"]}
    except (KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"{place} is not whole ({error!r} in it); {remedy}") from error


def _list_differences(earlier: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """The keys whose values differ, in words for messages."""
    return sorted(WORDS.get(key, key) for key in {*earlier, *current} if earlier.get(key) != current.get(key))


def _read_outcome(piece: Mapping[str, Any]) -> Outcome:
    """The outcome in a piece of a document."""
    scores = {}
    for stored in piece["scores"]:
        values = tuple(stored["values"])
        scores[stored["metric"]] = Score(stored["value"], stored["stderr"], values, find_interval(values))
    return Outcome(scores, piece["details"])


def summarise(variants: Sequence[str], tasks: Sequence[Task], pieces: Pieces) -> Iterator[dict[str, Any]]:
    """A line for every variant, task and metric: the score and its difference from the base's, the first variant's.

    A group of two tasks or more gets a line of its own, the mean over its tasks, once all of them are finished.
    """
    groups: dict[str, list[str]] = {}
    for task in tasks:
        if task.group:
            groups.setdefault(task.group, []).append(task.name)
    base = variants[0]
    for variant in variants:
        lines: dict[tuple[str, str], _Line] = {}
        for task in tasks:
            base_scores = _read_scores(pieces, base, task.name) if variant != base else {}
            for metric, score in _read_scores(pieces, variant, task.name).items():
                base_score = base_scores.get(metric)
                lines[task.name, metric] = score, compare(score, base_score) if base_score else None
        for group, members in groups.items():
            metrics = [metric for name, metric in lines if name == members[0]]
            for metric in metrics if len(members) > 1 else ():
                parts = [lines[name, metric] for name in members if (name, metric) in lines]
                if len(parts) == len(members):
                    lines[group, metric] = _combine_lines(parts)
        for (task_name, metric), (score, difference) in lines.items():
            yield {
                "variant": variant,
                "task": task_name,
                "metric": metric,
                "value": score.value,
                "stderr": score.stderr,
                "interval": _to_list(score.interval),
                "difference": difference.value if difference else None,
                "difference_stderr": difference.stderr if difference else None,
                "difference_interval": _to_list(difference.interval) if difference else None,
            }


def _to_list(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else list(interval)


def _combine_lines(lines: Sequence[_Line]) -> _Line:
    """The means over tasks of scores and differences; None for a difference that a task lacks."""
    differences = [difference for _, difference in lines if difference]
    complete = len(differences) == len(lines)
    return combine([score for score, _ in lines]), combine(differences, paired=True) if complete else None


def _read_scores(pieces: Pieces, variant: str, task: str) -> Mapping[str, Score]:
    outcome = pieces.get((variant, task))
    return outcome.scores if outcome else {}
