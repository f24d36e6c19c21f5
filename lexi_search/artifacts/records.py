"""Files other than profiles and allocations, of both tools, as plain tables: titles, columns and rows.

Documents of `lexi-adapter` are read as JSON: this side knows the keys that it shows, and no more.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lexi_search.artifacts.codec import short
from lexi_search.artifacts.compensation import FORMAT, SUFFIX, list_maps
from lexi_search.artifacts.cost_table import CostTable
from lexi_search.artifacts.files import read_bytes, read_json_object
from lexi_search.artifacts.profile import format_layers
from lexi_search.artifacts.serialisation import read_cost_table
from lexi_search.errors import InputError

HISTORY = "lexi-history"  # the format of a file of `search --history`
FOLDER_RECORDS = ("lexi-export.json", "lexi-pruning.json")  # of folders that the tools make


class Record(NamedTuple):
    """A table of what a file holds: the file's kind, a title with units, names of columns, and rows."""

    kind: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


_Table = tuple[str, Sequence[str], Sequence[Sequence[Any]]]  # title, columns, rows


def read_record(path: str) -> Record:
    """The record of a file or folder that one of the tools wrote; InputError for any other, or for one not whole."""
    if os.path.isdir(path):
        return _read_folder(path)
    kind = _find_kind(path)
    if kind == FORMAT:
        return _describe_maps(path)
    if kind == "journal":
        return _read_journal(path)
    if kind == "lexi-cost":
        return _describe_costs(read_cost_table(path))
    if kind not in _READERS:
        known = ", ".join(["lexi-profile", "lexi-allocation", "lexi-cost", FORMAT, *_READERS])
        raise InputError(f"{path}: its format is {short(kind)}, expected one of {known}")
    try:
        return Record(kind, *_READERS[kind](path, read_json_object(path, finite=False)))
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise InputError(f"{path}: a {kind} file that is not whole ({short(error)}); make it again") from error


def _find_kind(path: str) -> str | None:
    """The format of a file; "journal" for the unfinished parts of `lexi-adapter sensitivity`."""
    if path.endswith(SUFFIX):
        return FORMAT
    try:
        data = read_bytes(path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    first = data.partition(b"\n")[0]
    try:
        run = json.loads(first)
    except ValueError:
        run = None
    if isinstance(run, dict) and {"model", "settings", "losses", "made_by"} <= run.keys() and "format" not in run:
        return "journal"
    kind = read_json_object(path, finite=False).get("format")
    return kind if isinstance(kind, str) else None


def _read_folder(path: str) -> Record:
    folder = Path(path)
    for name in FOLDER_RECORDS:
        if (folder / name).is_file():
            return read_record(str(folder / name))
    layers = {int(file.name.partition("-")[0]) for file in folder.glob("[0-9]*-*.json")}
    found = sorted(file.name.partition("-")[0] for file in folder.glob("*.found"))
    if not layers and not found and "lexi_allocation" in _read_config(folder):
        raise InputError(f"{path}: an exported folder without its {FOLDER_RECORDS[0]}; remove it and export again")
    if not layers and not found:
        raise InputError(f"{path}: no folder that these tools made; name a file, or a folder with {FOLDER_RECORDS[0]}")
    rows = [("finished layers", format_layers(sorted(layers)) or "none"), ("kept for all", ", ".join(found) or "none")]
    return Record("partial", f"{path}: what a profile that was cut short has finished", ("what", "which"), rows)


def _read_journal(path: str) -> Record:
    lines = read_bytes(path).splitlines()
    run = json.loads(lines[0])
    rows = [
        ("model", run["model"].get("model_type")),
        ("finished parts (batch of text x layer)", len(lines) - 1),
        *((f"settings: {name}", value) for name, value in sorted(run["settings"].items()) if value is not None),
    ]
    title = f"{path}: what a profile of lexi-adapter sensitivity that was cut short has finished"
    return Record("journal", title, ("what", "value"), rows)


def _describe_maps(path: str) -> Record:
    told, places = list_maps(path)
    ks: dict[int, list[int]] = {}
    for layer, k in places:
        ks.setdefault(layer, []).append(k)
    rows = [(layer, " ".join(map(str, held))) for layer, held in ks.items()]
    title = f"{told['model_type']}: corrections of rank {told['rank']}, {os.path.getsize(path) / 1e6:.3g} MB"
    return Record(FORMAT, title, ("layer", "k"), rows)


def _describe_costs(table: CostTable) -> Record:
    rows = []
    for tokens, step in sorted(table.steps.items()):
        alike: dict[tuple[float, ...], list[int]] = {}
        for layer, times in sorted(step.layers.items()):
            alike.setdefault(times, []).append(layer)
        rows += [
            (tokens, f"{step.other_ms:.4g}", format_layers(layers), *(f"{time:.4g}" for time in times))
            for times, layers in alike.items()
        ]
    columns = ("tokens", "other", "layers", *(f"k={k}" for k in range(1, table.model.top_k + 1)))
    title = f"{table.model.model_type} on {table.device}: milliseconds of an engine step, of each layer at each k"
    return Record("lexi-cost", title, columns, rows)


def _read_front(path: str, document: Mapping[str, Any]) -> _Table:
    points = document["points"]
    shown = points[:: max(1, -(-len(points) // 24))]
    shown += [points[-1]] if shown[-1] is not points[-1] else []
    timed = "ms" in points[0]
    columns = ("budget", *(("ms", "speed-up") if timed else ()), "loss", "k per layer")
    rows = [
        (
            point["budget"],
            *((f"{point['ms']:.6g}", f"{point['speedup']:.3f}") if timed else ()),
            f"{point['loss']:.6g}",
            " ".join(map(str, point["top_k"].values())),
        )
        for point in shown
    ]
    title = f"{_name(document)}: {len(points)} Pareto points, {len(shown)} of them, {document['loss']} loss"
    return title, columns, rows


def _read_history(path: str, document: Mapping[str, Any]) -> _Table:
    rows = [
        (budget, len(values["best"]), *(f"{values[name][at]:.6g}" for name in ("best", "mean") for at in (0, -1)))
        for budget, values in document["budgets"].items()
    ]
    columns = ("budget", "generations", "best, first", "best, last", "mean, first", "mean, last")
    title = f"{_name(document)}: {document['loss']} loss of the population over generations"
    return title, columns, rows


def _read_export(path: str, document: Mapping[str, Any]) -> _Table:
    folder = Path(path).parent
    states = {name: _check_entry(folder / name, made) for name, made in sorted(document["entries"].items())}
    config = _read_config(folder)
    if "lexi_allocation" not in config:
        raise InputError(f"{folder / 'config.json'}: no whole config with an allocation; remove {folder}, export again")
    allocation = config["lexi_allocation"]
    top_k = sorted(((int(layer), k) for layer, k in allocation["top_k"].items()))
    rows = [
        ("k per layer", " ".join(str(k) for _, k in top_k)),
        ("gate exponent", allocation.get("gate_exponent", "none")),
        ("made by", ", ".join(f"{name} {str(value)[:20]}" for name, value in sorted(allocation["made_by"].items()))),
        *states.items(),
    ]
    title = f"{folder}: a model folder with budget {allocation['budget']} for {allocation['model']['model_type']}"
    return title, ("entry", "what it is"), rows


def _check_entry(path: Path, made: str) -> str:
    """What an entry of an exported folder is, which was `made` so; InputError where it is gone, or what it links to."""
    if not os.path.lexists(path):
        raise InputError(f"{path} is gone since the export; remove {path.parent} and export again")
    if not path.exists():
        target = os.path.join(path.parent, os.readlink(path))
        raise InputError(f"{path} links to {target}, which is not there; put it back, or export again where it is now")
    hashed = len(made) == hashlib.sha256().digest_size * 2 and not path.is_symlink() and path.is_file()
    return "changed since the export" if hashed and hashlib.sha256(path.read_bytes()).hexdigest() != made else made


def _read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder, empty where none can be read."""
    try:
        return read_json_object(folder / "config.json", finite=False)
    except InputError:
        return {}


def _read_pruning(path: str, document: Mapping[str, Any]) -> _Table:
    names = {"num_experts": "experts a layer", "width": "channels an expert", "size": "bytes of weights"}
    rows = [(text, *document[name]) for name, text in names.items()]
    folder = str(Path(path).parent)
    return f"{folder}: pruned {_name(document)}", ("size", "before", "after"), rows


def _read_eval(path: str, document: Mapping[str, Any]) -> _Table:
    rows = [
        (line["task"], line["metric"], line["variant"], f"{line['value']:.5g}", _format(line.get("stderr")))
        for line in document["summary"]
    ]
    title = f"{_shorten(document['model'])}: scores with standard errors"
    return title, ("task", "metric", "variant", "value", "± s.e."), rows


def _read_bench(path: str, document: Mapping[str, Any]) -> _Table:
    rows = [
        (
            line["variant"],
            line["workload"],
            *(f"{line[name]:.0f}" for name in ("median", "lowest", "highest")),
            f"{line['speedup']:.3f}" if "speedup" in line else "",
        )
        for line in document["summary"]
    ]
    columns = ("variant", "batch x input x output", "median", "lowest", "highest", "speed-up")
    return f"{_shorten(document['model'])}: throughput in tokens/s", columns, rows


def _read_loads(path: str, document: Mapping[str, Any]) -> _Table:
    rows = [
        (
            variant,
            layer,
            load["experts"],
            f"{load['max_over_mean']:.2f}",
            f"{load['variation']:.2f}",
            f"{100 * load['idle']:.1f}",
        )
        for variant, layers in document["loads"].items()
        for layer, load in sorted(layers.items(), key=lambda item: int(item[0]))
    ]
    columns = ("variant", "layer", "experts", "max/mean", "variation", "idle %")
    return f"tokens per expert on {document['device']}", columns, rows


def _read_judged(path: str, document: Mapping[str, Any]) -> _Table:
    top_k = (" ".join(map(str, variant["top_k"])) for variant in document["variants"])  # of all but the model's own k
    rows = [
        (one["name"], f"{one['divergence']:.6g}", _format(one["stderr"]), next(top_k, "")) for one in document["judged"]
    ]
    title = "whole models on a text of their own: divergence in nats per token, with standard errors"
    return title, ("k", "loss", "± s.e.", "k per layer"), rows


_READERS: dict[str, Callable[[str, Mapping[str, Any]], _Table]] = {
    "lexi-front": _read_front,
    HISTORY: _read_history,
    "lexi-export": _read_export,
    "lexi-pruning": _read_pruning,
    "lexi-eval": _read_eval,
    "lexi-bench": _read_bench,
    "lexi-loads": _read_loads,
    "lexi-judged": _read_judged,
}


def _name(document: Mapping[str, Any]) -> str:
    """The model that a document says it is of."""
    model = document.get("model")
    return model["model_type"] if isinstance(model, dict) else "a model that the file does not name"


def _shorten(folder: str) -> str:
    """The name of a model's folder."""
    return Path(folder).name or folder


def _format(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"
