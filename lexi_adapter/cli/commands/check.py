"""`lexi-adapter check`."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click

from lexi_adapter.allocation import KEY, Allocation, check_reducible, describe_run, hash_allocation, read_allocation
from lexi_adapter.cli.console import conclude, echo
from lexi_adapter.environment import find_vllm_version
from lexi_adapter.errors import AdapterError, AllocationError
from lexi_adapter.model.compensation import check_compensation
from lexi_adapter.model.folder import check_folder, find_hidden, find_part, has_weights, read_config
from lexi_adapter.serving.vllm_names import check_version
from lexi_adapter.serving.vllm_plugin import ALIAS, check_lm_head
from lexi_adapter.serving.vllm_status import Status, ask, compare_status


@click.command()
@click.argument("allocation", metavar="[ALLOCATION]", required=False)
@click.option("--model", "folder", help="Folder of the model, for an allocation's file: config.json and safetensors.")
@click.option("--url", metavar="http://HOST:PORT", help="A running vLLM server: which k do its layers have?")
@click.option("--api-key", envvar="VLLM_API_KEY", show_envvar=True, help="Of that server.")
def check(allocation: str | None, folder: str | None, url: str | None, api_key: str | None) -> None:
    """Check that ALLOCATION fits a model and the installed vLLM, before a long start-up; or what a server runs.

    ALLOCATION is a folder that lexi-search exported, or an allocation's file beside its --model. Compared are model
    type, layers, experts, top-k, and the bytes of the router tensors and of a compensation; with --url the k of the
    server's layers, read from the modules that vLLM built, and stated in its /v1/models.

    \b
    Examples:
      lexi-adapter check served/
      lexi-adapter check allocation.json --model weights/
      lexi-adapter check served/ --url http://localhost:8000
    """
    if allocation is None and (url is None or folder is not None):
        raise AdapterError("name an exported folder, or an allocation's file with --model, or a server by --url")
    wanted = None if allocation is None else _check_files(allocation, folder, alone=url is None)
    if url is not None:
        _check_server(ask(url, api_key=api_key), url, wanted, allocation)


def _check_files(place: str, folder: str | None, *, alone: bool) -> Allocation:
    """Check an exported folder or an allocation's file, say so, and return the allocation.

    `alone`: nothing else is checked, so there has to be a model to compare with.
    """
    exported = Path(place).is_dir()
    wanted = _read_export(Path(place)) if exported else read_allocation(place)
    folders = [Path(name) for name in ([place] if exported else []) + ([folder] if folder else [])]
    if not folders and alone:
        raise AdapterError(f"{place} is an allocation's file; name the model's folder by --model")
    for model in folders:
        check_folder(wanted.model, model)
        _check_export(wanted, model)
        check_lm_head(wanted.model.model_type, model)
    check_reducible(wanted)
    size = check_compensation(wanted, hidden=next(map(partial(find_hidden, wanted.model), folders), None))
    version = find_vllm_version()
    if version is not None:
        check_version(version)
    if not folders:
        return wanted
    echo(f"fits: {wanted.model.model_type}, {describe_run(wanted, wanted.top_k)}")
    if wanted.compensation is not None:
        echo(
            f"compensation: {wanted.compensation.file}, rank {wanted.compensation.rank}, {size / 1e6:.3g} MB, is whole"
        )
    if not all(map(has_weights, folders)):
        echo("note: no safetensors files there, so the weights were not compared")
    if version is None:
        echo("note: vLLM is not installed here, so its version was not checked")
    if exported and not _is_for_vllm(read_config(Path(place))):
        echo("note: exported for transformers: a vLLM without lexi_adapter would serve the model's own k")
    if alone:
        conclude(f"{place} fits {folders[-1]}", *_list_next(place, exported, folders[-1]))
    return wanted


def _list_next(place: str, exported: bool, folder: Path) -> list[list[str]]:
    if exported or KEY in read_config(folder):
        ask_it = ["lexi-adapter", "check", place, "--url", "http://localhost:8000"]
        return [["vllm", "serve", str(folder)], ask_it]
    return [["lexi-search", "export", place, "--to", "vllm", "--model", str(folder), "-o", "served/"]]


def _read_export(folder: Path) -> Allocation:
    """The allocation in an exported folder's config.json.

    Raises:
        AllocationError: there is none, or `per_layer_config` beside it says something else.
    """
    config = read_config(folder)
    if config.get(KEY) is None:
        raise AllocationError(
            f"{folder}/config.json has no {KEY}: vLLM would serve the model's own k; export a folder with lexi-search, "
            "or name the allocation's file and this folder by --model"
        )
    allocation = read_allocation(config[KEY], folder=folder)
    *parents, key = allocation.model.top_k_key.split(".")
    layers = (find_part(config, parents) or {}).get("per_layer_config")
    for layer, values in layers.items() if isinstance(layers, Mapping) else ():
        k = values.get(key) if isinstance(values, Mapping) else None
        if k is not None and (not layer.isdecimal() or k != allocation.top_k.get(int(layer))):
            raise AllocationError(
                f"{folder}/config.json: per_layer_config and {KEY} differ in layer {layer}; export again"
            )
    return allocation


def _is_for_vllm(config: Mapping[str, Any]) -> bool:
    names = config.get("architectures")
    return isinstance(names, list) and bool(names) and all(str(name).startswith(ALIAS) for name in names)


def _check_export(allocation: Allocation, folder: Path) -> None:
    """Raise AllocationError for a folder that was exported with another allocation."""
    exported = read_config(folder).get(KEY)
    if exported is not None and not allocation.asks_the_same_as(read_allocation(exported)):
        raise AllocationError(f"{folder} was exported with another allocation; name the model's original folder")


def _check_server(status: Status, url: str, wanted: Allocation | None, place: str | None) -> None:
    if wanted is not None:
        compare_status(status, wanted, str(place))
    each = " ".join(f"{layer}:{k}" for layer, k in sorted(status.top_k.items()))
    shift = "".join(f", gate exponent {b:g}" for b in sorted(set(status.gate_exponents.values())))
    shift += "".join(f", compensation {source}" for source in sorted(set(status.compensation.values())))
    workers = f"{status.workers} worker{'s' * (status.workers > 1)}"
    workers += f" of engine 1 of {status.engines}" if status.engines > 1 else ""
    echo(
        f"{url} runs {', '.join(status.models)}: {sum(status.top_k.values())} of "
        f"{len(status.top_k) * status.own_top_k} active experts per token over {len(status.top_k)} MoE layers{shift}, "
        f"sha256 {status.sha256}, read from {workers}; top-k of each: {each}"
    )
    if wanted is None:
        conclude(f"{url} runs an allocation", ["lexi-adapter", "check", "served/", "--url", url])
    elif hash_allocation(wanted) == status.sha256:
        conclude(f"{url} runs {place}")
    else:
        conclude(f"{url} runs the k of {place}, whose sha256 is {hash_allocation(wanted)}: another run found them")
