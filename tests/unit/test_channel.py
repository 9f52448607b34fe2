"""Frames, messages and the shared page between the engine's process and a worker."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud.engine import channel as ch
from cloud.engine.executor.workers import WorkerHandle
from cloud.engine.stream import WITH_SEGMENT, FrameStream
from cloud.jobs import DEFAULT_OPTIONS, JobOptions
from cloud.serialization.memory import memory_file
from cloud.serialization.shared import Segment

LARGE = 1 << 17
"""Frames from this size on are read to where they belong."""

KINDS = st.integers(0, WITH_SEGMENT - 1)
FRAMES = st.lists(st.tuples(KINDS, st.binary(max_size=40)), max_size=6)


def joined(frames: list[tuple[int, bytes]]) -> bytes:
    return b"".join(ch.frame(kind, body) for kind, body in frames)


def received(stream: FrameStream) -> list[tuple[int, bytes]]:
    return [(kind, bytes(body)) for kind, body in stream.receive()]


@contextlib.contextmanager
def connected() -> Iterator[tuple[FrameStream, socket.socket]]:
    """A stream, and the bare socket at its other end."""
    ours, theirs = socket.socketpair()
    stream = FrameStream(ours.detach())
    with theirs:
        try:
            yield stream, theirs
        finally:
            stream.close()


@contextlib.contextmanager
def stream_pair() -> Iterator[tuple[FrameStream, FrameStream]]:
    ends = [FrameStream(each.detach()) for each in socket.socketpair()]
    try:
        yield ends[0], ends[1]
    finally:
        for end in ends:
            end.close()


def all_of(sender: FrameStream, receiver: FrameStream, n: int) -> list[tuple[int, bytes]]:
    """Work both ends until ``n`` frames have come."""
    found: list[tuple[int, bytes]] = []
    while len(found) < n:
        sender.send_rest()
        found += received(receiver)
    return found


# --- frames -----------------------------------------------------------------------------------------------------------


def test_a_frame_is_its_length_its_kind_and_its_parts() -> None:
    assert ch.frame(7, b"ab", b"", b"c") == (3).to_bytes(8, "little") + b"\x07abc"
    assert ch.frame(1) == bytes(8) + b"\x01"


@pytest.mark.parametrize("n_pieces", [2, 3])
def test_frames_may_be_split_at_every_byte(n_pieces: int) -> None:
    frames = [(1, b""), (2, b"ab"), (3, b"c" * 5), (0, b"")]
    data = joined(frames)
    for cuts in itertools.combinations(range(1, len(data)), n_pieces - 1):
        with connected() as (stream, other):
            found = []
            for low, high in itertools.pairwise((0, *cuts, len(data))):
                other.sendall(data[low:high])
                found += received(stream)
            assert found == frames, cuts
            assert stream.receive() == []


def test_frames_may_come_byte_by_byte() -> None:
    frames = [(1, b"a" * 30), (2, b""), (255 - WITH_SEGMENT, bytes(range(256)))]
    with connected() as (stream, other):
        found = []
        for byte in joined(frames):
            other.sendall(bytes((byte,)))
            found += received(stream)
        assert found == frames


@given(FRAMES, st.data())
def test_frames_come_whole_and_in_order_however_they_are_cut(
    frames: list[tuple[int, bytes]], data: st.DataObject
) -> None:
    content = joined(frames)
    cuts = sorted({0, len(content), *data.draw(st.lists(st.integers(0, len(content)), max_size=8))})
    with connected() as (stream, other):
        found = []
        for low, high in itertools.pairwise(cuts):
            other.sendall(content[low:high])
            found += received(stream)
        assert found == frames


@settings(max_examples=25)
@given(
    st.lists(st.sampled_from((0, 1, LARGE - 1, LARGE, LARGE + 1, 3 * LARGE)), min_size=1, max_size=4),
    st.lists(st.integers(1, 300_000), min_size=1, max_size=5),
)
def test_large_frames_come_whole_among_small_ones(sizes: list[int], pieces: list[int]) -> None:
    frames = [(number, os.urandom(size)) for number, size in enumerate(sizes)]
    content = memoryview(joined(frames))
    found: list[tuple[int, bytes]] = []
    with connected() as (stream, other):
        other.setblocking(False)
        # After some small pieces a large one: a frame of megabytes would take a while in single bytes.
        for n_bytes in itertools.cycle([*pieces, LARGE]):
            if content:
                with contextlib.suppress(BlockingIOError):
                    content = content[other.send(content[:n_bytes]) :]
            found += received(stream)
            if not content and len(found) == len(frames):
                break
    assert found == frames


@given(FRAMES, st.integers(0, 200))
def test_what_has_not_arrived_whole_waits(frames: list[tuple[int, bytes]], n_missing: int) -> None:
    content = joined(frames)
    cut = max(0, len(content) - n_missing)
    n_whole, at = 0, 0
    for _, body in frames:
        at += ch.FRAME.size + len(body)
        n_whole += at <= cut
    with connected() as (stream, other):
        other.sendall(content[:cut])
        found = received(stream)
        assert found == frames[:n_whole]
        other.sendall(content[cut:])
        assert found + received(stream) == frames


def test_nothing_comes_from_a_quiet_socket() -> None:
    with connected() as (stream, _):
        assert stream.receive() == []


@pytest.mark.parametrize("rest", [b"", b"\x05", joined([(1, b"abc")])[:-1], ch.FRAME.pack(LARGE, 1) + b"x"])
def test_the_end_of_the_stream_is_told(rest: bytes) -> None:
    with connected() as (stream, other):
        other.sendall(rest)
        assert stream.receive() == []
        other.close()
        with pytest.raises(EOFError):
            stream.receive()


def test_sending_to_nobody_raises() -> None:
    with connected() as (stream, other):
        other.close()
        with pytest.raises(OSError):
            stream.send(ch.frame(1))


def test_what_the_socket_does_not_take_is_kept_and_sent_later() -> None:
    frames = [(number, os.urandom(size)) for number, size in enumerate((10, 3_000_000, 0, 70_000, 5))]
    with stream_pair() as (sender, receiver):
        assert sender.send(ch.frame(*frames[0]))
        assert not sender.has_unsent
        for kind, body in frames[1:]:
            assert not sender.send(ch.frame(kind, body)), "behind what is kept, all is kept"
        assert sender.has_unsent
        assert all_of(sender, receiver, len(frames)) == frames
        assert not sender.has_unsent
        assert sender.send_rest()


@settings(max_examples=25)
@given(st.lists(st.tuples(KINDS, st.integers(0, 400_000)), min_size=1, max_size=6))
def test_both_ends_agree(shapes: list[tuple[int, int]]) -> None:
    frames = [(kind, os.urandom(size)) for kind, size in shapes]
    with stream_pair() as (sender, receiver):
        for kind, body in frames:
            sender.send(ch.frame(kind, body))
        assert all_of(sender, receiver, len(frames)) == frames


# --- segments ---------------------------------------------------------------------------------------------------------


def segment_of(content: bytes) -> Segment:
    segment = Segment.write([[content]])
    assert segment is not None
    return segment


@pytest.mark.parametrize("n_before", [0, 3_000_000], ids=["at once", "behind what is kept"])
def test_segments_come_with_their_frames(n_before: int) -> None:
    contents = [os.urandom(5000), b"x" * 10_000, os.urandom(1)]
    with stream_pair() as (sender, receiver):
        sender.send(ch.frame(1, bytes(n_before)))
        for number, content in enumerate(contents):
            sender.send(ch.frame(2, b"plain"))
            sender.send(ch.frame(WITH_SEGMENT + 3, bytes((number,))), segment_of(content))
        found: list[tuple[int, Any]] = []
        while len(found) < 1 + 2 * len(contents):
            sender.send_rest()
            found += receiver.receive()
        assert [kind for kind, _ in found] == [1, 2, 3, 2, 3, 2, 3]
        assert not receiver.descriptors
        for number, content in enumerate(contents):
            body = found[2 + 2 * number][1]
            assert bytes(body) == bytes((number,))
            assert bytes(body.segment.views([len(content)])[0]) == content


def test_descriptors_that_nobody_claimed_are_closed_with_the_stream() -> None:
    with stream_pair() as (sender, receiver):
        sender.send(ch.frame(WITH_SEGMENT + 1, b"abc")[:-1], segment_of(b"lost"))
        assert receiver.receive() == []
        assert len(receiver.descriptors) == 1
        [fd] = receiver.descriptors
        receiver.close()
        with pytest.raises(OSError):
            os.fstat(fd)
        receiver.close()


def test_a_worker_that_has_not_read_what_it_was_sent_takes_no_more() -> None:
    settings = {"output_limit_bytes": 1000}
    worker = WorkerHandle(1, settings, capture=False)
    try:
        assert worker.takes_more
        worker.write(ch.frame(1, bytes(LARGE * 10)))
        assert worker.takes_work
        assert not worker.takes_more
    finally:
        worker.close()


# --- messages ---------------------------------------------------------------------------------------------------------

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.integers(0, 2**32 - 1),
    st.dictionaries(st.text(max_size=8).filter(lambda key: key != "blobs"), PLAIN, max_size=4),
    st.lists(st.binary(max_size=30), max_size=4),
)
def test_messages_are_unpacked_as_they_were_packed(number: int, content: dict[str, Any], blobs: list[bytes]) -> None:
    packed = ch.pack_message(ch.REQUEST, number, content, tuple(blobs))
    length, kind = ch.FRAME.unpack_from(packed)
    assert (length, kind) == (len(packed) - ch.FRAME.size, ch.REQUEST)
    assert ch.unpack_message(packed[ch.FRAME.size :]) == (number, content, blobs)


# --- the page ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def page_fd() -> Iterator[int]:
    fd = memory_file()
    yield fd
    os.close(fd)


def test_a_new_page_says_that_nothing_runs_and_nothing_is_forbidden(page_fd: int) -> None:
    page = ch.Page(page_fd, create=True)
    current, limit, kill = (page.slots[slot] for slot in (ch.CURRENT, ch.LIMIT, ch.KILL))
    assert current == ch.NO_LIMIT
    assert limit > ch.NO_LIMIT
    assert kill > ch.NO_LIMIT, "no item, begun or not, is one to be killed"
    assert page.slots[ch.OUT] == page.slots[ch.ERR] == ch.CAPTURE_START
    page.close()


def test_both_sides_see_one_page(page_fd: int) -> None:
    ours = ch.Page(page_fd, create=True)
    theirs = ch.Page(page_fd)
    for slot, value in ((ch.CURRENT, 0), (ch.LIMIT, 2**62), (ch.OUT, 2**63 - 1), (ch.SPIN, True)):
        ours.slots[slot] = value
        assert theirs.slots[slot] == value
    theirs.slots[ch.KILL] = 5
    assert ours.slots[ch.KILL] == 5
    assert ours.slots[ch.CURRENT] == 0
    ours.close()
    theirs.close()


def test_a_page_outlives_its_descriptor(page_fd: int) -> None:
    fd = os.dup(page_fd)
    page = ch.Page(fd, create=True)
    os.close(fd)
    page.slots[ch.CURRENT] = 17
    assert page.slots[ch.CURRENT] == 17
    page.close()


def test_a_page_is_closed_twice_without_harm(page_fd: int) -> None:
    page = ch.Page(page_fd, create=True)
    page.close()
    page.close()


# --- flags ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"profile": True}, ch.PROFILE_FLAG),
        ({"restartable": False}, ch.DELIVER),
        ({"env_vars": {"A": "1"}}, ch.EXTRAS),
        ({"fast_serialization": 2}, ch.FAST_PICKLE),
        ({"fast_serialization": 1}, 0),
        ({"priority": 1}, 0),
    ],
    ids=str,
)
def test_flags_tell_what_the_worker_must_know(values: dict[str, Any], flag: int) -> None:
    options = JobOptions.from_dict(values)
    assert ch.run_flags(options, reusable=False) == flag
    assert ch.run_flags(options, reusable=True) == flag | ch.KEEP_FUNCTION


def test_flags_do_not_overlap() -> None:
    flags = [ch.PROFILE_FLAG, ch.KEEP_FUNCTION, ch.DELIVER, ch.EXTRAS, ch.FAST_PICKLE]
    assert sum(flags) == 2 ** len(flags) - 1
    assert ch.run_flags(DEFAULT_OPTIONS, reusable=False) == 0
