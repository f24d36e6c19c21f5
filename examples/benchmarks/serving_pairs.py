"""What the plugin costs: pairs of engines that should be equally fast, from results of serving_plugin.py.

    python examples/benchmarks/serving_pairs.py FILE ...
    python examples/benchmarks/serving_pairs.py --pair exponent.json plain.json FILE ...    # of lexi-adapter bench

Runs are interleaved, so the pair's throughputs are compared round by round: the median of the ratios over the rounds,
their mean and its standard error. Beside it the ratio of the medians of all runs and that of the fastest runs, which
what else a host does at times can only make slower, and how many greedy answers are the same. The last lines are over
all files.
"""

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean, median, stdev

import click


def compare_rounds(document, variant, other, workload):
    """Throughput of a variant relative to the other's, of every round in which both ran."""
    rounds = defaultdict(lambda: defaultdict(list))
    for run in document["runs"]:
        if run["workload"] == workload:
            rounds[run["round"]][run["variant"]].append(run["seconds"])
    return [
        median(times[other]) / median(times[variant]) for times in rounds.values() if {variant, other} <= times.keys()
    ]


def compare_answers(document, variant, other):
    """How many greedy answers are the same; older results hold none."""
    answers = {each["name"]: each.get("answers") for each in document["variants"]}
    pairs = list(zip(answers[variant] or (), answers[other] or (), strict=False))
    return f"{sum(ours == theirs for ours, theirs in pairs)} of {len(pairs)}" if pairs else ""


def compare_pair(document, pair):
    """A row of the table, without its file, and the ratios by round."""
    variant, other, workload = pair["variant"], pair["against"], pair["workload"]
    lines = {line["variant"]: line for line in document["summary"] if line["workload"] == workload}
    ratios = compare_rounds(document, variant, other, workload)
    whole = [f"{lines[variant][name] / lines[other][name]:.3f}" for name in ("median", "highest")]
    names = (f"{variant} / {other}", workload)
    return (*names, *show_ratios(ratios), *whole, compare_answers(document, variant, other)), ratios


def show_ratios(ratios):
    """How many rounds, their median, their mean and its standard error."""
    error = f"{stdev(ratios) / len(ratios) ** 0.5:.3f}" if len(ratios) > 1 else ""
    return len(ratios), f"{median(ratios):.3f}", f"{mean(ratios):.3f}", error


def list_pairs(document, asked):
    """The pairs that were asked for at every workload, or else those that the file names."""
    if not asked:
        return document["pairs"]
    pairs = [(variant, other, workload) for variant, other in asked for workload in document["workloads"]]
    return [dict(zip(("variant", "against", "workload"), pair, strict=True)) for pair in pairs]


def make_rows(documents, asked=()):
    """The table: one row a file, pair and workload, then one a pair over all of them."""
    yield ("file", "pair", "workload", "rounds", "by round", "mean", "±", "of medians", "of fastest", "same answers")
    found = defaultdict(list)
    for name, document in documents.items():
        for pair in list_pairs(document, asked):
            row, ratios = compare_pair(document, pair)
            found[row[0]] += ratios
            yield (name, *row)
    for pair, ratios in found.items():
        yield ("all", pair, "", *show_ratios(ratios), "", "", "")


@click.command(help=__doc__.splitlines()[0])
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--pair", "asked", type=(str, str), multiple=True, help="Two variants.  [default: the file's pairs]")
def main(files, asked):
    for row in make_rows({file.stem: json.loads(file.read_text()) for file in files}, asked):
        click.echo(" | ".join(map(str, row)))


if __name__ == "__main__":
    main()
