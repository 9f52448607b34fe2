"""The tables of a store, and how its file is opened.

::

    content     functions and surroundings, each kept once; counted by the batches that use them
    batch       a row a submission, never one an item
      chunk     arguments of a run of items, until the batch is finished; a call has one
      segment   how a run of items ended
      mark      runs of items that were begun, were deleted, or are in a later attempt
    blob        files of the blobs' folder, counted by the rows that refer to them
    reply       replies to requests, by idempotency key
    counter     jids and batch ids below these may have been given out

Counting is done by triggers, in the transaction that adds or removes the row.

SQLite before 3.51.3 can lose a commit when one connection writes while another resets the log after a checkpoint.
Therefore one connection writes and checkpoints, and readers are opened read-only, which can do neither.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from urllib.parse import quote

from cloud.errors import BackendError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

ATTEMPT: Final = 0  #: ``stop`` is how many attempts were begun before the present one
BEGUN: Final = 1
DELETED: Final = 2

_FIRST: Final = """
CREATE TABLE counter (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE reply (key TEXT PRIMARY KEY, created REAL NOT NULL, body TEXT NOT NULL, digest BLOB NOT NULL);
CREATE INDEX reply_created ON reply (created);
CREATE TABLE blob (sha BLOB PRIMARY KEY, n_refs INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX blob_unused ON blob (sha) WHERE n_refs = 0;
CREATE TABLE content (
    id INTEGER PRIMARY KEY,
    n_refs INTEGER NOT NULL,
    sha BLOB NOT NULL,
    name TEXT NOT NULL,
    reusable INTEGER NOT NULL,
    digest BLOB NOT NULL,
    body BLOB,
    UNIQUE (sha, name, reusable)
);
CREATE TABLE batch (
    id INTEGER PRIMARY KEY,
    jid0 INTEGER UNIQUE,
    n INTEGER NOT NULL,
    is_map INTEGER NOT NULL,
    label TEXT,
    created REAL NOT NULL,
    finished REAL,
    depth INTEGER NOT NULL,
    options TEXT NOT NULL,
    environment TEXT NOT NULL,
    function INTEGER NOT NULL,
    context INTEGER NOT NULL,
    digest BLOB NOT NULL
);
CREATE INDEX batch_label ON batch (label, jid0) WHERE label IS NOT NULL;
CREATE INDEX batch_unfinished ON batch (id) WHERE finished IS NULL;
CREATE INDEX batch_finished ON batch (finished) WHERE finished IS NOT NULL;
CREATE TABLE chunk (
    batch INTEGER NOT NULL,
    start INTEGER NOT NULL,
    n INTEGER NOT NULL,
    kind INTEGER NOT NULL,
    digest BLOB NOT NULL,
    sha BLOB,
    body BLOB,
    PRIMARY KEY (batch, start)
) WITHOUT ROWID;
CREATE TABLE segment (
    batch INTEGER NOT NULL,
    start INTEGER NOT NULL,
    n INTEGER NOT NULL,
    kind INTEGER NOT NULL,
    digest BLOB NOT NULL,
    sha BLOB,
    body BLOB,
    PRIMARY KEY (batch, start)
) WITHOUT ROWID;
CREATE TABLE mark (
    batch INTEGER NOT NULL,
    kind INTEGER NOT NULL,
    start INTEGER NOT NULL,
    stop INTEGER NOT NULL,
    digest BLOB NOT NULL,
    PRIMARY KEY (batch, kind, start, stop)
) WITHOUT ROWID;
CREATE TRIGGER batch_added AFTER INSERT ON batch BEGIN
    UPDATE content SET n_refs = n_refs + 1 WHERE id = new.function;
    UPDATE content SET n_refs = n_refs + 1 WHERE id = new.context;
END;
CREATE TRIGGER batch_removed AFTER DELETE ON batch BEGIN
    DELETE FROM chunk WHERE batch = old.id;
    DELETE FROM segment WHERE batch = old.id;
    DELETE FROM mark WHERE batch = old.id;
    UPDATE content SET n_refs = n_refs - 1 WHERE id = old.function;
    UPDATE content SET n_refs = n_refs - 1 WHERE id = old.context;
    DELETE FROM content WHERE id IN (old.function, old.context) AND n_refs = 0;
END;
CREATE TRIGGER content_added AFTER INSERT ON content WHEN new.body IS NULL BEGIN
    INSERT INTO blob VALUES (new.sha, 1) ON CONFLICT (sha) DO UPDATE SET n_refs = n_refs + 1;
END;
CREATE TRIGGER content_removed AFTER DELETE ON content WHEN old.body IS NULL BEGIN
    UPDATE blob SET n_refs = n_refs - 1 WHERE sha = old.sha;
END;
CREATE TRIGGER chunk_added AFTER INSERT ON chunk WHEN new.body IS NULL BEGIN
    INSERT INTO blob VALUES (new.sha, 1) ON CONFLICT (sha) DO UPDATE SET n_refs = n_refs + 1;
END;
CREATE TRIGGER chunk_removed AFTER DELETE ON chunk WHEN old.body IS NULL BEGIN
    UPDATE blob SET n_refs = n_refs - 1 WHERE sha = old.sha;
END;
CREATE TRIGGER segment_added AFTER INSERT ON segment WHEN new.body IS NULL BEGIN
    INSERT INTO blob VALUES (new.sha, 1) ON CONFLICT (sha) DO UPDATE SET n_refs = n_refs + 1;
END;
CREATE TRIGGER segment_removed AFTER DELETE ON segment WHEN old.body IS NULL BEGIN
    UPDATE blob SET n_refs = n_refs - 1 WHERE sha = old.sha;
END;
"""

MIGRATIONS: Final = (_FIRST,)
"""For each schema version, from 1, the script that leads to it from the version before. Only ever appended to."""


def open_writer(path: str) -> sqlite3.Connection:
    """The one connection that writes; makes the file or brings it to the present schema.

    Raises:
        BackendError: The file is damaged, is no database, or is of a newer version of this package.
        OSError: The disk is full.
    """
    if not os.path.exists(path):
        # SQLite gives its side files the mode of this one.
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    try:
        connection = sqlite3.connect(path, timeout=30.0, isolation_level=None, check_same_thread=False)
        try:
            _refuse_newer(connection, path)
            if not _version(connection):
                # Before the first table is made: it decides the file's layout.
                connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA journal_size_limit = 67108864")
            connection.execute("PRAGMA cache_size = -16384")
            for number in range(_version(connection) + 1, len(MIGRATIONS) + 1):
                connection.executescript(
                    f"BEGIN EXCLUSIVE;\n{MIGRATIONS[number - 1]}\nPRAGMA user_version = {number};\nCOMMIT;"
                )
        except BaseException:
            connection.close()
            raise
    except sqlite3.Error as exc:
        raise explained(exc, path) from exc
    return connection


def open_reader(path: str) -> sqlite3.Connection:
    """A connection that neither writes nor checkpoints."""
    uri = f"file:{quote(os.fsencode(path))}?mode=ro"
    connection = sqlite3.connect(uri, uri=True, timeout=30.0, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA wal_autocheckpoint = 0")
    return connection


def _version(connection: sqlite3.Connection) -> int:
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    return version


def _refuse_newer(connection: sqlite3.Connection, path: str) -> None:
    version = _version(connection)
    if version > len(MIGRATIONS):
        raise BackendError(
            f"{path} has schema version {version}, this version of the package knows {len(MIGRATIONS)}",
            hint="Upgrade the package to the version that wrote the file, or use another data folder.",
        )


def explained(exc: Exception, path: str) -> Exception:
    """The error to tell for one of SQLite's: ``OSError`` (ENOSPC) for a full disk, else `BackendError`."""
    if not isinstance(exc, sqlite3.Error):
        return exc
    # The low byte is the class of the error, the rest its detail.
    code = getattr(exc, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return BackendError(f"{path} is damaged: {exc}", hint="Restore it and its folder from a backup.")
    return BackendError(f"{path} cannot be used: {exc}", retry=code == sqlite3.SQLITE_IOERR)


__all__ = ["ATTEMPT", "BEGUN", "DELETED", "MIGRATIONS", "explained", "open_reader", "open_writer"]
