"""What the plugin costs, and whether a live engine's changed k is as fast as a real start with it.

    python examples/benchmarks/serving_plugin.py MODEL [--load-format dummy] [-o serving_plugin.json]

MODEL is a folder. Measured in turn, in rounds: vLLM without the plugin; with it and an allocation that gives every
layer the model's own k; with half of that k in every layer, beside vLLM's own --hf-overrides for the same; and with a
mixed k at half of the budget, from a fresh start and in place, in the engine that runs without the plugin. Variants
that should be the same model must answer the same: "answer" is the SHA-256 of greedy tokens.
"""

import json
from pathlib import Path

import click

from lexi_adapter import benchmark
from lexi_adapter.files import describe_call, write_json
from lexi_adapter.variants import TOP_K, Variant, allocate, describe, draw_top_k
from lexi_adapter.workloads import parse_workload

ALONE = {"VLLM_PLUGINS": ""}  # vLLM without any plugin
PAIRS = (  # what should be as fast as what, and answer the same
    ("plugin, own k", "no plugin"),
    ("plugin, half k", "hf-overrides, half k"),
    ("in place, half k", "hf-overrides, half k"),
    ("in place, mixed k", "plugin, mixed k"),
)


def make_variants(folder, config):
    model = describe(config)
    half = dict.fromkeys(model.moe_layers, model.top_k // 2)
    mixed = allocate(model, draw_top_k(model, sum(half.values()), seed=0))
    half, own = allocate(model, half), allocate(model, dict.fromkeys(model.moe_layers, model.top_k))
    return (
        Variant("no plugin", folder, environment=ALONE),
        Variant("in place, mixed k", folder, allocation=mixed, environment=ALONE),
        Variant("in place, half k", folder, allocation=half, environment=ALONE),
        Variant("plugin, own k", folder, allocation=own),
        Variant("plugin, mixed k", folder, allocation=mixed),
        Variant("plugin, half k", folder, allocation=half),
        Variant("hf-overrides, half k", folder, {TOP_K: model.top_k // 2}, environment=ALONE),
    )


@click.command(help=__doc__.splitlines()[0])
@click.argument("folder")
@click.option("--load-format", default="auto", show_default=True)
@click.option("--workload", "workloads", multiple=True, default=("16x512x256",), show_default=True)
@click.option("--rounds", default=7, show_default=True)
@click.option("--together", default=3, show_default=True, help="Engines on the card at once.")
@click.option("--engine", default="{}", help="Other arguments of vllm.LLM, as JSON.")
@click.option("-o", "--output", default="serving_plugin.json", show_default=True)
def main(folder, load_format, workloads, rounds, together, engine, output):
    made_by = describe_call("python examples/benchmarks/serving_plugin.py")

    def report(document):
        lines = {(line["variant"], line["workload"]): line for line in document["summary"]}
        answers = {variant["name"]: variant["answer"] for variant in document["variants"]}
        pairs = [
            {
                "variant": variant,
                "against": other,
                "workload": workload,
                "ratio": lines[variant, workload]["median"] / lines[other, workload]["median"],
                "same_answer": answers[variant] == answers[other],
            }
            for variant, other in PAIRS
            for workload in document["workloads"]
            if variant in answers and other in answers
        ]
        write_json(output, {**document, "pairs": pairs, "made_by": made_by})
        for pair in pairs:
            click.echo(
                f"{pair['workload']}: {pair['variant']} / {pair['against']} = {pair['ratio']:.4f}, "
                f"answers {'the same' if pair['same_answer'] else 'differ'}"
            )

    benchmark.measure(
        make_variants(folder, json.loads((Path(folder) / "config.json").read_text())),
        [parse_workload(text) for text in workloads],
        rounds=rounds,
        together=together,
        in_place=True,
        engine={"load_format": load_format, "parallel": {}, **json.loads(engine)},
        report=report,
    )


if __name__ == "__main__":
    main()
