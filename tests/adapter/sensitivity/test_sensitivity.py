"""`lexi-adapter sensitivity`, judged by whole forward passes in float64 and by a loop over tokens and experts."""

import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import command_line
import jax
import numpy as np
import pytest
import reference
import tiny
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lexi_adapter.cli.main import main
from lexi_adapter.errors import AdapterError, AllocationError
from lexi_adapter.evaluation.transformers_backend import load_model
from lexi_adapter.model.identity import describe_checkpoint
from lexi_adapter.model.variants import allocate
from lexi_adapter.sensitivity.ablation import LayerLosses, measure
from lexi_adapter.sensitivity.divergence import judge_allocations
from lexi_adapter.sensitivity.journal import Journal
from lexi_adapter.sensitivity.profile import summarise
from lexi_adapter.sensitivity.replay import check_replays, find_decoder, run, run_from, run_recorded
from lexi_adapter.sensitivity.windows import cut, generate
from lexi_adapter.serving.transformers_patch import apply
from lexi_adapter.tasks.texts import load_tokenizer
from lexi_search.artifacts.serialisation import read_profile
from lexi_search.checkpoint.reader import open_checkpoint
from lexi_search.errors import InputError
from lexi_search.models.loading.streaming import stream_layers
from lexi_search.models.model import describe

WINDOWS = torch.randint(3, 256, (3, 12), generator=torch.Generator().manual_seed(5))
# A dense layer and a shared expert; scaled outputs; layers that pass each other more than hidden states, or keep
# several residual streams; attention that is not softmax's; layers that are only a mixer.
FAMILIES = ("mixtral", "qwen2_moe", "deepseek_v2", "granitemoe", "glm_moe_dsa", "hy_v4", "qwen3_next", "nemotron_h")
CHANGES = {
    "granitemoe": {"residual_multiplier": 0.3},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads wait for each other longer than such small products take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A function that makes each family's tiny checkpoint once, and returns its folder and identity."""
    made = {}

    def make(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            tiny.make_checkpoint(family, folder, **CHANGES.get(family, {}))
            made[family] = folder, describe_checkpoint(folder)
        return made[family]

    return make


def load(folder):
    return load_model(str(folder), device="cpu")


def run_plainly(family, top_k):
    """float64 logits of a model put together from whole layers of models whose config says one k for all."""
    model, layers = copy.deepcopy(build_plainly(family, 4))
    for layer, k in top_k.items():
        layers[layer] = build_plainly(family, k)[1][layer]
    with torch.no_grad():
        return model(WINDOWS, use_cache=False).logits


@functools.cache
def build_plainly(family, k):
    model = tiny.build_reference(family, **CHANGES.get(family, {}), num_experts_per_tok=k).double()
    model.set_experts_implementation("eager")
    return model, next(module for name, module in model.named_modules() if name.endswith("layers"))


def judge_plainly(base, changed):
    """KL(base || changed) and increase of cross-entropy of each sequence, by loops in float64."""
    found = []
    for own, other, tokens in zip(base.numpy(), changed.numpy(), WINDOWS.tolist(), strict=True):
        divergences, increases = [], []
        for place, token in enumerate(tokens[1:]):
            p, q = reference.softmax(own[place]), reference.softmax(other[place])
            divergences.append(sum(p * np.log(p / q)))
            increases.append(math.log(p[token]) - math.log(q[token]))
        found.append((np.mean(divergences), np.mean(increases)))
    return np.array(found).T


@pytest.mark.parametrize("family", FAMILIES)
def test_brute_force_is_what_whole_passes_in_float64_say(checkpoints, family):
    folder, identity = checkpoints(family)
    model, base = load(folder), run_plainly(family, {})
    found = {layer: losses for _, layer, losses in measure(model, identity, WINDOWS)}
    assert tuple(found) == identity.moe_layers
    for layer, k in itertools.product(identity.moe_layers, range(1, identity.top_k)):
        expected = judge_plainly(base, run_plainly(family, {layer: k}))
        ours = np.array([[row[k - 1] for row in table] for table in (found[layer].divergence, found[layer].increase)])
        np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=2e-6)
        assert expected[0].min() > 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_resuming_from_a_layer_is_exactly_the_whole_pass(checkpoints, family):
    folder, identity = checkpoints(family)
    model = load(folder)
    decoder = find_decoder(model, identity)
    with torch.no_grad():
        base, outputs = run_recorded(decoder, WINDOWS, {})
        assert torch.equal(base, model(WINDOWS, use_cache=False).logits)
        for layer in identity.moe_layers:
            reduce(model, identity, {layer: 2})
            assert torch.equal(run_from(decoder, layer, WINDOWS, outputs), model(WINDOWS, use_cache=False).logits)
            reduce(model, identity, {})
    assert not any("forward" in vars(module) for module in model.modules())


def reduce(model, identity, top_k):
    apply(model, allocate(identity, dict.fromkeys(identity.moe_layers, identity.top_k) | top_k), check_weights=False)


def test_a_model_whose_layers_pass_each_other_more_than_they_return_is_refused(checkpoints):
    folder, identity = checkpoints("mixtral")
    model = load(folder)
    first, last = model.model.layers[0], model.model.layers[2]
    told = {}
    first.mlp.register_forward_hook(lambda module, args, output: told.update(seen=output))
    last.register_forward_hook(lambda module, args, output: output + told.pop("seen", 0))
    with pytest.raises(AdapterError, match="resumed from layer 1 differs from the whole pass .*unknown family"):
        check_replays(find_decoder(model, identity), WINDOWS)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v2", "granitemoe"])
def test_a_block_changes_as_the_loop_over_tokens_and_experts_says(checkpoints, family):
    """Inputs and residual streams are those that pass through the model; the rest is lexi_search's reference."""
    folder, identity = checkpoints(family)
    model, checkpoint = load(folder), open_checkpoint(folder)
    described, seen = describe(checkpoint), {}
    for layer, block in tiny.find_moe_blocks(model).items():
        keep(block, seen, ("input", layer))
        norm = model.model.layers[layer].post_attention_layernorm
        keep(norm, seen, ("stream", layer))
    with torch.no_grad():
        model(WINDOWS, use_cache=False)
    measured = {layer: losses for _, layer, losses in measure(load(folder), identity, WINDOWS, local=True)}
    for layer, weights in stream_layers(checkpoint, described, described.layers):
        router, bias, experts = jax.tree.map(
            lambda part: np.asarray(part, np.float64), (weights.router, weights.bias, tuple(weights.experts))
        )
        experts = [tuple(0 if i > 2 and part is None else part for i, part in enumerate(expert)) for expert in experts]
        x = seen["input", layer].reshape(-1, described.hidden_size)
        compute = functools.partial(
            reference.moe_output, x, router, bias, experts, described.routing, described.activation
        )
        stream = (seen["stream", layer] ** 2).sum(-1)
        for k in range(1, identity.top_k):
            squares = ((compute(k) - compute(identity.top_k)) ** 2).sum(-1).reshape(WINDOWS.shape)
            np.testing.assert_allclose([row[k - 1] for row in measured[layer].squares], squares.sum(-1), rtol=1e-4)
            relative = (squares / stream).mean(-1)
            np.testing.assert_allclose([row[k - 1] for row in measured[layer].relative], relative, rtol=1e-4)
        assert measured[layer].divergence == measured[layer].increase == ()


def keep(module, seen, key):
    module.register_forward_pre_hook(lambda _, args: seen.update({key: args[0].double().numpy()}))


def test_a_gate_exponent_is_that_of_an_allocation(checkpoints):
    folder, identity = checkpoints("mixtral")
    model = load(folder)
    found = {layer: losses for _, layer, losses in measure(model, identity, WINDOWS, gate_exponent=0.25)}
    alone = replace(allocate(identity, {0: 4, 1: 2, 2: 4}), gate_exponent=0.25)
    judged = judge_allocations(model, WINDOWS, [alone, replace(alone, gate_exponent=None)])
    np.testing.assert_allclose([row[1] for row in found[1].divergence], judged.divergence[0], rtol=1e-6)
    assert (judged.divergence[0] - judged.divergence[1]).abs().min() > 1e-4


def test_whole_allocations_are_judged_as_whole_passes_in_float64_say(checkpoints):
    folder, identity = checkpoints("deepseek_v2")
    model = load(folder)
    before = run(find_decoder(model, identity), WINDOWS)
    top_ks = ({1: 1, 2: 3, 3: 2}, {1: 4, 2: 4, 3: 4}, {1: 2, 2: 2, 3: 2})
    judged = judge_allocations(model, WINDOWS, [allocate(identity, top_k) for top_k in top_ks], batch=2)
    assert judged.divergence.shape == judged.increase.shape == (3, 3)
    base = run_plainly("deepseek_v2", {})
    for place, top_k in enumerate(top_ks):
        expected = judge_plainly(base, run_plainly("deepseek_v2", top_k))
        np.testing.assert_allclose(torch.stack(judged)[:, place], expected, rtol=1e-3, atol=2e-6)
    assert torch.equal(run(find_decoder(model, identity), WINDOWS), before)
    with pytest.raises(AdapterError, match="there are no allocations to judge"):
        judge_allocations(model, WINDOWS, [])
    with pytest.raises(AllocationError, match="other router weights"):
        judge_allocations(model, WINDOWS, [allocate(replace(identity, router_sha256="0" * 64), top_ks[0])])


@pytest.mark.parametrize("family", tiny.ALL_FAMILIES)
def test_the_identity_is_what_a_search_finds(tmp_path, family):
    folder = tiny.make_checkpoint(family, tmp_path)
    try:
        expected = describe(open_checkpoint(folder)).identity
    except InputError as error:
        assert "none can be saved" in str(error)
        with pytest.raises(AdapterError, match="none can be saved"):
            describe_checkpoint(folder)
    else:
        assert dataclasses.asdict(describe_checkpoint(folder)) == dataclasses.asdict(expected)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3))
def test_standard_errors_are_over_sequences(sequences, length, ks):
    generator = np.random.default_rng([sequences, length, ks])
    tables = generator.random((4, sequences + 1, ks))
    parts = [LayerLosses(*(table[rows].tolist() for table in tables)) for rows in (slice(1), slice(1, None))]
    found = summarise(parts, length, ("divergence", "increase"))
    squares, *others = tables
    assert (found["iterations"], found["samples"]) == (sequences + 1, (sequences + 1) * length)
    columns = {"frobenius": np.sqrt(squares)} | dict(zip(("relative", "divergence", "increase"), others, strict=True))
    for kind, table in columns.items():
        np.testing.assert_allclose(found[kind], [*table.mean(axis=0), 0])
        np.testing.assert_allclose(found[f"{kind}_stderr"], [*table.std(axis=0, ddof=1) / (sequences + 1) ** 0.5, 0])
    rms = np.sqrt(squares.mean(axis=0) / length)
    np.testing.assert_allclose(found["rms"], [*rms, 0])
    slope = 1 / (2 * rms * length)
    error = slope * squares.std(axis=0, ddof=1) / (sequences + 1) ** 0.5
    np.testing.assert_allclose(found["rms_stderr"], [*error, 0])


@given(st.lists(st.integers(0, 30), max_size=5), st.integers(1, 6), st.integers(2, 6))
def test_windows_lie_evenly_over_the_whole_ones_that_there_are(lengths, length, sequences):
    streams = [[100 * place + token for token in range(size)] for place, size in enumerate(lengths)]
    whole = [stream[i : i + length] for stream in streams for i in range(0, len(stream), length)]
    whole = [window for window in whole if len(window) == length]
    if len(whole) < 2:
        expected = f"a.txt: {len(whole)} windows of {length} tokens in {sum(lengths)}, at least 2 needed"
        with pytest.raises(AdapterError, match=expected):
            cut(streams, length=length, sequences=sequences, source="a.txt")
        return
    found = cut(streams, length=length, sequences=sequences, source="a.txt").tolist()
    assert len(found) == min(sequences, len(whole))
    places = [whole.index(window) for window in found]
    assert places[0] == 0 and places == sorted(set(places))
    steps = np.diff([*places, len(whole)])
    assert max(steps) - min(steps) <= 1


@pytest.mark.parametrize("family", ["mixtral", "qwen3_next"])
def test_a_model_draws_from_its_own_distribution(checkpoints, family):
    """Judged by whole passes over the tokens so far, without a cache, with the same random numbers."""
    model = load(checkpoints(family)[0])
    found = generate(model, length=6, sequences=5, batch=3, seed=7)
    assert found.shape == (5, 6) and found.dtype == torch.int64
    generator = torch.Generator().manual_seed(7)
    for window in found.split(3):
        expected = torch.zeros((len(window), 1), dtype=torch.int64)  # the token that begins a text
        for _ in range(5):
            with torch.no_grad():
                logits = model(expected, use_cache=False).logits[:, -1]
            drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            expected = torch.cat([expected, drawn], dim=1)
        assert torch.equal(window, expected)
    model.config.bos_token_id = None
    firsts = generate(model, length=2, sequences=40, batch=20, seed=0)[:, 0]
    assert len(set(firsts.tolist())) > 20


@pytest.fixture(scope="module")
def mixtral(checkpoints):
    """A checkpoint with a tokenizer of one word a token, and a text that it reads as three streams' worth of tokens."""
    folder, _ = checkpoints("mixtral")
    vocabulary = {f"t{token}": token for token in range(256)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    (folder / "text.txt").write_text(" ".join(f"t{token}" for token in WINDOWS.flatten().tolist()))
    return folder


def invoke(*arguments):
    return CliRunner().invoke(main, ["sensitivity", *map(str, arguments)], catch_exceptions=False)


def make_profile(*arguments, output="truth.json"):
    chosen = () if output == "truth.json" else ("-o", output)
    result = invoke(*arguments, *chosen, "--device", "cpu")
    assert (result.exit_code, result.stdout) == (0, f"{output}\n"), result.stderr
    return read_profile(output)


def test_the_file_is_a_profile_that_a_search_reads(folder, mixtral):
    made = make_profile(mixtral, "--text", mixtral / "text.txt", "--length", 12, "--batch", 2)
    assert made.model == describe(open_checkpoint(mixtral)).identity
    settings = made.settings
    assert (settings.input, settings.batch, settings.length, settings.max_samples) == ("text", 1, 12, 36)
    assert made.loss_kinds == ("frobenius", "rms", "squared", "relative", "divergence", "increase")
    model, identity = load(mixtral), describe_checkpoint(mixtral)
    whole = {layer: losses for _, layer, losses in measure(model, identity, WINDOWS)}
    for layer, loss in made.layers.items():
        for kind in ("divergence", "increase"):
            expected = np.mean(getattr(whole[layer], kind), axis=0)
            np.testing.assert_allclose(getattr(loss, kind)[:-1], expected, rtol=1e-4, atol=1e-7)
    found = command_line.run("search", "truth.json", "--loss", "increase", "--budget", 7, "-o", "allocation.json")
    assert found.exit_code == 0, found.output
    assert sum(json.loads((folder / "allocation.json").read_text())["top_k"].values()) == 7
    (folder / "text.json").write_text(json.dumps(WINDOWS.tolist()))
    np.savez(folder / "text.npz", first=WINDOWS[:1].numpy(), others=WINDOWS[1:].flatten().numpy().astype(np.uint16))
    for tokens in ("text.json", "text.npz"):
        make_profile(mixtral, "--tokens", tokens, "--length", 12, "--batch", 2, output="again.json")
        assert (folder / "again.json").read_bytes() == (folder / "truth.json").read_bytes()
    assert sorted(path.suffix for path in folder.iterdir()) == [".json"] * 4 + [".npz"]


def test_without_text_the_model_samples_its_own(folder, mixtral):
    options = ("--generate", "--length", 9, "--sequences", 3, "--gate-exponent", 0.5)
    made = make_profile(mixtral, *options)
    assert (made.settings.input, made.settings.gate_exponent) == ("generated", 0.5)
    assert "divergence" in made.loss_kinds and "increase" not in made.loss_kinds
    make_profile(mixtral, *options, output="again.json")
    assert (folder / "again.json").read_bytes() == (folder / "truth.json").read_bytes()
    other = make_profile(mixtral, *options, "--seed", 1, output="other.json")
    assert other.made_by["tokens_sha256"] != made.made_by["tokens_sha256"]


def test_only_the_blocks_are_looked_at_if_asked(folder, mixtral):
    options = (mixtral, "--text", mixtral / "text.txt", "--length", 12)
    whole, local = make_profile(*options), make_profile(*options, "--local", output="local.json")
    assert local.loss_kinds == ("frobenius", "rms", "squared", "relative")
    for kind in local.loss_kinds:
        np.testing.assert_allclose(local.losses(kind), whole.losses(kind))


def test_a_run_cut_short_goes_on(folder, mixtral, monkeypatch):
    options = (mixtral, "--text", mixtral / "text.txt", "--length", 12, "--batch", 1)
    make_profile(*options, output="whole.json")
    add, kept = Journal.add, []

    def add_four(journal, batch, layer, losses):
        add(journal, batch, layer, losses)
        kept.append((batch, layer))
        if len(kept) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", add_four)
    assert invoke(*options).exit_code == 130 and kept == [(0, 0), (0, 1), (0, 2), (1, 0)]
    partial = folder / "truth.json.partial"
    cut_short = partial.read_bytes() + b"[1, 1, [[0.1"  # the write of a crash
    partial.write_bytes(cut_short)
    (folder / "other.txt").write_text((mixtral / "text.txt").read_text().replace("t3", "t4"))
    for others, difference in {
        ("--seed", 1): "--seed was 0, is 1 now",
        ("--local",): "--local differs",
        ("--batch", 2): "--batch was 1, is 2 now",
        ("--length", 9): "--length was 12, is 9 now",
        ("--gate-exponent", 0.5): "--gate-exponent was not given, is 0.5 now",
        ("--dtype", "bfloat16"): "--dtype was float32, is bfloat16 now",
        ("--sequences", 2): "the number of tokens was 36, is 24 now",
        (): "other tokens",
    }.items():
        text = ("--text", mixtral / "text.txt" if others else "other.txt")
        expected = f"truth.json.partial is of another run .{difference}.; repeat that .*--restart"
        refuse(expected, mixtral, "--length", 12, "--batch", 1, *text, *others)
    assert partial.read_bytes() == cut_short
    make_profile(*options)
    assert kept[4:] == [(1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]
    assert (folder / "truth.json").read_bytes() == (folder / "whole.json").read_bytes()
    assert not partial.exists()
    del kept[:]
    assert invoke(*options).exit_code == 130
    make_profile(*options, "--restart")
    assert kept[4:] == list(itertools.product(range(3), range(3)))
    assert (folder / "truth.json").read_bytes() == (folder / "whole.json").read_bytes()


def refuse(expected, *arguments):
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    *progress, line = result.stderr.splitlines()
    assert re.search(expected, line) and all(words.startswith("parts: ") for words in progress), result.stderr


def test_bad_input_is_refused_in_one_line(folder, mixtral):
    text = ("--length", 12, "--text", mixtral / "text.txt")
    refuse("give one of --text, --tokens and --generate", mixtral)
    refuse("give one of --text, --tokens and --generate", mixtral, *text, "--generate")
    words = Path("words")
    words.mkdir()
    refuse("cannot write .*nowhere", mixtral, *text, "-o", "nowhere/profile.json")
    refuse("cannot write .*config.json: it is a file of", mixtral, *text, "-o", mixtral / "config.json")
    (words / "own.json").touch()
    refuse("cannot write words/own.json: it is a file", mixtral, *text, "--tokenizer", words, "-o", words / "own.json")
    Path("truth.json.partial").write_text("mine")
    journal = ("--length", 12, "--text", "truth.json.partial", "--restart")
    refuse("cannot write .*truth.json.partial: the same command reads", mixtral, *journal)
    assert Path("truth.json.partial").read_text() == "mine"
    Path("truth.json.partial").unlink()
    for option in ("--text", "--tokens"):
        refuse("cannot write mine: the same command reads", mixtral, option, "mine", "-o", "mine")
    refuse("cannot read nothing/config.json", "nothing", *text)
    refuse("--length of 129 tokens is more than the model's 128", mixtral, *text, "--length", 129)
    refuse("text.txt: 1 windows of 20 tokens in 36, at least 2 needed", mixtral, *text, "--length", 20)
    refuse("cannot read nothing.txt", mixtral, "--length", 12, "--text", "nothing.txt")
    for device in ("tpu9", "meta"):
        refuse(f"no device '{device}'", mixtral, *text, "--device", device)
    refuse("nothing has no tokenizer", mixtral, *text, "--tokenizer", "nothing")
    (folder / "truth.json.partial").mkdir()
    refuse("cannot write .*truth.json.partial: not a regular file", mixtral, *text)
    os.mkfifo("pipe.partial")
    refuse("cannot write .*pipe.partial: not a regular file", mixtral, *text, "-o", "pipe")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[[1, 2", "cannot read tokens.json"),
        ("3", "cannot read tokens.json"),
        ("[]", "does not hold rows of token ids"),
        ("[[1.5, 2.5]]", "does not hold rows of token ids"),
        ("[[[1]], 2]", "does not hold rows of token ids"),
        (json.dumps([[3] * 12, [300] * 12]), "the model has tokens 0 to 255, but there is 300"),
        (json.dumps([[3] * 12, [-1] * 12]), "the model has tokens 0 to 255, but there is -1"),
        (json.dumps([[3] * 12, [2**63] * 12]), "the model has tokens 0 to 255, but there is -9"),
    ],
)
def test_files_of_something_else_than_tokens_are_refused(folder, mixtral, content, expected):
    (folder / "tokens.json").write_text(content)
    refuse(expected, mixtral, "--tokens", "tokens.json", "--length", 12)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"no array"])
@pytest.mark.parametrize("name", ["tokens.npy", "tokens.npz", "tokens.json"])
def test_files_that_are_broken_are_refused(folder, mixtral, name, content):
    (folder / name).write_bytes(content)
    refuse(f"cannot read {name} ", mixtral, "--tokens", name, "--length", 12)


@pytest.mark.parametrize("local", [True, False])
def test_what_is_not_finite_is_refused(checkpoints, local):
    folder, identity = checkpoints("mixtral")
    expected = "the output of layer 0 in torch.float32 is not always finite; use float32, or a gate exponent"
    with pytest.raises(AdapterError, match=expected):
        list(measure(load(folder), identity, WINDOWS, local=local, gate_exponent=1e9))


@pytest.mark.parametrize("number", ["nan", "inf", "-0.5"])
def test_a_gate_exponent_is_a_finite_number(folder, mixtral, number):
    result = invoke(mixtral, "--generate", "--length", 12, "--gate-exponent", number)
    assert result.exit_code == 2 and "Invalid value for '--gate-exponent'" in result.stderr
    assert not list(folder.iterdir())


def test_a_device_that_is_too_small_is_told(folder, mixtral, monkeypatch):
    def fail(*args):
        raise torch.OutOfMemoryError("a lot tried\nto be had")

    monkeypatch.setattr("lexi_adapter.sensitivity.ablation.compare", fail)
    refuse(
        "ran out of memory; try a --batch below 2",
        mixtral,
        "--generate",
        "--length",
        12,
        "--batch",
        2,
        "--sequences",
        2,
    )


def test_a_model_that_lacks_tensors_or_k_is_refused(folder, checkpoints):
    whole = checkpoints("mixtral")[0]
    tensors = load_file(whole / "model.safetensors")
    lacking = dict(tensors)
    del lacking["model.layers.1.input_layernorm.weight"]
    for name, stored, config in (
        ("lacking", lacking, {}),
        ("single", tensors, {"num_experts_per_tok": 1}),
        ("dense", {key: value for key, value in tensors.items() if ".gate." not in key}, {}),
    ):
        (folder / name).mkdir()
        save_file(stored, folder / name / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((whole / "config.json").read_text()) | config
        (folder / name / "config.json").write_text(json.dumps(config))
    own = ("--generate", "--length", 12)
    refuse(r"lacking lacks 1 tensors, such as model.layers.1.input_layernorm.weight", "lacking", *own)
    refuse("num_experts_per_tok is 1: each token runs one expert, none can be saved", "single", *own)
    refuse("dense: no tensor with a router's name and 8 rows: unknown family", "dense", *own)


def test_a_token_with_a_zero_embedding_gives_finite_losses(checkpoints):
    """Weight decay may leave such a token where no text has it; so may padding at the beginning of a text."""
    folder, identity = checkpoints("olmoe")
    model = load(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = 0
    windows = torch.cat([torch.full((3, 1), 7), WINDOWS], dim=1)
    for _, _, losses in measure(model, identity, windows, batch=3):
        assert all(np.isfinite(values).all() for values in losses)


@pytest.mark.parametrize("model_type", ["mixtral", "own"])
def test_no_code_of_a_checkpoint_runs_whatever_is_answered(folder, mixtral, monkeypatch, model_type):
    """transformers asks whether to run it where nobody has said so, and `yes | lexi-adapter` says yes."""
    own = folder / "own"
    shutil.copytree(mixtral, own)
    config = json.loads((own / "config.json").read_text()) | {"model_type": model_type}
    classes = {
        "AutoConfig": "own_code.Own",
        "AutoModelForCausalLM": "own_code.Own",
        "AutoTokenizer": ["own_code.Own", None],
    }
    (own / "config.json").write_text(json.dumps(config | {"auto_map": classes}))
    (own / "own_code.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Own: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    result = invoke(str(own), "--generate", "--length", 4, "--sequences", 2, "--device", "cpu")
    assert not (folder / "ran").exists()
    assert result.exit_code == (0 if model_type == "mixtral" else 2), result.output
    with contextlib.suppress(AdapterError):
        load_tokenizer(str(own))
    assert not (folder / "ran").exists()
