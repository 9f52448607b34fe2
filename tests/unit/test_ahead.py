"""Memory for the large buffers that a program writes next: when it is got, what is done with it, when it goes back."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cloud.serialization import ahead as ahead_module
from cloud.serialization import shared, spare
from cloud.serialization.ahead import Ahead
from cloud.serialization.memory import MemoryFile
from cloud.serialization.shared import Segment
from tests.contract.jobs import eventually

N = 20_000


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ahead]:
    """This program's, for buffers of this size already."""
    monkeypatch.setattr(shared, "_AHEAD_BYTES", 1000)
    monkeypatch.setattr(shared, "_gets_ahead", [os.getpid()])
    monkeypatch.setattr(ahead_module, "_AFTER_S", 0.001)
    monkeypatch.setattr(ahead_module, "_SOON_S", 0.5)
    made = Ahead()
    monkeypatch.setattr(ahead_module, "ahead", made)
    yield made
    made.take(0)


def write(n_bytes: int = N, content: bytes = b"x") -> Segment:
    segment = Segment.write([[content * n_bytes]])
    assert segment is not None
    assert bytes(segment.views([n_bytes])[0]) == content * n_bytes
    return segment


def inode(file: MemoryFile | None) -> int:
    assert file is not None
    return os.fstat(file.fd).st_ino


def is_got(ahead: Ahead, n_bytes: int = N) -> Callable[[], bool]:
    def found() -> bool:
        file = ahead._spare.file
        return file is not None and os.fstat(file.fd).st_size == n_bytes

    return found


def test_the_third_of_several_is_written_to_memory_that_was_got_meanwhile(ahead: Ahead) -> None:
    write()
    assert not ahead._runs, "one alone is no reason"
    write()
    for content in (b"y", b"z"):
        assert eventually(is_got(ahead))
        got = inode(ahead._spare.file)
        assert inode(write(content=content).file) == got


@pytest.mark.parametrize("n_bytes", [N // 2, N + 1, 3 * N])
def test_what_was_got_does_for_another_length(ahead: Ahead, n_bytes: int) -> None:
    write()
    write()
    assert eventually(is_got(ahead))
    got = inode(ahead._spare.file)
    segment = write(n_bytes)
    assert inode(segment.file) == got
    assert os.fstat(segment.fd).st_size == n_bytes


def test_it_is_given_back_if_nothing_comes(ahead: Ahead, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead_module, "_SOON_S", 0.2)
    before = MemoryFile.n_open[0]
    write()
    write()
    assert eventually(lambda: not ahead._runs)
    assert ahead._spare.file is None
    assert MemoryFile.n_open[0] == before
    write()
    write()
    assert ahead._runs, "and begins again"


def test_getting_ends_as_soon_as_it_is_needed(ahead: Ahead, monkeypatch: pytest.MonkeyPatch) -> None:
    at_second, go_on = threading.Event(), threading.Event()
    allocate = os.posix_fallocate
    parts = []

    def slow(fd: int, start: int, n: int) -> None:
        parts.append(start)
        if len(parts) == 2:
            at_second.set()
            go_on.wait(10)
        allocate(fd, start, n)

    monkeypatch.setattr(spare, "_PART_BYTES", 4096)
    monkeypatch.setattr(os, "posix_fallocate", slow)
    write()
    write()
    assert at_second.wait(10)
    monkeypatch.setattr(os, "posix_fallocate", allocate)
    write(content=b"z")
    go_on.set()
    assert eventually(is_got(ahead)), "that of the next"
    assert parts == [0, 4096]


def test_no_more_is_held_than_one_may_hold_for_nothing(ahead: Ahead, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead_module, "MAX_BYTES", N - 1)
    write()
    write()
    assert not ahead._runs


def test_small_ones_do_without(ahead: Ahead) -> None:
    for _ in range(3):
        write(999)
    assert not ahead._runs


def in_child(check: Callable[[], bool]) -> bool:
    pid = os.fork()
    if not pid:
        try:
            os._exit(0 if check() else 1)
        finally:
            os._exit(2)
    return os.waitpid(pid, 0)[1] == 0


def test_a_forked_child_has_nothing_of_it(ahead: Ahead) -> None:
    write()
    write()
    assert eventually(is_got(ahead))
    got = inode(ahead._spare.file)
    assert in_child(lambda: inode(write(content=b"c").file) != got)
    assert inode(write(content=b"p").file) == got


def test_a_child_is_not_kept_waiting_by_what_a_thread_of_its_parent_did(
    ahead: Ahead, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with ahead._changed:
            held.set()
            over.wait(10)

    def begins_anew() -> bool:
        signal.alarm(5)
        shared.get_memory_ahead()
        write()
        write()
        return eventually(is_got(ahead)) is not None

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(10)
    try:
        assert in_child(begins_anew)
    finally:
        over.set()
        holder.join()


def test_where_memory_is_short_none_is_got(ahead: Ahead, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = threading.Event()

    def little() -> int:
        asked.set()
        return 4 * N - 1

    monkeypatch.setattr(spare, "_n_free", little)
    write()
    write()
    assert asked.wait(10)
    write()
    assert ahead._spare.file is None


def test_one_that_cannot_start_a_thread_goes_without(ahead: Ahead, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        for _ in range(3):
            write()
    assert not ahead._runs
    write()
    assert ahead._runs, "and tries again"


def test_a_group_may_have_less_than_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def set_left(folder: Path, limit: str, most: str, usage: str, used: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / limit).write_text(f"{most}\n")
        (folder / usage).write_text(f"{used}\n")

    root = os.fsencode(tmp_path)
    assert spare._n_left_of_group(root, b"/", b"memory.max", b"memory.current") == float("inf")
    set_left(tmp_path / "outer" / "inner", "memory.max", "max", "memory.current", "100")
    assert spare._n_left_of_group(root, b"/outer/inner", b"memory.max", b"memory.current") == float("inf")
    set_left(tmp_path / "outer" / "inner", "memory.max", "7000", "memory.current", "3000")
    assert spare._n_left_of_group(root, b"/outer/inner", b"memory.max", b"memory.current") == 4000
    set_left(tmp_path / "outer", "memory.max", "5000", "memory.current", "3000")
    assert spare._n_left_of_group(root, b"/outer/inner", b"memory.max", b"memory.current") == 2000
    assert 0 < spare._n_free() < float("inf")
