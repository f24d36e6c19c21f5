"""Throughput of the paper's six models with fewer active experts and with pruned ones: serving tables of RESULTS.md.

    python examples/benchmarks/serving_models.py [--model NAME ...] [--gpus N] [-o FOLDER] [-- --kernels ...]
    python examples/benchmarks/serving_models.py --table -o FOLDER    # print only, of files that are there

Runs `lexi-adapter bench` on the shapes in `configs/` with random weights, up to --at-once models side by side, each
within --limit seconds, and prints what all result files in FOLDER say as one table: tokens/s of the base, and the
others' factors on it. A second table says where a card's time goes, if files hold kernels. Models are dealt to the
host's cards, --tensor-parallel-size of them each, the DeepSeek models at most two, as in the paper; on one card
nothing is measured while another model starts or is measured. All variants of a model are measured in one engine, in
place, so that their runs are interleaved and the model has to fit only once; MiniCPM's k is compiled into its graph, so
that each of its variants is started.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click

SHAPES = Path(os.path.relpath(Path(__file__).parent / "configs"))  # as results name it
BENCH = [sys.executable, "-c", "from lexi_adapter.cli.main import main; main()", "bench"]
SHARES = (0.75, 0.5)
PRUNED = (0.25, 0.5)
CARDS = (("deepseek-v2-lite", 2), ("deepseek-vl2-tiny", 2))
OWN_CODE = {"deepseek-vl2-tiny", "minicpm-moe-8x2b"}  # configs with a configuration.py
UNSURE = 0.2
PREFILL = "16x1024x16"  # where kernels are compared: shorter outputs are recorded whole
COMPILED_K = {"minicpm-moe-8x2b"}
COLUMNS = (
    *(f"{kind} {100 * share:g} %" for share in SHARES for kind in ("mixed", "uniform")),
    *(f"{kind}-pruned {100 * share:g} %" for kind in ("inter", "intra") for share in PRUNED),
)


def make_command(name, output, *, workloads, rounds, together, pruned, cards, locks, others):
    options = ["--load-format", "dummy", "--rounds", str(rounds), "-o", str(output), *others]
    options += [word for workload in workloads for word in ("--workload", workload)]
    options += [word for share in SHARES for word in ("--budget-share", f"{100 * share:g}%")]
    kinds = ("--drop-experts", "--narrow-experts")
    options += [word for share in filter(None, pruned) for kind in kinds for word in (kind, f"{100 * share:g}%")]
    options += ["--together", str(together)] if name in COMPILED_K else ["--in-place"]
    options += ["--engine", json.dumps({"trust_remote_code": True})] if name in OWN_CODE else []
    options += ["--tensor-parallel-size", str(len(cards))] if len(cards) > 1 else []
    options += [word for card in cards for word in ("--lock", str(Path(locks) / card))]
    return [*BENCH, str(SHAPES / name), *options]


def deal(names, there, most, fewer):
    """The cards of each model, `most` or what `fewer` allows it, one model after the other around the host."""
    first = 0
    for name in names:
        count = min(most, fewer.get(name, most))
        first += -first % count  # pairs begin at even cards, and so on
        yield name, [there[(first + i) % len(there)] for i in range(count)]
        first += count


def find_column(variant):
    """The table's column of a variant, by its name in the result file."""
    kind, share = variant.split()[0], " ".join(variant.split()[-2:])
    return f"{kind} {share}"


def mark(line, figure):
    """The figure, with a ~ before it where highest and lowest run are more than `UNSURE` of the median apart."""
    return f"{'~' * (line['highest'] - line['lowest'] > UNSURE * line['median'])}{figure}"


def name_model(document):
    """The model, and on how many cards it ran where that is more than one."""
    cards = document["variants"][0]["engine"]["workers"]
    return Path(document["model"]).name + (f", {cards} cards" if cards > 1 else "")


def make_table(documents):
    """Markdown: one row a model and workload."""
    yield f"| model | batch x input x output | base [tokens/s] | {' | '.join(COLUMNS)} |"
    yield f"|---|---|{'---|' * (1 + len(COLUMNS))}"
    for document in documents:
        for workload in document["workloads"]:
            lines = [line for line in document["summary"] if line["workload"] == workload]
            factors = {find_column(line["variant"]): mark(line, f"{line['speedup']:.2f}") for line in lines[1:]}
            cells = [name_model(document), workload, mark(lines[0], f"{lines[0]['median']:,.0f}")]
            yield f"| {' | '.join([*cells, *(factors.get(column, '') for column in COLUMNS)])} |"


def make_kernels_table(documents):
    """Markdown: milliseconds of one card's kernels at `PREFILL`, of the base and of half of the active experts.

    The half is the mixed allocation, or uniform k where there is no mixed one. No lines if no kernels were recorded.
    """
    documents = [document for document in documents if "kernels" in document]
    if documents:
        yield "| model | variant | MoE kernels [ms] | other compute [ms] | transfer [ms] |"
        yield "|---|---|---|---|---|"
    for document in documents:
        records = [record for record in document["kernels"] if record["workload"] == PREFILL]
        halves = [record for record in records if find_column(record["variant"]) in ("mixed 50 %", "uniform 50 %")]
        for record in [record for record in records if record["variant"] == "base"] + halves[:1]:
            seconds = record["seconds"]
            rest = sum(seconds.values()) - seconds["moe"] - seconds["communication"]
            times = (seconds["moe"], rest, record["transfer"])
            times = ("" if value is None else f"{1000 * value:.1f}" for value in times)
            yield f"| {name_model(document)} | {record['variant']} | {' | '.join(times)} |"


def show(folder):
    documents = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("serving_bench_*.json"))]
    for line in make_table(documents):
        click.echo(line)
    for number, line in enumerate(make_kernels_table(documents)):
        click.echo(line if number else f"\n{line}")


@click.command(help=__doc__.splitlines()[0])
@click.option("--model", "names", multiple=True, help="[default: all in configs/]")
@click.option("--workload", "workloads", multiple=True, default=("16x512x256", "16x1024x16"), show_default=True)
@click.option("--pruned", multiple=True, type=float, default=PRUNED, help="Shares to prune; 0: none.  [0.25, 0.5]")
@click.option("--rounds", default=5, show_default=True)
@click.option("--together", default=2, show_default=True, help="Engines of one model at once, where each is started.")
@click.option("--gpus", default=1, show_default=True, help="Cards of this host to deal the models to.")
@click.option("--tensor-parallel-size", "most", default=1, show_default=True, help="Cards of one model, at most.")
@click.option("--most-cards", "fewer", type=(str, int), multiple=True, default=CARDS, help="The same for one model.")
@click.option("--at-once", default=1, show_default=True, help="Models at the same time; they have to fit together.")
@click.option("--limit", default=3600, show_default=True, help="Seconds for one model.")
@click.option("-o", "--output", "folder", default=".", help="Result files go here, serving_bench_NAME.json.")
@click.option("--table", "only_show", is_flag=True, help="Measure nothing: print what the files in FOLDER say.")
@click.argument("others", nargs=-1, type=click.UNPROCESSED)
def main(names, gpus, most, fewer, at_once, limit, folder, only_show, **settings):
    if only_show:
        return show(folder)
    names = names or sorted(path.parent.name for path in SHAPES.glob("*/config.json"))
    there = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")[:gpus]
    if len(there) < most:
        raise click.UsageError(f"--tensor-parallel-size {most} is more than the {len(there)} cards that there are")

    def run(place, locks):
        name, cards = place
        output = Path(folder) / f"serving_bench_{name}.json"
        command = make_command(name, output, cards=cards, locks=locks, **settings)
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(cards)}
        with subprocess.Popen(command, env=environment, start_new_session=True) as bench:
            try:
                outcome = f"exit status {bench.wait(limit)}"
            except subprocess.TimeoutExpired:
                os.killpg(bench.pid, signal.SIGKILL)  # the engines' processes too, which hold the card's memory
                outcome = f"not done after {limit} s"
        if bench.returncode:
            click.echo(f"{name}: {outcome}, going on with the next", err=True)

    with tempfile.TemporaryDirectory() as locks, ThreadPoolExecutor(at_once) as pool:
        list(pool.map(lambda place: run(place, locks), deal(names, there, most, dict(fewer))))
    show(folder)


if __name__ == "__main__":
    main()
