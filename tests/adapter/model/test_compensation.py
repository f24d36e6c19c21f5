"""Files of corrections that are not what an allocation names: refused in one line wherever one is read."""

import hashlib
import json
import os
import pickle
import random
import re
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from corrections import compensate, describe, draw_tensors, write_corrections
from mutation import mutate_shard
from synthetic import make_allocation

from lexi_adapter.allocation import describe_run, read_allocation, to_document
from lexi_adapter.errors import AllocationError
from lexi_adapter.model.compensation import check_compensation, covers, locate, read_corrections
from lexi_search.artifacts import serialisation

HIDDEN, RANK = 16, 4
COUNT = int(os.environ.get("LEXI_MUTATIONS", "100"))
FILE = "corrections.safetensors"


@pytest.fixture
def document(folder):
    """An allocation of k = 1, 2, 3, 4 of 4 with its file, as a.json in the working directory."""
    allocation = make_allocation()
    document = compensate(serialisation.to_document(allocation), allocation.model, folder, hidden=HIDDEN)
    Path("a.json").write_text(json.dumps(document))
    return document


def refuse(document=None, **options):
    """The one line with which both readers refuse a.json or a document."""
    lines = []
    for read in (check_compensation, read_corrections):
        with pytest.raises(AllocationError) as caught:
            read(read_allocation("a.json" if document is None else document), **options)
        lines.append(str(caught.value))
    assert lines[0] == lines[1] and "\n" not in lines[0]
    return lines[0]


def name_again(tensors, **changes):
    """Write the file anew, and a.json so that it names it."""
    document = json.loads(Path("a.json").read_text())
    model = make_allocation().model
    named = write_corrections(Path(FILE), tensors, describe(model, RANK) | changes)
    Path("a.json").write_text(json.dumps(document | {"compensation": named | {"rank": RANK}}))


def test_what_was_written_is_read(document, folder):
    allocation = read_allocation("a.json")
    assert (to_document(allocation), allocation.folder) == (document, str(folder))
    assert "gate exponent 0.5, compensation of rank 4 (" in describe_run(allocation, allocation.top_k)
    assert check_compensation(allocation, hidden=HIDDEN) == os.path.getsize(FILE)
    corrections = read_corrections(allocation, hidden=HIDDEN)
    assert sorted(corrections) == [0, 1, 2]  # the last layer runs the model's own k
    expected = draw_tensors(allocation.model, [(layer, layer + 1) for layer in range(3)], hidden=HIDDEN)
    for layer, correction in corrections.items():
        for part, tensor in correction._asdict().items():
            stored = expected[f"layers.{layer}.top_k.{layer + 1}.{part}"]
            assert tensor.dtype == (torch.float32 if part == "c" else torch.bfloat16)
            np.testing.assert_array_equal(tensor.float().numpy(), stored.astype(np.float32))
    plain = replace(allocation, compensation=None)
    assert check_compensation(plain) == 0 and read_corrections(plain) == {}
    assert covers(allocation, {0: 1, 3: 4}) and not covers(allocation, {0: 2})


def test_the_place_of_the_file_goes_with_the_allocation_to_other_processes(document, folder, monkeypatch):
    allocation = read_allocation("a.json")
    sent = json.loads(json.dumps(to_document(allocation, located=True)))
    monkeypatch.chdir("/")
    for other in (
        read_allocation(sent),
        pickle.loads(pickle.dumps(allocation)),
        read_allocation(document, folder=folder),
    ):
        assert other == allocation and other.folder == str(folder)
        assert check_compensation(other) > 0 and to_document(other) == document
    assert locate(read_allocation(document), folder).folder == str(folder)
    assert "not known where that is; give the allocation as a file" in refuse(document)
    assert locate(read_allocation(document), folder / "nowhere").folder is None


def test_allocations_with_other_files_ask_for_other_things(document):
    one = read_allocation("a.json")
    moved = replace(one, compensation=replace(one.compensation, file="b.safetensors"), folder="/elsewhere")
    assert one.asks_the_same_as(moved)
    for other in (None, replace(one.compensation, sha256="0" * 64)):
        assert not one.asks_the_same_as(replace(one, compensation=other))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"file": "../corrections.safetensors"}, "compensation.file is"),
        ({"file": "/etc/corrections.safetensors"}, "compensation.file is"),
        ({"file": "sub\\corrections.safetensors"}, "compensation.file is"),
        ({"file": ".corrections.safetensors"}, "compensation.file is"),
        ({"file": "a\nb.safetensors"}, "compensation.file is"),
        ({"file": "corrections.bin"}, "compensation.file is"),
        ({"file": ""}, "compensation.file is ''"),
        ({"file": 3}, "compensation.file is 3"),
        ({"rank": 0}, "compensation.rank is 0"),
        ({"rank": "4"}, "compensation.rank is '4'"),
        ({"rank": True}, "compensation.rank is True"),
        ({"sha256": "0F" * 32}, "compensation.sha256 .* is not 64 lower-case hex digits"),
        ({"sha256": None}, "compensation.sha256 None is not"),
        ({"folder": "/tmp"}, "unknown compensation.folder"),
        ({"size": 3}, "unknown compensation.size"),
    ],
)
def test_an_allocation_that_names_its_file_otherwise_is_refused(document, change, message):
    Path("a.json").write_text(json.dumps(document | {"compensation": document["compensation"] | change}))
    with pytest.raises(AllocationError, match=message):
        read_allocation("a.json")


def test_a_compensation_is_an_object_beside_a_gate_exponent(document):
    for value in (None, [], "a.safetensors", {}, {"file": FILE}):
        with pytest.raises(AllocationError, match="compensation"):
            read_allocation(document | {"compensation": value})
    with pytest.raises(AllocationError, match="compensation comes without a gate_exponent"):
        read_allocation({key: value for key, value in document.items() if key != "gate_exponent"})
    for place in ("relative", 3, ""):
        with pytest.raises(AllocationError, match="compensation.folder .* has no root"):
            read_allocation(document | {"compensation": document["compensation"] | {"folder": place}})


def test_no_file_or_another_kind_of_file_is_refused(document):
    Path(FILE).unlink()
    assert "cannot be read (No such file or directory)" in refuse()
    os.mkfifo(FILE)
    assert "cannot be read (not a regular file)" in refuse()
    Path(FILE).unlink()
    Path(FILE).symlink_to("/dev/zero")
    assert "cannot be read (not a regular file)" in refuse()
    Path(FILE).unlink()
    Path(FILE).mkdir()
    assert f"{FILE}: cannot be read (Is a directory)" in refuse()


def test_a_file_that_has_changed_is_refused(document):
    whole = Path(FILE).read_bytes()
    for data in (b"", whole[:-1], whole + b"\0", whole[:100], b"version https://git-lfs.github.com/spec/v1\n"):
        Path(FILE).write_bytes(data)
        assert "not the file that the allocation names: its SHA-256 is" in refuse()
    Path("b.safetensors").write_bytes(whole)
    Path(FILE).unlink()
    Path(FILE).symlink_to("b.safetensors")
    assert check_compensation(read_allocation("a.json")) == len(whole)


def draw(**options):
    return draw_tensors(make_allocation().model, [(0, 1), (1, 2), (2, 3)], **{"hidden": HIDDEN, "rank": RANK} | options)


def change(part, function):
    def changing():
        tensors = draw()
        return tensors | {f"layers.1.top_k.2.{part}": function(tensors[f"layers.1.top_k.2.{part}"])}

    return changing


def poison(value):
    def poisoning(tensor):
        tensor = tensor.copy()
        tensor.flat[-1] = value
        return tensor

    return poisoning


@pytest.mark.parametrize(
    "make, metadata, message",
    [
        (draw, {"model_type": "mixtral"}, "its model_type is 'mixtral', the allocation's is 'olmoe'"),
        (draw, {"router_sha256": "0" * 64}, "its router_sha256 is '000"),
        (draw, {"format": "pt"}, "its format is 'pt', the allocation's is 'lexi-compensation'"),
        (draw, {"version": "2"}, "its version is '2', the allocation's is '1'"),
        (draw, {"rank": "8"}, "its rank is '8', the allocation's is '4'"),
        (lambda: draw(rank=2), {}, r"layers.0.top_k.1.A is BF16 \[2, 24\], BF16 \[4, 24\] expected"),
        (lambda: draw_tensors(make_allocation().model, [(0, 1), (2, 3)], hidden=16), {}, "has no layers.1.top_k.2.A"),
        (lambda: draw_tensors(make_allocation().model, [(0, 1), (1, 1)], hidden=16), {}, "has no layers.1.top_k.2.A"),
        (change("A", lambda A: A.T), {}, r"layers.1.top_k.2.A is BF16 \[24, 4\], BF16 \[4, 24\] expected"),
        (change("A", lambda A: A.astype(np.float32)), {}, r"layers.1.top_k.2.A is F32 \[4, 24\], BF16"),
        (change("B", lambda B: B.astype(np.float16)), {}, r"layers.1.top_k.2.B is F16 \[16, 4\], BF16"),
        (change("B", lambda B: B[:-1]), {}, r"layers.1.top_k.2.B is BF16 \[15, 4\], BF16 \[16, 4\] expected"),
        (change("c", lambda c: c.astype(ml_dtypes.bfloat16)), {}, r"layers.1.top_k.2.c is BF16 \[16\], F32"),
        (change("c", lambda c: c[:, None]), {}, r"layers.1.top_k.2.c is F32 \[16, 1\], F32 \[16\] expected"),
        (change("c", lambda c: c[:0]), {}, r"layers.1.top_k.2.c is F32 \[0\], F32 \[16\] expected"),
        (change("A", poison(np.nan)), {}, "A of layer 1 holds numbers that are not finite"),
        (change("B", poison(-np.inf)), {}, "B of layer 1 holds numbers that are not finite"),
        (change("c", poison(np.nan)), {}, "c of layer 1 holds numbers that are not finite"),
    ],
)  # fmt: skip
def test_a_whole_file_that_does_not_fit_is_refused(document, make, metadata, message):
    name_again(draw())
    assert check_compensation(read_allocation("a.json")) > 0
    name_again(make(), **metadata)
    assert re.search(message, refuse())


def test_the_hidden_size_is_the_models(document):
    assert "layers.0.top_k.1.B is BF16 [16, 4], BF16 [32, 4] expected" in refuse(hidden=32)
    name_again(draw() | draw_tensors(make_allocation().model, [(2, 3)], hidden=8))
    assert "layers.2.top_k.3.B is BF16 [8, 4], BF16 [16, 4] expected" in refuse()


def test_a_damaged_file_whose_sha256_is_stated_is_refused_in_one_line_or_read_whole(document):
    rng, original, refused = random.Random(0), Path(FILE).read_bytes(), 0
    for number in range(COUNT):
        data = mutate_shard(rng, original)
        Path(FILE).write_bytes(data)
        named = document["compensation"] | {"sha256": hashlib.sha256(data).hexdigest()}
        Path("a.json").write_text(json.dumps(document | {"compensation": named}))
        try:
            corrections = read_corrections(read_allocation("a.json"))
        except AllocationError as error:
            refused += 1
            assert "\n" not in str(error) and FILE in str(error), number
        else:
            shapes = [tuple(tuple(tensor.shape) for tensor in correction) for correction in corrections.values()]
            assert len(shapes) == 3 and set(shapes) == {((4, 24), (16, 4), (16,))}, number
            assert all(tensor.isfinite().all() for correction in corrections.values() for tensor in correction)
    assert refused > COUNT // 2
