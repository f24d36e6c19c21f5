"""A table of the model families: what each can be used for, from the registries of both packages and of the engines.

    python examples/families.py            # writes examples/families.md

It needs transformers and vLLM, of which it names the versions.
"""

import os
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

import click

from lexi_search.models.decoder_families import FAMILIES
from lexi_search.models.families.moe import Architecture
from lexi_search.models.families.refused import REFUSED
from lexi_search.models.moe_families import ARCHITECTURES
from lexi_search.profiling.profile import decide_compensation

PLACE = Path(__file__).with_suffix(".md")
HEADS = ("model_type", "MoE layers alone", "own text, whole model", "compensation", "transformers", "vLLM")
# Run in a real engine by the tests, under mixed allocations; the first ones with corrections, too.
TESTED = frozenset(
    """olmoe mixtral qwen2_moe qwen3_moe deepseek deepseek_v2 deepseek_vl_v2 minicpm
    axk1 cohere2_moe exaone_moe gemma4_text granitemoehybrid lfm2_moe qwen3_next""".split()
)
# Why the default input does not run them.
PAPER_ONLY = {
    "bailing_hybrid": "transformers has no class of it that could judge what is computed here",
}
# Why the tests do not, where it was tried: they have the engine's build for CPUs.
UNSERVED = {
    "deepseek_v4": "the CPU build's sparse attention calls kernels of Triton, which has no backend for CPUs",
    "gemma4": "its processor needs torchvision, which the tests do without; see gemma4_text",
    "jamba": "the CPU build has no scan of Mamba",
    "kimi_linear": "the CPU build refuses the blocks of its caches",
    "laguna": "the CPU build's router takes softmax scores alone, where there are no groups",
    "llama4": "see llama4_text",
    "llama4_text": "it runs one expert a token, and the engine weighs the inputs of no more",
    "minimax_m3_vl": "its processor needs torchvision, which the tests do without",
    "mimo_v2_flash": "the engine's class wants the hub's config, and transformers writes another",
    "nemotron_h": "the CPU build has no experts without gates",
    "qwen3_5_moe": "its processor needs torchvision, which the tests do without",
    "qwen3_5_moe_text": "its processor needs torchvision, which the tests do without",
    "step3p5": "the CPU build's router takes softmax scores alone, where there are no groups",
}
# That transformers has, and the tests apply no allocation to.
UNTRIED = frozenset(
    """aria deepseek_ocr2 glm4v_moe glm5_next kimi_k25 minimax_m3_vl mistral3 mistral4 qwen3_omni_moe qwen3_vl_moe
    step3p5 step3p7""".split()
)
# Checkpoints' own `architectures` where transformers has no such class, or calls it otherwise.
HUB_CLASSES = {
    "bailing_moe": "BailingMoeForCausalLM",
    "bailing_moe_v2": "BailingMoeV2ForCausalLM",
    "deepseek": "DeepseekForCausalLM",
    "deepseek_vl_v2": "DeepseekVLV2ForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
    "kimi_k25": "KimiK25ForConditionalGeneration",
    "kimi_vl": "KimiVLForConditionalGeneration",
    "minicpm": "MiniCPMForCausalLM",
    "minimax": "MiniMaxText01ForCausalLM",
    "phimoe": "PhiMoEForCausalLM",
    "qwen3_omni_moe": "Qwen3OmniMoeForConditionalGeneration",
    "bailing_hybrid": "BailingMoeV3ForCausalLM",
    "sarvam_mla": "SarvamMLAForCausalLM",
    "sarvam_moe": "SarvamMoEForCausalLM",
    "step3p5": "Step3p5ForCausalLM",
}
NOTES = """
- **MoE layers alone** is `lexi-search profile --input paper`; **own text, whole model** is the default. "no" there:
  what the decoder computes outside its MoE layers is not known, for the reason below, and the default refuses the
  family and names `--input paper`.
- **compensation**: "full" is the gate exponent and corrections. "none": the gate weights are not the scores up to one
  factor a token, which is what a gate exponent is defined by; `--compensation full` and `exponent` are refused.
- **transformers**: `lexi_adapter.apply`, "tested" on the class or on that of its text model. "class": transformers
  has it, and the tests do not try it. "remote code": transformers has none; `apply` takes the model that the
  checkpoint's code makes if its routers are as those of other families. What it cannot change it refuses.
- **vLLM**: "tested" families run in a real engine in the tests. "class" names what the engine has; the plugin changes
  the engine's own routers, whatever the family, and the start ends with one line where it cannot. "no class": the
  engine does not serve it.
"""
PAPER_ONLY_HEAD = "## By their MoE layers alone"
UNSERVED_HEAD = "## Tried in vLLM without a GPU, and not tested"
REFUSED_HEAD = "## Refused"


def find_version(package: str) -> str:
    """The version of an installed package that may have another name on CPUs."""
    return next(found.version for found in distributions() if found.name in (package, f"{package}-cpu"))


def find_classes(model_type: str) -> list[str]:
    """The names of the classes that checkpoints of a family ask an engine for."""
    from transformers.models.auto import modeling_auto as auto

    mappings = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    named = [HUB_CLASSES.get(model_type), *(mapping.get(model_type) for mapping in mappings)]
    return [name for name in dict.fromkeys(named) if name]


def describe(architecture: Architecture) -> tuple[str, ...]:
    """A row of the table."""
    from transformers import CONFIG_MAPPING
    from vllm.model_executor.models.registry import ModelRegistry

    name = architecture.model_type
    served = [each for each in find_classes(name) if each in ModelRegistry.get_supported_archs()]
    return (
        f"`{name}`",
        "yes",
        "yes" if name in FAMILIES else "no",
        decide_compensation(None, None, "weights", architecture.routing),
        ("class" if name in UNTRIED else "tested") if name in CONFIG_MAPPING else "remote code",
        ("tested" if name in TESTED else f"class `{served[-1]}`") if served else "no class",
    )


def make_lines() -> Iterator[str]:
    """The lines of the document."""
    versions = {package: find_version(package) for package in ("transformers", "vllm")}
    whole = sum(name in FAMILIES for name in ARCHITECTURES)
    yield "# Families"
    yield f"{len(ARCHITECTURES)} values of `model_type` in config.json; the default input runs {whole} of them. Made by"
    yield f"`python examples/families.py` with {' and '.join(map(' '.join, versions.items()))}."
    yield ""
    rows = (HEADS, ("---",) * len(HEADS), *(describe(ARCHITECTURES[name]) for name in sorted(ARCHITECTURES)))
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield NOTES.rstrip()
    for head, reasons in ((PAPER_ONLY_HEAD, PAPER_ONLY), (UNSERVED_HEAD, UNSERVED), (REFUSED_HEAD, REFUSED)):
        yield from ("", head, "| model_type | reason |", "| --- | --- |")
        yield from (f"| `{name}` | {reasons[name]} |" for name in sorted(reasons))


@click.command()
@click.option("-o", "output", type=click.Path(path_type=Path), default=PLACE, show_default=True)
def main(output: Path) -> None:
    """Write the table of families."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    output.write_text("\n".join(make_lines()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
