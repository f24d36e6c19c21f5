"""The vLLM plugin (entry point group `vllm.general_plugins`): find the allocation, check it, send it to the workers.

vLLM calls `register` in every process. It hooks three methods of vLLM's configuration classes, which do nothing unless
an allocation is asked for; then `vllm_build` hooks the building of MoE layers. Nothing here imports vLLM before
`register` runs: vLLM only logs a plugin whose import fails, and would go on to serve the model's own k.

An allocation comes as `lexi_allocation` in config.json (an exported folder) or in `--hf-overrides`, or as
`--additional-config '{"lexi_allocation": {...} or "file.json"}'`. It ends as a `Document` in `additional_config`, which
vLLM hashes into its compile cache's key and pickles for its workers.
"""

from collections.abc import Callable, Iterator, Mapping
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from lexi_adapter.allocation import FORMAT, KEY, Allocation, check_reducible, read_allocation, to_document
from lexi_adapter.errors import AdapterError, AllocationError
from lexi_adapter.model.compensation import check_compensation, locate_on_hub
from lexi_adapter.model.folder import (
    READ_AS_STORED,
    check_config,
    check_folder,
    compare,
    find_lm_head,
    has_weights,
    read_config,
)
from lexi_adapter.serving.vllm_build import hook, hook_build, is_folder
from lexi_adapter.serving.vllm_names import NEVER_TIED, check_version, describe_supported
from lexi_adapter.serving.vllm_status import hook_server, hook_worker

ADDITIONAL, CONFIG = "--additional-config", "config.json or --hf-overrides"  # the two places, for messages
LIKENESS = 0.85  # of two keys that are at most two edits apart, of the length of ours; other keys of configs are below
DEEPEST = 8  # levels of a configuration that are looked through
ALIAS = "Lexi"  # prefix of the architecture in exported folders, so that a vLLM without this plugin stops


class Document(dict):
    """An allocation's document inside `VllmConfig.additional_config`.

    Unpickling one hooks vLLM in the receiving process, and fails where lexi_adapter is missing: a worker cannot get an
    allocation without the code that applies it.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _receive, (dict(self),)


def _receive(document: dict[str, Any]) -> Document:
    hook_build()
    hook_worker()
    return Document(document)


def register() -> None:
    """Hook vLLM in this process; calling it again changes nothing.

    Raises:
        AdapterError: this vLLM lacks a function to hook.
    """
    try:
        from vllm.config import ModelConfig, VllmConfig
        from vllm.transformers_utils.config import HFConfigParser

        hook(HFConfigParser, "parse", _restore_parsed)
        hook(ModelConfig, "get_model_arch_config", _restore_overridden)
        hook(VllmConfig, "__post_init__", _prepare_config)
    except (ImportError, AttributeError) as error:
        remedy = f"{describe_supported()}, or leave the plugin out with VLLM_PLUGINS=''"
        raise AdapterError(f"lexi_adapter cannot hook this vLLM ({error}); {remedy}") from error


def _restore_parsed(parse: Callable) -> Callable:
    def restoring(self: Any, *args: Any, **kwargs: Any) -> Any:
        config_dict, config = parse(self, *args, **kwargs)
        restore(config)
        return config_dict, config

    return restoring


def _restore_overridden(get_model_arch_config: Callable) -> Callable:
    # The first thing that vLLM does with a configuration after applying --hf-overrides.
    def restoring(self: Any, *args: Any, **kwargs: Any) -> Any:
        restore(self.hf_config)
        if "num_experts_per_tok" in (getattr(self.hf_text_config, "per_layer_attributes", None) or ()):
            raise AllocationError(f"per_layer_config sets num_experts_per_tok without a {KEY} beside it; export again")
        return get_model_arch_config(self, *args, **kwargs)

    return restoring


def restore(config: Any) -> None:
    """Undo, in a Hugging Face configuration, the changes of an export that are for engines without this plugin.

    The architecture loses the prefix `ALIAS`, and the top-k leaves transformers' `per_layer_config`:
    vLLM's models do not read it there, and vLLM refuses some models (those with latent attention) whose layers differ.

    Raises:
        AllocationError: the prefix is there without an allocation, or `per_layer_config` differs from the allocation.
    """
    source, architectures = getattr(config, KEY, None), getattr(config, "architectures", None)
    names = architectures if isinstance(architectures, list) else []  # vLLM itself refuses others
    if any(isinstance(name, str) and name.startswith(ALIAS) for name in names):
        if source is None:
            raise AllocationError(f"architectures is {architectures}, but there is no {KEY} beside it; export again")
        config.architectures = [str(name).removeprefix(ALIAS) for name in names]
    if source is not None:
        _take_top_k_out(config.get_text_config(), _read(source, CONFIG))


def _take_top_k_out(config: Any, allocation: Allocation) -> None:
    key = allocation.model.top_k_key.rpartition(".")[2]
    attributes = getattr(config, "per_layer_attributes", None) or set()
    if key not in attributes:
        return
    per_layer = {index: getattr(layer, key) for index, layer in enumerate(config.per_layer_config)}
    differing = [layer for layer, k in allocation.top_k.items() if per_layer.get(layer) != k]
    if differing:
        raise AllocationError(f"per_layer_config and {KEY} differ in layers {differing}; export again")
    others = attributes - {key}
    rest = {i: {name: getattr(layer, name) for name in others} for i, layer in enumerate(config.per_layer_config)}
    config.per_layer_config = rest if others else None


def _prepare_config(post_init: Callable) -> Callable:
    def preparing(self: Any, *args: Any, **kwargs: Any) -> None:
        post_init(self, *args, **kwargs)
        prepare(self)

    return preparing


def prepare(vllm_config: Any) -> None:
    """Find the allocation that a VllmConfig asks for, check it, and leave it there as a `Document`.

    Raises:
        AllocationError: two allocations that disagree, or one that does not fit the model.
        AdapterError: a version or a setting of vLLM, or a checkpoint, under which no allocation can be applied.
    """
    sources = dict(_find_sources(vllm_config))
    if any(isinstance(source, Document) for source in sources.values()):
        return  # a copy of a configuration that was prepared before
    model = getattr(vllm_config.model_config, "model", None)
    folders = {CONFIG: model} if model is not None and is_folder(model) else {}
    allocation = _agree({place: _read(source, place, folders.get(place)) for place, source in sources.items()})
    if allocation is None:
        return
    import vllm

    check_version(vllm.__version__)
    check_reducible(allocation)
    check_settings(vllm_config)
    check_model(allocation, vllm_config)
    allocation = _locate(allocation, vllm_config.model_config)
    check_compensation(allocation, hidden=vllm_config.model_config.get_hidden_size())
    hook_build()
    hook_worker()
    hook_server()
    vllm_config.additional_config = vllm_config.additional_config | {
        KEY: Document(to_document(allocation, located=True))
    }


def _locate(allocation: Allocation, model_config: Any) -> Allocation:
    """The allocation with the folder of its compensation's file: that of a hub id is fetched beside its config."""
    if allocation.compensation is None or allocation.folder is not None or is_folder(model_config.model):
        return allocation
    try:
        return locate_on_hub(allocation, model_config.model, revision=model_config.revision)
    except OSError as error:
        reason = str(error).partition("\n")[0]
        raise AllocationError(f"{model_config.model}: its {KEY} names a file that is not there: {reason}") from error


def _find_sources(vllm_config: Any) -> Iterator[tuple[str, Any]]:
    """Place -> allocation. AllocationError for what looks like one there and would be passed over."""
    model_config = vllm_config.model_config
    config = {} if model_config is None else vars(model_config.hf_config)
    for place, values in ((ADDITIONAL, vllm_config.additional_config), (CONFIG, config)):
        if isinstance(values, Mapping):
            _check_understood(values, place)
            if KEY in values:
                yield place, values[KEY]


def _check_understood(values: Mapping[str, Any], place: str) -> None:
    """Raise AllocationError for a null under our key, a key that is almost ours, or an allocation under no key of ours.

    Any of them was meant to be an allocation, and vLLM would serve the full k without a word.
    """
    form = f'give it as "{KEY}": {{...}} or "file.json", at the top'
    if values.get("format") == FORMAT:
        raise AllocationError(f"{place} is an allocation itself; {form}")
    if KEY in values and values[KEY] is None:
        raise AllocationError(f"{KEY} in {place} is null; {form}, or leave it out")
    others = {key: value for key, value in values.items() if key != KEY}
    if stray := next(_find_strays(others, ()), None):
        raise AllocationError(f"{place} has {'.'.join(stray)}, which looks like an allocation and is not read; {form}")
    if unknown := next((key for key in others if place == ADDITIONAL and str(key).lower().startswith("lexi")), None):
        raise AllocationError(f"{place} has {unknown}, which this plugin does not know; {form}, or leave it out")


def _find_strays(values: Mapping[Any, Any], path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The paths of keys at any level that look like ours, and of objects that are allocations."""
    for key, value in values.items():
        here = (*path, str(key))
        inner = vars(value) if hasattr(value, "to_dict") else value  # configurations inside configurations
        if _looks_like_key(str(key)) or (isinstance(inner, Mapping) and inner.get("format") == FORMAT):
            yield here
        elif isinstance(inner, Mapping) and len(here) < DEEPEST:
            yield from _find_strays(inner, here)


def _looks_like_key(name: str) -> bool:
    plain, ours = (text.lower().translate({ord("-"): None, ord("_"): None}) for text in (name, KEY))
    # The ratio takes time with the square of the length, and a name of another length cannot be that alike.
    return abs(len(plain) - len(ours)) <= 2 and SequenceMatcher(None, plain, ours).ratio() >= LIKENESS


def _read(source: Any, place: str, folder: str | None = None) -> Allocation:
    try:
        return read_allocation(source, folder=folder)
    except AdapterError as error:
        raise AllocationError(f"{KEY} in {place}: {error}") from error


def _agree(allocations: Mapping[str, Allocation]) -> Allocation | None:
    if not allocations:
        return None
    first, *others = allocations.values()
    if not all(first.asks_the_same_as(other) for other in others):
        raise AllocationError(f"{' and '.join(allocations)} hold different allocations; give one")
    return first


def check_settings(vllm_config: Any) -> None:
    """Raise AdapterError for settings of vLLM that need one top-k for all layers."""
    if not isinstance(vllm_config.additional_config, dict):
        raise AdapterError("additional_config is not a JSON object, so it cannot carry the allocation; give one")
    if vllm_config.parallel_config.all2all_backend == "flashinfer_nvlink_one_sided":
        raise AdapterError("all2all backend flashinfer_nvlink_one_sided has one top-k for all layers; take another")
    for config in (vllm_config.model_config, getattr(vllm_config, "aux_output_config", None)):
        if getattr(config, "enable_return_routed_experts", False):
            raise AdapterError("enable_return_routed_experts has one top-k for all layers; serve without it")


def check_model(allocation: Allocation, vllm_config: Any) -> None:
    """Check the allocation against the model's files, before the model is built.

    Those of a hub id are not known to be here yet: `vllm_build` compares their routers where vLLM has fetched them, and
    says so where vLLM reads what cannot be compared.
    """
    model, config = allocation.model, vllm_config.model_config
    folder = Path(config.model)
    compare("num_hidden_layers", config.hf_text_config.num_hidden_layers, model.num_hidden_layers, config.model)
    if not is_folder(config.model):
        compare("model_type", config.hf_config.model_type, model.model_type, config.model)
    elif vllm_config.load_config.load_format not in READ_AS_STORED:
        check_config(model, read_config(folder), f"{folder}/config.json")
    else:
        check_folder(model, folder)
        check_lm_head(model.model_type, folder)
    if vllm_config.load_config.load_format in READ_AS_STORED:
        # An override shows when the layers are built, too, but in a process whose log others' lines follow.
        key = model.top_k_key.rpartition(".")[2]
        overridden = getattr(config.hf_text_config, key, model.top_k)
        if type(overridden) is int and overridden != model.top_k:
            raise AllocationError(
                f"{config.model}: {key}, after --hf-overrides, is {overridden}, the allocation was made for "
                f"{model.top_k}; leave the override out: the allocation says the k of every layer"
            )


def check_lm_head(model_type: str, folder: Path) -> None:
    """Raise AdapterError for a checkpoint with a tied LM head where vLLM would serve one that it never loaded."""
    if model_type in NEVER_TIED and has_weights(folder) and find_lm_head(folder) is None:
        raise AdapterError(
            f"{folder} has no lm_head.weight: its LM head is tied to the embeddings, which vLLM ignores for "
            f"{model_type}; save the checkpoint with tie_word_embeddings = false and a copy as lm_head.weight"
        )
