"""The ring of a worker: whole frames, in order, whatever their sizes; and nonsense is refused."""

from __future__ import annotations

import mmap
import os
import struct
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud.engine import channel as ch
from cloud.engine.ring import RING_BYTES, Ring


class Pair:
    """Both ends over the same memory, which is private to this process."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, ch.PAGE_BYTES + RING_BYTES)
        whole = memoryview(self.memory)
        self.slots = whole[: ch.PAGE_BYTES].cast("Q")
        self.writer = Ring(whole[ch.PAGE_BYTES :], self.slots)
        self.reader = Ring(whole[ch.PAGE_BYTES :], self.slots)


@pytest.fixture
def pair() -> Iterator[Pair]:
    yield Pair()


def test_what_is_put_is_taken_once(pair: Pair) -> None:
    assert pair.reader.take() == []
    assert pair.writer.put(ch.frame(ch.OUTCOME, b"one") + ch.frame(ch.REPLY, b""))
    assert pair.writer.put(ch.frame(ch.OUTCOME, b"two"))
    assert pair.writer.has_unread
    assert pair.reader.take() == [(ch.OUTCOME, b"one"), (ch.REPLY, b""), (ch.OUTCOME, b"two")]
    assert not pair.writer.has_unread
    assert pair.reader.take() == []


def test_what_does_not_fit_is_refused_whole(pair: Pair) -> None:
    large = ch.frame(ch.OUTCOME, bytes(RING_BYTES - ch.FRAME.size))
    assert not pair.writer.put(large + b"x")
    assert pair.writer.put(large)
    assert not pair.writer.put(ch.frame(ch.OUTCOME))
    assert [len(body) for _, body in pair.reader.take()] == [RING_BYTES - ch.FRAME.size]
    assert pair.writer.put(ch.frame(ch.OUTCOME, b"room again"))
    assert pair.reader.take() == [(ch.OUTCOME, b"room again")]


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, RING_BYTES // 3), st.booleans()), max_size=40))
def test_frames_of_any_size_come_whole_and_in_order(steps: list[tuple[int, bool]]) -> None:
    pair = Pair()
    expected: list[tuple[int, bytes]] = []
    got: list[tuple[int, bytes]] = []
    for number, (size, look) in enumerate(steps):
        body = struct.pack("<I", number) + bytes(size)
        if pair.writer.put(ch.frame(ch.OUTCOME, body)):
            expected.append((ch.OUTCOME, body))
        if look:
            got += pair.reader.take()
    assert got + pair.reader.take() == expected


def test_a_reader_beside_a_writer_sees_whole_frames_only(pair: Pair) -> None:
    n = 20_000
    frames = [ch.frame(ch.OUTCOME, struct.pack("<I", number) * (1 + number % 50)) for number in range(n)]

    def write() -> None:
        for frame in frames:
            while not pair.writer.put(frame):
                os.sched_yield()

    thread = threading.Thread(target=write)
    thread.start()
    seen = 0
    while seen < n:
        for _, body in pair.reader.take():
            assert body == struct.pack("<I", seen) * (1 + seen % 50)
            seen += 1
    thread.join()


@pytest.mark.parametrize("written", [RING_BYTES + 1, 1 << 61, 5, ch.FRAME.size + 3])
def test_nonsense_is_refused(pair: Pair, written: int) -> None:
    pair.writer.put(ch.frame(ch.OUTCOME, b"12345678"))
    pair.slots[ch.WRITTEN] = written
    with pytest.raises(OSError):
        pair.reader.take()
