"""Files of corrections: both packages accept the same ones, read the same numbers, and refuse others in one line."""

import dataclasses
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from corrections import compensate, describe, draw_tensors, write_corrections
from mutation import mutate_shard
from synthetic import make_allocation

from lexi_adapter import allocation as serving
from lexi_adapter.errors import AdapterError
from lexi_adapter.model.compensation import check_compensation, read_corrections
from lexi_search.artifacts import serialisation
from lexi_search.errors import InputError

HIDDEN, RANK = 8, 2
FILE = "corrections.safetensors"
COUNT = int(os.environ.get("LEXI_MUTATIONS", "100"))
MODEL = make_allocation().model
PAIRS = [(0, 1), (1, 2), (2, 3)]  # what the allocation with k = 1, 2, 3, 4 of 4 uses


@pytest.fixture
def document(folder):
    """An allocation that names a file beside it, in a.json."""
    document = compensate(serialisation.to_document(make_allocation()), MODEL, folder, hidden=HIDDEN, rank=RANK)
    Path("a.json").write_text(json.dumps(document))
    return document


def read_searching(path):
    maps = serialisation.read_allocation_maps(path, serialisation.read_allocation(path))
    return maps and {layer: [array.astype(np.float32) for array in one] for (layer, _), one in maps.items()}


def read_serving(path):
    found = serving.read_allocation(path)
    size, read = check_compensation(found), read_corrections(found)
    assert size == (os.path.getsize(found.compensation.file) if found.compensation else 0)
    return {layer: [tensor.float().numpy() for tensor in one] for layer, one in read.items()} or None


def read_both(path="a.json"):
    """What both readers find, or None where both refuse; they agree."""
    results = []
    for read, error in ((read_searching, InputError), (read_serving, AdapterError)):
        try:
            results.append(read(path))
        except error as refusal:
            assert str(refusal).isprintable() and ("a.json" in str(refusal) or ".safetensors" in str(refusal))
            results.append(str(refusal))
    theirs, ours = results
    if isinstance(theirs, str) or isinstance(ours, str):
        assert isinstance(theirs, str) and isinstance(ours, str), results
        return None
    assert (theirs or {}).keys() == (ours or {}).keys()
    for layer, arrays in (theirs or {}).items():
        assert all(np.array_equal(*pair) for pair in zip(arrays, ours[layer], strict=True))
    return theirs or {}


def name_again(tensors, metadata=None):
    """Write the file anew, and a.json so that it names it."""
    named = write_corrections(Path(FILE), tensors, metadata or describe(MODEL, RANK))
    document = json.loads(Path("a.json").read_text())
    Path("a.json").write_text(json.dumps(document | {"compensation": named | {"rank": RANK}}))


def test_both_read_what_either_writes(document, folder):
    assert read_both().keys() == {0, 1, 2}
    maps = serialisation.read_allocation_maps("a.json", serialisation.read_allocation("a.json"))
    plain = dataclasses.replace(make_allocation(gate_exponent=0.0), made_by={"compensation_rank": RANK})
    [written] = serialisation.write_allocations(["b.json"], [plain], maps)
    assert read_both("b.json").keys() == {0, 1, 2}
    assert serving.to_document(serving.read_allocation("b.json")) == serialisation.to_document(written)
    Path("c.json").write_text(json.dumps(serialisation.to_document(make_allocation())))
    assert read_both("c.json") == {}  # without any


@pytest.mark.parametrize("place", [FILE, "a.json"])
def test_mutations_are_read_alike(document, place):
    rng, originals = random.Random(place), {name: Path(name).read_bytes() for name in (FILE, "a.json")}
    accepted = 0
    for _ in range(COUNT):
        changed = mutate_shard(rng, originals[FILE])
        if place == FILE:  # named by its new hash: what is read is the header and the numbers
            Path(FILE).write_bytes(changed)
            named = document["compensation"] | {"sha256": serving.hashlib.sha256(changed).hexdigest()}
            Path("a.json").write_text(json.dumps(document | {"compensation": named}))
        else:
            Path(FILE).write_bytes(changed)
            assert read_both() is None or changed == originals[FILE]
            Path(FILE).write_bytes(originals[FILE])
        accepted += read_both() is not None
    assert accepted == COUNT if place == "a.json" else 0 < accepted < COUNT


METADATA = describe(MODEL, RANK)
DRAWN = draw_tensors(MODEL, PAIRS, hidden=HIDDEN, rank=RANK)
NAME = "layers.1.top_k.2.A"


def spoil(value, name=NAME):
    array = DRAWN[name].copy()
    array.flat[0] = value
    return DRAWN | {name: array}


@pytest.mark.parametrize(
    ("tensors", "metadata", "accepted"),
    [
        (DRAWN, {}, True),
        (
            draw_tensors(MODEL, [(layer, k) for layer in range(4) for k in (1, 2, 3)], hidden=HIDDEN, rank=RANK),
            {},
            True,
        ),
        (DRAWN, {"maker": "x"}, True),
        (DRAWN, {"format": "lexi-allocation"}, False),
        (DRAWN, {"version": "2"}, False),
        (DRAWN, {"model_type": "mixtral"}, False),
        (DRAWN, {"router_sha256": "f" * 64}, False),
        (DRAWN, {"rank": "3"}, False),
        (DRAWN, {"rank": "02"}, False),
        ({name: value for name, value in DRAWN.items() if name != NAME}, {}, False),
        (draw_tensors(MODEL, PAIRS, hidden=HIDDEN, rank=RANK + 1), {}, False),
        (draw_tensors(MODEL, PAIRS, hidden=HIDDEN, rank=RANK + 1), {"rank": "3"}, False),
        (draw_tensors(dataclasses.replace(MODEL, num_experts=9), PAIRS, hidden=HIDDEN, rank=RANK), {}, False),
        (DRAWN | draw_tensors(MODEL, PAIRS[:1], hidden=HIDDEN + 1, rank=RANK), {}, False),
        (DRAWN | {NAME: DRAWN[NAME].astype(np.float32)}, {}, False),
        (DRAWN | {NAME: DRAWN[NAME].T.copy()}, {}, False),
        (DRAWN | {"layers.1.top_k.2.c": DRAWN["layers.1.top_k.2.c"].astype(np.float16)}, {}, False),
        (spoil(np.nan), {}, False),
        (spoil(-np.inf), {}, False),
        (spoil(np.inf, "layers.0.top_k.1.B"), {}, False),
        (spoil(np.nan, "layers.0.top_k.1.c"), {}, False),
        (spoil(3e38), {}, True),
    ],
)
def test_both_accept_the_same_files(document, tensors, metadata, accepted):
    name_again(tensors, METADATA | metadata)
    assert (read_both() is not None) is accepted


@pytest.mark.parametrize(
    ("change", "accepted"),
    [
        *(({"file": name}, False) for name in ("", "x", "../x.safetensors", "/x.safetensors", "d/x.safetensors")),
        *(({"file": name}, False) for name in (".x.safetensors", "x\\y.safetensors", "x\n.safetensors", None, 3)),
        ({"file": "x\udce9.safetensors"}, False),
        ({"file": "missing.safetensors"}, False),
        ({"file": FILE.upper()}, False),
        *(({"rank": rank}, False) for rank in (0, -1, 3, True, 2.0, "2", None)),
        *(({"sha256": text}, False) for text in ("", "0" * 64, "0" * 63, 3, None)),
        ({"folder": "/tmp"}, False),
        ({"size": 3}, False),
        ({}, True),
    ],
)
def test_both_accept_the_same_allocations(document, change, accepted):
    named = document["compensation"] | change
    Path("a.json").write_text(json.dumps(document | {"compensation": named}))
    assert (read_both() is not None) is accepted
    for key in ("file", "rank", "sha256"):
        less = {name: value for name, value in document["compensation"].items() if name != key}
        Path("a.json").write_text(json.dumps(document | {"compensation": less}))
        assert read_both() is None


def test_both_want_a_gate_exponent_and_an_object(document):
    for value in (None, [], "corrections.safetensors", {}):
        Path("a.json").write_text(json.dumps(document | {"compensation": value}))
        assert read_both() is None
    Path("a.json").write_text(json.dumps({name: value for name, value in document.items() if name != "gate_exponent"}))
    assert read_both() is None
    for exponent in (0, 1.0):
        Path("a.json").write_text(json.dumps(document | {"gate_exponent": exponent}))
        assert read_both().keys() == {0, 1, 2}


def test_both_read_regular_files_only(document):
    data = Path(FILE).read_bytes()
    for make in (os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path), lambda path: os.symlink(path, path)):
        os.rmdir(FILE) if os.path.isdir(FILE) else os.remove(FILE)
        make(FILE)
        assert read_both() is None
    os.remove(FILE)
    Path("elsewhere").write_bytes(data)
    os.symlink("elsewhere", FILE)
    assert read_both().keys() == {0, 1, 2}


def test_both_read_up_to_the_same_size(document):
    os.truncate(FILE, (1 << 34) + 1)  # sparse
    for read, error in ((read_searching, InputError), (read_serving, AdapterError)):
        with pytest.raises(error, match="larger than 16 GiB"):
            read("a.json")
