"""The thread that writes: changes in the order they were told, all that wait in one commit.

::

    engine, under its lock          writer thread                              teller thread
    tell(change) ──┐
    after(action) ─┴─► told ──────► BEGIN · files · rows · COMMIT ──► actions ─► action(error)
                                      │ failed
                                      ├─ submissions: given up; their actions get the error
                                      └─ all else: stays at the head, tried again every second

Actions have a thread of their own: they take the engine's lock, and who holds that may be waiting for a commit.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from queue import SimpleQueue

from cloud.engine.store.blobs import BlobFolder
from cloud.engine.store.schema import explained, open_writer
from cloud.errors import BackendClosed, BackendError
from cloud.logs import logger

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    Write = Callable[["Transaction"], None]
    Action = Callable[[Exception | None], None]

RETRY_S: Final = 1.0
_CLOSE_S: Final = 30.0
_VACUUM_PAGES: Final = 512
_TIDY_EVERY_S: Final = 0.05
_EXIT_AT: Final = "CLOUD_TEST_EXIT_AT_COMMIT"
_FAULTS: Final = (sqlite3.IntegrityError, sqlite3.ProgrammingError, sqlite3.InterfaceError, sqlite3.DataError)
"""Of SQLite's errors those that a change brings upon itself."""
_commit_points = count(1)


class Transaction:
    """What a change writes with.

    Attributes:
        execute: Runs one SQL statement.
    """

    def __init__(self, connection: sqlite3.Connection, blobs: BlobFolder) -> None:
        self.execute = connection.execute
        self._blobs = blobs
        self._new: list[bytes] = []
        self._n_put = 0

    def put(self, content: bytes) -> bytes:
        """Keep large bytes in a file; returns the digest that names it, for a row to refer to."""
        digest, is_new = self._blobs.put(content)
        self._n_put += 1
        if is_new:
            self._new.append(digest)
        return digest

    def sync(self) -> None:
        """Block until the files are on disk under their names."""
        if self._n_put:
            self._blobs.sync()

    def undo(self) -> None:
        """Remove the files that no row came to refer to."""
        self._blobs.remove(self._new)


class Change:
    """Something to write, whole or not at all.

    Args:
        write: Writes it; called again if the transaction failed.
        submission: True for what is given up when it cannot be written: its submitter is told, and can repeat it.
        group: Submissions of one group depend on each other: once one is given up the later ones are, too. 0: none.

    Attributes:
        when_over: Called by the writer once it is on disk, or given up.
        error: Why it was given up.
        over: True once it is on disk or given up.
        taken: True once the writer has it.
    """

    __slots__ = ("error", "group", "over", "settled", "submission", "taken", "when_over", "writes")

    def __init__(
        self,
        write: Write,
        *,
        submission: bool = False,
        group: int = 0,
    ) -> None:
        self.writes = [write]
        self.submission = submission
        self.group = group
        self.when_over: list[Callable[[], None]] = []
        self.error: Exception | None = None
        self.over = False
        self.taken = False

    def settle(self, error: Exception | None = None) -> None:
        """It is on disk, or was given up."""
        self.error = error
        self.over = True
        self.writes = []
        for action in self.when_over:
            action()


class _After:
    __slots__ = ("action", "change", "taken")

    def __init__(self, action: Action, change: Change | None) -> None:
        self.action = action
        self.change = change
        self.taken = False


class Journal:
    """Writes changes to one SQLite file and its blobs.

    Args:
        path: The SQLite file.
        blobs: Its folder of files.

    Raises:
        BackendError, OSError: See ``open_writer``.

    Attributes:
        n_commits, commit_s: Transactions written, and the seconds that took.
    """

    def __init__(self, path: str, blobs: BlobFolder) -> None:
        self._path = path
        self._blobs = blobs
        self._connection: sqlite3.Connection | None = open_writer(path)
        self._changed = threading.Condition()
        self._told: list[Change | _After] = []
        self._failed: list[Change | _After] = []
        self._given_up: dict[int, Exception] = {}
        self._retry_at = 0.0
        self._n_held = 0
        self._writing = False
        self._n_acting = 0
        self.n_commits, self.commit_s = 0, 0.0
        self._urgent = False
        self._closing = False
        self._exit_at = int(os.environ.get(_EXIT_AT, "0"))
        self._actions: SimpleQueue[tuple[Action, Exception | None] | None] = SimpleQueue()
        self._writer = threading.Thread(target=self._write_all, name="cloud-store-writer", daemon=True)
        self._teller = threading.Thread(target=self._tell_all, name="cloud-store-teller", daemon=True)
        self._writer.start()
        self._teller.start()

    # --- for the store ------------------------------------------------------------------------------------------------

    def tell(self, change: Change) -> None:
        """Write the change after all that was told before. Does not block.

        Raises:
            BackendClosed: The journal is closed.
        """
        self._put(change)

    def add(self, change: Change, write: Write, when_over: Callable[[], None]) -> bool:
        """Write something more as part of a change told before; False if the writer has that one."""
        with self._changed:
            if change.taken:
                return False
            change.writes.append(write)
            change.when_over.append(when_over)
            return True

    def after(self, action: Action, change: Change | None) -> None:
        """Call ``action`` once all that was told is on disk; with its error if this change was given up.

        At once if nothing is on its way: who only asks is spared the way through both threads.
        """
        with self._changed:
            at_once = not (self._told or self._failed or self._writing or self._n_acting or self._closing)
        if at_once:
            self._act(action, None if change is None else change.error)
        else:
            self._put(_After(action, change))

    def wait(self, change: Change) -> None:
        """Block until the change is on disk.

        Raises:
            BackendError, OSError: It was given up.
        """
        with self._changed:
            self._urgent = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: change.over)
        if change.error is not None:
            raise change.error

    @contextmanager
    def together(self) -> Iterator[None]:
        """Write what is told meanwhile in one commit; only ``wait`` cuts it short. Nests."""
        with self._changed:
            self._n_held += 1
        try:
            yield
        finally:
            with self._changed:
                self._n_held -= 1
                self._changed.notify_all()

    def forget(self, group: int) -> None:
        """No more is told of this group."""
        self._given_up.pop(group, None)

    def close(self) -> None:
        """Write what is not written, try once more what failed, and end both threads. Idempotent; bounded."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in (self._writer, self._teller):
            if thread is not threading.current_thread():
                thread.join(_CLOSE_S)

    def _put(self, item: Change | _After) -> None:
        with self._changed:
            if self._closing:
                raise BackendClosed("the store of jobs was closed")
            self._told.append(item)
            if len(self._told) == 1:
                self._changed.notify_all()

    # --- the writer ---------------------------------------------------------------------------------------------------

    def _write_all(self) -> None:
        tidy_at: float | None = 0.0
        while True:
            with self._changed:
                while not self._closing and (delay_s := self._delay_s(tidy_at)) != 0.0:
                    self._changed.wait(delay_s)
                if self._n_held and not self._urgent and not self._closing:
                    items = self._failed
                else:
                    items = self._failed + self._told
                    for item in self._told:
                        item.taken = True
                    self._told = []
                    self._urgent = False
                self._failed = []
                self._writing = bool(items)
                last = self._closing
            if items:
                self._commit(items, last=last)
                if tidy_at is None:
                    tidy_at = time.monotonic() + _TIDY_EVERY_S
                with self._changed:
                    self._writing = False
                    self._changed.notify_all()
            else:
                tidy_at = time.monotonic() if not last and self._tidy() else None
            if last and not items:
                break
        self._actions.put(None)
        self._close_connection()

    def _delay_s(self, tidy_at: float | None) -> float | None:
        """How long there is nothing to do; 0.0: there is, None: nobody knows."""
        ready = bool(self._told) and (not self._n_held or self._urgent)
        if self._failed:
            return max(0.0, self._retry_at - time.monotonic())
        if ready:
            return 0.0
        return None if tidy_at is None or self._n_held else max(0.0, tidy_at - time.monotonic())

    def _commit(self, items: list[Change | _After], *, last: bool) -> None:
        changes = []
        for item in items:
            if isinstance(item, Change) and not item.over:
                if item.submission and item.group in self._given_up:
                    item.settle(self._given_up[item.group])
                else:
                    changes.append(item)
        try:
            self._write(changes)
        except Exception as exc:  # noqa: BLE001 - whatever it is, the others' changes and actions must go on
            at_fault = isinstance(exc, _FAULTS) or not isinstance(exc, sqlite3.Error | OSError | BackendError)
            if at_fault and len(changes) > 1:
                # Not the disk's fault but one of theirs: the others must not suffer.
                for item in items:
                    self._commit([item], last=last)
            else:
                self._fail(items, len(changes), explained(exc, self._path), hopeless=last or at_fault)
        else:
            for item in items:
                self._done(item)

    def _write(self, changes: list[Change]) -> None:
        if not changes:
            return
        connection = self._connection = self._connection or open_writer(self._path)
        transaction = Transaction(connection, self._blobs)
        began = time.monotonic()
        try:
            connection.execute("BEGIN IMMEDIATE")
            for change in changes:
                for write in change.writes:
                    write(transaction)
            unused = [sha for (sha,) in connection.execute("SELECT sha FROM blob WHERE n_refs = 0")]
            if unused:
                connection.execute("DELETE FROM blob WHERE n_refs = 0")
            transaction.sync()
            self._commit_point()
            connection.execute("COMMIT")
            self._commit_point()
        except BaseException:
            self._roll_back()
            transaction.undo()
            raise
        self.n_commits += 1
        self.commit_s += time.monotonic() - began
        # After the commit: a crash in between leaves files nobody refers to, not rows without their files.
        self._blobs.remove(unused)

    def _roll_back(self) -> None:
        try:
            if self._connection is not None and self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
        except sqlite3.Error:
            # After an I/O error nothing that it holds can be relied on; the next transaction opens another.
            self._close_connection()

    def _fail(self, items: list[Change | _After], n_changes: int, error: Exception, *, hopeless: bool) -> None:
        logger("Cloud.Store").error("%s: %d changes were not written: %s", self._path, n_changes, error)
        self._retry_at = time.monotonic() + RETRY_S
        n_kept = 0
        for item in items:
            if isinstance(item, Change) and not item.over:
                if item.submission or hopeless:
                    if item.group and item.submission:
                        self._given_up[item.group] = error
                    item.settle(error)
                else:
                    self._failed.append(item)
                    n_kept += 1
            elif isinstance(item, _After):
                # Of what was given up is told at once; of all else when what stands before it is written.
                if n_kept and (item.change is None or item.change.error is None):
                    self._failed.append(item)
                else:
                    self._done(item)

    def _done(self, item: Change | _After) -> None:
        if isinstance(item, _After):
            with self._changed:
                self._n_acting += 1
            self._actions.put((item.action, None if item.change is None else item.change.error))
        elif not item.over:
            item.settle()

    def _commit_point(self) -> None:
        # A hook for tests: the process dies just before its k-th commit (2k - 1) or just after it (2k).
        if self._exit_at and next(_commit_points) == self._exit_at:
            os._exit(137)

    def _tidy(self) -> bool:
        """Give some free pages back to the file system, if there are many; True if there may be more."""
        if self._connection is None:
            return False
        try:
            execute = self._connection.execute
            n_free = execute("PRAGMA freelist_count").fetchone()[0]
            if n_free < 4 * _VACUUM_PAGES or n_free * 4 < execute("PRAGMA page_count").fetchone()[0]:
                return False
            # Not by execute, which stops after the first of the pages: they come as rows without columns.
            self._connection.executescript(f"PRAGMA incremental_vacuum({_VACUUM_PAGES})")
        except sqlite3.Error as exc:
            logger("Cloud.Store").warning("%s: free pages were not given back: %s", self._path, exc)
            return False
        return True

    def _close_connection(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(sqlite3.Error):  # what it cannot write back stays in its log
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            with suppress(sqlite3.Error):
                connection.close()

    # --- the teller ---------------------------------------------------------------------------------------------------

    def _tell_all(self) -> None:
        while (found := self._actions.get()) is not None:
            self._act(*found)
            with self._changed:
                self._n_acting -= 1

    def _act(self, action: Action, error: Exception | None) -> None:
        try:
            action(error)
        except Exception:  # noqa: BLE001 - the actions behind it must not wait for ever
            logger("Cloud.Store").exception("%s: an action after a commit failed", self._path)


__all__ = ["RETRY_S", "Change", "Journal", "Transaction"]
