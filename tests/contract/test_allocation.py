"""The adapter's reader of allocations, judged by lexi_search's: it must accept the same files and read the same."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import make_allocation

from lexi_adapter.allocation import MAX_GATE_EXPONENT, Allocation, read_allocation, to_document
from lexi_adapter.errors import AllocationError
from lexi_search.artifacts import allocation, identity, serialisation
from lexi_search.errors import InputError


@st.composite
def allocations(draw):
    layers = sorted(draw(st.sets(st.integers(0, 30), min_size=1, max_size=6)))
    own = draw(st.integers(1, 8))
    top_k = {layer: draw(st.integers(1, own)) for layer in layers}
    numbers = st.floats(0, 1e6)
    model = identity.ModelIdentity(
        model_type="olmoe",
        num_hidden_layers=layers[-1] + 1 + draw(st.integers(0, 3)),
        num_experts=own + draw(st.integers(0, 8)),
        top_k=own,
        moe_layers=tuple(layers),
        router="model.layers.{}.mlp.gate.weight",
        top_k_key="num_experts_per_tok",
        router_sha256="0f" * 32,
    )
    return allocation.Allocation(
        model=model,
        top_k=top_k,
        budget=sum(top_k.values()),
        loss=draw(numbers),
        optimal_loss=draw(numbers),
        made_by={"seed": draw(st.integers(0, 9))},
        gate_exponent=draw(st.none() | st.floats(0, MAX_GATE_EXPONENT)),
    )


NUMBERS = [None, True, -1, 0, 1, 2, 99, 2.5, 2**60]
TEXTS = ["", "x", "0", "0f" * 32]
DAMAGES = [*NUMBERS, *TEXTS, [], [0], [1, 0], {}, {"0": 1}, {"x": 1}, {"00": 1}]


def find_places(document, path=()):
    if isinstance(document, dict):
        for key, value in document.items():
            yield (*path, key)
            yield from find_places(value, (*path, key))


def read_both(path):
    """The document that each reader finds in a file, or None where it refuses the file."""
    results = []
    for read, document, error in (
        (serialisation.read_allocation, serialisation.to_document, InputError),
        (read_allocation, to_document, AllocationError),
    ):
        try:
            results.append(document(read(path)))
        except error as refusal:
            assert "\n" not in str(refusal) and str(path) in str(refusal)
            results.append(None)
    return results


@given(allocations())
def test_reads_what_lexi_search_writes(allocation):
    read = read_allocation(serialisation.to_document(allocation))
    assert (read.top_k, read.budget, read.loss) == (allocation.top_k, allocation.budget, allocation.loss)
    assert vars(read.model) == vars(allocation.model)
    assert to_document(read) == serialisation.to_document(allocation)
    assert read_allocation(to_document(read)) == read == read_allocation(read)


@settings(max_examples=300, deadline=None)
@given(allocations(), st.data())
def test_refuses_what_lexi_search_refuses(tmp_path_factory, allocation, data):
    document = serialisation.to_document(allocation)
    damaged = copy.deepcopy(document)
    *parents, key = data.draw(st.sampled_from(list(find_places(document))))
    place = damaged
    for parent in parents:
        place = place[parent]
    action = data.draw(st.sampled_from(["remove", "replace", "add"]))
    if action == "remove":
        del place[key]
    else:
        place[key if action == "replace" else data.draw(st.sampled_from(["x", "7", "gate_exponent"]))] = data.draw(
            st.sampled_from(DAMAGES)
        )
    path = tmp_path_factory.getbasetemp() / "damaged.json"
    path.write_text(json.dumps(damaged))
    theirs, ours = read_both(path)
    assert ours == theirs


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", "{", '{"format": "lexi-allocation"', "{}", '{"format": "lexi-profile", "version": 1}', '{"a": NaN}',
     '{"format": "lexi-allocation", "version": 2}', '{"a": 1, "a": 1}', "\ud800".encode("utf-8", "surrogatepass")],
)  # fmt: skip
def test_refuses_other_files_in_one_line(tmp_path, text):
    path = tmp_path / "allocation.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert read_both(path) == [None, None]


@pytest.mark.parametrize("exponent", [0, 2, 2.0, 2.000001, 99, 1e308])
def test_a_gate_exponent_has_an_end(tmp_path, exponent):
    document = serialisation.to_document(make_allocation(gate_exponent=1.0)) | {"gate_exponent": exponent}
    path = tmp_path / "allocation.json"
    path.write_text(json.dumps(document))
    theirs, ours = read_both(path)
    assert ours == theirs and (ours is not None) is (exponent <= MAX_GATE_EXPONENT)
    if ours is None:
        with pytest.raises(AllocationError, match="expected between 0 and 2"):
            read_allocation(path)


def test_names_a_missing_file(tmp_path):
    with pytest.raises(AllocationError, match=r"cannot read the allocation .*nowhere.json: No such file"):
        read_allocation(tmp_path / "nowhere.json")


@given(allocations(), allocations())
def test_two_allocations_ask_the_same_only_when_the_model_runs_the_same(one, other):
    one, other = (read_allocation(serialisation.to_document(allocation)) for allocation in (one, other))
    same = (one.model, one.top_k, one.gate_exponent) == (other.model, other.top_k, other.gate_exponent)
    assert one.asks_the_same_as(other) is same
    relabelled = Allocation(**vars(one) | {"made_by": {"other": 1}, "loss": 1.0, "optimal_loss": 0.5})
    assert one.asks_the_same_as(relabelled)
