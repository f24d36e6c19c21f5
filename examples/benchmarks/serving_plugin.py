"""What the plugin costs, and whether a variant that is measured in place is as fast as a real start of it.

    python examples/benchmarks/serving_plugin.py MODEL [--load-format dummy] [--started] [-o serving_plugin.json]

MODEL is a folder. Engines are started as what they are: without the plugin, twice, which is the noise of such a
comparison; with the plugin and an allocation that gives every layer the model's own k; with vLLM's own --hf-overrides
for half of the k, and with an allocation that says the same. Those of one pair should be equally fast and answer the
same greedy tokens, as far as two starts of the same engine do.

Unless --started, beside them are measured in place, in a vLLM without the plugin, the model as it is, a mixed and a
uniform k at 75 and 50 % of its budget, and with --load-format dummy pruned models; and those at 50 % are started, too.
(What is pruned in place has other weights.)
"""

import json
import operator
from dataclasses import replace
from pathlib import Path

import click

from lexi_adapter.engines.workload import parse_workload
from lexi_adapter.environment import describe_call
from lexi_adapter.files import write_json
from lexi_adapter.model.shapes import RANDOM, TOP_K, describe_folder
from lexi_adapter.model.variants import Variant, allocate, make_variants
from lexi_adapter.speed import throughput

ALONE = {"VLLM_PLUGINS": ""}  # vLLM without any plugin
AGAIN, OWN, OVERRIDES, FRESH = "base, again", "plugin, own k", "hf-overrides, half k", "fresh: "


def find_variants(folder, load_format, started):
    """The variants, and the pairs of names that should be alike."""
    pruned = (0.25, 0.5) if load_format == RANDOM and not started else ()
    table = make_variants(
        folder, load_format=load_format, allocations={}, shares=(0.75, 0.5), dropped=pruned, narrowed=pruned
    )
    uniform, *others = sorted((v for v in table if "50 %" in v.name), key=lambda v: not v.name.startswith("uniform"))
    model = describe_folder(folder, load_format)
    own = allocate(model, dict.fromkeys(model.moe_layers, model.top_k))
    starts = (
        Variant(AGAIN, folder, environment=ALONE),
        Variant(OWN, folder, allocation=own),
        Variant(OVERRIDES, folder, {TOP_K: model.top_k // 2}, environment=ALONE),
        replace(uniform, name=FRESH + uniform.name),
    )
    pairs = [(AGAIN, "base"), (OWN, "base"), (OWN, AGAIN), (FRESH + uniform.name, OVERRIDES)]
    if started:
        return (Variant("base", folder, environment=ALONE), *starts), pairs
    pairs += [(uniform.name, OVERRIDES), *((variant.name, FRESH + variant.name) for variant in others)]
    starts += tuple(replace(variant, name=FRESH + variant.name) for variant in others)
    return (*(replace(variant, environment=ALONE) for variant in table), *starts), pairs


@click.command(help=__doc__.splitlines()[0])
@click.argument("folder")
@click.option("--load-format", default="auto", show_default=True)
@click.option("--workload", "workloads", multiple=True, default=("16x512x256", "16x1024x16"), show_default=True)
@click.option("--started", is_flag=True, help="Nothing in place: what the plugin costs, in five engines.")
@click.option("--answers", default=16, show_default=True, help="Greedy answers to compare.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--together", default=4, show_default=True, help="Engines on the card at once.")
@click.option("--engine", default="{}", help="Other arguments of vllm.LLM, as JSON.")
@click.option("--lock", "locks", multiple=True, help="A file for a card that others use too.")
@click.option("-o", "--output", default="serving_plugin.json", show_default=True)
def main(folder, load_format, workloads, started, answers, rounds, together, engine, locks, output):
    variants, pairs = find_variants(folder, load_format, started)
    made_by = describe_call("python examples/benchmarks/serving_plugin.py")

    def report(document):
        lines = {(line["variant"], line["workload"]): line for line in document["summary"]}
        answered = {variant["name"]: variant["answers"] for variant in document["variants"]}
        compared = [
            {
                "variant": variant,
                "against": other,
                "workload": workload,
                "ratio": lines[variant, workload]["median"] / lines[other, workload]["median"],
                "same_answers": sum(map(operator.eq, answered[variant], answered[other])),
                "answers": answers,
            }
            for variant, other in pairs
            for workload in document["workloads"]
            if {(variant, workload), (other, workload)} <= set(lines)
        ]
        write_json(output, {**document, "pairs": compared, "made_by": made_by})

    throughput.measure(
        variants,
        [parse_workload(text) for text in workloads],
        rounds=rounds,
        together=together,
        in_place=not started,
        answers=answers,
        seconds=0.5,
        locks=locks,
        engine={"load_format": load_format, "parallel": {}, **json.loads(engine)},
        report=report,
    )
    for pair in json.loads(Path(output).read_text())["pairs"]:
        click.echo(
            f"{pair['workload']}: {pair['variant']} / {pair['against']} = {pair['ratio']:.4f}, "
            f"{pair['same_answers']} of {pair['answers']} answers the same"
        )


if __name__ == "__main__":
    main()
