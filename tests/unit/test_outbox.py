"""A worker's outcomes on their way: held, left in the ring or sent, and failures at once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from cloud.engine import channel as ch
from cloud.engine.ring import RING_BYTES, Ring
from cloud.engine.worker.outbox import Outbox
from cloud.jobs import DONE, ERROR, ERROR_TEXT, pack_outcome
from cloud.serialization.memory import memory_file

GOOD = pack_outcome(DONE, [])
BAD = pack_outcome(ERROR, [(ERROR_TEXT, b"no")])


class House:
    """An outbox, what it sent, and the engine's end of its ring; somebody looks into that."""

    def __init__(self) -> None:
        fd = memory_file()
        self.page = ch.Page(fd, RING_BYTES, create=True)
        os.close(fd)
        self.page.slots[ch.SEEN] = 0
        self.sent: list[bytes] = []
        self.outbox: Any = Outbox(self, self.page)  # type: ignore[arg-type]
        self._ring = Ring(self.page.behind, self.page.slots)

    def send(self, data: bytes, segment: Any = None) -> None:
        self.sent.append(data)

    @property
    def left(self) -> int:
        return len(self._ring.take())

    def hold_for(self, seconds: float) -> None:
        self.page.slots[ch.HOLD] = int(1e9 * seconds)


@pytest.fixture
def house() -> Iterator[House]:
    made = House()
    yield made
    made._ring = made.outbox = None
    made.page.close()


def test_what_is_held_is_left_in_the_ring(house: House) -> None:
    house.outbox.hold(0, 1, GOOD)
    house.outbox.hold(1, 3, GOOD)
    assert house.page.slots[ch.HELD] > 0
    house.outbox.flush()
    assert (house.left, house.sent, house.page.slots[ch.HELD]) == (2, [], 0)


def test_it_is_told_since_when_the_first_of_what_is_held_may_have_ended(house: House) -> None:
    house.hold_for(100)
    assert house.outbox.note_beginning() == pytest.approx(100)  # of the item that is about to run
    since = house.page.slots[ch.HELD]
    house.outbox.hold(0, 3, GOOD)
    house.page.slots[ch.HELD] = since = since - 60 * 10**9
    assert house.outbox.note_beginning() < 41
    house.outbox.hold(3, 1, GOOD)
    assert house.page.slots[ch.HELD] == since
    house.outbox.flush()
    house.outbox.hold(4, 1, GOOD)
    assert house.page.slots[ch.HELD] > since


def test_it_is_due_when_the_page_says_so(house: House) -> None:
    house.outbox.flush()
    house.hold_for(100)
    house.outbox.hold(0, 1, GOOD)
    assert not house.outbox.is_due()
    house.hold_for(0)
    assert house.outbox.is_due()


def test_a_failure_does_not_wait_for_that_and_wakes_the_engine(house: House) -> None:
    house.hold_for(100)
    house.outbox.flush()
    house.outbox.hold(0, 1, GOOD)
    assert not house.outbox.is_due()
    house.outbox.hold(1, 1, BAD)
    assert house.outbox.is_due()
    house.outbox.flush()
    assert (house.left, len(house.sent)) == (0, 1)
    house.page.slots[ch.SEEN] = 2
    house.outbox.hold(2, 1, GOOD)
    assert not house.outbox.is_due()
    house.outbox.flush()
    assert (house.left, len(house.sent)) == (1, 1)


def test_failures_that_follow_each_other_go_together(house: House) -> None:
    house.hold_for(100)
    house.outbox.hold(0, 1, BAD)
    house.outbox.flush()
    house.outbox.hold(1, 1, BAD)
    while not house.outbox.is_due():
        assert house.outbox.hold_s < 0.005
    house.outbox.flush()
    assert len(house.sent) == 2
    assert house.outbox.hold_s == pytest.approx(100)


def test_much_is_not_held_for_long(house: House) -> None:
    house.hold_for(100)
    house.outbox.flush()
    large = pack_outcome(DONE, [(ERROR_TEXT, bytes(1 << 17))])
    house.outbox.hold(0, 1, large)
    assert house.outbox.is_due()
    house.outbox.flush()
    house.outbox.hold(1, 1, GOOD)
    assert not house.outbox.is_due()
