"""Tables and figures show all numbers and every name as it is, wherever they go."""

import dataclasses
import io
import itertools
import random
import re
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
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
    points = tuple(
        Point(name, "allocation", 123456.0, 1.0, 2e5, 1.2345, 0.0678, method=name, label="62.5 %") for name in names
    )
    return tuple(Panel("mine[/b]", "score $[x]", workload, points) for workload in WORKLOADS)


STEP = Step(32, 1.0, (1.25, 2.5) * 8)
LOAD = Load(experts=64, max_over_mean=1.25, variation=0.75, idle=0.125, active=31.5)
TABLES = {
    "bench": lambda: (tables.tabulate_bench(make_bench()), (*NAMES, *WORKLOADS, "123,456", "0.25x")),
    "kernels": lambda: (tables.tabulate_kernels(make_bench()), (*NAMES, *WORKLOADS, "12345.67", "99875.00")),
    "eval": lambda: (tables.tabulate_eval(make_eval()), (*NAMES, "mine[/b]", "score[x]", "-0.9876", "0.0543")),
    "tradeoff": lambda: (tables.tabulate_tradeoff(make_panels()), (*NAMES, *WORKLOADS, "123,456", "0.0678", "62.5 %")),
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


def catch_figures(monkeypatch):
    """The figures that are drawn from now on."""
    caught, save = [], figures.save_figure
    monkeypatch.setattr(figures, "save_figure", lambda figure, kind: caught.append(figure) or save(figure, kind))
    return caught


def make_crowd(number, seed):
    """A panel of `number` points of four methods, crowded as good allocations are."""
    rng, points = random.Random(seed), []
    for place in range(number):
        method = ("base", "ours/a-*.json", "uniform k", "pruned-*")[place % 4 if place else 0]
        kind = {"base": "base", "uniform k": "uniform", "pruned-*": "folder"}.get(method, "allocation")
        rate, value = 1000 + 40 * rng.random(), 0.5 + 0.02 * rng.random()
        label = "base" if kind == "base" else f"{100 * rng.random():.3g} %"
        points.append(Point(str(place), kind, rate, rate - 1, rate + 1, value, 0.001, method, label))
    return Panel("passkey 1024", "accuracy", "16x512x512", tuple(points))


def find_boxes(axes, renderer):
    for text in axes.texts:
        text.update_positions(renderer)
    return [Text.get_window_extent(text, renderer) for text in axes.texts]  # without the line to the point


def list_overlaps(boxes):
    return [(one, other) for one, other in itertools.combinations(boxes, 2) if one.overlaps(other)]


@pytest.mark.parametrize("number, seed", [(2, 0), (9, 1), (16, 2), (24, 3), (60, 4)])
def test_labels_of_a_tradeoff_overlap_neither_each_other_nor_points_and_stay_inside(monkeypatch, number, seed):
    caught = catch_figures(monkeypatch)
    panel = make_crowd(number, seed)
    figures.draw_tradeoff("/models/OLMoE-1B-7B/", [panel], "png")
    (figure,) = caught
    axes, renderer = figure.axes[0], FigureCanvasAgg(figure).get_renderer()
    boxes = find_boxes(axes, renderer)
    assert len(boxes) == number if number <= 24 else len(boxes) > 24
    assert list_overlaps(boxes) == []
    inside = axes.get_window_extent(renderer)
    for point in panel.points:
        x, y = axes.transData.transform((point.throughput, point.value))
        assert not any(box.x0 < x < box.x1 and box.y0 < y < box.y1 for box in boxes)
    assert all(inside.x0 <= box.x0 and box.x1 <= inside.x1 for box in boxes)
    assert all(inside.y0 <= box.y0 and box.y1 <= inside.y1 for box in boxes)


def test_a_method_s_points_are_joined_in_order_of_their_speed(monkeypatch):
    caught = catch_figures(monkeypatch)
    panel = make_crowd(12, 5)
    figures.draw_tradeoff("a/b/model", [panel], "svg")
    (figure,) = caught
    drawn = [line.get_xydata().tolist() for line in figure.axes[0].lines]
    for method in {point.method for point in panel.points}:
        points = sorted([p.throughput, p.value] for p in panel.points if p.method == method)
        assert points in drawn
    assert {text.get_text() for text in figure.legends[0].texts} == {point.method for point in panel.points}
    assert figure.get_suptitle().startswith("model; ")


def test_titles_name_the_model_and_not_its_path(monkeypatch):
    caught = catch_figures(monkeypatch)
    for model in ("/data/models/OLMoE", "../OLMoE/", "OLMoE"):
        for draw in (figures.draw_bench, figures.draw_bench_lines):
            draw(make_bench() | {"model": model}, "svg")
    assert {figure.get_suptitle() for figure in caught} == {"OLMoE"}
    assert tables.name_model(".") == Path.cwd().name


def test_throughput_over_active_experts_has_a_line_a_pruning_level(monkeypatch):
    caught, rates, variants, lines = catch_figures(monkeypatch), {}, [], []
    for level in (None, "inter-pruned 25 %", "smaller/"):
        for k in (1, 2, 4):
            name = f"{level}, k = {k}"
            rates[level, k] = 1000.0 / k + len(name)
            variants.append({"name": name, "overrides": {}, "pruning": level, "engine": {"top_k": {"0": k, "1": k}}})
    variants.append({"name": "a.json", "overrides": {}, "pruning": None, "engine": {"top_k": {"0": 1, "1": 4}}})
    for variant in variants:
        k = variant["engine"]["top_k"]["0"]
        rate = rates[variant["pruning"], k]
        lines += [
            {"variant": variant["name"], "workload": work, "median": rate, "lowest": rate - 1, "highest": rate + 2}
            for work in WORKLOADS
        ]
    document = {"model": "m", "variants": variants, "workloads": list(WORKLOADS), "summary": lines}
    figures.draw_bench_lines(document, "pdf")
    (figure,) = caught
    assert [text.get_text() for text in figure.legends[0].texts] == ["not pruned", "inter-pruned 25 %", "smaller/"]
    for axes in figure.axes:
        drawn = [line.get_xydata().tolist() for line in axes.lines]
        for level in (None, "inter-pruned 25 %", "smaller/"):
            assert [[k, rates[level, k]] for k in (1, 2, 4)] in drawn
        assert [2.5, rates[None, 1]] in [line[0] for line in drawn]
        assert [text.get_text() for text in axes.texts] == ["a.json"]
