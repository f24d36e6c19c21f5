"""Profile and allocation files: what is written is read back, byte for byte; what is damaged is refused by name."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import add_model_losses, make_allocation, make_cost_table, make_identity, make_profile

from lexi_search.artifacts import serialisation
from lexi_search.artifacts.allocation import Allocation
from lexi_search.artifacts.codec import MAX_GATE_EXPONENT
from lexi_search.artifacts.identity import ModelIdentity
from lexi_search.artifacts.profile import DTYPES, LARGEST, LOSS_KINDS, LayerLoss, Profile, ProfileSettings
from lexi_search.errors import InputError

losses = st.floats(0, LARGEST)
counts = st.integers(1, 10**12)
names = st.text(min_size=1, max_size=12)
made_by = st.dictionaries(st.text(max_size=8), st.none() | st.booleans() | st.integers() | losses | st.text(max_size=8))


@st.composite
def identities(draw):
    num_hidden_layers = draw(st.integers(1, 70))
    indices = st.integers(0, num_hidden_layers - 1)
    num_experts = draw(st.integers(1, 512))
    return ModelIdentity(
        model_type=draw(names),
        num_hidden_layers=num_hidden_layers,
        num_experts=num_experts,
        top_k=draw(st.integers(1, min(num_experts, 16))),
        moe_layers=tuple(sorted(draw(st.sets(indices, min_size=1)))),
        router=draw(st.sampled_from(["model.layers.{}.mlp.gate.weight", "layers.{}.router"])),
        top_k_key=draw(names),
        router_sha256=draw(st.text("0123456789abcdef", min_size=64, max_size=64)),
    )


@st.composite
def profiles(draw):
    model = draw(identities())
    settings = ProfileSettings(
        input=draw(names),
        seed=draw(st.integers(0)),
        batch=draw(counts),
        length=draw(counts),
        dtype=draw(st.sampled_from(DTYPES)),
        relative_error=draw(losses),
        max_samples=draw(counts),
    )
    rows = st.tuples(*[losses] * (model.top_k - 1)).map(lambda row: (*row, 0.0))

    def measure(_):
        iterations = draw(counts)
        samples = iterations * settings.batch * settings.length
        return LayerLoss(iterations, samples, draw(rows), draw(rows), draw(rows), draw(rows))

    layers = draw(st.sets(st.sampled_from(model.moe_layers), min_size=1, max_size=4))
    return Profile(model, settings, {layer: measure(layer) for layer in layers}, draw(made_by))


@st.composite
def allocations(draw):
    model = draw(identities())
    top_k = {layer: draw(st.integers(1, model.top_k)) for layer in model.moe_layers}
    exponent = draw(st.none() | st.floats(0, MAX_GATE_EXPONENT))
    return Allocation(model, top_k, sum(top_k.values()), draw(losses), draw(losses), draw(made_by), exponent)


@given(profile=profiles())
def test_profile_survives_its_file(tmp_path_factory, profile):
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    serialisation.write_profile(path, profile)
    again = serialisation.read_profile(path)
    assert again == profile == serialisation.read_artifact(path)
    assert serialisation.to_bytes(again) == path.read_bytes()


@given(allocation=allocations())
def test_allocation_survives_its_file(tmp_path_factory, allocation):
    path = tmp_path_factory.mktemp("allocation") / "allocation.json"
    serialisation.write_allocation(path, allocation)
    again = serialisation.read_allocation(path)
    assert again == allocation == serialisation.read_artifact(path)
    assert serialisation.to_bytes(again) == path.read_bytes()


def test_bytes_are_canonical_whatever_the_order_of_insertion():
    allocation = make_allocation(12)
    backwards = dataclasses.replace(allocation, top_k=dict(reversed(allocation.top_k.items())))
    data = serialisation.to_bytes(allocation)
    assert serialisation.to_bytes(backwards) == data
    assert data == (json.dumps(json.loads(data), sort_keys=True, indent=1) + "\n").encode()
    assert "gate_exponent" not in json.loads(data)


def test_the_file_is_the_documented_one():
    document = serialisation.to_document(make_allocation(2, 2, gate_exponent=0.5))
    assert document == {
        "format": "lexi-allocation",
        "version": 1,
        "model": {
            "model_type": "olmoe",
            "num_hidden_layers": 2,
            "num_experts": 4,
            "top_k": 2,
            "moe_layers": [0, 1],
            "router": "model.layers.{}.mlp.gate.weight",
            "top_k_key": "num_experts_per_tok",
            "router_sha256": "0123456789abcdef" * 4,
        },
        "top_k": {"0": 1, "1": 2},
        "gate_exponent": 0.5,
        "budget": 3,
        "loss": 1.5,
        "optimal_loss": 1.25,
        "made_by": {"lexi_search": "0.1.0"},
    }


def test_losses_by_kind():
    profile = make_profile(3, 3)
    shuffled = dataclasses.replace(profile, layers=dict(reversed(profile.layers.items())))
    assert shuffled.losses("frobenius") == tuple(profile.layers[layer].frobenius for layer in range(3))
    assert shuffled.losses("rms") == tuple(profile.layers[layer].rms for layer in range(3))
    assert shuffled.losses("squared") == tuple(tuple(r * r for r in profile.layers[i].rms) for i in range(3))
    largest = max(max(row) for row in profile.losses("squared"))
    expected = tuple(tuple(value / largest for value in row) for row in profile.losses("squared"))
    assert profile.losses("squared", normalised=True) == expected


def test_losses_of_the_whole_model(tmp_path):
    plain, profile = make_profile(3, 3), add_model_losses(make_profile(3, 3))
    assert (plain.loss_kinds, profile.loss_kinds) == (("frobenius", "rms", "squared"), tuple(LOSS_KINDS))
    path = tmp_path / "profile.json"
    serialisation.write_profile(path, profile)
    assert serialisation.read_profile(path) == profile
    measured = profile.layers[0].increase
    assert any(value < 0 for row in profile.layers.values() for value in row.increase)  # noise around nothing
    assert profile.losses("increase")[0] == tuple(max(value, 0.0) for value in measured)
    for kind in LOSS_KINDS:
        table = profile.losses(kind)
        assert [len(row) for row in table] == [3] * 3 and all(row[-1] == 0 for row in table)
        assert np.shape(profile.errors(kind)) == np.shape(table)
    with pytest.raises(InputError, match="made with input 'paper', holds frobenius, rms, squared, no increase"):
        plain.losses("increase")
    one = dataclasses.replace(profile, layers=dict(plain.layers) | {0: profile.layers[0]})
    assert one.loss_kinds == plain.loss_kinds
    with pytest.raises(InputError, match="loss kind 'l1' is unknown, expected one of frobenius, rms, squared"):
        profile.losses("l1")


def test_profiles_state_the_errors_of_every_loss():
    profile = make_profile(2, 3)
    for kind, losses, errors in (
        ("frobenius", "frobenius", "frobenius_stderr"),
        ("rms", "rms", "rms_stderr"),
    ):
        assert profile.errors(kind) == tuple(getattr(profile.layers[i], errors) for i in (0, 1))
        assert profile.losses(kind) == tuple(getattr(profile.layers[i], losses) for i in (0, 1))
    step = 1e-6  # the error of a square is that of its root times the slope there
    for row, layer in zip(profile.errors("squared"), profile.layers.values(), strict=True):
        slopes = [((rms + step) ** 2 - (rms - step) ** 2) / (2 * step) for rms in layer.rms]
        np.testing.assert_allclose(row, np.multiply(slopes, layer.rms_stderr), rtol=1e-6)
    with pytest.raises(InputError, match="loss kind 'x' is unknown"):
        profile.errors("x")


def test_gap():
    allocation = make_allocation()
    assert allocation.gap == pytest.approx(0.2)
    assert dataclasses.replace(allocation, optimal_loss=1.5).gap == 0
    assert dataclasses.replace(allocation, loss=0.0, optimal_loss=0.0).gap == 0
    assert dataclasses.replace(allocation, optimal_loss=0.0).gap is None


def change(document, path, value):
    """The document with the entry at `path` replaced, or removed where `value` is DELETED."""
    *parents, last = path
    for key in parents:
        document = document[key]
    if value is DELETED:
        del document[last]
    else:
        document[last] = value


DELETED = object()

BROKEN_ALLOCATIONS = [
    (["format"], "lexi-profile", "its format is 'lexi-profile', expected 'lexi-allocation'"),
    (["format"], DELETED, "its format is None, expected 'lexi-allocation'"),
    (["version"], 2, "its format version is 2, lexi-search 0.1.0 reads 1; make the file again"),
    (["version"], True, "its format version is True"),
    (["version"], "1", "its format version is '1'"),
    (["budget"], 11, "budget is 11, but top_k sums to 10"),
    (["budget"], 10.0, "budget is not an integer: 10.0"),
    (["budget"], DELETED, "missing budget"),
    (["surprise"], 1, "unknown surprise"),
    (["top_k", "1"], DELETED, r"top_k lacks layers \[1\]"),
    (["top_k", "7"], 1, r"top_k has layers \[7\], which are not among the model's moe_layers"),
    (["top_k", "1"], 0, "top_k of layer 1 is 0, expected between 1 and the model's own 4"),
    (["top_k", "1"], 5, "top_k of layer 1 is 5, expected between 1 and the model's own 4"),
    (["top_k", "1"], True, "top_k.1 is not an integer: True"),
    (["top_k", "01"], 1, "key '01' of top_k is not a whole number"),
    (["top_k", "-1"], 1, "key '-1' of top_k is not a whole number"),
    (["top_k", "1" * 5000], 1, "key '1+ of top_k is not a whole number"),
    (["top_k"], [1, 2, 3, 4], "top_k is not an object"),
    (["loss"], -1.0, "loss is -1.0, a finite number of at least 0 expected"),
    (["loss"], "1", "loss is not a number: '1'"),
    (["loss"], 10**400, "loss is not a number: 1000"),
    (["optimal_loss"], None, "optimal_loss is not a number: None"),
    (["gate_exponent"], None, "gate_exponent is not a number: None"),
    (["gate_exponent"], -0.5, "gate_exponent is -0.5"),
    (["gate_exponent"], 1e308, r"gate_exponent is 1e\+308, expected between 0 and 2"),
    (["made_by"], [], "made_by is not an object"),
    (["model"], "olmoe", "model is not an object: 'olmoe'"),
    (["model", "top_k"], 9, "model: top_k is 9, expected between 1 and num_experts = 8"),
    (["model", "num_hidden_layers"], 0, "model: num_hidden_layers is 0"),
    (["model", "moe_layers"], [], "model: moe_layers is empty"),
    (["model", "moe_layers"], [0, 1, 3, 2], r"model: moe_layers \[0, 1, 3, 2\] must ascend within 0..3"),
    (["model", "moe_layers"], [0, 1, 2, 4], "must ascend within 0..3"),
    (["model", "moe_layers"], [0, 1, 2, "3"], r"model.moe_layers\[3\] is not an integer: '3'"),
    (["model", "router"], "gate", "model: router 'gate' must hold exactly one {}"),
    (["model", "router_sha256"], "ABC", "model: router_sha256 'ABC' is not 64 lower-case hex digits"),
    (["model", "model_type"], "", "model: model_type is empty"),
    (["model", "top_k_key"], "", "model: top_k_key is empty"),
    (["model", "top_k_key"], DELETED, "missing model.top_k_key"),
]


@pytest.mark.parametrize("path, value, message", BROKEN_ALLOCATIONS)
def test_broken_allocation_is_refused(tmp_path, path, value, message):
    document = serialisation.to_document(make_allocation())
    change(document, path, value)
    assert_refused(serialisation.read_allocation, tmp_path, json.dumps(document), message)


BROKEN_PROFILES = [
    (["format"], "lexi-allocation", "its format is 'lexi-allocation', expected 'lexi-profile'"),
    (["version"], 99, "its format version is 99, lexi-search 0.1.0 reads 1; make the file again"),
    (["layers"], {}, "the profile has no layers"),
    (["layers", "8"], {}, "missing layers.8.frobenius, layers.8.frobenius_stderr, layers.8.iterations"),
    (["layers", "x"], {}, "key 'x' of layers is not a whole number"),
    (["layers", "1", "rms"], [1.0, 0.5, 0.0], "layers.1: rms has 3 entries, frobenius has 4"),
    (["layers", "1", "rms", 0], float("nan"), "NaN is not a finite number"),
    (["layers", "1", "rms", 0], float("inf"), "Infinity is not a finite number"),
    (["layers", "1", "frobenius", 2], -0.25, "layers.1: frobenius at k = 3 is -0.25"),
    (["layers", "1", "frobenius", 3], 0.25, "layers.1: frobenius at the last k is 0.25, 0 expected"),
    (["layers", "1", "frobenius"], [], "layers.1: frobenius has 0 entries"),
    (["layers", "1", "relative"], [0.5, 0.4, 0.3, 0.0], "layers.1: one of relative and relative_stderr is missing"),
    (["layers", "1", "iterations"], 0, "layers.1: iterations is 0, at least 1 expected"),
    (["layers", "1", "samples"], 47, r"layer 1 has 47 samples, not iterations \* batch \* length = 48"),
    (["settings", "dtype"], "int8", "settings: dtype is 'int8', expected one of float32, bfloat16, float16"),
    (["settings", "batch"], 0, "settings: batch is 0, at least 1 expected"),
    (["settings", "seed"], -1, "settings: seed is -1, at least 0 expected"),
    (["settings", "relative_error"], "1 %", "settings.relative_error is not a number: '1 %'"),
    (["settings", "input"], "", "settings: input is empty"),
]


@pytest.mark.parametrize("path, value, message", BROKEN_PROFILES)
def test_broken_profile_is_refused(tmp_path, path, value, message):
    document = serialisation.to_document(make_profile())
    change(document, path, value)
    assert_refused(serialisation.read_profile, tmp_path, json.dumps(document), message)


def test_profile_of_fewer_k_than_the_model_is_refused(tmp_path):
    document = serialisation.to_document(make_profile())
    for name in ("frobenius", "frobenius_stderr", "rms", "rms_stderr"):
        document["layers"]["2"][name] = [1.0, 0.0]
    message = "layer 2 has losses for 2 values of k, 4 expected"
    assert_refused(serialisation.read_profile, tmp_path, json.dumps(document), message)


BROKEN_COSTS = [
    (["steps"], {}, "the cost table has no steps"),
    (["steps", "x"], {}, "key 'x' of steps is not a whole number"),
    (["steps", "16", "other_ms"], -1.0, "steps.16: other_ms is -1.0, a finite number of at least 0 expected"),
    (["steps", "16", "layers", "0"], [1.0, 2.0], "the step of 16 tokens has 2 times for layer 0, the model's k is 4"),
    (["steps", "16", "layers", "0", 1], 0.0, "the time of layer 0 at k = 2 is 0"),
    (["steps", "16", "layers", "0", 1], "1", r"steps.16.layers.0\[1\] is not a number"),
    (["steps", "16", "layers", "9"], [1.0] * 4, "the step of 16 tokens has layers"),
    (["model", "top_k"], 5, "the model's k is 5"),
    (["device"], 3, "device is not a string: 3"),
]


def test_cost_table_comes_back_as_it_was(tmp_path):
    table = make_cost_table()
    (tmp_path / "cost").write_bytes(serialisation.to_bytes(table))
    assert serialisation.read_cost_table(tmp_path / "cost") == table


@pytest.mark.parametrize("path, value, message", BROKEN_COSTS)
def test_broken_cost_table_is_refused(tmp_path, path, value, message):
    document = serialisation.to_document(make_cost_table())
    change(document, path, value)
    assert_refused(serialisation.read_cost_table, tmp_path, json.dumps(document), message)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ("\ufeff{}", "not JSON"),
        ('{"loss": 1e999}', "1e999 is not a finite number"),
        ('{"a": {"b": 1, "b": 2}}', "key 'b' appears twice in one object"),
        ("[" * 100_000, "not JSON"),
        ('{"format": ' + "1" * 5000 + "}", "not JSON"),
        ("{}", "its format is None, expected 'lexi-profile' or 'lexi-allocation'"),
    ],
)
def test_file_that_is_no_artifact_is_refused(tmp_path, text, message):
    assert_refused(serialisation.read_artifact, tmp_path, text, message)


def assert_refused(read, folder, text, message):
    path = folder / "file.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "file.json"
    path.write_bytes(b"\xff\xfe\x00garbage")
    with pytest.raises(InputError, match="not JSON"):
        serialisation.read_artifact(path)


def test_unreadable_paths_are_refused(tmp_path):
    with pytest.raises(InputError, match="cannot read .*absent.json: No such file or directory"):
        serialisation.read_profile(tmp_path / "absent.json")
    with pytest.raises(InputError, match="cannot read .*: Is a directory"):
        serialisation.read_profile(tmp_path)


def test_invalid_objects_cannot_be_made():
    with pytest.raises(InputError, match="budget is 3, but top_k sums to 10"):
        dataclasses.replace(make_allocation(), budget=3)
    with pytest.raises(InputError, match=r"layers \[9\] are not among the model's moe_layers"):
        dataclasses.replace(make_profile(), layers={9: make_profile().layers[0]})
    with pytest.raises(InputError, match="loss is nan"):
        dataclasses.replace(make_allocation(), loss=float("nan"))
    with pytest.raises(InputError, match="top_k is 0"):
        make_identity(top_k=0)
