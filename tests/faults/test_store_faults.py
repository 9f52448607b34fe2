"""The durable store when its process dies, its disk is full, or its bytes are changed."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloud.engine.store.base import Batch, Chunk, loaded
from cloud.engine.store.journal import RETRY_S
from cloud.engine.store.sqlite import SqliteStore
from cloud.errors import BackendError
from cloud.jobs import DEFAULT_OPTIONS, DONE, QUEUED, VALUE, pack_outcome
from cloud.serialization.functions import Function
from tests.faults.store_program import Program, State, found_in

FUNCTION = Function(b"function", "module.work")
N_STEPS = 24


def submitted(store: SqliteStore, arguments: bytes) -> Batch:
    batch = Batch(0, FUNCTION, (1, b"context"), DEFAULT_OPTIONS, 0, 1.0, arguments)
    batch.jid0 = store.new_jids(1)
    store.add(batch)
    return batch


def end(store: SqliteStore, batch: Batch, value: bytes) -> bytes:
    outcome = pack_outcome(DONE, [(VALUE, value)])
    batch.states[0] = DONE
    batch.n_final = 1
    batch.arguments = b""
    batch.add_segment(0, 1, outcome)
    store.finished(batch, 0, 1, outcome)
    return outcome


class Answer:
    """How what was told so far ends."""

    def __init__(self, store: SqliteStore) -> None:
        self.error: Exception | None = None
        self._come = threading.Event()
        store.after(self._take)

    def _take(self, error: Exception | None) -> None:
        self.error = error
        self._come.set()

    def wait(self, timeout_s: float = 30.0) -> bool:
        return self._come.wait(timeout_s)


def told(store: SqliteStore) -> Exception | None:
    answer = Answer(store)
    assert answer.wait()
    return answer.error


# --- the process dies -------------------------------------------------------------------------------------------------


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(random=st.randoms(use_true_random=False), n_steps=st.integers(1, 40))
def test_what_was_told_is_found_again(random: Random, n_steps: int) -> None:
    """After a crash, for which a copy of the files stands, and after an orderly end."""
    folder = Path(tempfile.mkdtemp(prefix="store-"))
    program = Program(folder / "first", random)
    try:
        for _ in range(n_steps):
            program.step()
        program.sure()
        shutil.copytree(folder / "first", folder / "copy", ignore=shutil.ignore_patterns("*-shm"))
        expected = program.expected()
        assert found_in(folder / "copy", set(program.replies)) == expected
    finally:
        program.store.close()
    assert found_in(folder / "first", set(program.replies)) == expected
    shutil.rmtree(folder)


def states_of(folder: Path, seed: int) -> tuple[list[State], set[str]]:
    """What must be found after each number of steps."""
    program = Program(folder, Random(seed))
    states = [program.expected()]
    for _ in range(N_STEPS):
        program.step()
        states.append(program.expected())
    program.store.close()
    return states, set(program.replies)


def run_until_killed(folder: Path, log: Path, seed: int, exit_at: int) -> int:
    """Do the steps in a process of their own that dies at a commit; its exit status."""
    child = os.fork()
    if not child:
        try:
            os.environ["CLOUD_TEST_EXIT_AT_COMMIT"] = str(exit_at)
            line = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            program = Program(folder, Random(seed))
            for number in range(1, N_STEPS + 1):
                os.write(line, b"t%d\n" % number)
                program.step()
                if number % 3:
                    program.store.after(lambda error, number=number: os.write(line, b"s%d\n" % number))
                else:
                    program.sure()
                    os.write(line, b"s%d\n" % number)
            program.store.close()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("seed", [1, 2])
def test_it_may_die_at_every_commit(tmp_path: Path, seed: int) -> None:
    """What is found is what stood after one of the steps: no earlier one than the last that was confirmed."""
    states, replies = states_of(tmp_path / "whole", seed)
    n_deaths = 0
    for exit_at in range(1, 200):
        folder, log = tmp_path / f"at-{exit_at}", tmp_path / f"log-{exit_at}"
        status = run_until_killed(folder, log, seed, exit_at)
        assert status in (0, 137)
        lines = log.read_text().split() if log.exists() else []
        begun = max((int(line[1:]) for line in lines if line[0] == "t"), default=0)
        confirmed = max((int(line[1:]) for line in lines if line[0] == "s"), default=0)
        found = found_in(folder, replies)
        assert found in states[confirmed : begun + 1]
        shutil.rmtree(folder)
        if status == 0:
            break
        n_deaths += 1
    assert status == 0
    assert n_deaths >= 10


def test_files_of_a_crash_are_swept(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    submitted(store, b"x" * 100_000)
    assert told(store) is None
    store.close()
    kept = list((tmp_path / "blobs").iterdir())
    (tmp_path / "blobs" / ("00" * 32)).write_bytes(b"never committed")
    (tmp_path / "blobs" / ".part-1").write_bytes(b"half")
    SqliteStore(tmp_path).close()
    assert list((tmp_path / "blobs").iterdir()) == kept


# --- the disk is full -------------------------------------------------------------------------------------------------


@pytest.fixture(params=[1000, 200_000], ids=["rows", "files"])
def size(request: pytest.FixtureRequest) -> int:
    """Bytes of what does not fit: kept in rows, or in files."""
    return int(request.param)


@pytest.fixture
def full_disk(size: int) -> Iterator[Callable[[bool], None]]:
    """Call with True: no file can grow beyond 4 kB, with False: they can again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(full: bool) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096 if full else soft, hard))

    yield limit
    limit(False)
    signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_refuses_submissions_and_loses_no_outcome(
    tmp_path: Path, size: int, full_disk: Callable[[bool], None]
) -> None:
    store = SqliteStore(tmp_path)
    running, other = submitted(store, b"arguments"), submitted(store, b"arguments")
    assert told(store) is None
    full_disk(True)
    outcome = end(store, running, os.urandom(size))
    ended = Answer(store)
    refused = submitted(store, os.urandom(size))
    error = told(store)
    assert isinstance(error, OSError | BackendError)
    store.delete(refused, 0, 1)  # as the engine does
    assert not ended.wait(2 * RETRY_S), "an outcome is not on disk before there is room for it"
    with pytest.raises((OSError, BackendError)):
        store.began(other, 0, 1)
    full_disk(False)
    assert ended.wait()
    assert ended.error is None
    later = submitted(store, os.urandom(size))
    assert told(store) is None
    store.close()
    store = SqliteStore(tmp_path)
    assert [batch.jid0 for batch, begun in store.recovered() if not begun] == [other.jid0, later.jid0]
    batch, _ = store.locate(running.jid0)
    assert loaded(batch.segments[0][2]) == outcome
    assert store._reader.rows("PRAGMA integrity_check") == [("ok",)]
    store.close()


def test_chunks_of_a_map_that_was_given_up_are_given_up(tmp_path: Path, full_disk: Callable[[bool], None]) -> None:
    store = SqliteStore(tmp_path)
    full_disk(True)
    batch = Batch(0, FUNCTION, (1, os.urandom(50_000)), DEFAULT_OPTIONS, 0, 1.0, None)
    store.opened(batch)
    assert told(store) is not None
    full_disk(False)
    batch.chunks.append(Chunk(1, 0, 2, 1, b"payload"))
    batch.n = 2
    batch.states += bytes((QUEUED, QUEUED))
    store.extended(batch, batch.chunks[0])
    assert told(store) is not None, "its map is not on disk"
    submitted(store, b"arguments")
    assert told(store) is None
    store.close()
    store = SqliteStore(tmp_path)
    assert len(store.recovered()) == 1
    store.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a file system of its own")
def test_a_full_file_system(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    if os.system(f"mount -t tmpfs -o size=2m none {folder} 2>/dev/null"):
        pytest.skip("may not mount")
    try:
        store = SqliteStore(folder)
        accepted: list[Batch] = []
        while True:
            batch = submitted(store, os.urandom(60_000))
            if (error := told(store)) is not None:
                break
            accepted.append(batch)
        assert isinstance(error, OSError)
        assert error.errno == errno.ENOSPC
        store.delete(batch, 0, 1)
        for each in accepted:
            end(store, each, b"value")
            store.delete(each, 0, 1)
        os.system(f"mount -o remount,size=8m {folder}")
        assert told(store) is None
        assert list(store.batches()) == []
        assert submitted(store, os.urandom(60_000)).jid0 > accepted[-1].jid0
        assert told(store) is None
        store.close()
        store = SqliteStore(folder)
        assert len(store.recovered()) == 1
        assert store._reader.rows("PRAGMA integrity_check") == [("ok",)]
        store.close()
    finally:
        os.system(f"umount {folder}")


# --- bytes are changed ------------------------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << (at % 8)
    path.write_bytes(content)


@pytest.mark.parametrize("n_bytes", [300, 100_000], ids=["row", "file"])
def test_a_changed_outcome_is_never_returned(tmp_path: Path, n_bytes: int) -> None:
    value = os.urandom(n_bytes)
    store = SqliteStore(tmp_path)
    end(store, submitted(store, b"arguments"), value)
    assert told(store) is None
    store.close()
    files = [path for path in tmp_path.rglob("*") if path.is_file() and value[-200:] in path.read_bytes()]
    assert files
    for offset in (0, 57, 123, 199):
        saved = [(path, path.read_bytes()) for path in files]
        for path, content in saved:
            flip(path, content.index(value[-200:]) + offset)
        store = SqliteStore(tmp_path)
        assert store.recovered() == []
        batch, _ = store.locate(1)
        with pytest.raises(BackendError, match="job 1 cannot be trusted"):
            loaded(batch.segments[0][2])
        store.close()
        for path, content in saved:
            path.write_bytes(content)


@pytest.mark.parametrize("n_bytes", [300, 100_000], ids=["row", "file"])
def test_changed_arguments_are_never_run(tmp_path: Path, n_bytes: int) -> None:
    arguments = os.urandom(n_bytes)
    store = SqliteStore(tmp_path)
    submitted(store, arguments)
    assert told(store) is None
    store.close()
    for path in tmp_path.rglob("*"):
        if path.is_file() and arguments[-200:] in (content := path.read_bytes()):
            flip(path, content.index(arguments[-200:]) + 77)
    store = SqliteStore(tmp_path)
    with pytest.raises(BackendError, match="job 1"):
        for batch, _ in store.recovered():
            loaded(batch.arguments)
    store.close()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    end(store, submitted(store, b"arguments"), b"v" * 100_000)
    assert told(store) is None
    next((tmp_path / "blobs").iterdir()).unlink()
    batch, _ = store.locate(1)
    with pytest.raises(BackendError, match="job 1"):
        loaded(batch.segments[0][2])
    store.close()


@pytest.mark.parametrize(
    "changed", [b"jid0 = 2", b"n = 7", b"label = 'b'", b"options = '{\"cores\": 2}'", b"depth = 3"]
)
def test_a_changed_row_is_refused(tmp_path: Path, changed: bytes) -> None:
    store = SqliteStore(tmp_path)
    submitted(store, b"arguments")
    assert told(store) is None
    store.close()
    with sqlite3.connect(tmp_path / "jobs.sqlite3") as connection:
        connection.execute(f"UPDATE batch SET {changed.decode()}")
    connection.close()
    store = SqliteStore(tmp_path)
    with pytest.raises(BackendError, match="does not match its digest"):
        store.recovered()
    store.close()


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "jobs.sqlite3").write_bytes(b"something else " * 1000)
    with pytest.raises(BackendError, match="damaged"):
        SqliteStore(tmp_path)


def test_a_newer_file_is_refused(tmp_path: Path) -> None:
    SqliteStore(tmp_path).close()
    with sqlite3.connect(tmp_path / "jobs.sqlite3") as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    before = (tmp_path / "jobs.sqlite3").read_bytes()
    with pytest.raises(BackendError, match="schema version 99"):
        SqliteStore(tmp_path)
    assert (tmp_path / "jobs.sqlite3").read_bytes() == before
