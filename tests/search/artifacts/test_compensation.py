"""Files of corrections: canonical bytes, read back as they were, and refused in one line where they are others."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from corrections import describe, draw_maps, draw_tensors, write_corrections
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load
from synthetic import make_allocation, make_identity, make_profile

from lexi_search.artifacts import compensation, serialisation
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

HIDDEN, RANK = 8, 2
MODEL = make_identity(3, 3)
PAIRS = [(layer, k) for layer in range(3) for k in (1, 2)]
NAME = "layers.1.top_k.2.B"
HASH = "0" * 64


def equal(left, right):
    same = (
        np.array_equal(*pair) and pair[0].dtype == pair[1].dtype
        for place in left
        for pair in zip(left[place], right[place], strict=True)
    )
    return list(left) == list(right) and all(same)


@pytest.fixture
def maps():
    return draw_maps(MODEL, PAIRS, hidden=HIDDEN, rank=RANK)


@pytest.fixture
def named(folder, maps):
    """A file beside p.json, and what names it."""
    return write_maps("p.safetensors", maps, MODEL)


def refuse(named, model=MODEL, **options):
    """The one line that the file beside p.json is refused with."""
    with pytest.raises(InputError) as caught:
        read_maps("p.json", named, model, **options)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("p.safetensors") and message.endswith(compensation.REMEDY)
    return message


def rename(data):
    """What names p.safetensors with these bytes."""
    Path("p.safetensors").write_bytes(data)
    return CompensationFile("p.safetensors", RANK, hashlib.sha256(data).hexdigest())


def test_what_is_written_is_read_and_safetensors_reads_it_too(named, maps):
    assert list_maps("p.safetensors")[1] == PAIRS
    data = Path("p.safetensors").read_bytes()
    assert named == CompensationFile("p.safetensors", RANK, hashlib.sha256(data).hexdigest())
    read = read_maps("p.json", named, MODEL)
    assert equal(read, maps) and equal(parse_maps(data, MODEL), maps) and format_maps(read, MODEL) == data
    expected = draw_tensors(MODEL, PAIRS, hidden=HIDDEN, rank=RANK)
    stored = load(data)
    assert stored.keys() == expected.keys()
    for name, tensor in stored.items():
        assert str(tensor.dtype) == f"torch.{expected[name].dtype}"
        assert np.array_equal(tensor.float().numpy(), expected[name].astype(np.float32))
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert list(header) == ["__metadata__", *sorted(stored)] and (8 + length) % 8 == 0
    assert header["__metadata__"] == describe(MODEL, RANK)
    assert list(header["__metadata__"]) == sorted(header["__metadata__"])


def test_bytes_do_not_depend_on_the_order_in_which_layers_came(maps):
    assert format_maps(dict(reversed(maps.items())), MODEL) == format_maps(maps, MODEL)
    big = {
        place: type(one)(*(array.astype(array.dtype.newbyteorder(">")) for array in one)) for place, one in maps.items()
    }
    big = {place: one._replace(A=maps[place].A, B=maps[place].B) for place, one in big.items()}
    assert format_maps(big, MODEL) == format_maps(maps, MODEL)


def test_only_what_is_needed_is_read(named, maps):
    assert equal(
        read_maps("p.json", named, MODEL, needed=[(1, 2), (0, 1)]), {key: maps[key] for key in ((0, 1), (1, 2))}
    )
    assert read_maps("p.json", named, MODEL, needed=[]) == {}
    assert read_maps("p.json", None, MODEL) is None and write_maps("q", {}, MODEL) is None and not Path("q").exists()
    other = make_identity(4, 3)
    assert "it lacks layers.3.top_k.1.A" in refuse(named, other, needed=[(3, 1)])


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_other_bytes_are_taken(named, data):
    original = Path("p.safetensors").read_bytes()
    place = data.draw(st.integers(0, len(original) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda byte: byte != original[place]))
    others = original[:place], original[:place] + bytes([byte]) + original[place + 1 :], original + bytes([byte])
    try:
        for other in others:
            Path("p.safetensors").write_bytes(other)
            assert "is not the file that p.json names (its SHA-256 is" in refuse(named)
    finally:
        Path("p.safetensors").write_bytes(original)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_file_that_is_named_anew_is_refused_or_reads_as_finite_numbers(folder, data):
    maps = draw_maps(MODEL, PAIRS[:2], hidden=2, rank=1)
    original = format_maps(maps, MODEL)
    length = 8 + int.from_bytes(original[:8], "little")
    place = data.draw(st.integers(0, data.draw(st.sampled_from([length, len(original)])) - 1))
    changed = original[:place] + data.draw(st.binary(max_size=3)) + original[place + data.draw(st.integers(0, 3)) :]
    try:
        read = parse_maps(changed, MODEL)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert read.keys() <= set(PAIRS)
        assert all(np.isfinite(array.astype(np.float32)).all() for one in read.values() for array in one)


def change_header(data, change):
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    text = json.dumps(change(header) or header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def set_entry(**changes):
    return lambda header: header[NAME].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header["__metadata__"].update(format="lexi-other"), "its format is 'lexi-other', expected"),
        (lambda header: header["__metadata__"].update(version="2"), "its version is '2', expected '1'"),
        (lambda header: header["__metadata__"].update(model_type="mixtral"), "its model_type is 'mixtral', expected"),
        (lambda header: header["__metadata__"].update(router_sha256="f" * 64), "its router_sha256 is 'ffff"),
        (lambda header: header["__metadata__"].update(rank="3"), "its rank is '3', expected '2'"),
        (lambda header: header["__metadata__"].update(rank=2), "its __metadata__ holds what is not text"),
        (lambda header: header.pop("__metadata__") and None, "not a whole safetensors file"),
        (set_entry(dtype="F16"), "tensor 'layers.1.top_k.2.B' is of no correction: ('F16'"),
        (set_entry(dtype=["BF16"]), "is of no correction"),
        (set_entry(dtype="F32", shape=[HIDDEN, 1]), f"{NAME} is F32 [8, 1], expected BF16 [8, 2]"),
        (set_entry(shape=[RANK, HIDDEN]), f"{NAME} is BF16 [2, 8], expected BF16 [8, 2]"),
        (set_entry(shape=[HIDDEN, RANK, 1]), f"{NAME} is BF16 [8, 2, 1], expected BF16 [8, 2]"),
        (set_entry(shape=[HIDDEN, 3]), "does not fill its bytes"),
        (set_entry(shape=[HIDDEN, 2.0]), "is of no correction"),
        (set_entry(shape=None), "not a whole safetensors file"),
        (set_entry(data_offsets=[0, 32]), "overlaps its neighbour"),
        (set_entry(data_offsets=["0", "32"]), "is of no correction"),
        (set_entry(data_offsets=[0]), "not a whole safetensors file"),
        (set_entry(data_offsets=[-32, 0]), "is of no correction"),
        (lambda header: header.update({"layers.1.top_k.2.D": header.pop(NAME)}), "which is of no correction"),
        (lambda header: header.update({"layers.7.top_k.2.B": header.pop(NAME)}), "is of no layer and k"),
        (lambda header: header.update({"layers.1.top_k.3.B": header.pop(NAME)}), "is of no layer and k"),
        (lambda header: {"__metadata__": header["__metadata__"]}, "its header says 0"),
        (lambda header: [header], "not a whole safetensors file"),
    ],
)
def test_headers_that_do_not_fit_are_refused(named, change, message):
    data = change_header(Path("p.safetensors").read_bytes(), change)
    assert message in refuse(rename(data))


def test_files_that_are_no_safetensors_are_refused(folder):
    for data in (b"", b"1234567", b"\xff" * 8, (2).to_bytes(8, "little") + b"[]", (9).to_bytes(8, "little") + b"{" * 9):
        assert "not a whole safetensors file" in refuse(rename(data))
    repeated = b'{"__metadata__": {}, "__metadata__": {}}'
    assert "appears twice" in refuse(rename(len(repeated).to_bytes(8, "little") + repeated))
    empty = json.dumps({"__metadata__": describe(MODEL, RANK)}).encode()
    assert "it holds no corrections" in refuse(rename(len(empty).to_bytes(8, "little") + empty))


@pytest.mark.parametrize("part", ["A", "B", "c"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(named, maps, part, value):
    array = getattr(maps[1, 2], part).copy()
    array.flat[-1] = value
    changed = write_maps("p.safetensors", maps | {(1, 2): maps[1, 2]._replace(**{part: array})}, MODEL)
    assert f"layers.1.top_k.2.{part} holds numbers that are not finite" in refuse(changed)
    assert read_maps("p.json", changed, MODEL, needed=[(1, 1)]).keys() == {(1, 1)}


def test_another_models_and_a_lost_or_exchanged_file_are_refused(named, maps):
    for other in (dataclasses.replace(MODEL, router_sha256="a" * 64), dataclasses.replace(MODEL, model_type="mixtral")):
        assert "expected" in refuse(named, other)
    more = dataclasses.replace(MODEL, num_experts=12)
    assert "layers.0.top_k.1.A is BF16 [2, 18], expected BF16 [2, 36]" in refuse(named, more)
    assert "its rank is '2', expected '3'" in refuse(dataclasses.replace(named, rank=3))
    swapped = draw_maps(MODEL, PAIRS, hidden=HIDDEN, rank=RANK, seed=1)
    write_maps("p.safetensors", swapped, MODEL)
    assert "is not the file that p.json names" in refuse(named)
    os.remove("p.safetensors")
    assert refuse(named).startswith("p.safetensors, which p.json names, cannot be read (No such file or directory)")


def test_hidden_sizes_that_differ_are_refused(folder):
    tensors = draw_tensors(MODEL, PAIRS[:3], hidden=HIDDEN, rank=RANK)
    tensors |= draw_tensors(MODEL, PAIRS[3:], hidden=HIDDEN + 1, rank=RANK)
    named = CompensationFile(**write_corrections(Path("p.safetensors"), tensors, describe(MODEL, RANK)))
    assert f"{NAME} is BF16 [9, 2], expected BF16 [8, 2]" in refuse(named)
    tensors = draw_tensors(MODEL, PAIRS, hidden=HIDDEN, rank=RANK)
    tensors[NAME] = tensors[NAME].astype(np.float32)
    named = CompensationFile(**write_corrections(Path("p.safetensors"), tensors, describe(MODEL, RANK)))
    assert f"{NAME} is F32 [8, 2], expected BF16 [8, 2]" in refuse(named)


def test_what_is_no_regular_file_is_refused_at_once(folder):
    named = CompensationFile("p.safetensors", RANK, HASH)
    for make in (os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path), lambda path: os.symlink(path, path)):
        make("p.safetensors")
        assert "which p.json names, cannot be read (" in refuse(named)
        os.rmdir("p.safetensors") if os.path.isdir("p.safetensors") else os.remove("p.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            ({"file": file}, "compensation file is")
            for file in ("", "a", "../a.safetensors", "/a.safetensors", "b/a.safetensors", "b\\a.safetensors")
        ),
        *(({"file": file}, "compensation file is") for file in (".a.safetensors", ".safetensors", "a\n.safetensors")),
        ({"rank": 0}, "compensation rank is 0, at least 1"),
        ({"sha256": "A" * 64}, "compensation sha256 is"),
        ({"sha256": "a" * 63}, "compensation sha256 is"),
    ],
)
def test_names_that_cannot_be_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        CompensationFile(**{"file": "a.safetensors", "rank": 1, "sha256": HASH} | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": 3}, "compensation.file is not a string: 3"),
        ({"rank": True}, "compensation.rank is not an integer: True"),
        ({"rank": "2"}, "compensation.rank is not an integer: '2'"),
        ({"size": 3}, "unknown compensation.size"),
    ],
)
def test_documents_that_name_it_otherwise_are_refused(folder, change, message):
    named = {"file": "a.safetensors", "rank": 1, "sha256": HASH}
    document = serialisation.to_document(make_allocation(gate_exponent=0.5)) | {"compensation": named | change}
    Path("a.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=message):
        serialisation.read_allocation("a.json")


def test_allocations_and_profiles_name_it_only_as_it_can_be():
    named = CompensationFile("a.safetensors", RANK, HASH)
    with pytest.raises(InputError, match="compensation without a gate_exponent"):
        dataclasses.replace(make_allocation(), compensation=named)
    profile = make_profile(3, 3)
    with pytest.raises(InputError, match="compensation without a gate_exponent"):
        dataclasses.replace(profile, compensation=named)
    for rank in (None, 3):
        changed = dataclasses.replace(profile.settings, gate_exponent=0.0, compensation_rank=rank)
        with pytest.raises(InputError, match=f"compensation rank is 2, settings.compensation_rank {rank}"):
            dataclasses.replace(profile, settings=changed, compensation=named)


def test_a_profile_must_have_the_corrections_of_all_its_layers(folder, maps):
    profile = make_profile(3, 3)
    settings = dataclasses.replace(profile.settings, gate_exponent=0.5, compensation_rank=RANK)
    profile = dataclasses.replace(profile, settings=settings)
    with pytest.raises(
        InputError, match="its losses are with corrections, and it names no file of them; profile again"
    ):
        serialisation.read_profile_maps("p.json", profile)
    some = {key: one for key, one in maps.items() if key != (2, 1)}
    for kept, chosen in ((maps, None), (some, "it lacks layers.2.top_k.1.A")):
        whole = dataclasses.replace(profile, compensation=write_maps("p.safetensors", kept, MODEL))
        if chosen is None:
            assert equal(serialisation.read_profile_maps("p.json", whole), maps)
        else:
            with pytest.raises(InputError, match=chosen):
                serialisation.read_profile_maps("p.json", whole)


def test_allocations_share_one_file_of_what_they_use(folder, maps):
    made_by = {"compensation_rank": RANK}
    model = dataclasses.replace(make_allocation(3, 3, gate_exponent=0.5), made_by=made_by)
    ks = ((1, 1, 3), (2, 1, 3), (3, 3, 3))
    wanted = [dataclasses.replace(model, top_k=dict(enumerate(k)), budget=sum(k)) for k in ks]
    files = [Path(f"{name}.json") for name in "abc"]
    written = serialisation.write_allocations(files, wanted, maps, shared="compensation.safetensors")
    assert [serialisation.read_allocation(file) for file in files] == written
    assert sorted(os.listdir()) == ["a.json", "b.json", "c.json", "compensation.safetensors"]
    used = {key: maps[key] for key in ((0, 1), (0, 2), (1, 1))}
    assert Path("compensation.safetensors").read_bytes() == format_maps(used, MODEL)
    assert written[0].compensation == written[1].compensation and written[2].compensation is None
    for file, allocation in zip(files, written, strict=True):
        read = serialisation.read_allocation_maps(file, allocation)
        assert read is None if file.stem == "c" else equal(read, {key: maps[key] for key in allocation.corrected})
    with pytest.raises(InputError, match="the allocation's losses are with corrections, which it does not name"):
        serialisation.write_allocation("d.json", wanted[0])
    serialisation.write_allocation("d.json", wanted[2])  # corrects nothing


def test_only_corrections_are_replaced_without_force(named):
    for path in ("p.safetensors", "new.safetensors"):
        check_maps_place(path, MODEL, force=False)
    Path("other.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    Path("text.safetensors").write_text("mine")
    for path in ("other.safetensors", "text.safetensors"):
        with pytest.raises(InputError, match=f"cannot write {path}: there is another file; choose another name, or"):
            check_maps_place(path, MODEL, force=False)
        check_maps_place(path, MODEL, force=True)
    with pytest.raises(InputError, match="the same command reads or writes it as another file"):
        check_maps_place("p.safetensors", MODEL, apart_from=["p.safetensors"])


def test_parts_merge_unless_they_disagree(maps):
    one, two = ({place: maps[place] for place in maps if place[0] in layers} for layers in ((0, 1), (1, 2)))
    assert equal(merge_maps({"one": one, "two": two}), maps)
    other = draw_maps(MODEL, PAIRS, hidden=HIDDEN, rank=RANK, seed=1)
    with pytest.raises(InputError, match="other: the correction of layer 0 at k = 1 differs from that in one"):
        merge_maps({"one": one, "other": {(0, 1): other[0, 1]}})


def test_corrections_that_another_file_names_are_not_replaced_without_force(named, maps):
    other = dataclasses.replace(MODEL, router_sha256="f" * 64)
    write_maps("other.safetensors", maps, other, owners=["other.json"])
    with pytest.raises(InputError, match="there is a file of another model; .*--force"):
        write_maps("other.safetensors", maps, MODEL, owners=["other.json"], force=False)
    document = serialisation.to_document(make_allocation(3, 3, gate_exponent=0.5)) | {"compensation": vars(named)}
    for name in ("p.json", "twin.json"):
        Path(name).write_text(json.dumps(document))
    before, changed = Path("p.safetensors").read_bytes(), draw_maps(MODEL, PAIRS, hidden=HIDDEN, rank=RANK, seed=1)
    with pytest.raises(InputError, match=r"twin\.json names it and would lose its corrections"):
        write_maps("p.safetensors", changed, MODEL, owners=["p.json"], force=False)
    assert Path("p.safetensors").read_bytes() == before
    Path("twin.json").write_text("{")
    assert write_maps("p.safetensors", changed, MODEL, owners=["p.json"], force=False) != named


@pytest.mark.parametrize("name", [".p.json", "a\nb.json"])
def test_a_name_that_no_json_may_hold_is_refused_before_anything_is_written(folder, maps, name):
    with pytest.raises(InputError, match="choose another name"):
        check_maps_place(name_beside(name), MODEL, owners=[name])
    with pytest.raises(InputError, match="choose another name"):
        write_maps(name_beside(name), maps, MODEL, owners=[name])
    assert not os.listdir()


@pytest.mark.parametrize(
    ("path", "beside"),
    [("a.json", "a.safetensors"), ("d/a.b.json", "d/a.b.safetensors"), ("profile", "profile.safetensors")],
)
def test_the_file_lies_beside_the_one_that_names_it(path, beside):
    assert name_beside(path) == Path(beside)


def test_stored_types_are_those_of_the_file(maps):
    for one in maps.values():
        assert [array.dtype for array in one] == [ml_dtypes.bfloat16, ml_dtypes.bfloat16, np.float32]
