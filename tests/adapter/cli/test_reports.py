"""Tables and figures show all numbers and every name as it is, wherever they go."""

import dataclasses
import io
import re

import pytest
from matplotlib.text import Text

from lexi_adapter.cli import console, figures, tables
from lexi_adapter.evaluation.tradeoff import Panel, Point
from lexi_adapter.speed import throughput
from lexi_adapter.speed.expert_load import Load
from lexi_adapter.speed.latency import Check, Step

LONG = "results/of/a/search/with/a/long/name/allocation-"
NAMES = ("base", "d[/x].json", "a [bold]x.json", ":smile:.json", "$x^$.json", LONG + "1.json", LONG + "2.json")
WORKLOADS = ("16x1024x512", "1024x16384x65536")


def make_bench(names=NAMES):
    engine = {"top_k": {"0": 3, "1": 2}}
    lines = [
        throughput.Summary(name, workload, 123456.0 + place, 110000.0, 130000.0, 0.25)
        for place, name in enumerate(names)
        for workload in WORKLOADS
    ]
    return {
        "model": "weights [/i]/$_$",
        "variants": [{"name": name, "overrides": {}, "engine": engine} for name in names],
        "workloads": list(WORKLOADS),
        "summary": [dataclasses.asdict(line) for line in lines],
        "kernels": [
            {
                "variant": name,
                "workload": workload,
                "seconds": {"moe": 12.34567, "other": 0.5},
                "transfer": 0.25,
                "exposed_communication": None,
                "busy": 99.875,
            }
            for name in names
            for workload in WORKLOADS
        ],
    }


def make_eval(names=NAMES):
    numbers = {"value": 1.2345, "stderr": 0.0678, "difference": -0.9876, "difference_stderr": 0.0543}
    return {
        "model": "weights",
        "setting": {"backend": "transformers"},
        "summary": [{"variant": name, "task": "mine[/b]", "metric": "score[x]", **numbers} for name in names],
    }


def make_panels(names=NAMES):
    points = tuple(Point(name, "allocation", 123456.0, 1.0, 2e5, 1.2345, 0.0678) for name in names)
    return tuple(Panel("mine[/b]", "score $[x]", workload, points) for workload in WORKLOADS)


STEP = Step(32, 1.0, (1.25, 2.5) * 8)
LOAD = Load(experts=64, max_over_mean=1.25, variation=0.75, idle=0.125, active=31.5)
TABLES = {
    "bench": lambda: (tables.tabulate_bench(make_bench()), (*NAMES, *WORKLOADS, "123,456", "0.25x")),
    "kernels": lambda: (tables.tabulate_kernels(make_bench()), (*NAMES, *WORKLOADS, "12345.67", "99875.00")),
    "eval": lambda: (tables.tabulate_eval(make_eval()), (*NAMES, "mine[/b]", "score[x]", "-0.9876", "0.0543")),
    "tradeoff": lambda: (tables.tabulate_tradeoff(make_panels()), (*NAMES, *WORKLOADS, "123,456", "0.0678")),
    "latency": lambda: (tables.tabulate_latency([STEP]), ("32", "1.2500", "2.5000", "k=16")),
    "checks": lambda: (
        tables.tabulate_checks([Check(work, {0: 12, 1: 3}, 1.5, 1.25) for work in WORKLOADS]),
        (*WORKLOADS, "15", "1.500", "1.250", "+20.0"),
    ),
    "loads": lambda: (tables.tabulate_loads({name: {11: LOAD} for name in NAMES}), (*NAMES, "1.25", "12.5", "31.5")),
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_tables_cut_nothing_and_show_names_as_they_are(monkeypatch, kind, stream):
    table, expected = TABLES[kind]()
    monkeypatch.setenv("COLUMNS", "40")
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", shown := stream())
        console.print_table(table)
    text = re.sub(r"\x1b\[[0-9;]*m", "", shown.getvalue())
    assert "\u2026" not in text
    assert [part for part in expected if part not in text] == []


@pytest.mark.parametrize(("encoding", "spelt"), [("ascii", "+- 8.1 %"), ("latin-1", "± 8.1 %"), ("utf-8", "± 8.1 %")])
def test_what_stdout_cannot_show_is_spelt_out(monkeypatch, encoding, spelt):
    names = ("base", "k\u2082.json", "caf\udce9.json")
    shown = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", shown)
        console.print_table(tables.tabulate_bench(make_bench(names)))
    text = shown.buffer.getvalue().decode(encoding)
    assert spelt in text and "caf\\udce9.json" in text
    assert ("k\u2082.json" if encoding == "utf-8" else "k\\u2082.json") in text


@pytest.mark.parametrize(
    ("module", "draw", "make"),
    [
        (figures, lambda document: figures.draw_bench(document, "svg"), make_bench),
        (figures, lambda panels: figures.draw_tradeoff("weights/$_$", panels, "svg"), make_panels),
    ],
)
def test_figures_show_names_as_they_are(monkeypatch, module, draw, make):
    figures = []
    save = module.save_figure
    monkeypatch.setattr(module, "save_figure", lambda figure, kind: figures.append(figure) or save(figure, kind))
    data = draw(make((*NAMES, "caf\udce9.json")))
    assert data.startswith(b"<?xml") and draw(make((*NAMES, "caf\udce9.json"))) == data
    texts = figures[0].findobj(Text)
    assert {*NAMES, "caf\\udce9.json"} <= {text.get_text() for text in texts}
    assert not any(text.get_parse_math() for text in texts)
