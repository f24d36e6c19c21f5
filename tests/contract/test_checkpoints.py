"""The adapter's reader of safetensors folders, judged by lexi_search's: the same folders, and the same tensors."""

import json
import os
import random
import struct

import numpy as np
import pytest
from mutation import mutate_shard, mutate_text
from safetensors.numpy import save, save_file

from lexi_adapter.errors import AdapterError
from lexi_adapter.model.folder import INDEX, read_tensors
from lexi_search.checkpoint.reader import open_checkpoint
from lexi_search.errors import InputError

ROUTERS = {f"model.layers.{layer}.mlp.gate.weight": np.full((4, 2), layer, np.float32) for layer in range(3)}
NAMES = list(ROUTERS)
COUNT = int(os.environ.get("LEXI_MUTATIONS", "150"))  # a seed


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def write(folder, shards, weight_map=None):
    """Shards as {file: names of their tensors}, and the index."""
    for file, names in shards.items():
        save_file({name: ROUTERS[name] for name in names}, folder / file, metadata={"format": "pt"})
    if weight_map is not None:
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def read_both(folder):
    """Name -> place of every tensor by each reader, and its refusal."""
    results, lines = [], []
    for read, error in (
        (
            lambda: {n: (e.file.name, e.shape, e.start, e.size) for n, e in open_checkpoint(folder).entries.items()},
            InputError,
        ),
        (lambda: {n: (t.path.name, t.shape, t.offset, t.size) for n, t in read_tensors(folder).items()}, AdapterError),
    ):
        try:
            results.append(read())
        except error as refusal:
            assert "\n" not in str(refusal) and str(folder) in str(refusal)
            results.append(None)
            lines.append(str(refusal))
    return (*results, lines)


def refuse(folder, reason):
    theirs, ours, lines = read_both(folder)
    assert theirs is ours is None
    assert all(reason in line for line in lines), lines


def agree(folder):
    theirs, ours, lines = read_both(folder)
    assert ours == theirs and ours is not None, lines
    assert list(ours) == list(theirs)
    return ours


def test_shards_without_an_index(folder):
    write(folder, {"b.safetensors": NAMES[:1], "a.safetensors": NAMES[1:]})
    assert set(agree(folder)) == set(NAMES)


@pytest.mark.parametrize("weight_map", [None, dict.fromkeys(NAMES, "a.safetensors") | {NAMES[2]: "b.safetensors"}])
@pytest.mark.parametrize(
    "change", [lambda tensor: tensor + 1, lambda tensor: tensor.T, lambda tensor: tensor.view("i4")]
)
def test_a_tensor_in_two_shards(folder, weight_map, change):
    write(folder, {"a.safetensors": NAMES[:2], "b.safetensors": NAMES[1:]}, weight_map)
    assert [file for file, *_ in agree(folder).values()] == ["a.safetensors", "b.safetensors", "b.safetensors"]
    tensors = {name: np.ascontiguousarray(change(ROUTERS[name])) for name in NAMES[1:]}
    save_file(tensors, folder / "b.safetensors")
    refuse(folder, f"tensor {NAMES[1]} is also in a.safetensors, with other values")


def test_shards_that_the_index_does_not_name_do_not_count(folder):
    write(folder, {"a.safetensors": NAMES, "b.safetensors": NAMES}, dict.fromkeys(NAMES[:2], "b.safetensors"))
    found = agree(folder)
    assert {file for file, *_ in found.values()} == {"b.safetensors"} and set(found) == set(NAMES)
    (folder / INDEX).unlink()
    (folder / "a.safetensors").rename(folder / "model.safetensors")
    assert {file for file, *_ in agree(folder).values()} == {"model.safetensors"}


def test_an_index_names_files_and_no_tensors(folder):
    places = {NAMES[0]: "b.safetensors", NAMES[1]: "b.safetensors", "nowhere": "a.safetensors"}
    write(folder, {"a.safetensors": NAMES[:1], "b.safetensors": NAMES[1:]}, places)
    assert set(agree(folder)) == set(NAMES)


def test_numbered_shards_need_not_all_be_there(folder):
    write(folder, {"model-00001-of-00003.safetensors": NAMES[:1], "model-00003-of-00003.safetensors": NAMES[1:]})
    assert set(agree(folder)) == set(NAMES)


def test_an_adapters_shard_is_not_the_models(folder):
    write(folder, {"adapter_model.safetensors": NAMES[:1], "x.safetensors": NAMES})
    assert {file for file, *_ in agree(folder).values()} == {"x.safetensors"}
    (folder / "x.safetensors").rename(folder / "pytorch_model.bin")
    refuse(folder, "the weights are in pytorch_model.bin")


@pytest.mark.parametrize("shard", ["../a.safetensors", "x/../a.safetensors", "/etc/passwd", "", ".", "b.safetensors"])
def test_places_that_an_index_may_not_name(folder, shard):
    write(folder, {"a.safetensors": NAMES}, dict.fromkeys(NAMES, shard))
    write(folder.parent, {"a.safetensors": NAMES})
    refuse(folder, "")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("file", [INDEX, "a.safetensors"])
def test_json_is_utf_8_without_a_mark(folder, encoding, file):
    write(folder, {"a.safetensors": NAMES}, dict.fromkeys(NAMES, "a.safetensors"))
    data = (folder / file).read_bytes()
    if file == INDEX:
        (folder / file).write_bytes(data.decode().encode(encoding))
    else:
        length = struct.unpack("<Q", data[:8])[0]
        header = data[8 : 8 + length].decode().encode(encoding)
        (folder / file).write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    refuse(folder, file)


@pytest.mark.parametrize("seed", range(3))
def test_mutated_checkpoints_are_read_alike(folder, seed):
    weight_map = {NAMES[0]: "a.safetensors"} | dict.fromkeys(NAMES[1:], "b.safetensors")
    write(folder, {"a.safetensors": NAMES[:1], "b.safetensors": NAMES[1:]}, weight_map)
    rng, accepted = random.Random(seed), 0
    for number in range(COUNT):
        file = rng.choice(["a.safetensors", "b.safetensors", INDEX])
        before = (folder / file).read_bytes()
        (folder / file).write_bytes((mutate_text if file == INDEX else mutate_shard)(rng, before))
        theirs, ours, lines = read_both(folder)
        assert ours == theirs, (number, lines)
        accepted += ours is not None
        (folder / file).write_bytes(before)
    assert 0 < accepted < COUNT


def test_a_single_file_with_nothing_in_it(folder):
    (folder / "model.safetensors").write_bytes(save({}))
    assert agree(folder) == {}
