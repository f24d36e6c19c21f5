"""Files of corrections: what is written is read back to the bit; what is damaged or of another is refused by name."""

import dataclasses
import hashlib
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from mutation import mutate_shard
from safetensors import safe_open
from safetensors.numpy import load_file
from synthetic import make_allocation, make_identity, make_maps, make_profile

from lexi_search.artifacts import serialisation
from lexi_search.artifacts.compensation import (
    CompensationFile,
    check_maps_place,
    format_maps,
    list_maps,
    merge_maps,
    name_beside,
    parse_maps,
    read_maps,
    write_maps,
)
from lexi_search.errors import InputError

COUNT = int(os.environ.get("LEXI_MUTATIONS", "100"))
MODEL = make_identity()
OTHER = make_identity(router_sha256="f" * 64)
PLACES = [(layer, k) for layer in MODEL.moe_layers for k in range(1, MODEL.top_k)]


def require_same(one, other):
    assert list(one) == list(other)
    for place in one:
        for ours, theirs in zip(one[place], other[place], strict=True):
            assert (ours.dtype, ours.shape, ours.tobytes()) == (theirs.dtype, theirs.shape, theirs.tobytes())


def write(path, maps=None, model=MODEL, **options):
    maps = make_maps(model) if maps is None else maps
    return write_maps(path, maps, model, owners=[Path(path).with_suffix(".json")], **options)


def test_corrections_survive_their_file(tmp_path):
    maps = make_maps(MODEL)
    named = write(tmp_path / "p.safetensors", maps)
    assert (named.file, named.rank, list(maps)) == ("p.safetensors", 2, PLACES)
    require_same(maps, read_maps(tmp_path / "p.json", named, MODEL))
    some = read_maps(tmp_path / "p.json", named, MODEL, needed=[(2, 3), (0, 1)])
    require_same({place: maps[place] for place in [(0, 1), (2, 3)]}, some)
    assert list_maps(tmp_path / "p.safetensors")[1] == PLACES


def test_bytes_do_not_depend_on_the_order_and_other_readers_agree(tmp_path):
    maps = make_maps(MODEL)
    data = format_maps(maps, MODEL)
    assert data == format_maps(dict(reversed(maps.items())), MODEL)
    path = tmp_path / "p.safetensors"
    path.write_bytes(data)
    told = {"format": "lexi-compensation", "version": "1", "rank": "2", "model_type": "olmoe"}
    with safe_open(path, "np") as file:
        assert file.metadata() == told | {"router_sha256": MODEL.router_sha256}
    stored = load_file(path)
    assert set(stored) == {f"layers.{layer}.top_k.{k}.{part}" for layer, k in PLACES for part in "ABc"}
    for name, array in stored.items():
        _, layer, _, k, part = name.split(".")
        ours = getattr(maps[int(layer), int(k)], part)
        np.testing.assert_array_equal(np.asarray(array, np.float32), np.asarray(ours, np.float32))


def test_artifacts_name_a_file_only_where_there_is_one():
    named = CompensationFile("a.safetensors", 2, "0" * 64)
    assert b"compensation" not in serialisation.to_bytes(make_allocation(gate_exponent=0.5))
    assert b"compensation" not in serialisation.to_bytes(make_profile())
    for bare in (make_allocation(), make_profile()):
        with pytest.raises(InputError, match="compensation"):
            dataclasses.replace(bare, compensation=named)
    allocation = dataclasses.replace(make_allocation(gate_exponent=0.0), compensation=named)
    document = serialisation.to_document(allocation)
    assert document["compensation"] == {"file": "a.safetensors", "rank": 2, "sha256": "0" * 64}


@pytest.mark.parametrize("stem", ["", ".", "../a", "/a", ".a", "b\\a", "\n", "a.safetensors/b"])
def test_a_file_elsewhere_is_refused(stem):
    with pytest.raises(InputError, match=r"expected the bare name of a \.safetensors file"):
        CompensationFile(f"{stem}.safetensors", 2, "0" * 64)


def change_header(change):
    data = format_maps(make_maps(MODEL), MODEL)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data[8 + length :]


NAME = "layers.1.top_k.2.A"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"__metadata__": {"format": "pt"}}, "its format is 'pt'"),
        ({"__metadata__": 3}, "not a whole safetensors file"),
        ({NAME: {"dtype": "F32", "shape": [1, 24], "data_offsets": [576, 672]}}, "A is F32 [1, 24], expected BF16"),
        ({NAME: {"dtype": "F32", "shape": [2, 24], "data_offsets": [528, 624]}}, "A' does not fill its bytes"),
        ({NAME: {"dtype": "BF16", "shape": [2, 24]}}, "not a whole safetensors file"),
        ({NAME: {"shape": [2, 24], "data_offsets": [0, 96]}}, "not a whole safetensors file"),
        ({NAME: {"dtype": "BF16", "shape": [2, 24], "data_offsets": [0, 96, 7]}}, "not a whole safetensors file"),
        ({NAME: {"dtype": "BF16", "shape": [2, 24], "data_offsets": [0.0, 96]}}, "A' is of no correction"),
        ({NAME: {"dtype": "BF16", "shape": [2, 24], "data_offsets": ["0", 96]}}, "A' is of no correction"),
        ({NAME: {"dtype": "BF16", "shape": [2, 24], "data_offsets": [-1, 96]}}, "A' is of no correction"),
        ({NAME: {"dtype": "BF16", "shape": [2, 24], "data_offsets": [0, 1 << 40]}}, "A' does not fill its bytes"),
        ({NAME: None}, "not a whole safetensors file"),
        ({"layers.9.top_k.1.A": {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]}}, "is of no layer and k"),
    ],
)
def test_a_damaged_header_is_refused_in_one_line(change, said):
    with pytest.raises(InputError) as refusal:
        parse_maps(change_header(lambda header: header.update(change)), MODEL)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", "ABc")
def test_numbers_that_are_not_finite_are_refused(part, value):
    maps = dict(make_maps(MODEL))
    array = getattr(maps[1, 2], part).copy()
    array.flat[3] = value
    maps[1, 2] = maps[1, 2]._replace(**{part: array})
    with pytest.raises(InputError, match=rf"layers\.1\.top_k\.2\.{part} holds numbers that are not finite"):
        parse_maps(format_maps(maps, MODEL), MODEL)


def test_mutated_files_are_read_or_refused_in_one_line():
    data, rng, accepted = format_maps(make_maps(MODEL), MODEL), random.Random(0), 0
    for _ in range(COUNT):
        mutated = mutate_shard(rng, data)
        for needed in (None, [(1, 2)]):
            try:
                parse_maps(mutated, MODEL, needed=needed)
                accepted += 1
            except InputError as refusal:
                assert "\n" not in str(refusal)
    assert 0 < accepted < 2 * COUNT


def test_another_file_under_the_name_is_refused(tmp_path):
    named = write(tmp_path / "p.safetensors")
    write(tmp_path / "p.safetensors", make_maps(MODEL, seed=1))
    with pytest.raises(InputError, match=r"p\.safetensors is not the file that .*p\.json names"):
        read_maps(tmp_path / "p.json", named, MODEL)
    (tmp_path / "p.safetensors").unlink()
    with pytest.raises(InputError, match=r"p\.safetensors, which .*p\.json names, cannot be read"):
        read_maps(tmp_path / "p.json", named, MODEL)
    os.mkfifo(tmp_path / "p.safetensors")
    with pytest.raises(InputError, match="not a regular file"):
        read_maps(tmp_path / "p.json", named, MODEL)


def test_one_of_another_model_or_rank_or_without_a_needed_place_is_refused(tmp_path):
    named = write(tmp_path / "p.safetensors", {(0, 1): make_maps(MODEL)[0, 1]})
    for options, said in (
        ({"model": OTHER}, "its router_sha256 is"),
        ({"named": dataclasses.replace(named, rank=3)}, "its rank is"),
        ({"needed": [(0, 1), (1, 2)]}, r"it lacks layers\.1\.top_k\.2\.A"),
    ):
        with pytest.raises(InputError, match=said):
            read_maps(tmp_path / "p.json", **({"named": named, "model": MODEL} | options))


def test_parts_merge_unless_they_disagree():
    maps, other = make_maps(MODEL), make_maps(MODEL, seed=1)
    one, two = ({place: maps[place] for place in maps if place[0] in rows} for rows in ((0, 1), (1, 2, 3)))
    require_same(maps, merge_maps({"one": one, "two": two}))
    with pytest.raises(InputError, match="other: the correction of layer 0 at k = 1 differs from that in one"):
        merge_maps({"one": one, "other": {(0, 1): other[0, 1]}})


def test_what_is_there_is_replaced_only_where_nobody_loses_by_it(tmp_path):
    place, data = tmp_path / "p.safetensors", b"something else"
    place.write_bytes(data)
    for what, maps in (("another file", None), ("a file of another model", make_maps(OTHER))):
        if maps:
            write(place, maps, OTHER)
        with pytest.raises(InputError, match=f"there is {what}; .*--force"):
            write(place, force=False)
    named = write(place)
    document = serialisation.to_document(make_allocation(gate_exponent=0.5)) | {"compensation": vars(named)}
    for name in ("p.json", "twin.json"):
        (tmp_path / name).write_text(json.dumps(document))
    before = hashlib.sha256(place.read_bytes()).hexdigest()
    with pytest.raises(InputError, match=r"twin\.json names it and would lose its corrections"):
        write(place, make_maps(MODEL, seed=1), force=False)
    assert hashlib.sha256(place.read_bytes()).hexdigest() == before
    (tmp_path / "twin.json").write_text("{")
    assert write(place, make_maps(MODEL, seed=1), force=False) != named


@pytest.mark.parametrize("name", [".p.json", "a\nb.json"])
def test_a_name_that_no_json_may_hold_is_refused_before_anything_is_written(tmp_path, name):
    with pytest.raises(InputError, match="choose another name"):
        check_maps_place(name_beside(tmp_path / name), MODEL, owners=[tmp_path / name])
    with pytest.raises(InputError, match="choose another name"):
        write(name_beside(tmp_path / name))
    assert not list(tmp_path.iterdir())
