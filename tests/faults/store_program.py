"""Random programs of changes told to a store, and what must be found of them when its folder is opened again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from cloud.engine.store.base import Batch, Chunk, loaded
from cloud.engine.store.sqlite import SqliteStore
from cloud.jobs import DONE, ERROR, KILLED, QUEUED, VALUE, JobOptions, pack_outcome
from cloud.serialization.functions import Function

State = dict[Any, Any]
SIZES = (0, 10, 3000, 70_000)
FUNCTIONS = [Function(b"first", "module.first"), Function(b"second" * 12_000, "module.second", reusable=True)]


class Program:
    """Does one random step after another; knows what the store must hold after each.

    Args:
        folder: The store's.
        random: Decides the steps.
    """

    def __init__(self, folder: Path, random: Random) -> None:
        self.store = SqliteStore(folder)
        self.random = random
        self.batches: list[Batch] = []
        self.deleted: dict[int, set[int]] = {}
        self.begun: dict[int, set[int]] = {}
        self.replies: dict[str, Any] = {}
        self.outcomes: dict[tuple[int, int], bytes] = {}
        self.payloads: dict[tuple[int, int], bytes] = {}

    def step(self) -> None:
        """Tell the store of one more change."""
        steps: list[Callable[[], None]] = [self._call, self._open, self._call_remembered]
        opened = [batch for batch in self.batches if not batch.sealed]
        unfinished = [batch for batch in self.batches if QUEUED in batch.states]
        if opened:
            steps += [lambda: self._extend(self.random.choice(opened)), lambda: self._seal(self.random.choice(opened))]
        if unfinished:
            steps += [
                lambda: self._finish(self.random.choice(unfinished)),
                lambda: self._finish(self.random.choice(unfinished)),
                lambda: self._retry(self.random.choice(unfinished)),
                lambda: self._begin(self.random.choice(unfinished)),
            ]
        finished = [batch for batch in self.batches if batch.finished]
        if finished:
            steps.append(lambda: self._delete(self.random.choice(finished)))
        self.random.choice(steps)()

    def sure(self) -> None:
        """Block until all that was told is on disk."""
        done = threading.Event()
        errors: list[Exception | None] = []
        self.store.after(lambda error: (errors.append(error), done.set()))  # type: ignore[func-returns-value]
        assert done.wait(60)
        assert errors == [None]

    def expected(self) -> State:
        """What is to be found when the folder is opened now."""
        found: State = {("reply", key): reply for key, reply in self.replies.items()}
        for batch in self.batches:
            deleted = self.deleted.get(batch.key, set())
            begun = {index for index in self.begun.get(batch.key, ()) if batch.states[index] == QUEUED}
            payloads = [each for (key, _), each in sorted(self.payloads.items()) if key == batch.key]
            outcomes = [self.outcomes[batch.key, start] for start, _, _ in batch.segments]
            found[batch.key] = _described(batch, deleted, begun, payloads, outcomes)
        return found

    # --- steps --------------------------------------------------------------------------------------------------------

    def _bytes(self) -> bytes:
        return self.random.choice(b"abc").to_bytes() * self.random.choice(SIZES)

    def _batch(self, arguments: bytes | None) -> Batch:
        options = JobOptions()
        options.label = self.random.choice([None, "a", "b"])
        options.depends_on = self.random.choice([(), range(1, 4), [2, 1]])
        function = self.random.choice(FUNCTIONS)
        return Batch(0, function, (1, b"context" * self.random.choice([1, 10_000])), options, 1, 2.5, arguments)

    def _call(self) -> None:
        batch = self._batch(self._bytes())
        batch.jid0 = self.store.new_jids(1)
        content = batch.arguments
        self.store.add(batch)
        self.payloads[batch.key, 0] = content or b""
        self.batches.append(batch)

    def _call_remembered(self) -> None:
        with self.store.together():
            self._call()
            key, reply = f"key-{len(self.batches)}-{len(self.replies)}", {"jid": self.batches[-1].jid0}
            self.store.remember(key, reply)
            self.replies[key] = reply

    def _open(self) -> None:
        batch = self._batch(None)
        self.store.opened(batch)
        self.batches.append(batch)

    def _extend(self, batch: Batch) -> None:
        n, payload = self.random.randint(1, 4), self._bytes()
        chunk = Chunk(1, batch.n, n, 1, payload)
        batch.chunks.append(chunk)
        batch.n += n
        batch.states += bytes((QUEUED,)) * n
        self.store.extended(batch, chunk)
        self.payloads[batch.key, chunk.start] = payload

    def _seal(self, batch: Batch) -> None:
        if not batch.n:
            return
        batch.sealed = True
        batch.jid0 = self.store.new_jids(batch.n)
        self.store.add(batch)

    def _finish(self, batch: Batch) -> None:
        start = self.random.choice([index for index in range(batch.n) if batch.states[index] == QUEUED])
        n = 1
        while start + n < batch.n and batch.states[start + n] == QUEUED and self.random.random() < 0.5:
            n += 1
        outcome = pack_outcome(self.random.choice([DONE, ERROR, KILLED]), [(VALUE, self._bytes())])
        batch.states[start : start + n] = outcome[:1] * n
        batch.n_final += n
        if batch.arguments is not None:
            batch.arguments = b""
        batch.add_segment(start, n, outcome)
        self.outcomes[batch.key, start] = outcome
        self.store.finished(batch, start, n, outcome)

    def _retry(self, batch: Batch) -> None:
        index = self.random.choice([index for index in range(batch.n) if batch.states[index] == QUEUED])
        batch.next_attempt(index)
        self.store.retried(batch, index)
        self.begun.get(batch.key, set()).discard(index)

    def _begin(self, batch: Batch) -> None:
        start = self.random.randrange(batch.n)
        stop = self.random.randint(start + 1, batch.n)
        self.store.began(batch, start, stop)
        self.begun.setdefault(batch.key, set()).update(range(start, stop))

    def _delete(self, batch: Batch) -> None:
        start = self.random.randrange(batch.n)
        stop = self.random.randint(start + 1, batch.n)
        self.store.delete(batch, start, stop)
        deleted = self.deleted.setdefault(batch.key, set())
        deleted.update(range(start, stop))
        if len(deleted) == batch.n:
            self.batches.remove(batch)


def found_in(folder: Path, replies: set[str]) -> State:
    """What a new store finds in the folder; ``replies`` are the keys to ask for."""
    store = SqliteStore(folder)
    try:
        found: State = {}
        for batch, runs in store.recovered():
            payloads = [batch.arguments] if batch.arguments is not None else [each.payload for each in batch.chunks]
            found[batch.key] = _found(store, batch, {at for start, stop in runs for at in range(start, stop)}, payloads)
        for batch in store.batches():
            if batch.key not in found:
                found[batch.key] = _found(store, batch, set(), [])
        for key in replies:
            if (reply := store.recall(key)) is not None:
                found["reply", key] = reply
        assert store._reader.rows("PRAGMA integrity_check") == [("ok",)]
        known = {sha.hex() for (sha,) in store._reader.rows("SELECT sha FROM blob")}
        assert {path.name for path in (folder / "blobs").iterdir()} == known
        return found
    finally:
        store.close()


def _found(store: SqliteStore, batch: Batch, begun: set[int], payloads: list[Any]) -> Any:
    deleted = {index for index in range(batch.n) if store.forgotten(batch, index)}
    contents = [loaded(payload) for payload in payloads]
    return _described(batch, deleted, begun, contents, [loaded(outcome) for _, _, outcome in batch.segments])


def _described(
    batch: Batch, deleted: set[int], begun: set[int], payloads: list[bytes], outcomes: list[bytes]
) -> tuple[Any, ...]:
    over = batch.finished
    return (
        (batch.jid0, batch.n, batch.is_map, batch.sealed, bytes(batch.states), batch.n_final),
        (batch.function.name, None if over else (batch.function.payload, batch.function.reusable, batch.context[1])),
        (batch.options.as_dict(), batch.depth, batch.created, dict(batch.attempts or {})),
        None if over else [each for each in payloads if batch.is_map or not batch.n_final],
        [(start, n) for start, n, _ in batch.segments],
        outcomes,
        sorted(deleted),
        sorted(begun),
    )
