"""Runs that share cards take turns."""

import fcntl
import re
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lexi_adapter.engines.locks import measure_alone, start_beside
from lexi_adapter.errors import AdapterError

CARDS = st.lists(st.sampled_from("012"), min_size=1, max_size=3)


def test_starts_share_a_card_and_a_measurement_does_not(tmp_path):
    card = str(tmp_path / "card")
    with start_beside([card]), start_beside([card]), open(card) as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with measure_alone([card]), open(card) as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
    with open(card) as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_card_that_is_named_twice_is_locked_once(tmp_path):
    with measure_alone([str(tmp_path / "card")] * 2):
        pass


@pytest.mark.parametrize("place", ["nowhere/card", "."])
def test_a_file_that_cannot_be_made_is_refused(tmp_path, place):
    path = str(tmp_path / place)
    with pytest.raises(AdapterError, match=re.escape(f"cannot lock {path} (")), measure_alone([path]):
        pass


def test_without_cards_nothing_waits():
    with measure_alone([]), measure_alone([]), start_beside([]):
        pass


@settings(max_examples=20, deadline=None)
@given(st.lists(CARDS, min_size=2, max_size=6))
def test_all_get_their_turn_and_nobody_measures_beside_another_on_the_same_card(tmp_path_factory, runs):
    folder = tmp_path_factory.mktemp("cards")
    busy, clashes = {card: [] for card in "012"}, []

    def run(name, cards):
        files = [str(folder / card) for card in cards]
        with start_beside(files):
            clashes.extend(busy[card][0] for card in set(cards) if busy[card])
        with measure_alone(files):
            for card in set(cards):
                clashes.extend(busy[card])
                busy[card].append(name)
            for card in set(cards):
                busy[card].remove(name)

    threads = [threading.Thread(target=run, args=item, daemon=True) for item in enumerate(runs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads), "a deadlock"
    assert not clashes
