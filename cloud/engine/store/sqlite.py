"""Keeps jobs in a folder, so that they outlive the process: one SQLite file, and a file for each large payload.

::

    <folder>/jobs.sqlite3       rows; a batch is one, whatever its length
    <folder>/blobs/<sha256>     payloads and outcomes of more than 64 KiB

    unfinished batches     objects in memory; each change goes to the journal, whose thread writes it
    finished batches       rows; some hundred that were used last are objects, too

The caller's lock (the engine's) guards everything here. The journal's thread only leaves notes of what is on disk,
which the next call takes up: what is in memory changes under the lock alone.
"""

from __future__ import annotations

import gc
import os
import time
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cloud.engine.store.base import Batch, Chunk, Store, not_found
from cloud.engine.store.blobs import BlobFolder
from cloud.engine.store.held import Held, HeldBatches
from cloud.engine.store.journal import Change, Journal, Transaction
from cloud.engine.store.pages import ascending, newest_first, oldest_first
from cloud.engine.store.replies import Replies
from cloud.engine.store.rows import (
    LARGE_BYTES,
    BatchRow,
    Part,
    Reader,
    write_attempt,
    write_begun,
    write_deleted,
    write_outcome,
    write_part,
)
from cloud.engine.store.tally import Tally
from cloud.jobs import QUEUED, Jids
from cloud.serialization.plain import plain_chunk, plain_outcome, plain_payload

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

_OUTCOME_BYTES: Final = 1 << 12
"""Outcomes of unfinished batches from this size on are not kept in memory."""
_PAGE: Final = 256
_BLOCK: Final = 1000
"""Jids reserved on disk at once: what a crash leaves of them is never given out."""


class SqliteStore(Store):
    """Batches in a folder of their own, which one process uses at a time.

    Args:
        folder: Made, for its owner only, when missing.
        now: Seconds since the epoch, for the times that ``expire`` and replies go by.

    Raises:
        BackendError: The file is damaged, or was written by a newer version of this package.
        OSError: The disk is full or failed.
    """

    durable = True

    def __init__(self, folder: str | os.PathLike[str], *, now: Callable[[], float] = time.time) -> None:
        path = os.path.join(folder, "jobs.sqlite3")
        os.makedirs(folder, mode=0o700, exist_ok=True)
        blobs = BlobFolder(os.path.join(folder, "blobs"))
        self._now = now
        self._journal = Journal(path, blobs)
        self._reader = Reader(path, blobs)
        blobs.sweep({sha for (sha,) in self._reader.rows("SELECT sha FROM blob")})
        counters: dict[str, int] = dict(self._reader.rows("SELECT name, value FROM counter"))
        last = self._reader.rows("SELECT max(id), (SELECT max(jid0 + n) FROM batch) FROM batch")[0]
        self._next = {
            "jid": max(counters.get("jid", 1), last[1] or 1),
            "key": max(counters.get("key", 1), (last[0] or 0) + 1),
        }
        self._reserved = dict(self._next)
        self._held = HeldBatches()
        self._tally = Tally(self._reader)
        self._gone: set[int] = set()
        self._deleted: OrderedDict[int, bytearray | None] = OrderedDict()
        self._replies = Replies(self._reader, now)
        self._last: Change | None = None
        self._n_together = 0
        self._notes: deque[Callable[[], None]] = deque()
        self._closed = False

    # --- keeping ------------------------------------------------------------------------------------------------------

    def new_jids(self, n: int) -> int:
        return self._take("jid", n)

    def add(self, batch: Batch) -> None:
        self._catch_up()
        held = self._held.get(batch.key)
        known = held is not None
        if held is None:
            held = self._hold(batch)
        else:
            self._held.place(held)
        row = BatchRow(batch, self._now() if batch.finished else None)
        if known:
            self._tell(held, row.seal, submission=True)
            return
        payloads = self._payloads(batch)

        def write(transaction: Transaction) -> None:
            row.insert(transaction)
            for fields, payload, plain in payloads:
                write_part(transaction, "chunk", fields, plain(payload))

        self._tell(held, write, parts=self._put_away(batch, batch.chunks), submission=True)

    def opened(self, batch: Batch) -> None:
        self._catch_up()
        held = self._hold(batch)
        self._tell(held, BatchRow(batch, None).insert, submission=True)

    def extended(self, batch: Batch, chunk: Chunk) -> None:
        self._catch_up()
        held = self._held.get(batch.key)
        if held is None:
            return
        fields, payload = (batch.key, chunk.start, chunk.n, chunk.kind), chunk.payload

        def write(transaction: Transaction) -> None:
            write_part(transaction, "chunk", fields, plain_chunk(payload))

        self._tell(held, write, parts=self._put_away(batch, [chunk]), submission=True)

    def began(self, batch: Batch, start: int, stop: int) -> None:
        """See ``Store.began``.

        Raises:
            BackendError, OSError: It could not be written, and must not begin.
        """
        held = self._held.get(batch.key)
        if held is None:
            return
        key = batch.key
        change = self._tell(held, lambda transaction: write_begun(transaction, key, start, stop), submission=True)
        self._journal.wait(change)

    def retried(self, batch: Batch, index: int) -> None:
        held = self._held.get(batch.key)
        if held is not None:
            key, n = batch.key, batch.attempt(index) - 1
            self._tell(held, lambda transaction: write_attempt(transaction, key, index, n))

    def finished(self, batch: Batch, start: int, n: int, outcome: bytes) -> None:
        self._catch_up()
        held = self._held.get(batch.key)
        if held is None:
            return  # deleted while it ran
        key, status, over = batch.key, outcome[0], self._now() if batch.finished else None
        self._tally.add(status, n)
        parts = []
        if len(outcome) > _OUTCOME_BYTES or type(outcome) is not bytes:
            parts = [Part(self._reader, "segment", key, start, outcome)]
            segments: Any = batch.segments
            segments[bisect_right(segments, start, key=_start) - 1] = (start, n, parts[0])

        def write(transaction: Transaction) -> None:
            write_outcome(transaction, (key, start, n, status), plain_outcome(outcome), over)

        self._tell(held, write, parts=parts)

    def _payloads(self, batch: Batch) -> list[tuple[tuple[int, int, int, int], Any, Callable[[bytes], bytes]]]:
        if batch.arguments is not None:
            return [((batch.key, 0, 1, 0), batch.arguments, plain_payload)]
        return [((batch.key, each.start, each.n, each.kind), each.payload, plain_chunk) for each in batch.chunks]

    def _put_away(self, batch: Batch, chunks: list[Chunk]) -> list[Part]:
        """Put what reads large payloads back in their place."""
        parts: list[Part] = []
        arguments: Any = batch.arguments
        if arguments is not None and _is_large(arguments):
            part: Any = Part(self._reader, "chunk", batch.key, 0, arguments)
            batch.arguments = part
            parts.append(part)
        for chunk in chunks:
            if _is_large(chunk.payload):
                part = Part(self._reader, "chunk", batch.key, chunk.start, chunk.payload)
                chunk.payload = part
                parts.append(part)
        return parts

    # --- finding ------------------------------------------------------------------------------------------------------

    def locate(self, jid: int) -> tuple[Batch, int]:
        self._catch_up()
        held = self._find(jid)
        return held.batch, self._index(held, jid)

    def runs(self, jids: Jids) -> list[tuple[Batch, int, int]]:
        self._catch_up()
        if type(jids) is range and jids.step == 1:
            return list(self._contiguous(jids.start, jids.stop))
        found: list[tuple[Batch, int, int]] = []
        for start, stop in ascending(jids):
            for run in self._contiguous(start, stop):
                if found and found[-1][0] is run[0] and found[-1][2] == run[1]:
                    found[-1] = (run[0], found[-1][1], run[2])
                else:
                    found.append(run)
        return found

    def _contiguous(self, jid: int, end: int) -> Iterator[tuple[Batch, int, int]]:
        ahead: dict[int, Held] = {}
        while jid < end:
            held = self._held.at(jid) or ahead.get(jid)
            if held is None and end - jid > 1:
                # Hundreds of calls by one query, which are not worth a place among the recent ones.
                ahead = self._read("b.jid0 >= ? AND b.jid0 < ? AND +b.finished IS NOT NULL", jid, end)
                held = ahead.get(jid)
            if held is None or held.batch.key in self._gone:
                held = self._find(jid)
            batch, index = held.batch, self._index(held, jid)
            stop = min(batch.n, index + end - jid)
            if held.deleted is not None and (at := held.deleted.find(1, index, stop)) >= 0:
                raise not_found(batch.jid0 + at)
            yield batch, index, stop
            jid += stop - index

    def batches(self, *, label: str | None = None, unfinished: bool = False) -> Iterator[Batch]:
        self._catch_up()
        if unfinished:
            yield from self._held.unfinished(label)
            return
        for found in oldest_first(self._page, self._held, label):
            yield from self._kept(found)

    def newest(self, before: int, *, label: str | None = None) -> Iterator[Batch]:
        self._catch_up()
        for found in newest_first(self._page, self._held, before, label):
            yield from self._kept(found)

    def _kept(self, found: Held) -> Iterator[Batch]:
        key = found.batch.key
        if key not in self._gone:
            if self._held.get(key) is None:
                self._note_deleted(key, found.deleted)
            yield found.batch

    def forgets(self, batch: Batch) -> bool:
        return batch.is_map and self._deleted_of(batch) is not None

    def forgotten(self, batch: Batch, index: int) -> bool:
        if not batch.is_map:
            return False
        deleted = self._deleted_of(batch)
        return deleted is not None and deleted[index] == 1

    def _deleted_of(self, batch: Batch) -> bytearray | None:
        held = self._held.get(batch.key)
        if held is not None:
            return held.deleted
        if batch.key not in self._deleted:
            self._note_deleted(batch.key, self._reader.add_marks({batch.key: batch}).get(batch.key))
        return self._deleted[batch.key]

    def recovered(self) -> list[tuple[Batch, list[tuple[int, int]]]]:
        # Each of these objects stays: looking through them again and again for garbage doubles the time.
        collects = gc.isenabled()
        gc.disable()
        try:
            batches, deleted, marks = self._reader.unfinished()
            begun: dict[int, set[int]] = {}
            for key, start, stop in marks:
                begun.setdefault(key, set()).update(range(start, stop))
            found: list[tuple[Batch, list[tuple[int, int]]]] = []
            for key, batch in batches.items():
                self._held.add(Held(batch, deleted.get(key)))
                if batch.is_map and batch.n:
                    batch.put_free(0, batch.n)
                items = sorted(each for each in begun[key] if batch.states[each] == QUEUED) if key in begun else ()
                found.append((batch, list(ascending(items)) if items else []))
        finally:
            if collects:
                gc.enable()
        return found

    def tally(self) -> list[int]:
        return self._tally.counts

    def figures(self) -> dict[str, Any]:
        """Since it was opened: ``ended`` (jobs by status code), ``n_commits``, and ``commit_s``, which they took."""
        journal = self._journal
        return {"ended": list(self._tally.ended), "n_commits": journal.n_commits, "commit_s": journal.commit_s}

    # --- forgetting ---------------------------------------------------------------------------------------------------

    def delete(self, batch: Batch, start: int, stop: int) -> None:
        self._catch_up()
        held = self._held.get(batch.key)
        if held is None:
            held = None if batch.key in self._gone or not batch.jid0 else self._load(batch.jid0)
            if held is None or held.batch.key != batch.key:
                return  # its last job was forgotten before
        batch = held.batch
        if stop - start == batch.n and batch.sealed and held.deleted is None:
            self._tally.remove(batch.states, [(start, stop)])
            self._remove([batch.key])
            return
        deleted = held.deleted = held.deleted or bytearray(batch.n)
        runs = []
        while (start := deleted.find(0, start, stop)) >= 0:
            end = deleted.find(1, start, stop)
            end = stop if end < 0 else end
            runs.append((start, end))
            deleted[start:end] = b"\x01" * (end - start)
        self._tally.remove(batch.states, runs)
        if batch.sealed and not deleted.count(0):
            self._remove([batch.key])
        elif runs:
            key = batch.key
            self._tell(held, lambda transaction: write_deleted(transaction, key, runs))

    def expire(self, before: float, *, limit: int = 1000) -> int:
        """Delete finished batches of long ago; returns how many. Does not wait for the disk.

        Space is used again by later jobs, and given back to the file system when a quarter of the file is free.

        Args:
            before: Those that finished before this moment, in seconds since the epoch.
            limit: How many at most, the oldest first; call again while as many were deleted.
        """
        self._catch_up()
        rows = self._reader.rows(
            "SELECT id FROM batch WHERE finished < ? ORDER BY finished LIMIT ?", (before, limit + len(self._gone))
        )
        keys = [key for (key,) in rows if key not in self._gone][:limit]
        held = [each for key in keys if (each := self._held.get(key)) is not None]
        for each in held:
            self.delete(each.batch, 0, each.batch.n)
        stored = [key for key in keys if key not in self._gone]
        if stored:
            self._tally.remove_stored(stored)
            self._remove(stored)
        return len(keys)

    def _remove(self, keys: list[int]) -> None:
        for key in keys:
            self._held.remove(key)
            self._deleted.pop(key, None)
        self._gone.update(keys)

        def write(transaction: Transaction) -> None:
            for key in keys:
                transaction.execute("DELETE FROM batch WHERE id = ?", (key,))

        def over() -> None:
            self._gone.difference_update(keys)
            for key in keys:
                self._journal.forget(key)

        self._write(Change(write), over)

    # --- commits ------------------------------------------------------------------------------------------------------

    @contextmanager
    def together(self) -> Iterator[None]:
        """Write what is told meanwhile, by this thread and under the engine's lock, in one commit. Nests.

        ``after`` tells of errors of the changes told within. Only ``began`` cuts the commit short.
        """
        if not self._n_together:
            self._last = None
        self._n_together += 1
        try:
            with self._journal.together():
                yield
        finally:
            self._n_together -= 1

    def after(self, action: Callable[[Exception | None], None]) -> None:
        """See ``Store.after``; the error is that of the last change told, if it was a submission and is given up.

        What is no submission is never given up: the action comes when space has returned.
        """
        self._journal.after(action, self._last)

    def remember(self, key: str, reply: dict[str, Any]) -> None:
        """See ``Store.remember``; within ``together`` nothing can come between the change and this."""
        write, change = self._replies.writing(key, reply), self._last

        def over() -> None:
            self._replies.settle(key)

        if change is None or not self._journal.add(change, write, lambda: self._notes.append(over)):
            change = self._write(Change(write), over)
        self._replies.expect(key, reply, change)

    def recall(self, key: str) -> dict[str, Any] | None:
        self._catch_up()
        pending = self._replies.pending(key)
        if pending is None:
            return self._replies.stored(key)
        # Whoever asks again is told when, and whether, the first answer is on disk.
        self._last, reply = pending
        return reply

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._reserve(dict(self._next))
        self._journal.close()
        self._reader.close()

    def _tell(
        self,
        held: Held,
        write: Callable[[Transaction], None],
        *,
        parts: list[Part] | tuple[()] = (),
        submission: bool = False,
    ) -> Change:
        held.n_pending += 1
        change = Change(write, submission=submission, group=held.batch.key if held.batch.is_map else 0)

        def over() -> None:
            held.n_pending -= 1
            self._held.let_go(held)

        if parts:
            change.when_over.append(lambda: None if change.error else _release(parts))
        return self._write(change, over)

    def _write(self, change: Change, over: Callable[[], None]) -> Change:
        change.when_over.append(lambda: self._notes.append(over))
        self._journal.tell(change)
        self._last = change
        return change

    def _catch_up(self) -> None:
        notes = self._notes
        while notes:
            notes.popleft()()

    def _take(self, counter: str, n: int) -> int:
        first = self._next[counter]
        self._next[counter] = first + n
        if first + n > self._reserved[counter]:
            self._reserve({counter: first + n + _BLOCK})
        return first

    def _reserve(self, values: dict[str, int]) -> None:
        self._reserved.update(values)

        def write(transaction: Transaction) -> None:
            for row in values.items():
                transaction.execute("INSERT OR REPLACE INTO counter VALUES (?, ?)", row)

        # Told before whatever uses the numbers, and never given up: what is on disk is below what is reserved there.
        self._journal.tell(Change(write))

    # --- memory -------------------------------------------------------------------------------------------------------

    def _hold(self, batch: Batch) -> Held:
        batch.key = self._take("key", 1)
        held = Held(batch)
        self._held.add(held)
        return held

    def _find(self, jid: int) -> Held:
        held = self._held.at(jid) or self._load(jid)
        if held is None:
            raise not_found(jid)
        return held

    def _load(self, jid: int) -> Held | None:
        if not 0 < jid < self._next["jid"]:
            return None
        found = self._read(
            "b.id = (SELECT id FROM batch WHERE jid0 <= ? ORDER BY jid0 DESC LIMIT 1) "
            "AND b.jid0 + b.n > ? AND b.finished IS NOT NULL",
            jid,
            jid,
        )
        held = next(iter(found.values()), None)
        if held is None or held.batch.key in self._gone:
            return None
        self._held.add(held)
        self._deleted.pop(held.batch.key, None)
        self._held.let_go(held)
        return held

    def _read(self, where: str, *values: object) -> dict[int, Held]:
        return self._page(where, values, f"ORDER BY b.jid0 LIMIT {_PAGE}")

    def _page(self, where: str, values: tuple[object, ...], order: str) -> dict[int, Held]:
        found = self._reader.finished(f"WHERE {where} {order}", values)
        return {batch.jid0: Held(batch, deleted) for batch, deleted in found}

    def _index(self, held: Held, jid: int) -> int:
        index = jid - held.batch.jid0
        if held.deleted is not None and held.deleted[index]:
            raise not_found(jid)
        return index

    def _note_deleted(self, key: int, deleted: bytearray | None) -> None:
        self._deleted[key] = deleted
        if len(self._deleted) > 2 * _PAGE:
            self._deleted.popitem(last=False)


def _release(parts: list[Part] | tuple[()]) -> None:
    for part in parts:
        part.release()


def _is_large(payload: Any) -> bool:
    return len(payload) > LARGE_BYTES or type(payload) is not bytes


def _start(segment: tuple[int, int, Any]) -> int:
    return segment[0]


__all__ = ["SqliteStore"]
