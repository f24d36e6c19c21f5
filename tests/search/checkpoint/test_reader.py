"""The reader of safetensors folders against safetensors' own, and what it refuses."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save, save_file

from lexi_search.checkpoint.reader import INDEX, find_missing_shards, open_checkpoint, read_header, read_rows
from lexi_search.checkpoint.writer import write_shards
from lexi_search.errors import InputError

ARRAYS = st.sampled_from(
    [np.float16, np.float32, np.float64, ml_dtypes.bfloat16, np.int64, np.uint8, np.bool_]
).flatmap(
    lambda dtype: hnp.arrays(np.uint8, hnp.array_shapes(max_dims=3, max_side=4, min_side=0)).map(
        lambda array: array.astype(dtype)
    )
)
TENSORS = st.dictionaries(st.text(min_size=1, max_size=8).filter(lambda s: s != "__metadata__"), ARRAYS, max_size=5)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "olmoe"}')
    return tmp_path


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(tensors=TENSORS)
def test_reads_what_safetensors_writes(folder, tensors):
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint) == set(tensors)
    for name, array in tensors.items():
        read = checkpoint[name]
        assert read.dtype == array.dtype and read.shape == array.shape and read.tobytes() == array.tobytes()


def test_reads_float8(folder):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    values = torch.tensor([0.5, -448.0, 3.0]).to(torch.float8_e4m3fn)
    save_torch({"x": values}, folder / "model.safetensors")
    np.testing.assert_array_equal(open_checkpoint(folder)["x"].astype(np.float32), [0.5, -448.0, 3.0])


def test_reads_into_a_reused_buffer(folder):
    save_file(
        {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float16)}, folder / "model.safetensors"
    )
    checkpoint, buffer = open_checkpoint(folder), np.empty(64, np.uint8)
    a = checkpoint.read("a", buffer)
    assert np.shares_memory(a, buffer) and a.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert checkpoint.read("b", buffer).tolist() == [1, 1]


def test_reads_some_rows_alone(folder):
    table = np.arange(36).reshape(9, 4).astype(ml_dtypes.bfloat16)
    file = folder / "model.safetensors"
    save_file({"first": np.ones(3), "table": table}, file)
    checkpoint, rows = open_checkpoint(folder), [8, 0, 3, 3]
    np.testing.assert_array_equal(read_rows(checkpoint, "table", rows), table[rows])
    file.write_bytes(file.read_bytes()[:-1])
    assert read_rows(checkpoint, "table", [7]).shape == (1, 4)
    with pytest.raises(InputError, match="the file ends inside tensor table"):
        read_rows(checkpoint, "table", [7, 8])


def test_index_names_the_shards(folder):
    save_file({"a": np.zeros(1), "unlisted": np.zeros(1)}, folder / "one.safetensors")
    save_file({"b": np.ones(2)}, folder / "two.safetensors")
    save_file({"c": np.ones(2)}, folder / "unnamed.safetensors")
    places = {"a": "two.safetensors", "b": "one.safetensors", "nowhere": "one.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint) == {"a", "b", "unlisted"} and checkpoint["b"].tolist() == [1, 1]
    (folder / "two.safetensors").unlink()
    with pytest.raises(InputError, match="two.safetensors: no such shard"):
        open_checkpoint(folder)


def test_shards_without_an_index(folder):
    save_file({"a": np.zeros(1)}, folder / "one.safetensors")
    save_file({"b": np.ones(2)}, folder / "two.safetensors")
    assert set(open_checkpoint(folder)) == {"a", "b"}
    save_file({"b": np.ones(2)}, folder / "three.safetensors")
    assert set(open_checkpoint(folder)) == {"a", "b"}  # twice the same
    save_file({"b": np.zeros(2)}, folder / "three.safetensors")
    with pytest.raises(InputError, match="tensor b is also in three.safetensors"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "no weight_map"),
        ({"weight_map": {"a": 3}}, "no weight_map"),
        ({"weight_map": {"a": "../one.safetensors"}}, "not a plain file name"),
    ],
)
def test_refuses_a_bad_index(folder, index, message):
    save_file({"a": np.zeros(1)}, folder / "one.safetensors")
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match=message):
        open_checkpoint(folder)


def test_refuses_what_is_no_folder(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        open_checkpoint(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        open_checkpoint(tmp_path / "file")
    with pytest.raises(InputError, match="config.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="no safetensors"):
        open_checkpoint(tmp_path)


def test_hub_id_comes_from_the_cache(folder, tmp_path, monkeypatch):
    """Offline, an id resolves to its snapshot in the hub's cache, and an unknown id fails with one line."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    repository = tmp_path / "cache" / "models--owner--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (snapshot / "config.json").write_text("{}")
    save_file({"a": np.ones(1)}, snapshot / "model.safetensors")
    assert open_checkpoint("owner/name")["a"].tolist() == [1]
    with pytest.raises(InputError, match="owner/other: no such folder here, and not to be had from the hub"):
        open_checkpoint("owner/other")


GOOD = save({"a": np.arange(4, dtype=np.float32), "b": np.zeros((2, 2), np.float16)})


def damaged_header(change):
    length = struct.unpack("<Q", GOOD[:8])[0]
    header = json.loads(GOOD[8 : 8 + length])
    change(header)
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + GOOD[8 + length :]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "truncated or not safetensors"),
        (b"1234567", "truncated or not safetensors"),
        (struct.pack("<Q", 1 << 40) + GOOD[8:], "truncated or not safetensors"),
        (struct.pack("<Q", 3) + GOOD[8:], "not a valid safetensors header"),
        (struct.pack("<Q", 9) + b"{nonsense", "not a valid safetensors header"),
        (struct.pack("<Q", 2) + b"[]", "not a valid safetensors header"),
        (GOOD[:-1], "truncated"),
        (GOOD + b"\0", "longer than its header says"),
        (damaged_header(lambda h: h["a"].update(dtype="F5")), "element type 'F5'"),
        (damaged_header(lambda h: h["a"].update(dtype="F4")), "does not fill"),
        (damaged_header(lambda h: h["a"].update(shape=[5])), "does not fill"),
        (damaged_header(lambda h: h["a"].update(shape=[-4])), "not whole numbers"),
        (damaged_header(lambda h: h["a"].update(shape=[True, 4])), "not whole numbers"),
        (damaged_header(lambda h: h["a"].pop("dtype")), "not a valid safetensors header"),
        (damaged_header(lambda h: h["b"].update(data_offsets=[8, 16])), "overlaps its neighbour or leaves a hole"),
        (damaged_header(lambda h: h.pop("a")), "overlaps its neighbour or leaves a hole"),
    ],
)
def test_refuses_a_damaged_shard(tmp_path, data, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=500)
@given(position=st.integers(0, len(GOOD) - 1), value=st.integers(0, 255), cut=st.integers(0, len(GOOD)))
def test_damage_is_never_read_differently_than_safetensors_reads_it(tmp_path, position, value, cut):
    """A mutated file is either refused, or read as safetensors' own reader reads it."""
    data = bytearray(GOOD[: cut or len(GOOD)])
    data[position % len(data)] = value
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    try:
        entries = read_header(path)
    except InputError:
        return
    try:
        with safe_open(path, "np") as theirs:
            assert {name: list(entry.shape) for name, entry in entries.items()} == {
                name: theirs.get_slice(name).get_shape() for name in theirs.keys()
            }
    except SafetensorError as error:
        pytest.fail(f"accepted what safetensors refuses: {error}")


def test_numbers_of_less_than_a_byte_are_read_and_copied_as_bytes(folder):
    header = {"a": {"dtype": "F4", "shape": [3, 4], "data_offsets": [0, 6]}}
    header["b"] = {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [6, 9]}
    raw = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(range(9)))
    checkpoint = open_checkpoint(folder)
    assert checkpoint["a"].tolist() == [0, 1, 2, 3, 4, 5] and checkpoint["b"].tolist() == [6, 7, 8]
    (copy := folder / "copy").mkdir()
    (copy / "config.json").write_text("{}")
    write_shards(copy, checkpoint, {})
    again = open_checkpoint(copy)
    assert {name: (entry.dtype, entry.shape) for name, entry in again.entries.items()} == {
        name: (entry.dtype, entry.shape) for name, entry in checkpoint.entries.items()
    }
    assert all(again[name].tobytes() == checkpoint[name].tobytes() for name in checkpoint)


def test_the_numbers_of_shards_need_not_be_right(folder):
    for number in (1, 3):
        save_file({f"t{number}": np.zeros(2, np.float32)}, folder / f"model-0000{number}-of-00004.safetensors")
    assert set(open_checkpoint(folder)) == {"t1", "t3"}
    assert find_missing_shards(folder) == ["model-00002-of-00004.safetensors", "model-00004-of-00004.safetensors"]


@pytest.mark.parametrize(
    ("other", "message"), [("pytorch_model.bin", "in pytorch_model.bin; convert"), ("x", "no safet")]
)
def test_an_adapters_weights_are_not_the_models(folder, other, message):
    save_file({"base_model.lora_A.weight": np.zeros(2, np.float32)}, folder / "adapter_model.safetensors")
    (folder / other).write_bytes(b"PK")
    with pytest.raises(InputError, match=message):
        open_checkpoint(folder)
    save_file({"a": np.zeros(1)}, folder / "weights.safetensors")
    assert set(open_checkpoint(folder)) == {"a"}
