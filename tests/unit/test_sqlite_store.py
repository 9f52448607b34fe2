"""The durable store: what reaches the disk, in which commits, and what stays in memory."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cloud.engine.store.base import Batch, Chunk, Stored, loaded
from cloud.engine.store.sqlite import SqliteStore
from cloud.environment import Environment
from cloud.errors import BackendClosed, JobNotFound
from cloud.jobs import DEFAULT_OPTIONS, DONE, ERROR, QUEUED, VALUE, JobOptions, Outcome, pack_outcome
from cloud.serialization.functions import Function
from cloud.serialization.plain import plain_chunk
from cloud.serialization.shared import attach, pack_shared, unpack_shared
from tests.contract.jobs import eventually

FUNCTION = Function(b"function", "module.work", reusable=True)
LARGE = 100_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of the store."""
    return tmp_path / "store"


@pytest.fixture
def opened(folder: Path) -> Iterator[Callable[..., SqliteStore]]:
    """Opens the folder again, as a new process would."""
    stores: list[SqliteStore] = []

    def again(**options: Any) -> SqliteStore:
        for each in stores:
            each.close()
        stores.append(SqliteStore(folder, **options))
        return stores[-1]

    yield again
    for each in stores:
        each.close()


@pytest.fixture
def store(opened: Callable[..., SqliteStore]) -> SqliteStore:
    """An empty one."""
    return opened()


def sure(store: SqliteStore) -> None:
    """Block until all is on disk."""
    done = threading.Event()
    errors: list[Exception | None] = []

    def note(error: Exception | None) -> None:
        errors.append(error)
        done.set()

    store.after(note)
    assert done.wait(30)
    assert errors == [None]


def call(store: SqliteStore, arguments: bytes = b"arguments", options: JobOptions = DEFAULT_OPTIONS) -> Batch:
    batch = Batch(0, FUNCTION, (1, b"context"), options, 0, 1.5, arguments)
    batch.jid0 = store.new_jids(1)
    store.add(batch)
    return batch


def many(store: SqliteStore, *sizes: int, payload: bytes = b"payload") -> Batch:
    batch = Batch(0, FUNCTION, (1, b"context"), DEFAULT_OPTIONS, 0, 1.5, None)
    store.opened(batch)
    for n in sizes:
        batch.chunks.append(Chunk(len(batch.chunks) + 1, batch.n, n, 1, payload))
        batch.n += n
        batch.states += bytes((QUEUED,)) * n
        store.extended(batch, batch.chunks[-1])
    return batch


def seal(store: SqliteStore, batch: Batch) -> Batch:
    batch.sealed = True
    batch.jid0 = store.new_jids(batch.n)
    store.add(batch)
    return batch


def end(store: SqliteStore, batch: Batch, start: int = 0, n: int = 1, value: bytes = b"value") -> bytes:
    return end_with(store, batch, pack_outcome(DONE, [(VALUE, value)]), start, n)


def end_with(store: SqliteStore, batch: Batch, outcome: bytes, start: int = 0, n: int = 1) -> bytes:
    batch.states[start : start + n] = outcome[:1] * n
    batch.n_final += n
    if batch.arguments is not None:
        batch.arguments = b""
    batch.add_segment(start, n, outcome)
    store.finished(batch, start, n, outcome)
    return outcome


def n_rows(store: SqliteStore, table: str) -> int:
    found: int = store._reader.rows(f"SELECT count(*) FROM {table}")[0][0]
    return found


def blobs(folder: Path) -> list[str]:
    return sorted(os.listdir(folder / "blobs"))


# --- what comes back --------------------------------------------------------------------------------------------------


def test_an_unfinished_call_comes_back_whole(store: SqliteStore, opened: Callable[..., SqliteStore]) -> None:
    options = JobOptions()
    options.label, options.depends_on, options.env_vars = "a label", range(5, 9), {"A": "ü"}
    batch = Batch(0, FUNCTION, (7, b"context"), options, 3, 1.25, b"arguments", Environment("3.11", "c0de"))
    batch.jid0 = store.new_jids(1)
    store.add(batch)
    batch.next_attempt(0)
    store.retried(batch, 0)
    [(found, begun)] = opened().recovered()
    assert begun == []
    assert (found.jid0, found.key, found.n, found.is_map, found.sealed) == (1, batch.key, 1, False, True)
    assert (found.function.payload, found.function.name, found.function.reusable) == (b"function", "module.work", True)
    assert found.context[1] == b"context"
    assert found.options.as_dict() == options.as_dict()
    assert found.options.depends_on == range(5, 9)
    assert (found.depth, found.created, found.arguments) == (3, 1.25, b"arguments")
    assert found.environment == Environment("3.11", "c0de")
    assert found.attempt(0) == 2
    assert found.next_free() == (0, 1)


def test_an_open_map_comes_back_and_can_be_sealed(store: SqliteStore, opened: Callable[..., SqliteStore]) -> None:
    batch = many(store, 3, 2)
    outcome = end(store, batch, 1, 2)
    store = opened()
    [(found, _)] = store.recovered()
    assert (found.key, found.jid0, found.n, found.sealed) == (batch.key, 0, 5, False)
    assert list(store.batches()) == []
    assert [(each.start, each.n, each.kind, each.payload) for each in found.chunks] == [
        (0, 3, 1, b"payload"),
        (3, 2, 1, b"payload"),
    ]
    assert list(found.states) == [QUEUED, DONE, DONE, QUEUED, QUEUED]
    assert found.next_free() == (0, 1)
    seal(store, found)
    for index in (0, 3, 4):
        end(store, found, index)
    store = opened()
    assert store.recovered() == []
    again, index = store.locate(found.jid0 + 2)
    assert loaded(again.segment_at(index)[2]) == outcome


def test_jobs_that_share_a_function_still_do(store: SqliteStore, opened: Callable[..., SqliteStore]) -> None:
    for _ in range(3):
        call(store)
    found = [batch for batch, _ in opened().recovered()]
    assert len({batch.function.token for batch in found}) == 1
    assert len({batch.context[0] for batch in found}) == 1


def test_what_began_and_has_not_ended_is_told(store: SqliteStore, opened: Callable[..., SqliteStore]) -> None:
    batch = seal(store, many(store, 10))
    store.began(batch, 0, 6)
    end(store, batch, 2)
    batch.next_attempt(4)
    store.retried(batch, 4)
    [(found, begun)] = opened().recovered()
    assert begun == [(0, 2), (3, 4), (5, 6)]
    assert found.attempt(4) == 2


def test_jids_are_never_used_twice(store: SqliteStore, opened: Callable[..., SqliteStore]) -> None:
    batch = call(store)
    end(store, batch)
    store.delete(batch, 0, 1)
    assert store.new_jids(5000) == 2
    store = opened()
    assert store.new_jids(1) == 5002
    batch = call(store)
    assert batch.jid0 == 5003


def test_deleted_jobs_stay_deleted(store: SqliteStore, opened: Callable[..., SqliteStore]) -> None:
    batch, one = seal(store, many(store, 4)), call(store)
    end(store, batch, 0, 4)
    end(store, one)
    store.delete(one, 0, 1)
    store.delete(batch, 1, 3)
    with pytest.raises(JobNotFound):
        store.locate(one.jid0)
    store = opened()
    assert store.recovered() == []
    [found] = store.batches()
    assert [store.forgotten(found, index) for index in range(4)] == [False, True, True, False]
    assert [store.locate(jid)[1] for jid in (1, 4)] == [0, 3]
    for ask in (2, 3, one.jid0):
        with pytest.raises(JobNotFound):
            store.runs([ask])
    with pytest.raises(JobNotFound):
        store.runs(range(1, 5))
    store.delete(found, 0, 4)
    assert list(store.batches()) == []


def test_what_is_deleted_while_it_is_looked_up_is_not_taken_for_damaged(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = call(store), call(store)
    end(store, one)
    end(store, other)
    sure(store)
    [(found, _)] = store._reader.finished("WHERE b.id = ?", (other.key,))
    add_segments = store._reader.add_segments

    def delete_first(batches: dict[int, Batch]) -> None:
        store.delete(one, 0, 1)
        sure(store)
        add_segments(batches)

    monkeypatch.setattr(store._reader, "add_segments", delete_first)
    [(seen, _)] = store._reader.finished("WHERE b.id = ?", (one.key,))
    assert seen.finished
    assert n_rows(store, "batch") == 1
    store.delete(other, 0, 1)
    sure(store)
    with pytest.raises(JobNotFound):
        loaded(found.segments[0][2])


# --- memory -----------------------------------------------------------------------------------------------------------


def test_finished_jobs_leave_memory(store: SqliteStore) -> None:
    for _ in range(3000):
        end(store, call(store))
    sure(store)
    store.locate(1)
    gc.collect()
    assert sum(isinstance(each, Batch) for each in gc.get_objects()) < 1000
    runs = store.runs(range(1, 3001))
    assert [(batch.jid0, start, stop) for batch, start, stop in runs] == [(jid, 0, 1) for jid in range(1, 3001)]
    assert [batch.jid0 for batch in store.batches()] == list(range(1, 3001))
    assert [batch.jid0 for batch, _, _ in store.runs([5, 6, 2000, 7, 5])] == [5, 6, 2000, 7, 5]


def test_large_bytes_leave_memory(store: SqliteStore, opened: Callable[..., SqliteStore], folder: Path) -> None:
    batch = seal(store, many(store, 2, payload=b"p" * LARGE))
    one = call(store, b"a" * LARGE)
    outcome = end(store, batch, 0, 1, b"v" * LARGE)
    contents: list[Any] = [batch.chunks[0].payload, one.arguments, batch.segments[0][2]]
    assert [loaded(each) for each in contents] == [b"p" * LARGE, b"a" * LARGE, outcome]
    sure(store)
    assert all(isinstance(each, Stored) for each in contents)
    assert [each.content for each in contents] == [None, None, None]
    assert [loaded(each) for each in contents] == [b"p" * LARGE, b"a" * LARGE, outcome]
    store = opened()
    found, single = (batch for batch, _ in store.recovered())
    assert [loaded(each) for each in (found.chunks[0].payload, single.arguments)] == [b"p" * LARGE, b"a" * LARGE]
    assert len(blobs(folder)) == 3
    end(store, found, 1)
    end(store, single)
    sure(store)
    assert len(blobs(folder)) == 1, "arguments go when they are needed no more"
    store.delete(found, 0, 2)
    sure(store)
    assert blobs(folder) == []


def test_equal_files_are_one_until_the_last_goes(store: SqliteStore, folder: Path) -> None:
    batches = [call(store, b"same" * LARGE) for _ in range(3)]
    sure(store)
    for n_left, batch in zip((1, 1, 0), batches, strict=True):
        end(store, batch)
        sure(store)
        assert len(blobs(folder)) == n_left


def test_functions_are_stored_once_and_go_with_their_last_job(store: SqliteStore) -> None:
    batches = [call(store) for _ in range(5)]
    sure(store)
    assert n_rows(store, "content") == 2
    for batch in batches:
        end(store, batch)
        sure(store)
        assert n_rows(store, "content") == 2
        store.delete(batch, 0, 1)
    sure(store)
    assert [n_rows(store, table) for table in ("content", "batch", "chunk", "segment", "mark")] == [0] * 5


def test_a_map_has_one_row(store: SqliteStore) -> None:
    batch = seal(store, many(store, 100_000, 100_000))
    end(store, batch, 0, 200_000)
    sure(store)
    assert [n_rows(store, table) for table in ("batch", "chunk", "segment")] == [1, 0, 1]


def test_bytes_beside_a_payload_are_stored_with_it(store: SqliteStore, opened: Callable[..., SqliteStore]) -> None:
    buffer = os.urandom(300_000)
    shared = pack_shared([b"pickle"], [memoryview(buffer)])
    assert shared is not None
    call(store, shared)
    batch = seal(store, many(store, 2))
    end_with(store, batch, attach(pack_outcome(DONE, [(VALUE, shared)]), shared.segment), 0, 2)
    store = opened()
    [(found, _)] = store.recovered()
    finished, _ = store.locate(batch.jid0)
    value = Outcome(loaded(finished.segments[0][2])).section(VALUE)
    for payload in (loaded(found.arguments), value):
        content, buffers = unpack_shared(payload)
        assert bytes(content) == b"pickle"
        assert [bytes(each) for each in buffers] == [buffer]


def test_a_chunk_in_one_piece_has_its_items_length() -> None:
    shared = pack_shared([b"pickle"], [memoryview(b"x" * 300_000)])
    assert shared is not None
    chunk = plain_chunk(attach(len(shared).to_bytes(4, "little") + shared, shared.segment))
    assert int.from_bytes(chunk[:4], "little") == len(chunk) - 4
    assert bytes(unpack_shared(chunk[4:])[1][0]) == b"x" * 300_000


# --- commits ----------------------------------------------------------------------------------------------------------


def commits_of(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many changes each commit from now on has."""
    sizes: list[int] = []
    write = store._journal._write

    def counted(changes: list[Any]) -> None:
        sizes.append(len(changes))
        write(changes)

    monkeypatch.setattr(store._journal, "_write", counted)
    return sizes


def test_what_waits_is_one_commit(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    sure(store)
    sizes = commits_of(store, monkeypatch)
    for _ in range(2000):
        call(store)
    sure(store)
    assert len([size for size in sizes if size]) < 500


def test_what_is_told_together_is_one_commit(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    call(store)
    sure(store)
    sizes = commits_of(store, monkeypatch)
    went_on = threading.Event()
    with store.together():
        call(store)
        store.after(lambda error: went_on.set())
        with store.together():
            call(store)
        assert not went_on.wait(0.1)
        store.remember("key", {"jid": 3})
    assert went_on.wait(30)
    assert [size for size in sizes if size] == [2]


def test_actions_come_in_order_and_after_what_was_told(store: SqliteStore) -> None:
    order: list[int] = []
    done = threading.Event()
    for number in range(200):
        batch = call(store)

        def action(error: Exception | None, number: int = number, key: int = batch.key) -> None:
            assert error is None
            assert store._reader.rows("SELECT 1 FROM batch WHERE id = ?", (key,)) == [(1,)]
            order.append(number)
            if number == 199:
                done.set()

        store.after(action)
    assert done.wait(30)
    assert order == list(range(200))


def test_who_holds_the_lock_may_wait_for_a_commit(store: SqliteStore) -> None:
    """An action that wants the engine's lock must not keep the writer from what its holder waits for."""
    lock = threading.Lock()
    waits, over = threading.Event(), threading.Event()

    def action(error: Exception | None) -> None:
        waits.set()
        with lock:
            over.set()

    with lock:
        batch = call(store)
        store.after(action)
        assert waits.wait(30)
        store.began(batch, 0, 1)
    assert over.wait(30)


def test_began_is_on_disk_when_it_returns(store: SqliteStore) -> None:
    with store.together():
        batch = call(store)
        store.began(batch, 0, 1)
        assert n_rows(store, "mark") == 1


def test_one_bad_change_does_not_harm_others(store: SqliteStore) -> None:
    before = call(store)
    bad = Batch(0, FUNCTION, (1, b""), DEFAULT_OPTIONS, 0, 1.0, b"arguments")
    bad.jid0 = before.jid0
    errors: list[Exception | None] = []
    with store.together():
        store.add(bad)
        store.after(errors.append)
        call(store)
    sure(store)
    assert [type(error).__name__ for error in errors] == ["BackendError"]
    assert n_rows(store, "batch") == 2


def test_an_action_that_fails_does_not_stop_the_next(store: SqliteStore) -> None:
    def action(error: Exception | None) -> None:
        raise ValueError

    store.after(action)
    sure(store)


def test_who_only_asks_is_answered_at_once_when_nothing_is_on_its_way(store: SqliteStore) -> None:
    call(store)
    sure(store)
    threads: list[threading.Thread] = []
    until = time.monotonic() + 10.0
    # The thread that tells of the commit may be a moment behind it.
    while not threads or threads[-1] is not threading.current_thread():
        assert time.monotonic() < until
        store.after(lambda error: threads.append(threading.current_thread()))


def test_nothing_is_told_while_something_is_on_its_way(store: SqliteStore) -> None:
    sure(store)
    order: list[str] = []
    done = threading.Event()
    with store.together():
        call(store)
        store.after(lambda error: order.append("change"))
        store.after(lambda error: (order.append("question"), done.set()))
        assert order == []
    assert done.wait(30)
    assert order == ["change", "question"]


def test_a_closed_store_takes_nothing(store: SqliteStore) -> None:
    batch = call(store)
    store.close()
    store.close()
    with pytest.raises(BackendClosed):
        end(store, batch)


# --- replies ----------------------------------------------------------------------------------------------------------


def test_replies_are_kept_for_a_day(opened: Callable[..., SqliteStore]) -> None:
    now = [1000.0]
    store = opened(now=lambda: now[0])
    assert store.recall("key") is None
    call(store)
    store.remember("key", {"jid": 1})
    assert store.recall("key") == {"jid": 1}
    sure(store)
    assert store.recall("key") == {"jid": 1}
    store = opened(now=lambda: now[0])
    assert store.recall("key") == {"jid": 1}
    assert store.recall("other") is None
    now[0] += 86_401
    assert store.recall("key") is None
    store.remember("new", {})
    sure(store)
    assert n_rows(store, "reply") == 1


# --- listing, retention -----------------------------------------------------------------------------------------------


def test_batches_of_a_label(store: SqliteStore) -> None:
    labelled = JobOptions()
    labelled.label = "mine"
    for number in range(700):
        batch = call(store, options=labelled if number % 2 else DEFAULT_OPTIONS)
        if number % 3:
            end(store, batch)
    assert [batch.jid0 for batch in store.batches(label="mine")] == list(range(2, 701, 2))
    sure(store)
    assert [batch.jid0 for batch in store.batches(label="mine")] == list(range(2, 701, 2))
    assert [batch.jid0 for batch in store.batches(label="mine", unfinished=True)] == list(range(4, 701, 6))
    assert list(store.batches(label="nobody's")) == []
    plan = store._reader.rows(
        "EXPLAIN QUERY PLAN SELECT id FROM batch AS b WHERE b.jid0 > 1 AND b.jid0 < 9 AND b.label = 'a' ORDER BY jid0"
    )
    assert "batch_label" in str(plan)


def test_a_listing_goes_on_behind_jobs_that_are_being_deleted(store: SqliteStore) -> None:
    for _ in range(1500):
        end(store, call(store))
    sure(store)
    with store.together():
        for batch in list(store.batches())[:10]:
            store.delete(batch, 0, 1)
        assert [batch.jid0 for batch in store.batches()] == list(range(11, 1501))
        assert len(store.runs(range(11, 1501))) == 1490
        with pytest.raises(JobNotFound):
            store.runs(range(5, 50))


def test_an_empty_map_can_be_deleted(store: SqliteStore, opened: Callable[..., SqliteStore]) -> None:
    batch = many(store)
    batch.sealed = True
    store.delete(batch, 0, 0)
    assert opened().recovered() == []


def test_old_batches_expire(opened: Callable[..., SqliteStore], folder: Path) -> None:
    now = [1000.0]
    store = opened(now=lambda: now[0])
    old = [call(store, b"a" * LARGE) for _ in range(5)]
    unfinished = call(store)
    for batch in old:
        end(store, batch, value=b"%d" % batch.jid0 * LARGE)
    now[0] = 2000.0
    new = call(store)
    end(store, new)
    sure(store)
    assert store.expire(1500.0, limit=3) == 3
    assert store.expire(1500.0, limit=3) == 2
    assert store.expire(1500.0, limit=3) == 0
    assert [batch.jid0 for batch in store.batches()] == [unfinished.jid0, new.jid0]
    sure(store)
    assert blobs(folder) == []
    with pytest.raises(JobNotFound):
        store.locate(1)


def test_the_file_shrinks_when_much_is_free(store: SqliteStore, folder: Path) -> None:
    for _ in range(400):
        end(store, call(store), value=os.urandom(60_000))
    sure(store)
    for batch in list(store.batches()):
        store.delete(batch, 0, 1)
    # In its own time: what is asked of the store comes first.
    eventually(lambda: sure(store) or store._reader.rows("PRAGMA page_count")[0][0] < 3000)
    store.close()
    assert (folder / "jobs.sqlite3").stat().st_size < 12_000_000


def test_the_folder_is_the_owners(store: SqliteStore, folder: Path) -> None:
    call(store, b"a" * LARGE)
    sure(store)
    modes = {path.name: path.stat().st_mode & 0o077 for path in (folder, *folder.rglob("*"))}
    assert set(modes.values()) == {0}


def test_errors_have_their_states(store: SqliteStore, opened: Callable[..., SqliteStore]) -> None:
    batch = seal(store, many(store, 3))
    end(store, batch, 0)
    end_with(store, batch, pack_outcome(ERROR), 1, 2)
    found, _ = opened().locate(batch.jid0)
    assert list(found.states) == [DONE, ERROR, ERROR]
    assert found.finished
