"""What whole models lose on text that they write themselves; transformers' own logits are the judge."""

import itertools
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import command_line
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from command_line import refuse, succeed
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import lexi_adapter
from lexi_search.artifacts import serialisation
from lexi_search.artifacts.allocation import Allocation
from lexi_search.artifacts.profile import ProfileSettings
from lexi_search.checkpoint.reader import Checkpoint, open_checkpoint
from lexi_search.errors import InputError
from lexi_search.layers.decoder import read_log_probabilities
from lexi_search.models import decoder_families
from lexi_search.models.decoder_stack import describe_decoder
from lexi_search.models.model import describe
from lexi_search.profiling.compensation import fit_layers
from lexi_search.profiling.divergence import (
    EXPONENTS,
    Compensation,
    choose_compensation,
    find_compensation,
    measure_layers,
    summarise,
)
from lexi_search.profiling.forward import losses as losses_of
from lexi_search.profiling.forward import variants as variants_of
from lexi_search.profiling.forward.losses import Losses, measure_losses
from lexi_search.profiling.forward.passes import forward
from lexi_search.profiling.forward.sampling import draw_tokens
from lexi_search.profiling.forward.variants import MODEL, Run, Variant, check_room, find_leaders
from lexi_search.profiling.profile import profile_layers

FAMILIES = ("olmoe", "qwen2_moe", "deepseek_v2", "hy_v4", "deepseek_v4")  # from the third on a first layer without k
QUICK = ("--batch", 2, "--length", 16, "--samples", 64)
LENGTH = 12


def scale_up(model):
    """Sharper routers and heads than fresh weights have, or every divergence would be next to nothing."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim > 1:
                value.mul_(6.0 if name.endswith(("gate.weight", "lm_head.weight")) else 2.0)
    return model


def open_run(family, folder):
    """The run over a checkpoint, and transformers' model of it."""
    model = scale_up(tiny.build_reference(family))
    checkpoint = open_checkpoint(tiny.save_checkpoint(family, model, folder / family))
    described = describe(checkpoint)
    return Run(checkpoint, described, describe_decoder(checkpoint, described), "float32"), model


@pytest.fixture(scope="module", params=FAMILIES)
def opened(request, tmp_path_factory):
    return open_run(request.param, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory):
    return open_run("olmoe", tmp_path_factory.mktemp("checkpoint"))


def find_log_probabilities(model, run, tokens, variant=None):
    """[sequences, length, vocabulary] of transformers, float64, under a variant or as the model is."""
    identity, whole = run.model.identity, run.model.top_k
    top_k, exponent, maps = variant or Variant((whole,) * len(run.model.layers))
    chosen = dict(zip(identity.moe_layers, top_k, strict=True))
    allocation = Allocation(identity, chosen, sum(top_k), 0.0, 0.0, {"lexi_search": "0"}, exponent)
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "a.json"
        serialisation.write_allocations([file], [allocation], maps)
        lexi_adapter.apply(model, file, check_weights=False)
    with torch.no_grad():
        logits = model(torch.as_tensor(np.asarray(tokens)).long(), use_cache=False).logits
    return logits.double().log_softmax(-1).numpy()


def make_tokens(sequences=4, seed=1):
    return np.random.default_rng(seed).integers(3, 250, (sequences, LENGTH)).astype(np.int32)


def make_variants(run):
    whole, layers = run.model.top_k, len(run.model.layers)
    single = [Variant(tuple(k if n == own else whole for n in range(layers))) for own in range(layers) for k in (1, 2)]
    mixed = Variant(tuple(1 + n % whole for n in range(layers)))
    return [*single, mixed, Variant((whole,) * layers), Variant((2,) * layers, 0.5), mixed._replace(exponent=0.25)]


def test_divergence_is_that_of_transformers(opened):
    run, model = opened
    tokens, variants = make_tokens(), make_variants(run)
    done = []
    found = measure_losses(run, tokens, variants, report=done.append)
    assert done == list(range(run.model.identity.num_hidden_layers))
    own = find_log_probabilities(model, run, tokens)
    for variant, divergence in zip(variants, found.divergence, strict=True):
        other = find_log_probabilities(model, run, tokens, variant)
        expected = (np.exp(own) * (own - other)).sum(-1).mean(1)
        np.testing.assert_allclose(divergence, expected, rtol=2e-3, atol=1e-7)
    assert found.divergence[: -len(variants) // 2].max() > 1e-3
    assert (found.divergence[variants.index(Variant((run.model.top_k,) * len(run.model.layers)))] == 0).all()


def find_movements(model, run, tokens, exponent=None, maps=None):
    """Squares and relative squares as in `Losses`, of the outputs of transformers' own blocks."""
    whole, found = run.model.top_k, []
    inputs, streams = {}, {}
    blocks = tiny.find_moe_blocks(model)
    readers = "ffn_hc" if run.decoder.streams else "post_attention_layernorm"  # of the residual stream, or of several
    norms = {layer: dict(model.named_modules())[f"model.layers.{layer}.{readers}"] for layer in blocks}
    hooks = [
        module.register_forward_hook(lambda _, given, __, layer=layer, kept=kept: kept.update({layer: given[0]}))
        for modules, kept in ((norms, streams), (blocks, inputs))
        for layer, module in modules.items()
    ]
    find_log_probabilities(model, run, tokens)
    for hook in hooks:
        hook.remove()
    for layer in run.model.layers:
        results = []
        for k in range(1, whole + 1):
            variant = Variant(tuple(k if own == layer else whole for own in run.model.layers), exponent, maps)
            find_log_probabilities(model, run, tokens[:1, :2], variant)  # sets the layer's k
            with torch.no_grad():
                result = blocks[layer](inputs[layer])
            results.append((result[0] if type(result) is tuple else result).double().reshape(*tokens.shape, -1))
        squares = np.stack([((result - results[-1]) ** 2).sum(-1).numpy() for result in results], axis=-1)
        sizes = (streams[layer].double() ** 2).sum(-1).reshape(*tokens.shape, -1).mean(-1).numpy()[..., None]
        found.append((squares.mean(1), (squares / sizes).mean(1)))
    return (np.stack(arrays) for arrays in zip(*found, strict=True))


def test_local_movement_is_that_of_transformers_blocks(opened):
    run, model = opened
    tokens = make_tokens()
    found = measure_losses(run, tokens, [])
    squares, relative = find_movements(model, run, tokens)
    np.testing.assert_allclose(found.squares, squares, rtol=5e-3, atol=1e-7)
    np.testing.assert_allclose(found.relative, relative, rtol=5e-3, atol=1e-7)


def fit(run, exponent, rank=4):
    """Corrections of every layer at every k, fitted to some text, and the run with the exponent that they are for."""
    ks = dict.fromkeys(run.model.layers, range(1, run.model.top_k))
    [maps] = fit_layers(run, make_tokens(16, seed=2), ks, exponents=[exponent], rank=rank)
    model = run.model._replace(routing=run.model.routing._replace(exponent=exponent))
    return run._replace(model=model), dict(maps)


def test_corrected_losses_are_those_of_transformers(opened):
    """Maps of a fit, served by the adapter from the files that are written here, against the forward passes of both."""
    run, model = opened
    exponent = 0.3
    run, maps = fit(run, exponent)
    whole, layers, tokens = run.model.top_k, len(run.model.layers), make_tokens()
    mixed = Variant(tuple(1 + n % whole for n in range(layers)), exponent, maps)
    single = [mixed._replace(top_k=tuple(1 if n == own else whole for n in range(layers))) for own in range(layers)]
    variants = [mixed, *single, mixed._replace(top_k=(2,) * layers), mixed._replace(maps=None)]
    variants.append(mixed._replace(top_k=(whole,) * layers))
    found = measure_losses(run, tokens, variants, maps=maps)
    own = find_log_probabilities(model, run, tokens)
    for variant, divergence in zip(variants, found.divergence, strict=True):
        other = find_log_probabilities(model, run, tokens, variant)
        expected = (np.exp(own) * (own - other)).sum(-1).mean(1)
        np.testing.assert_allclose(divergence, expected, rtol=2e-3, atol=1e-7)
    assert (found.divergence[-1] == 0).all() and (found.divergence[:-1] > 0).any(axis=1).all()
    squares, relative = find_movements(model, run, tokens, exponent, maps)
    np.testing.assert_allclose(found.squares, squares, rtol=5e-3, atol=1e-7)
    np.testing.assert_allclose(found.relative, relative, rtol=5e-3, atol=1e-7)
    plain = measure_losses(run, tokens, [])
    assert (np.abs(found.squares - plain.squares) > 1e-3 * plain.squares)[..., :-1].mean() > 0.8  # they are corrected


@given(st.lists(st.tuples(st.tuples(*[st.integers(1, 3)] * 3), st.sampled_from([None, 0.5])), max_size=9))
def test_variants_that_are_the_same_so_far_have_one_leader(drawn):
    variants = [Variant(*each) for each in drawn]
    for count, leaders in enumerate(find_leaders(variants, layers=3, top_k=3)):
        begun = [None if set(one.top_k[:count]) <= {3} else (one.top_k[:count], one.exponent) for one in variants]
        assert list(leaders) == [MODEL if own is None else begun.index(own) for own in begun]


def test_what_variants_share_changes_nothing(olmoe):
    run, _ = olmoe
    run, maps = fit(run, 0.3)
    whole, layers, tokens = run.model.top_k, len(run.model.layers), make_tokens()
    tops = np.random.default_rng(0).integers(1, whole + 1, (12, layers))
    tops[:4, :-1] = tops[0, :-1]  # these part in the last layer
    tops[4] = tops[5]
    variants = [
        Variant(tuple(ks.tolist()), *(((0.3, maps), (0.3, None), (None, None))[n % 3])) for n, ks in enumerate(tops)
    ]
    variants += [variants[0], Variant((whole,) * layers)]
    alone = [measure_losses(run, tokens, [variant]).divergence[0] for variant in variants]
    np.testing.assert_allclose(measure_losses(run, tokens, variants).divergence, alone, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("background_k", [1, 2, None])
def test_losses_around_a_background_are_differences_of_whole_models(olmoe, background_k):
    run, model = olmoe
    run, maps = fit(run, 0.3)
    whole, layers, tokens = run.model.top_k, run.model.layers, make_tokens()
    others = background_k or whole
    settings = make_settings(background_k=background_k, gate_exponent=0.3, compensation_rank=4)
    measured = dict(measure_layers(run, tokens, layers[1:], settings, maps=maps))
    assert list(measured) == list(layers[1:])
    own = find_log_probabilities(model, run, tokens)
    for layer, losses in measured.items():
        found = []
        for k in range(1, whole + 1):
            variant = Variant(tuple(k if other == layer else others for other in layers), 0.3, maps)
            other = find_log_probabilities(model, run, tokens, variant)
            found.append((np.exp(own) * (own - other)).sum(-1).mean(1))
        differences = np.array(found) - found[-1]
        np.testing.assert_allclose(losses.divergence, differences.mean(1).clip(0), rtol=5e-3, atol=1e-6)
        errors = differences.std(axis=1, ddof=1) / len(tokens) ** 0.5
        np.testing.assert_allclose(losses.divergence_stderr, errors, rtol=2e-2, atol=1e-6)


def test_logits_are_those_of_the_served_allocation(opened):
    run, model = opened
    run, maps = fit(run, 0.0)
    layers, tokens = len(run.model.layers), make_tokens()
    variant = Variant(tuple(1 + n % 3 for n in range(layers)), 0.0, maps)
    [states] = forward(run, tokens, [variant])
    ends = run.find_residence().read_ends(first=False)
    hidden = jnp.asarray(states[0]).reshape(tokens.size, *states[0].shape[2:])
    found = np.asarray(read_log_probabilities(run.decoder, ends, hidden)).reshape(*tokens.shape, -1)
    expected = find_log_probabilities(model, run, tokens, variant)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    plain = find_log_probabilities(model, run, tokens, variant._replace(maps=None))
    assert np.abs(plain - expected).max() > 1e-2  # what the corrections do is far above that


def test_the_memory_of_hidden_states_is_that_of_all_residual_streams(opened):
    run, model = opened
    streams = getattr(model.config, "hc_mult", 1)
    [states] = forward(run, make_tokens())
    assert states[-1].nbytes == check_room(run, 4 * LENGTH) == 4 * LENGTH * streams * run.model.hidden_size * 4


def test_what_goes_through_at_once_changes_nothing(olmoe, monkeypatch):
    run, _ = olmoe
    tokens, variants = make_tokens(), make_variants(run)
    together = measure_losses(run, tokens, variants)
    monkeypatch.setattr(variants_of, "PASS_BYTES", 1)
    monkeypatch.setattr(losses_of, "LOGIT_BYTES", 1)
    monkeypatch.setattr(variants_of, "_choose_storage", lambda run, tokens: np.asarray)
    for one, other in zip(together, measure_losses(run, tokens, variants), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6)


def test_enough_passes_write_what_sampling_in_turn_writes(olmoe):
    run, model = olmoe
    drawn = draw_tokens(run, sequences=2, length=6, seed=3, passes=6)
    assert (draw_tokens(run, sequences=2, length=6, seed=3, passes=7) == drawn).all()
    assert (draw_tokens(run, sequences=2, length=6, seed=4, passes=1) != drawn).any()
    vocabulary = model.config.vocab_size
    key, in_turn = jax.random.key(3), drawn[:, :1].copy()
    for position in range(5):
        own = find_log_probabilities(model, run, in_turn)[:, -1]
        numbers = [sequence * 6 + position for sequence in range(2)]
        noise = [jax.random.gumbel(jax.random.fold_in(key, number), (vocabulary,)) for number in numbers]
        in_turn = np.concatenate([in_turn, (own + np.stack(noise)).argmax(-1)[:, None]], axis=1)
    np.testing.assert_array_equal(drawn, in_turn)


def test_texts_begin_as_the_config_says(olmoe, monkeypatch):
    run, _ = olmoe
    for token, expected in ((7, {7}), (None, None), ([1, 2], None), (10**6, None), (-1, None)):
        config = {key: value for key, value in run.checkpoint.config.items() if key != "bos_token_id"}
        changed = run._replace(
            checkpoint=Checkpoint(run.checkpoint.folder, config | {"bos_token_id": token}, run.checkpoint.entries)
        )
        firsts = set(draw_tokens(changed, sequences=8, length=2, seed=0, passes=0)[:, 0].tolist())
        assert firsts == expected if expected else len(firsts) > 1


def test_a_token_without_an_embedding_moves_nothing(tmp_path):
    """As one that no text has may be left by weight decay, or a padding token that begins a text."""
    model = tiny.build_reference("olmoe")
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = 0
    checkpoint = open_checkpoint(tiny.save_checkpoint("olmoe", model, tmp_path / "olmoe"))
    described = describe(checkpoint)
    run = Run(checkpoint, described, describe_decoder(checkpoint, described), "float32")
    losses = measure_losses(run, np.full((2, 4), 7, np.int32), [])
    assert (losses.squares == 0).all() and (losses.relative == 0).all()


def make_settings(**changes):
    values = dict(input="weights", seed=0, batch=2, length=LENGTH, dtype="float32", relative_error=0.0, max_samples=100)
    return ProfileSettings(**values | changes)


def test_losses_are_means_with_standard_errors_over_sequences():
    rng = np.random.default_rng(0)
    squares, relative = rng.uniform(1, 2, (2, 3, 6, 4))
    squares[..., -1] = relative[..., -1] = 0
    divergence = rng.uniform(0, 1, (4, 6))
    divergence[-1] = 0
    losses = Losses(squares, relative, divergence)
    loss = summarise(losses, 1, divergence, make_settings(batch=3))
    assert (loss.iterations, loss.samples) == (2, 6 * LENGTH)
    for k in range(4):
        mean, error = squares[1, :, k].mean(), squares[1, :, k].std(ddof=1) / 6**0.5
        norms = [np.sqrt(LENGTH * squares[1, 3 * i : 3 * i + 3, k].sum()) for i in range(2)]
        assert loss.rms[k] == pytest.approx(mean**0.5)
        assert loss.rms_stderr[k] == pytest.approx(0.5 * error / mean**0.5 if k < 3 else 0)
        assert loss.frobenius[k] == pytest.approx(np.mean(norms))
        assert loss.relative[k] == pytest.approx(relative[1, :, k].mean())
        assert loss.relative_stderr[k] == pytest.approx(relative[1, :, k].std(ddof=1) / 6**0.5)
        assert loss.divergence[k] == pytest.approx(divergence[k].mean() if k < 3 else 0)
        assert loss.divergence_stderr[k] == pytest.approx(divergence[k].std(ddof=1) / 6**0.5 if k < 3 else 0)


def test_the_gate_exponent_is_that_which_diverges_least(olmoe):
    run, model = olmoe
    whole = run.model.top_k
    tokens = draw_tokens(run, sequences=8, length=LENGTH, seed=0)
    own = find_log_probabilities(model, run, tokens)
    divergence = np.zeros((len(EXPONENTS), whole - 1))
    for i, exponent in enumerate(EXPONENTS):
        for k in range(1, whole):
            other = find_log_probabilities(model, run, tokens, Variant((k,) * len(run.model.layers), exponent))
            divergence[i, k - 1] = (np.exp(own) * (own - other)).sum(-1).mean()
    best = (divergence / divergence.min(axis=0)).mean(axis=1).argmin()
    assert best in (0, len(EXPONENTS) - 1) and choose_compensation(run, tokens) == (EXPONENTS[best], False)


@pytest.mark.parametrize(("curve", "least"), [(1.0, 0.4), (3.0, 0.06), (2.0, 0.94)])
def test_between_the_exponents_that_are_tried_it_is_where_a_parabola_is_lowest(olmoe, monkeypatch, curve, least):
    tried = []

    def measure(run, tokens, variants, report):
        tried.extend(variant.exponent for variant in variants)
        rows = [[(sum(variant.top_k) + curve * (variant.exponent - least) ** 2)] * 2 for variant in variants]
        return Losses(np.zeros((1, 2, 4)), np.zeros((1, 2, 4)), np.array(rows))

    monkeypatch.setattr("lexi_search.profiling.divergence.measure_losses", measure)
    found = choose_compensation(olmoe[0], make_tokens()).exponent
    assert tuple(dict.fromkeys(tried)) == EXPONENTS
    nearest = min(EXPONENTS, key=lambda exponent: abs(exponent - least))
    assert found == (pytest.approx(least) if 0 < nearest < 1 else nearest)
    maps = {0.0: {}, 0.5: {}, 1.0: {}}
    with_maps = choose_compensation(olmoe[0], make_tokens(), corrected=maps, alone=False).exponent
    assert with_maps == (least if least == 0.4 else nearest)


@pytest.mark.parametrize("sequences", [2, 3, 4, 7])
def test_corrections_are_tried_on_other_text_than_they_are_fitted_on(olmoe, monkeypatch, sequences):
    seen, tokens = {}, np.arange(8 * sequences, dtype=np.int32).reshape(sequences, 8)
    monkeypatch.setattr(
        "lexi_search.profiling.divergence.try_exponents",
        lambda run, tokens, **others: seen.update(fitted=tokens) or {0.25: {}},
    )
    monkeypatch.setattr(
        "lexi_search.profiling.divergence.choose_compensation",
        lambda run, tokens, **others: seen.update(tried=tokens, **others) or Compensation(0.25, True),
    )
    report = print
    assert find_compensation(olmoe[0], tokens, rank=2, alone=False, report=report) == (0.25, True)
    fitted, tried = set(seen["fitted"].flat), set(seen["tried"].flat)
    assert fitted | tried == set(tokens.flat) and not (sequences > 3 and fitted & tried)
    assert (seen["corrected"], seen["alone"]) == ({0.25: {}}, False)


# --- the command


@pytest.fixture(scope="module")
def checkpoint(olmoe):
    return olmoe[0].checkpoint.folder


def test_by_default_the_models_own_text_decides(folder, olmoe):
    """Profile, search and export; the losses are those of transformers on the text that the model writes."""
    run, model = olmoe
    succeed("profile", run.checkpoint.folder, "--length", 32, "--samples", 256)
    profile, whole = serialisation.read_profile("profile.json"), run.model.top_k
    maps, exponent = serialisation.read_profile_maps("profile.json", profile), profile.settings.gate_exponent
    settings = ProfileSettings("weights", 0, 4, 32, "float32", 0.0, 256)
    others = whole // 2
    assert profile.settings == replace(settings, gate_exponent=exponent, compensation_rank=32, background_k=others)
    tokens = draw_tokens(run, sequences=8, length=32, seed=0)
    own = find_log_probabilities(model, run, tokens)
    layers = run.model.layers
    for layer in layers:
        means = []
        for k in range(1, whole + 1):
            variant = Variant(tuple(k if other == layer else others for other in layers), exponent, maps)
            other = find_log_probabilities(model, run, tokens, variant)
            means.append((np.exp(own) * (own - other)).sum(-1).mean(1))
        more, found = np.array(means) - means[-1], profile.layers[layer]
        assert found.divergence == pytest.approx(tuple(more.mean(axis=1).clip(0)), rel=5e-3, abs=1e-6)
        errors = more.std(axis=1, ddof=1) / 8**0.5
        assert found.divergence_stderr == pytest.approx(tuple(errors), rel=2e-2, abs=1e-6)
    command_line.run("search", "profile.json", "--budget", 2 * len(layers) + 1)  # may be told to be noisy
    allocation = serialisation.read_allocation("allocation.json")
    table = np.array(profile.losses("divergence"))
    every = itertools.product(range(1, whole + 1), repeat=len(layers))
    fitting = [ks for ks in every if sum(ks) == 2 * len(layers) + 1]
    best = min(sum(table[row, k - 1] for row, k in enumerate(ks)) for ks in fitting)
    assert allocation.optimal_loss == pytest.approx(best)  # its own is by shrunk losses
    own = sum(table[row, k - 1] for row, k in enumerate(allocation.top_k.values()))
    assert allocation.loss == pytest.approx(own)
    succeed("export", "allocation.json", "--to", "vllm", "--model", run.checkpoint.folder, "-o", "out")
    written = json.loads((folder / "out" / "config.json").read_text())["per_layer_config"]
    assert written == {str(layer): {"num_experts_per_tok": k} for layer, k in allocation.top_k.items()}


def test_profile_of_the_models_own_text(folder, checkpoint):
    succeed("profile", checkpoint, *QUICK)
    profile = serialisation.read_profile("profile.json")
    assert profile.loss_kinds == ("frobenius", "rms", "squared", "relative", "divergence")
    assert (profile.settings.input, profile.settings.max_samples, profile.layers[0].samples) == ("weights", 64, 64)
    layers = len(profile.layers)
    succeed("search", "profile.json", "--budget", layers + 1)
    allocation = serialisation.read_allocation("allocation.json")
    assert allocation.made_by["loss"] == "divergence"
    table = profile.losses("divergence")
    assert allocation.loss == pytest.approx(sum(table[i][allocation.top_k[i] - 1] for i in range(layers)))
    assert "divergence loss of each layer" in succeed("show", "profile.json")
    for command in (("plot", "profile.json"), ("front", "profile.json", "--knee")):
        succeed(*command)
    assert serialisation.read_allocation("allocation.json").made_by["loss"] == "divergence"


def test_parts_make_the_same_profile(folder, checkpoint):
    full = (*QUICK, "--compensation", "full")
    succeed("profile", checkpoint, *full)
    for name, layers in (("a", "0"), ("b", "1")):
        succeed("profile", checkpoint, *full, "--layers", layers, "-o", f"{name}.json")
    whole = serialisation.read_profile("profile.json")
    parts = [serialisation.read_profile(f"{name}.json") for name in "ab"]
    for part in parts:
        for layer, loss in part.layers.items():
            assert loss.rms == whole.layers[layer].rms
            assert loss.divergence == pytest.approx(whole.layers[layer].divergence, rel=1e-4)
    every = list(range(2, len(whole.model.moe_layers)))
    succeed("profile", checkpoint, *full, "--layers", ",".join(map(str, every)), "-o", "c.json")
    succeed("merge", "a.json", "c.json", "b.json", "-o", "merged.json")
    merged = serialisation.read_profile("merged.json")
    assert merged.compensation == replace(whole.compensation, file="merged.safetensors")
    assert Path("merged.safetensors").read_bytes() == Path("profile.safetensors").read_bytes()


@pytest.mark.parametrize("compensation", ["none", "exponent"])
def test_the_background_is_half_of_the_models_k_where_experts_are_made_up_for(folder, checkpoint, compensation):
    options = (*QUICK, "--compensation", compensation)
    whole, half = profile_with(checkpoint, *options), {"none": None, "exponent": 2}[compensation]
    assert whole.settings.background_k == half
    again = profile_with(checkpoint, *options, "--background-k", half or whole.model.top_k)
    assert again == whole
    other = profile_with(checkpoint, *options, "--background-k", 1)
    assert other.settings == replace(whole.settings, background_k=1) and other.layers != whole.layers


def profile_with(checkpoint, *options):
    succeed("profile", checkpoint, *options, "-o", "other.json", "--force")
    return serialisation.read_profile("other.json")


def test_a_gate_exponent_can_be_found(folder, checkpoint):
    alone = ("--compensation", "exponent")
    result = command_line.run("profile", checkpoint, *QUICK, *alone)
    found = serialisation.read_profile("profile.json").settings.gate_exponent
    assert 0 <= found <= 1 and found == round(found, 2)
    assert (result.stdout, command_line.read_warnings(result)) == ("profile.json\n", "")
    assert f"gate exponent {found:g}" in result.stderr
    for options in ([*alone, "--gate-exponent", found], [*alone, "--gate-exponent", "auto"]):
        succeed("profile", checkpoint, *QUICK, *options, "-o", "given.json")
        assert (folder / "given.json").read_bytes() == (folder / "profile.json").read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == ["given.json", "profile.json"]
    succeed("search", "profile.json", "--budget", len(serialisation.read_profile("profile.json").layers) + 1)
    assert serialisation.read_allocation("allocation.json").gate_exponent == found


REFUSED = [
    (("--relative-error", "0.1"), "--relative-error is for --input paper; add that, or leave --relative-error out"),
    (("--control-variate", "2"), "--control-variate is for --input paper; add that"),
    (("--max-k", "8"), "--max-k is for --input paper; add that"),
    (("--samples", "20"), "20 samples are fewer than two sequences in iterations of batch 2 x length 16; raise --samp"),
    (("--samples", 2**50), "GB; lower --samples, or take --layers in parts"),
    (("--gate-exponent", "half"), "--gate-exponent 'half' is neither a number nor auto"),
    (("--layers", "77"), "layer 77 is no MoE layer"),
    (("--background-k", "77"), "--background-k is 77, expected 1 to"),
    (("--input", "paper", "--background-k", "1"), "--background-k is of other layers, which --input paper has none of"),
]


@pytest.mark.parametrize("options, message", REFUSED)
def test_bad_options_are_refused(folder, checkpoint, options, message):
    assert message in refuse("profile", checkpoint, *QUICK, *options)
    assert not list(folder.iterdir())


def test_auto_needs_the_models_own_text(folder, checkpoint):
    message = "auto is found on a text; leave --input paper out"
    assert message in refuse("profile", checkpoint, "--input", "paper", "--gate-exponent", "auto")


def test_a_family_whose_attention_is_not_known_is_refused(folder):
    known = decoder_families.FAMILIES
    name = next(name for name in tiny.ALL_FAMILIES if tiny.MODEL_TYPES.get(name, name) not in known)
    unknown = tiny.make_checkpoint(name, folder / name)
    assert "; use lexi-search profile --input paper, which takes the MoE layers alone; known are" in refuse(
        "profile", unknown
    )


def test_a_folder_of_moe_layers_alone_is_refused(folder, checkpoint):
    alone = Path(shutil.copytree(checkpoint, folder / "alone"))
    kept = {name: value for name, value in load_file(alone / "model.safetensors").items() if ".mlp." in name}
    save_file(kept, alone / "model.safetensors", {"format": "pt"})
    missing = "tensor model.layers.0.self_attn.q_proj.weight is missing"
    remedy = "complete the download, or use lexi-search profile --input paper, which takes the MoE layers alone"
    assert refuse("profile", alone) == f"{alone}: {missing}; {remedy}"
    succeed("profile", alone, *QUICK, "--input", "paper")


def test_overflow_is_refused(tmp_path):
    reference = tiny.build_reference("olmoe")
    with torch.no_grad():
        reference.model.embed_tokens.weight.mul_(100)
    opened = open_checkpoint(tiny.save_checkpoint("olmoe", reference, tmp_path / "olmoe"))
    model, settings = describe(opened), make_settings(dtype="float16")
    decoder = describe_decoder(opened, model)._replace(embedding_scale=6e4)
    with pytest.raises(InputError, match="hidden states overflow in float16; try --dtype float32"):
        list(measure_layers(Run(opened, model, decoder, "float16"), make_tokens(), model.layers[:1], settings))


def test_no_layers_need_no_text(checkpoint):
    opened = open_checkpoint(checkpoint)
    assert list(profile_layers(opened, describe(opened), layers=(), settings=make_settings(max_samples=1))) == []


def test_whole_allocations_are_judged(folder, olmoe):
    run, model = olmoe
    weights, identity, whole = run.checkpoint.folder, run.model.identity, run.model.top_k
    layers = len(identity.moe_layers)
    top_k = {layer: 1 + place % whole for place, layer in enumerate(identity.moe_layers)}
    allocation = Allocation(identity, top_k, sum(top_k.values()), 0.0, 0.0, {"lexi_search": "0"}, 0.5)
    serialisation.write_allocation("a.json", allocation)
    options = ("--batch", 2, "--length", LENGTH, "--samples", 4 * LENGTH)
    rows = json.loads(succeed("judge", weights, "a.json", *options, "--json"))
    assert [row["divergence"] for row in rows] == sorted(row["divergence"] for row in rows)
    tokens = draw_tokens(run, sequences=4, length=LENGTH, seed=1)
    own = find_log_probabilities(model, run, tokens)
    variants = {"a.json": Variant(tuple(top_k.values()), 0.5)}
    near = {allocation.budget // layers, -(-allocation.budget // layers)}
    variants |= {f"k = {k} in every layer": Variant((k,) * layers) for k in near}
    assert {row["name"] for row in rows} == set(variants)
    for row in rows:
        other = find_log_probabilities(model, run, tokens, variants[row["name"]])
        expected = (np.exp(own) * (own - other)).sum(-1).mean(1)
        assert row["divergence"] == pytest.approx(expected.mean(), rel=1e-2)
        assert row["stderr"] == pytest.approx(expected.std(ddof=1) / 2, rel=2e-2)
        assert row["budget"] == sum(variants[row["name"]].top_k)
    more = {layer: whole - (layer == identity.moe_layers[0]) for layer in identity.moe_layers}
    serialisation.write_allocation("more.json", replace(allocation, top_k=more, budget=sum(more.values())))
    told = command_line.run("judge", weights, "a.json", "more.json", *options).stderr
    (said,) = [line for line in told.splitlines() if line.startswith("done: ")]  # the larger budget wins nothing
    assert f"more.json is the only one with budget {sum(more.values())}, " in said and said.count("budget") == 2
    lines = succeed("judge", weights, "a.json", *options).splitlines()
    assert "a.json" in lines[2 + [row["name"] for row in rows].index("a.json")]
    serialisation.write_allocation("b.json", replace(allocation, model=replace(identity, router_sha256="f" * 64)))
    assert "b.json is for another model than" in refuse("judge", weights, "b.json", *options)
