"""What stands beside the jobs, embedded: stored files, crons, accounts; and what they share.

Owns `Database`, one SQLite file that any number of threads and processes read and write at the same time, and a few
functions about folders and text. Knows nothing of jobs, names, users or schedules; each resource brings its tables.

Rollback journal, not WAL, on purpose. SQLite before 3.51.3 can corrupt a WAL file when one connection writes
while another checkpoints; here every process of the user is a writer, so no single one can be made the only
checkpointer. WAL also needs memory shared between all users of the file, which a home folder on a network file
system does not give, and its side files would be created by mere readers.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from urllib.parse import quote

from cloud.errors import BackendError

__all__ = ["Database", "check_name", "check_text", "make_folder", "sync", "write_private"]

#: How long a transaction waits for the locks of other processes; also the bound of a fork's wait for transactions.
LOCK_WAIT_S = 30.0

#: What a connection is good for: process id, device and inode. None: the file did not exist.
_Identity = tuple[int, int, int] | None


class _ForkGate:
    """Lets transactions run side by side and keeps forks out of them.

    SQLite remembers per process which locks it holds on a file. A child forked while another thread is inside a
    transaction inherits that memory without the locks: it would read unlocked, or wait for a lock nobody holds.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._n_inside = 0
        self._n_forks = 0

    def __enter__(self) -> None:
        with self._changed:
            # A fork that waits goes first; otherwise busy threads would keep it waiting.
            while self._n_forks:
                self._changed.wait()
            self._n_inside += 1

    def __exit__(self, *exc_info: object) -> None:
        with self._changed:
            self._n_inside -= 1
            self._changed.notify_all()

    def shut(self) -> None:
        # The condition's lock stays held across the fork, so that nobody enters meanwhile.
        self._changed.acquire()
        self._n_forks += 1
        self._changed.wait_for(lambda: self._n_inside == 0, LOCK_WAIT_S)

    def reopen(self) -> None:
        self._n_forks -= 1
        self._changed.notify_all()
        self._changed.release()

    def renew(self) -> None:
        self.__init__()  # type: ignore[misc]  # in the child, where no other thread exists yet


_fork_gate = _ForkGate()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_fork_gate.shut, after_in_parent=_fork_gate.reopen, after_in_child=_fork_gate.renew)


class Database:
    """One SQLite file, opened when first used, safe in threads, in forked children and beside other processes.

    Transactions of one thread do not nest. A committed transaction survives power loss. The file is created,
    readable by its owner only, by the first write; a file that does not exist reads as an empty database.

    Args:
        path: The file. Its folder is created with it.
        migrations: For each schema version, from 1, the statements that lead to it from the version before.
            Only ever appended to; ``PRAGMA user_version`` says how many of them a file has seen.

    Every transaction raises `BackendError` when the file is damaged, was written by a newer version of this
    package, or stays locked for 30 s, and ``OSError`` (ENOSPC) when the disk is full; nothing is changed then.
    """

    def __init__(self, path: str, migrations: Sequence[Sequence[str]]) -> None:
        self._path = path
        self._migrations = migrations
        # A connection is either here, idle, or on the stack of the thread that uses it. A forked child therefore
        # finds only idle ones here, which it may close: they hold no lock and no open transaction.
        self._idle: list[tuple[_Identity, sqlite3.Connection]] = []

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """See one consistent state for the length of the block; `alone` blocks do not run meanwhile."""
        with self._transaction("BEGIN", create=False) as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Be the only writer among all processes; committed at the end of the block, undone if it raises."""
        with self._transaction("BEGIN IMMEDIATE", create=True) as connection:
            yield connection

    @contextmanager
    def alone(self) -> Iterator[sqlite3.Connection]:
        """As `writing`, and with no reader in any process."""
        with self._transaction("BEGIN EXCLUSIVE", create=True) as connection:
            yield connection

    def close(self) -> None:
        """Give the idle connections back. Idempotent; a later use opens new ones."""
        while (found := self._pop()) is not None:
            found[1].close()

    @contextmanager
    def _transaction(self, begin: str, *, create: bool) -> Iterator[sqlite3.Connection]:
        with _fork_gate, self._explaining():
            identity, connection = self._take(create=create)
            try:
                connection.execute(begin)
                # Looked at each time: another process may have upgraded the file since it was opened.
                self._refuse_unless_current(connection)
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                connection.close()  # which also rolls back
                raise
            self._idle.append((identity, connection))

    def _take(self, *, create: bool) -> tuple[_Identity, sqlite3.Connection]:
        identity = self._identity()
        while (found := self._pop()) is not None:
            if found[0] == identity and identity is not None:
                return found
            found[1].close()
        if identity is None and not create:
            return None, self._empty()
        connection = self._connect(create=create)
        try:
            connection.execute("PRAGMA synchronous = EXTRA")
            connection.execute("PRAGMA foreign_keys = ON")
            version = self._version(connection)
            if version == 0 and not create:
                # Its first writer is just being, or was, stopped before it committed anything.
                connection.close()
                return None, self._empty()
            if version < len(self._migrations):
                self._migrate(connection)
        except BaseException:
            connection.close()
            raise
        return self._identity(), connection

    def _pop(self) -> tuple[_Identity, sqlite3.Connection] | None:
        try:
            return self._idle.pop()
        except IndexError:
            return None

    def _identity(self) -> _Identity:
        # The inode tells a file that was removed and made anew under a running program.
        try:
            found = os.stat(self._path)
        except FileNotFoundError:
            return None
        return os.getpid(), found.st_dev, found.st_ino

    def _connect(self, *, create: bool) -> sqlite3.Connection:
        uri = f"file:{quote(os.fsencode(self._path))}"
        if not create:
            return _connection(f"{uri}?mode=rw")
        folder = os.path.dirname(self._path)
        make_folder(folder)
        # SQLite copies the mode 0600 of this file. Creating the database with os.open instead would be wrong:
        # closing any descriptor of a file drops all POSIX locks that this process holds on it.
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".mode-") as private:
            return _connection(f"{uri}?mode=rwc&modeof={quote(os.fsencode(private.name))}")

    def _empty(self) -> sqlite3.Connection:
        connection = _connection("file::memory:")
        self._migrate(connection)
        return connection

    def _migrate(self, connection: sqlite3.Connection) -> None:
        connection.execute("BEGIN EXCLUSIVE")
        version = self._version(connection)
        for number, statements in enumerate(self._migrations[version:], version + 1):
            for statement in statements:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {number}")
        connection.execute("COMMIT")

    def _version(self, connection: sqlite3.Connection) -> int:
        version: int = connection.execute("PRAGMA user_version").fetchone()[0]
        return version

    def _refuse_unless_current(self, connection: sqlite3.Connection) -> None:
        version = self._version(connection)
        if version != len(self._migrations):
            raise BackendError(
                f"{self._path} has schema version {version}, this version of the package knows {len(self._migrations)}",
                hint="Upgrade the package to the version that wrote the file, or set CLOUD_HOME to another folder.",
            )

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as exc:
            # The low byte is the class of the error, the rest its detail.
            code = getattr(exc, "sqlite_errorcode", 0) & 0xFF
            if code == sqlite3.SQLITE_FULL:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._path) from exc
            if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise BackendError(
                    f"{self._path} is damaged: {exc}",
                    hint="Restore it from a backup, or move it away to start with an empty one.",
                ) from exc
            if code == sqlite3.SQLITE_BUSY:
                raise BackendError(
                    f"{self._path} was locked by other processes for more than {LOCK_WAIT_S:g} s", retry=True
                ) from exc
            raise BackendError(f"{self._path} cannot be used: {exc}") from exc


def _connection(uri: str) -> sqlite3.Connection:
    return sqlite3.connect(uri, uri=True, timeout=LOCK_WAIT_S, isolation_level=None, check_same_thread=False)


def make_folder(path: str) -> None:
    """Make a folder for its owner only, and those missing above it; on disk when this returns."""
    if os.path.isdir(path):
        return
    parent = os.path.dirname(path)
    make_folder(parent)
    with suppress(FileExistsError):  # another process was faster
        os.mkdir(path, 0o700)
    sync(parent)


def sync(path: str) -> None:
    """Block until a file, or the names in a folder (files made, renamed or removed in it), are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_private(path: str, contents: bytes) -> None:
    """Make or replace a small file that only its owner may read; whole and on disk when this returns."""
    folder = os.path.dirname(path)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".private-", delete=False) as part:
        try:
            part.write(contents)
            part.flush()
            os.fsync(part.fileno())
            os.replace(part.name, path)
        except BaseException:
            os.unlink(part.name)
            raise
    sync(folder)


def check_text(what: str, value: object, min_chars: int, max_chars: int) -> str:
    """Return `value` if it is text of that length that UTF-8 can express, else raise TypeError or ValueError.

    Args:
        what: How the error begins, such as "a note".
        value: What the user gave; errors show at most its type or length, since it may be a password.
        min_chars: Least number of characters.
        max_chars: Greatest number of characters.
    """
    if not isinstance(value, str):
        raise TypeError(f"{what} must be a str, not {type(value).__name__}")
    if not min_chars <= len(value) <= max_chars:
        raise ValueError(f"{what} must have {min_chars} to {max_chars} characters, not {len(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        # A lone surrogate, as in file names that are not UTF-8. Not chained: that error shows the whole text.
        raise ValueError(f"{what} must be valid Unicode, without lone surrogates") from None
    return value


def check_name(what: str, value: object) -> str:
    """Return `value` if it can be a name: 1 to 128 printable characters, no blank at either end; else raise."""
    name = check_text(what, value, 1, 128)
    if not name.isprintable() or name != name.strip():
        raise ValueError(f"{what} must be printable, without a blank at either end: {name!r}")
    return name
