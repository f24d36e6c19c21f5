"""The arguments of `vllm.LLM` for one variant, and checks that the engine runs its allocation."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lexi_adapter.allocation import KEY, to_document
from lexi_adapter.engines.process import EngineError
from lexi_adapter.engines.workload import Workload
from lexi_adapter.environment import has_cpu_vllm
from lexi_adapter.errors import AdapterError
from lexi_adapter.model.variants import Variant

PLUGIN = "lexi"  # this package's entry point among vLLM's plugins, as VLLM_PLUGINS names it
SMALLEST_BLOCK = 16  # tokens of a block of the key-value cache; larger blocks only make the cache larger than needed


def check_plugin(variants: Iterable[Variant]) -> None:
    """Refuse variants whose allocation vLLM would ignore, because VLLM_PLUGINS leaves this package's plugin out.

    Raises:
        AdapterError: naming the variant and VLLM_PLUGINS.
    """
    for variant in variants:
        chosen = variant.environment.get("VLLM_PLUGINS", os.environ.get("VLLM_PLUGINS"))
        if variant.allocation is not None and chosen is not None and PLUGIN not in chosen.split(","):
            raise AdapterError(
                f"VLLM_PLUGINS is {chosen!r} and leaves out {PLUGIN!r}, without which vLLM runs {variant.name!r} with "
                f"the model's own k; set VLLM_PLUGINS={PLUGIN} or unset it"
            )


def check_switchable(engine: Mapping[str, Any]) -> None:
    """Refuse, before an engine starts, one whose k cannot change while it runs: compiled, on a CPU.

    What this does not know of (another platform, a compilation of one's own) the worker finds out once it runs.

    Raises:
        AdapterError: naming the option that helps.
    """
    if has_cpu_vllm() and not engine.get("enforce_eager") and not engine.get("compilation_config"):
        raise AdapterError(
            "vLLM's build for CPUs compiles k into the model, so one engine cannot change it; compile nothing with "
            "--engine '{\"enforce_eager\": true}', or measure on a GPU"
        )


def check_top_k(variant: Variant, running: Mapping[int, int]) -> None:
    """Raise EngineError unless `running`, layer -> k of the variant's engine, is what its allocation says."""
    top_k = {} if variant.allocation is None else variant.allocation.top_k
    differing = sorted(layer for layer, k in top_k.items() if running.get(layer) != k)
    if differing:
        layer = differing[0]
        raise EngineError(
            f"engine of {variant.name!r}: layer {layer} runs k = {running.get(layer)} and not the allocation's "
            f"{top_k[layer]}: vLLM did not load the plugin {PLUGIN!r}; install lexi-moe beside this vLLM, and if "
            f"VLLM_PLUGINS is set, name {PLUGIN!r} in it"
        )


def make_options(
    variant: Variant, workloads: Sequence[Workload], *, load_format: str, parallel: Mapping[str, Any], **others: Any
) -> dict[str, Any]:
    """Arguments of `vllm.LLM` for measuring `workloads`; the user's `others` replace ours, except the variant's.

    The key-value cache is as large as the largest workload needs, so that several engines fit on one card and none has
    to measure free memory. CUDA graphs are captured for the measured batches only. Neither changes the speed of a step.
    Prefix caching is off: a repeated prompt must cost what it cost the first time.
    """
    longest = max(workload.input_length + workload.output_length for workload in workloads)
    blocks = max(w.batch * (2 + (w.input_length + w.output_length) // SMALLEST_BLOCK) for w in workloads)
    compilation = {"cudagraph_capture_sizes": sorted({workload.batch for workload in workloads})}
    options = {
        "model": variant.folder,
        "load_format": load_format,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "max_model_len": longest + 1,
        "max_num_seqs": max(workload.batch for workload in workloads),
        "num_gpu_blocks_override": blocks + 1,
        "kv_cache_memory_bytes": 2**30,  # any number: with one, vLLM takes the blocks above without measuring memory
        "gpu_memory_utilization": 0.05,
        **parallel,
        **others,
        "compilation_config": compilation | dict(others.get("compilation_config") or {}),
    }
    if variant.overrides:
        options["hf_overrides"] = {**others.get("hf_overrides", {}), **variant.overrides}
    if variant.allocation is not None:
        options["additional_config"] = {
            **others.get("additional_config", {}),
            KEY: to_document(variant.allocation, located=True),
        }
    return options
