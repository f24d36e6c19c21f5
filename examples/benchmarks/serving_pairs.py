"""What the plugin costs: pairs of engines that should be equally fast, from results of serving_plugin.py.

    python examples/benchmarks/serving_pairs.py FILE ...

Runs are interleaved, so the pair's throughputs are compared round by round: the median of the ratios over the rounds,
and the standard error of their mean. Beside it the ratio of the medians of all runs and that of the fastest runs, which
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
    """How many rounds, their median and the standard error of their mean."""
    error = f"{stdev(ratios) / len(ratios) ** 0.5:.3f}" if len(ratios) > 1 else ""
    return len(ratios), f"{median(ratios):.3f}", error


def make_rows(documents):
    """The table: one row a file, pair and workload, then one a pair over all of them."""
    yield ("file", "pair", "workload", "rounds", "by round", "±", "of medians", "of fastest", "same answers")
    found = defaultdict(list)
    for name, document in documents.items():
        for pair in document["pairs"]:
            row, ratios = compare_pair(document, pair)
            found[row[0]] += ratios
            yield (name, *row)
    for pair, ratios in found.items():
        yield ("all", pair, "", *show_ratios(ratios), f"mean {mean(ratios):.3f}", "", "")


@click.command(help=__doc__.splitlines()[0])
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(files):
    for row in make_rows({file.stem: json.loads(file.read_text()) for file in files}):
        click.echo(" | ".join(map(str, row)))


if __name__ == "__main__":
    main()
