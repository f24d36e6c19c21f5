"""The arithmetic of benchmarks, cost tables and loads, judged by loops; no engine runs."""

import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import lexi_adapter
from lexi_adapter.allocation import CompensationFile, ModelIdentity, read_allocation, to_document
from lexi_adapter.cli import figures, tables
from lexi_adapter.cli.main import main
from lexi_adapter.engines import options, worker
from lexi_adapter.engines.measuring import describe_engine, switch_layers, time_run
from lexi_adapter.engines.options import make_options
from lexi_adapter.engines.process import EngineError
from lexi_adapter.engines.workload import STEPS, Workload, fit, parse_workload
from lexi_adapter.errors import AdapterError, AllocationError
from lexi_adapter.evaluation import vllm_backend
from lexi_adapter.model.variants import Variant, allocate
from lexi_adapter.speed import expert_load, latency, throughput

TINY = Path(lexi_adapter.__file__).parent.parent / "examples" / "tiny-olmoe"
MODEL = ModelIdentity("olmoe", 3, 8, 3, (0, 1, 2), "layers.{}.gate", "num_experts_per_tok", "0" * 64)
WORKLOAD = Workload(4, 10, 6)
DUMMY = ("--load-format", "dummy")
seconds = st.floats(0.01, 100)


def make_variants():
    half = allocate(MODEL, {0: 1, 1: 2, 2: 1})
    return (
        Variant("base", "here"),
        Variant("half", "here", allocation=half),
        Variant("compensated", "here", allocation=replace(half, gate_exponent=0.5)),
        Variant("pruned", "here", {"num_experts": 6}, kept={"experts": (6, 8)}),
        Variant("elsewhere", "there"),
        Variant("alone", "here", environment={"VLLM_PLUGINS": ""}),
    )


def test_every_variant_has_an_engine_and_in_place_those_of_the_same_weights_share_one():
    variants = make_variants()
    assert throughput.assign(variants, in_place=False) == tuple((variant, (variant,)) for variant in variants)
    (base, guests), *others = throughput.assign(variants, in_place=True)
    assert base.name == "base" and [variant.name for variant in guests] == ["base", "half", "pruned"]
    assert [variant.name for variant, _ in others] == ["compensated", "elsewhere", "alone"]
    (_, guests), *others = throughput.assign(variants, in_place=True, experts_spread=True)
    assert [variant.name for variant in guests] == ["base", "half"] and "pruned" in [v.name for v, _ in others]
    whole, half, compensated = variants[0], variants[1], next(v for v in variants if v.name == "compensated")
    (host, guests), *others = throughput.assign((compensated, half, whole), in_place=True)
    assert host is compensated and guests == (compensated, half) and [variant for variant, _ in others] == [whole]


@given(st.lists(seconds, min_size=3, max_size=3), st.lists(seconds, min_size=3, max_size=3))
def test_throughput_is_tokens_over_seconds(base, other):
    runs = [
        throughput.Run(name, str(WORKLOAD), turn, times[turn])
        for turn in range(3)
        for name, times in (("base", base), ("other", other))
    ]
    first, second = throughput.summarise(runs, "base")
    for line, times in ((first, base), (second, other)):
        rates = sorted(64 / time for time in times)
        assert (line.lowest, line.median, line.highest) == tuple(rates)
    assert second.speedup == second.median / first.median and first.speedup == 1


@given(
    st.floats(0.1, 10),
    st.lists(st.floats(0.1, 10), min_size=3, max_size=3),
    st.floats(0.1, 10),
    st.lists(st.floats(0.1, 10), min_size=3, max_size=3),
    st.lists(st.integers(1, 3), min_size=3, max_size=3),
)
def test_steps_give_back_what_runs_were_made_of(other_reading, reading, other_writing, writing, chosen):
    def run(top_k):
        """Seconds to the first and to the last token if layers cost what they cost; () leaves them out."""
        first = other_reading + sum(reading[k - 1] for k in top_k)
        step = other_writing + sum(writing[k - 1] for k in top_k)
        return first, first + step * (WORKLOAD.output_length - 1)

    found = {(k, WORKLOAD): run([k] * 3 if k else []) for k in range(4)}
    steps = latency._divide(WORKLOAD, found, 4, 3)
    assert [step.tokens for step in steps] == [40, 4]
    for step, other, layer in zip(steps, (other_reading, other_writing), (reading, writing), strict=True):
        assert step.other_ms == pytest.approx(1e3 * other)
        assert step.layer_ms == pytest.approx([1e3 * value for value in layer])
    top_k = dict(enumerate(chosen))
    assert latency.predict(steps, WORKLOAD, top_k) == pytest.approx(run(chosen)[1])
    measured = {**found, (4, WORKLOAD): run(chosen)}
    (check,) = latency._compare(MODEL, [WORKLOAD], steps, measured, 4, [top_k])
    assert check.measured_speedup == pytest.approx(run([3] * 3)[1] / run(chosen)[1])
    assert check.error == pytest.approx(0, abs=1e-6)


def test_a_step_that_layers_make_faster_is_refused():
    found = {(k, WORKLOAD): (1.0, 2.0) for k in range(4)}
    with pytest.raises(AdapterError, match="a step of 40 tokens got no slower with MoE layers"):
        latency.check_steps(latency._divide(WORKLOAD, found, 4, 3))


class Card:
    """An engine in which a step takes 1 s, 0.25 s more for each of its 3 layers' k, and more in later rounds."""

    def __init__(self, drift, bump=0.0):
        self.k, self.drift, self.bump = None, drift, bump

    def call(self, function, *arguments):
        if function is switch_layers:
            self.k = arguments[0] and arguments[0][0]
        elif function is time_run:
            workload, turn = arguments
            step = 1 + 0.25 * (self.k or 0) * 3 + (self.bump if self.k == 2 else 0)
            return (step + (self.drift * turn if self.k else 0)) * workload.output_length
        return {"top_k": {0: 3}, "device": "a card"}


def measure_steps(monkeypatch, card, rounds=3):
    @contextmanager
    def start(wanted, **_):
        yield [card]

    told = []
    monkeypatch.setattr(latency, "measure_engines", start)
    engine = {"load_format": "dummy", "parallel": {}, "enforce_eager": True}
    steps, _, facts = latency.measure(
        "here", MODEL, [WORKLOAD], rounds=rounds, checks=0, engine=engine, progress=lambda *words: told.append(words)
    )
    assert told[0][:2] == (0, 4 * (rounds + 1)) and told[-1][:2] == 2 * (4 * (rounds + 1),)
    return steps, latency.make_document(MODEL, steps, [], facts, {})


def test_the_spread_over_rounds_is_shown_and_written(monkeypatch):
    steps, document = measure_steps(monkeypatch, Card(drift=0.3))
    for step in steps:
        assert step.other_spread == pytest.approx(0, abs=1e-9)
        assert step.layer_spread == pytest.approx([100.0] * 3)  # rounds 1 to 3: 0.3 s apart, over 3 layers
    assert document["made_by"]["spread_ms"]["4"]["layer_ms"] == pytest.approx([100.0] * 3)
    # Three rounds 100 ms apart vary by 100 ms; the median's standard error is 1.2533 times that of their mean.
    error = 1.2533141373155 * 100 / 3**0.5
    errors = document["steps"]["4"]["layers_stderr"]
    assert list(errors) == list(document["steps"]["4"]["layers"])
    assert all(row == pytest.approx([error] * 3) for row in errors.values())
    steps, document = measure_steps(monkeypatch, Card(drift=0.3), rounds=1)
    assert steps[0].other_spread is None and "spread_ms" not in document["made_by"]
    assert "layers_stderr" not in document["steps"]["4"]


def test_a_k_that_costs_less_than_a_smaller_one_is_named(monkeypatch):
    steps, _ = measure_steps(monkeypatch, Card(drift=0.0))
    assert list(latency.find_dips(steps)) == []
    steps, _ = measure_steps(monkeypatch, Card(drift=0.0, bump=1.5))
    for line, tokens in zip(latency.find_dips(steps), (4, 40), strict=True):
        words = (
            f"in a step of {tokens} tokens a layer takes less time at k = 3 than at k = 2: 750.0000 and 1000.0000 ms"
        )
        assert line == f"{words}, beyond the spread of the rounds"
    steps, _ = measure_steps(monkeypatch, Card(drift=0.9, bump=1.5))
    assert all(
        line.endswith("within the spread of the rounds; more --rounds tell") for line in latency.find_dips(steps)
    )


def test_the_default_steps_are_those_of_the_search_and_of_a_size_that_the_model_reads():
    assert {STEPS.batch, STEPS.batch * STEPS.input_length} == {16, 16384}  # of `--mix 16:1024,16384:1`
    assert fit(STEPS, None) == fit(STEPS, 4096) == STEPS
    for positions in (1024, 1152, 300):
        fitted = fit(STEPS, positions)
        assert fitted.input_length + fitted.output_length + 1 <= positions < 2 * fitted.input_length + 129
    latency.check_workloads([fit(STEPS, 10)])  # too small for any: the engine says so


def test_the_cost_table_is_what_a_search_reads():
    steps = [latency.Step(40, 1.5, (0.1, 0.2, 0.3)), latency.Step(4, 0.5, (0.01, 0.02, 0.03))]
    facts = {"device": "a card", "dtype": "bfloat16", "top_k": {0: 3}}
    check = latency.Check("4x10x6", {0: 1, 1: 1, 2: 1}, 1.2, 1.0)
    document = latency.make_document(MODEL, steps, [check], facts, {"lexi_adapter": "0"})
    assert json.loads(json.dumps(document)) == {
        "format": "lexi-cost",
        "version": 1,
        "model": {
            "model_type": "olmoe",
            "num_hidden_layers": 3,
            "num_experts": 8,
            "top_k": 3,
            "moe_layers": [0, 1, 2],
        },
        "device": "a card",
        "steps": {
            "40": {"other_ms": 1.5, "layers": {layer: [0.1, 0.2, 0.3] for layer in "012"}},
            "4": {"other_ms": 0.5, "layers": {layer: [0.01, 0.02, 0.03] for layer in "012"}},
        },
        "made_by": {
            "lexi_adapter": "0",
            "engine": {"device": "a card", "dtype": "bfloat16"},
            "checks": [
                {
                    "workload": "4x10x6",
                    "top_k": {"0": 1, "1": 1, "2": 1},
                    "predicted_speedup": 1.2,
                    "measured_speedup": 1.0,
                    "error": pytest.approx(0.2),
                }
            ],
        },
    }


@pytest.mark.parametrize(
    "workloads, message",
    [
        (["4x1x6"], "workload 4x1x6 has 1 input token; it needs at least 2"),
        (["4x10x1"], "workload 4x10x1 has 1 output token; it needs at least 2"),
        (["4x10x6", "4x5x6"], "workloads 4x10x6 and 4x5x6 both have steps of 4 tokens"),
        (["4x10x6", "40x5x6"], "workloads 4x10x6 and 40x5x6 both have steps of 40 tokens"),
    ],
)
def test_steps_that_cannot_be_told_apart_are_refused_before_an_engine_starts(workloads, message):
    with pytest.raises(AdapterError, match=message):
        latency.measure("", MODEL, map(parse_workload, workloads), rounds=1, checks=0, engine={}, progress=print)


@given(st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), min_size=1, max_size=5))
def test_loads_are_those_that_a_loop_finds(steps):
    kept = (0, 1, 3)
    totals = {expert: 0 for expert in kept}
    active = []
    for step in steps:
        for expert in kept:
            totals[expert] += step[expert]
        active.append(len([expert for expert in kept if step[expert] > 0]))
    mean = sum(totals.values()) / 3
    if mean == 0:
        with pytest.raises(AdapterError, match="no token reached"):
            expert_load.summarise(steps, dropped=(2,))
        return
    load = expert_load.summarise(steps, dropped=(2,))
    assert load.experts == 3 and load.active == pytest.approx(sum(active) / len(active))
    assert load.max_over_mean == pytest.approx(max(totals.values()) / mean)
    assert load.idle == len([total for total in totals.values() if total == 0]) / 3
    assert load.variation == pytest.approx((sum((t - mean) ** 2 for t in totals.values()) / 3) ** 0.5 / mean)


def test_the_least_used_experts_are_dropped():
    counts = {0: [[5, 1, 0, 2], [5, 0, 3, 2]], 1: [[1, 2, 3, 4]]}
    assert expert_load.find_least_used(counts, 0.5, 2) == {0: [1, 2], 1: [0, 1]}
    assert expert_load.find_least_used(counts, 0.0, 2) == {0: [], 1: []}
    with pytest.raises(AdapterError, match="leaves fewer than k = 3"):
        expert_load.find_least_used(counts, 0.5, 3)


def make_document():
    variants = make_variants()[:2]
    runs = [throughput.Run(v.name, str(w), t, 1.0 + t) for v in variants for w in (WORKLOAD,) for t in range(3)]
    facts = {v.name: {"device": "a card", "top_k": {0: 3, 1: 2}} for v in variants}
    return throughput.make_document(variants, [WORKLOAD], runs, facts, {v.name: [[1]] for v in variants})


def test_the_cost_of_a_compensation_is_shown_beside_the_same_k_without():
    def draw(*chosen):
        document = throughput.make_document(variants, [WORKLOAD], runs, facts, {v.name: [[1]] for v in variants})
        document["variants"] = [variant for variant in document["variants"] if variant["name"] in chosen]
        return tables.tabulate_compensation(document)

    corrected = allocate(MODEL, {0: 1, 1: 2, 2: 1})
    corrected = replace(corrected, gate_exponent=0.5, compensation=CompensationFile("a.safetensors", 4, "0f" * 32))
    variants = [*make_variants()[:3], Variant("corrected", "here", allocation=corrected)]
    seconds = {"base": 4.0, "half": 2.0, "compensated": 3.0, "corrected": 2.5}
    runs = [throughput.Run(name, str(WORKLOAD), turn, seconds[name] + turn) for name in seconds for turn in (0, 1, 2)]
    facts = {name: {"top_k": {0: 3} if name == "base" else {0: 1}} for name in seconds}
    _, table = draw(*seconds).renderables
    assert [list(column.cells) for column in table.columns] == [["corrected"], [f"{3.0 / 3.5:.3f}"]]
    assert draw("base", "compensated", "corrected") is None and draw("base", "half") is None


def test_an_engine_gets_the_place_of_a_compensation(tmp_path):
    named = CompensationFile("a.safetensors", 4, "0f" * 32)
    half = replace(allocate(MODEL, {0: 1, 1: 2, 2: 1}), gate_exponent=0.5, compensation=named, folder=str(tmp_path))
    made = make_options(Variant("half", "here", allocation=half), [WORKLOAD], load_format="dummy", parallel={})
    sent = json.loads(json.dumps(made["additional_config"]["lexi_allocation"]))
    assert read_allocation(sent).folder == str(tmp_path) and read_allocation(sent) == half


@pytest.mark.parametrize("file_format, start", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_the_figure_is_drawn(file_format, start):
    assert figures.draw_bench(make_document(), file_format).startswith(start)


def test_other_figures_are_refused():
    with pytest.raises(AdapterError, match="no figure as bench.gif"):
        figures.find_format("bench.gif")


def test_options_are_those_of_the_workloads_and_the_user_wins():
    variant = make_variants()[1]
    options = make_options(
        variant,
        [WORKLOAD, Workload(2, 100, 30)],
        load_format="dummy",
        parallel={"tensor_parallel_size": 4},
        dtype="float32",
        compilation_config={"mode": 0},
        additional_config={"other": 1},
    )
    assert options["max_model_len"] == 131 and options["max_num_seqs"] == 4 and options["tensor_parallel_size"] == 4
    assert options["num_gpu_blocks_override"] > 2 * 130 / 16
    assert options["compilation_config"] == {"cudagraph_capture_sizes": [2, 4], "mode": 0}
    assert options["dtype"] == "float32" and options["additional_config"]["lexi_allocation"]["budget"] == 4
    assert options["additional_config"]["other"] == 1
    pruned = make_options(make_variants()[3], [WORKLOAD], load_format="", parallel={}, hf_overrides={"rope_theta": 2})
    assert pruned["hf_overrides"] == {"rope_theta": 2, "num_experts": 6}


class StandIn:
    """An engine that runs the model's own k, whatever it is asked for."""

    def call(self, function, *arguments):
        return {describe_engine: {"top_k": dict.fromkeys(range(3), 3), "device": ""}, time_run: 1.0}.get(function, [])


def measure(variants, **options):
    others = {"rounds": 1, "together": None, "in_place": False, "report": lambda document: None}
    engine = {"load_format": "auto", "parallel": {}}
    return throughput.measure(variants, [WORKLOAD], engine=engine, **(others | options))


def open_model(variant):
    return vllm_backend.open_model(
        variant,
        "",
        dtype="",
        batch_size=1,
        longest=2,
        trust_remote_code=False,
        engine={"load_format": "", "parallel": {}},
    )


def test_an_engine_that_runs_another_k_than_the_allocations_is_refused(monkeypatch):
    @contextmanager
    def start(wanted, **_):
        yield [StandIn() for _ in wanted]

    monkeypatch.setattr(throughput, "measure_engines", start)
    monkeypatch.setattr(vllm_backend, "start_engines", start)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    base, half, *_ = make_variants()
    assert [line["variant"] for line in measure([base])["summary"]] == ["base"]
    again = replace(base, name="again")
    turns = [(run["round"], run["variant"]) for run in measure([base, again], rounds=2)["runs"]]
    assert turns == [(0, "base"), (0, "again"), (1, "again"), (1, "base")]
    message = (
        "engine of 'half': layer 0 runs k = 3 and not the allocation's 1: .* VLLM_PLUGINS is set, name 'lexi' in it"
    )
    with pytest.raises(EngineError, match=message):
        measure([base, half])
    with open_model(base):
        pass
    with pytest.raises(EngineError, match=message), open_model(half):
        pass


@pytest.mark.parametrize("plugins", ["", "other", "lexi2,other"])
def test_an_allocation_that_vllm_would_not_see_is_refused_before_an_engine_starts(plugins, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", plugins)
    base, half, *_ = make_variants()
    message = f"VLLM_PLUGINS is '{plugins}' and leaves out 'lexi', .* runs 'half' .* set VLLM_PLUGINS=lexi"
    with pytest.raises(AdapterError, match=message):
        measure([base, half])
    with pytest.raises(AdapterError, match=message), open_model(half):
        pass
    options.check_plugin([base, replace(half, environment={"VLLM_PLUGINS": "other,lexi"})])
    monkeypatch.setenv("VLLM_PLUGINS", "lexi")
    with pytest.raises(AdapterError, match=message):
        options.check_plugin([replace(half, environment={"VLLM_PLUGINS": plugins})])


def test_what_a_worker_refuses_comes_back_as_it_said_it(monkeypatch):
    def refuse(worker, top_k, kept, compensated):
        if worker == 1 and 5 not in top_k:
            raise AllocationError("not this one")
        return {worker: top_k.get(worker)}

    class LLM:
        def collective_rpc(self, function, args):
            return [function(worker, *args) for worker in (0, 1)]

    monkeypatch.setattr(worker, "switch", refuse)
    with pytest.raises(AdapterError, match="^not this one$"):
        switch_layers(LLM(), {0: 1, 1: 2})
    with pytest.raises(AllocationError, match=r"layers \[5\] are no MoE layers of this model, which has \[0, 1\]"):
        switch_layers(LLM(), {0: 1, 1: 2, 5: 2})


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["bench", "{}", "--workload", "4x4"], "is not BATCHxINPUTxOUTPUT"),
        (["bench", "{}", "--drop-experts", "50%"], "add --load-format dummy"),
        (["bench", "{}", "--engine", "[]"], "--engine is not a JSON object"),
        (["bench", "{}", "--engine", "{{"], "--engine is not JSON"),
        (["bench", "{}", "--plot", "figure.gif"], "no figure as figure.gif"),
        (["bench", "{}", "-o", "nowhere/bench.json"], "cannot write nowhere/bench.json"),
        (["bench", "{}", "-o", "{}/config.json"], "which the same command reads"),
        (["bench", "{}", "--allocation", "fits.json", "-o", "fits.json"], "reads or writes it as another file"),
        (["bench", "{}", "--allocation", "fits.json", "--plot", "fits.json"], "reads or writes it as another file"),
        (["bench", "{}", "-o", "p.png", "--plot", "./p.png"], "reads or writes it as another file"),
        (["bench", "{}", "--lock", "card", "-o", "card"], "reads or writes it as another file"),
        (["loads", "{}", "--text", "text.txt", "-o", "text.txt"], "reads or writes it as another file"),
        (["loads", "{}", "--tokens", "{}/t", "-o", "{}/config.json"], "which the same command reads"),
        (["latency", "{}", "-o", "{}/config.json"], "which the same command reads"),
        (["latency", "{}", "--lock", "card", "-o", "card"], "reads or writes it as another file"),
        (["bench", "{}", "-o", "/dev/null"], "not a regular file"),
        (["bench", "nowhere"], "cannot read nowhere/config.json"),
        (["bench", "{}", "--engine", '{{"parallel": 3}}'], "--engine: parallel is set by other arguments"),
        (["bench", "{}", "--engine", '{{"variant": 3}}'], "--engine: variant is set by other arguments"),
        (["bench", "{}", "--engine", '{{"workloads": 3}}'], "--engine: workloads is set by other arguments"),
        (
            ["loads", "{}", "--tokens", "{}/t", "--engine", '{{"model": "other"}}'],
            "--engine: model is set by other arguments",
        ),
        (
            ["latency", "{}", "--engine", '{{"compilation_config": 3}}'],
            "compilation_config is 3, a JSON object expected",
        ),
        (["bench", "{}", "--engine", '{{"hf_overrides": "x"}}'], "hf_overrides is 'x', a JSON object expected"),
        (["bench", "{}", "--engine", '{{"additional_config": {{"lexi_allocation": 1}}}}'], "give it by --allocation"),
        (["bench", "{}", "--engine", "[" * 10**5], "--engine is not JSON"),
        (["bench", "{}", *DUMMY, *2 * ("--budget-share", "50%")], "two variants are called 'mixed k, 50 %'"),
        (["bench", "{}", "--uniform-k", "4"], "uniform k = 4 is not one of 1 to 3"),
        (["bench", "{}", "--folder", "base"], "two variants are called 'base'"),
        (
            ["bench", "{}", "--allocation", "{}/other.json"],
            "model_type is 'olmoe', the allocation was made for 'mixtral'",
        ),
        (["bench", "{}", "--allocation", "{}/wide.json"], "the number of experts is 8, the allocation was made for 16"),
        (["bench", "{}", "--allocation", "{}/deep.json", "--in-place"], "num_hidden_layers is 3, the allocation"),
        (["bench", "{}", "--allocation", "{}/dense.json", "--in-place"], "the list of MoE layers is [0, 1, 2]"),
        (["loads", "{}", "--tokens", "{}/t", "--allocation", "{}/other.json"], "the allocation was made for 'mixtral'"),
        (["loads", "{}", "--tokens", "{}/t", "--allocation", "{}/shifted.json"], "has a gate exponent of 0.5"),
        (["latency", "{}", "--workload", "4x1x4"], "workload 4x1x4 has 1 input token"),
        (["latency", "{}", *DUMMY], """compile nothing with --engine '{"enforce_eager": true}', or measure on a GPU"""),
        (["bench", "{}", *DUMMY, "--in-place"], "compiles k into the model, so one engine cannot change it"),
        (["loads", "{}", "--tokens", "{}/far"], "the model knows 0 to 6; use its own tokenizer"),
        (["loads", "{}", "--tokens", "{}/negative"], "the model knows 0 to 6; use its own tokenizer"),
        (["loads", "{}"], "give either --text or --tokens"),
        (["loads", "{}", "--tokens", "{}/config.json"], "is not a list of prompts"),
    ],
)
def test_bad_input_ends_in_one_line_before_an_engine_starts(arguments, message, folder):
    config = {"model_type": "olmoe", "num_hidden_layers": 3, "num_experts": 8, "num_experts_per_tok": 3}
    (folder / "model" / "sub").mkdir(parents=True)
    config |= {"intermediate_size": 32, "vocab_size": 7}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    for name, prompts in (("t", [[1]]), ("far", [[1], [2, 7]]), ("negative", [[1, -1]])):
        (folder / "model" / name).write_text(json.dumps(prompts))
    (folder / "text.txt").touch()
    made_for = {
        "other": replace(MODEL, model_type="mixtral"),
        "wide": replace(MODEL, num_experts=16),
        "deep": replace(MODEL, num_hidden_layers=4),
        "dense": replace(MODEL, moe_layers=(0, 1)),
    }
    allocations = {name: allocate(model, dict.fromkeys(model.moe_layers, 2)) for name, model in made_for.items()}
    allocations["shifted"] = replace(allocate(MODEL, {0: 1, 1: 2, 2: 1}), gate_exponent=0.5)
    for name, allocation in allocations.items():
        (folder / "model" / f"{name}.json").write_text(json.dumps(to_document(allocation)))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    result = CliRunner().invoke(main, [argument.format("model") for argument in arguments])
    assert result.exit_code == 2 and message in result.stderr
    assert result.stderr.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


def test_eval_measures_nothing_where_vllm_would_not_see_an_allocation(folder, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    arguments = ["eval", str(TINY), "--task", "passkey", "--uniform-k", "2", "--backend", "vllm"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2 and "VLLM_PLUGINS is 'other' and leaves out 'lexi'" in result.stderr
    assert result.stderr.count("\n") == 1 and not any(folder.iterdir())


@pytest.mark.parametrize(
    "command, option, values",
    [
        ("bench", "--seconds", ["nan", "inf", "-1"]),
        ("bench", "--budget-share", ["nan", "inf%", "-1%", "0%", "0.5", "150%", "1e1%"]),
        ("bench", "--drop-experts", ["nan", "-5%", "100%", "0.5"]),
        ("bench", "--narrow-experts", ["nan", "-5%", "100%", "0.5"]),
        ("loads", "--drop-experts", ["nan", "-5%", "100%", "0.5"]),
    ],
)
def test_shares_and_seconds_are_numbers_of_their_range(command, option, values):
    for value in values:
        result = CliRunner().invoke(main, [command, "nowhere", option, value])
        assert result.exit_code == 2 and f"Invalid value for '{option}'" in result.stderr
