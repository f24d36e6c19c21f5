"""The journal of a run: finished parts stay, another file is left alone, and a broken line is ignored."""

import fcntl
import io
import json
from pathlib import Path

import pytest

from lexi_adapter.errors import AdapterError
from lexi_adapter.sensitivity.ablation import LayerLosses
from lexi_adapter.sensitivity.journal import Journal, keep_journal

RUN = {"made_by": {"sequences_per_pass": 1}}
PART = LayerLosses([[1.5]], [[0.5]], [], [])
LINE = b"[0, 1, [[[1.5]], [[0.5]], [], []]]\n"


def cut_short(**parts):
    """Start a run, finish these parts, and interrupt it; returns the parts that were finished at the start."""
    with pytest.raises(KeyboardInterrupt):
        with keep_journal("out", RUN) as journal:
            found = dict(journal.parts)
            for layer, part in parts.items():
                journal.add(0, int(layer.removeprefix("layer_")), part)
            raise KeyboardInterrupt
    return found


@pytest.mark.parametrize(
    "content", [b"my notes\n", b"[1, 2]\n", b"5", b'"a\nb', b"[" * 100_000 + b"\n", b'{"made_by": 1']
)
def test_what_is_no_journal_stays_as_it_is(folder, content):
    Path("out.partial").write_bytes(content)
    with pytest.raises(AdapterError, match="out.partial is no journal of such a run; move it away, or .* --restart"):
        with keep_journal("out", RUN):
            pass
    assert Path("out.partial").read_bytes() == content
    with keep_journal("out", RUN, restart=True) as journal:
        assert journal.parts == {}
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    "line", ["5", "[0, 2]", "[0, 2, 3]", "[0, 2, [[[NaN]], [[0.5]], [], []]]", "[0, 2, [[1.5], [[0.5]], [], []]]", "{"]
)
def test_a_journal_counts_up_to_what_is_no_part(folder, line):
    cut_short(layer_1=PART)
    whole = Path("out.partial").read_bytes()
    assert whole.endswith(LINE)
    Path("out.partial").write_bytes(whole + line.encode() + b"\n" + LINE.replace(b"[0, 1", b"[0, 3"))
    assert cut_short() == {(0, 1): PART}
    assert Path("out.partial").read_bytes() == whole


@pytest.mark.parametrize("content", [b"", b'{"made_by": {"sequen', json.dumps(RUN).encode() + b"\n"])
def test_a_journal_in_which_nothing_is_finished_does_not_stay(folder, content):
    Path("out.partial").write_bytes(content)
    assert cut_short() == {}
    assert not list(folder.iterdir())


class Full(io.FileIO):
    """A file on a disk with room for 80 more bytes; like on Linux, a write that is too long is cut."""

    room = 80

    def write(self, data):
        if not self.room:
            raise OSError(28, "No space left on device")
        written = super().write(data[: self.room])
        self.room -= written
        return written


def test_on_a_full_disk_what_is_finished_stays(folder):
    cut_short(layer_1=PART)
    with Full("out.partial", "ab") as file:
        journal = Journal(Path("out.partial"), file, {})
        journal.add(0, 2, PART)
        with pytest.raises(AdapterError, match="cannot write out.partial: No space left on device; finished parts"):
            journal.add(0, 3, PART)
    assert cut_short() == {(0, 1): PART, (0, 2): PART}


def test_two_runs_do_not_write_one_file(folder):
    with keep_journal("out", {}):
        with pytest.raises(AdapterError, match="another run is writing out"):
            with keep_journal("out", {}):
                pass
    assert not list(folder.iterdir())


def test_a_digit_that_has_changed_is_not_believed(folder):
    cut_short(layer_1=PART, layer_2=PART)
    whole = Path("out.partial").read_bytes()
    start = whole.index(b"\n") + 1
    for place in range(start, len(whole)):
        for bit in (0, 3):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            Path("out.partial").write_bytes(damaged)
            found = cut_short()
            assert found == ({(0, 1): PART} if place >= start + len(whole[start:]) // 2 else {}), place


def test_a_lock_on_a_file_that_is_gone_is_none(folder, monkeypatch):
    """A run opens the journal, its holder ends and removes it, and a third begins another of that name."""
    lock, others = fcntl.flock, []

    def end_the_first_run_and_begin_a_third(file, how):
        monkeypatch.setattr(fcntl, "flock", lock)
        Path("out.partial").unlink()
        others.append(keep_journal("out", RUN))
        others[0].__enter__()
        return lock(file, how)

    monkeypatch.setattr(fcntl, "flock", end_the_first_run_and_begin_a_third)
    with pytest.raises(AdapterError, match="another run is writing out"):
        with keep_journal("out", RUN):
            pass
    assert Path("out.partial").exists()
    others[0].__exit__(None, None, None)
    assert not list(folder.iterdir())
