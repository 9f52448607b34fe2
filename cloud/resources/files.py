"""Stored files, embedded: names for blobs. Used by `cloud.files` directly, and by the server.

Owns the names, the books of the blobs, and when a blob may go. A name is a key in the database and never a path.

Who may do what at which moment::

    put      contents -> disk (no lock held) | writing: blob in place, name -> blob | alone: collect what it replaced
    delete                                   | writing: name gone                   | alone: collect it
    getf                                     | reading: name -> blob, open          | read (no lock held)

Blobs are removed only in `alone` blocks, and looked up and opened in one `reading` block: a reader that found a name
finds its blob. They are put in place only by `writing` ones, which re-enter them in the books: a blob that is
being put again while its last name goes is either seen as referenced or is put in place anew.

A server reads contents piece by piece, each in a request of its own. What was opened there is kept for `lease_s` after
the last piece, although its name may be gone.
"""

from __future__ import annotations

import builtins
import io
import os
import sqlite3
import time
from collections.abc import Iterable
from datetime import UTC, datetime

from cloud.errors import BackendError, StoredFileNotFound
from cloud.logs import logger
from cloud.resources import Database, check_text
from cloud.resources.blobs import Blob, BlobFolder, BlobReader, Readable, chunks
from cloud.resources.stored import FileInfo, Files, StoredFile, check_file_name, check_range, not_found

__all__ = ["FileInfo", "FileStore", "StoredFile"]

#: For how long what was done is remembered by its key.
_DONE_S = 86_400.0
_MANY_LEASES = 4096

_MIGRATIONS = [
    (
        "CREATE TABLE blob (digest TEXT PRIMARY KEY, size_bytes INTEGER NOT NULL, md5 TEXT NOT NULL,"
        " chunk_digests BLOB NOT NULL) WITHOUT ROWID",
        "CREATE TABLE file (name TEXT PRIMARY KEY, digest TEXT NOT NULL REFERENCES blob, modified_s REAL NOT NULL)"
        " WITHOUT ROWID",
        "CREATE INDEX file_digest ON file (digest)",
        # Blobs that lost a name and wait to be collected.
        "CREATE TABLE garbage (digest TEXT PRIMARY KEY) WITHOUT ROWID",
    ),
    (
        # What was done on request, by the key of the request: asked again, it is not done again.
        "CREATE TABLE done (key TEXT PRIMARY KEY, reply INTEGER NOT NULL, at_s REAL NOT NULL) WITHOUT ROWID",
        "CREATE INDEX done_at ON done (at_s)",
    ),
]

_BLOB = "SELECT digest, size_bytes, md5, chunk_digests FROM"


class FileStore(Files):
    """The files of one user or workgroup, kept under ``<home>/files``.

    Safe beside other processes on the same folder, too. Nothing is created on disk before the first put.

    Args:
        home: The data folder; need not exist.
        lease_s: How long contents opened with `open_contents` are kept for the next `read_contents`. With leases one
            process uses the folder.
    """

    def __init__(self, home: str, *, lease_s: float = 0.0) -> None:
        self.folder = os.path.join(os.path.abspath(home), "files")
        database = os.path.join(self.folder, "names.sqlite3")
        self._database = Database(database, _MIGRATIONS)
        self._blobs = BlobFolder(self.folder)
        self._swept = False
        self._lease_s = lease_s
        self._leases: dict[str, float] = {}
        # Whoever read before this process began, with the one before it, may go on.
        self._all_leased_until = time.monotonic() + lease_s if lease_s and os.path.exists(database) else 0.0

    def getf(self, file_name: str, start_byte: int = 0, end_byte: int | None = None) -> StoredFile:
        check_file_name(file_name)
        start, end = check_range(start_byte, end_byte)
        with self._database.reading() as db:
            row = db.execute(f"{_BLOB} file JOIN blob USING (digest) WHERE name = ?", (file_name,)).fetchone()
            if row is None:
                raise not_found(file_name)
            blob = _blob(row)
            descriptor = self._blobs.open(blob, file_name)
        return StoredFile(BlobReader(descriptor, blob, file_name, start, end), blob)

    def open_contents(self, file_name: str) -> Blob:
        """Return what a name stands for now, and keep it for `read_contents`.

        Raises:
            StoredFileNotFound: No stored file has this name.
        """
        check_file_name(file_name)
        with self._database.reading() as db:
            row = db.execute(f"{_BLOB} file JOIN blob USING (digest) WHERE name = ?", (file_name,)).fetchone()
            if row is None:
                raise not_found(file_name)
            self._lease(row[0])
            return _blob(row)

    def read_contents(self, digest: str, name: str, start: int, n: int) -> bytes:
        """Return at most `n` bytes from `start` on of contents, verified.

        Args:
            digest: SHA-256 of the contents, from `open_contents`.
            name: The name that they were opened by, for errors.
            start: First byte.
            n: How many.

        Raises:
            StoredFileNotFound: They have had no name for longer than they are kept, or never existed.
            StoredFileCorrupt: They are missing, or do not match their checksum.
        """
        with self._database.reading() as db:
            row = db.execute(f"{_BLOB} blob WHERE digest = ?", (digest,)).fetchone()
            if row is None:
                raise StoredFileNotFound(
                    f"stored file {name!r} was replaced or deleted while it was being read; open it again", name
                )
            self._lease(digest)
            blob = _blob(row)
            descriptor = self._blobs.open(blob, name)
        with io.BufferedReader(BlobReader(descriptor, blob, name, start, start + n)) as reader:
            return reader.read(n)

    def _lease(self, digest: str) -> None:
        if self._lease_s:
            now = time.monotonic()
            if len(self._leases) >= _MANY_LEASES:
                self._leases = {each: until for each, until in self._leases.copy().items() if until > now}
            self._leases[digest] = now + self._lease_s

    def _is_leased(self, digest: str) -> bool:
        now = time.monotonic()
        if self._leases.get(digest, 0.0) > now:
            return True
        self._leases.pop(digest, None)
        return now < self._all_leased_until

    def list(self, prefix: str = "", after: str = "", limit: int = -1) -> builtins.list[str]:
        """Return the names of all stored files, sorted; only those that start with `prefix`, if given.

        Args:
            prefix: What the names start with.
            after: Only names greater than this one.
            limit: So many at most; -1 is without limit.
        """
        check_text("prefix", prefix, 0, 1024)
        check_text("after", after, 0, 1024)
        with self._database.reading() as db:
            rows = db.execute(
                "SELECT name FROM file WHERE name >= :prefix AND name > :after"
                " AND substr(name, 1, length(:prefix)) = :prefix ORDER BY name LIMIT :limit",
                {"prefix": prefix, "after": after, "limit": limit},
            ).fetchall()
        return [name for (name,) in rows]

    def exists(self, file_name: str) -> bool:
        check_file_name(file_name)
        with self._database.reading() as db:
            return db.execute("SELECT 1 FROM file WHERE name = ?", (file_name,)).fetchone() is not None

    def delete(self, file_name: str, key: str = "") -> bool:
        """Delete a stored file; return whether there was one. Who has it open can read on.

        Args:
            file_name: The name in the store.
            key: Of the request, see `done`.
        """
        if not self.exists(file_name):
            return bool(key and self.done(key))
        with self._database.writing() as db:
            if key and (before := _done(db, key)) is not None:
                return bool(before)
            found = db.execute("DELETE FROM file WHERE name = ? RETURNING digest", (file_name,)).fetchall()
            db.executemany("INSERT OR IGNORE INTO garbage VALUES (?)", found)
            _note_done(db, key, len(found))
        self.tidy()
        return bool(found)

    def info(self, file_name: str) -> FileInfo:
        check_file_name(file_name)
        with self._database.reading() as db:
            row = db.execute(
                "SELECT size_bytes, md5, digest, modified_s FROM file JOIN blob USING (digest) WHERE name = ?",
                (file_name,),
            ).fetchone()
        if row is None:
            raise not_found(file_name)
        size_bytes, md5, digest, modified_s = row
        modified = datetime.fromtimestamp(modified_s, UTC)
        return FileInfo(name=file_name, size_bytes=size_bytes, md5=md5, sha256=digest, modified=modified)

    def sweep(self) -> None:
        """Remove what processes that died in the middle of a put or delete left behind.

        The first put of a process does this by itself.
        """
        for digest in self._blobs.sweep():
            self._collect([digest])
        if self._has_garbage():
            self._collect()

    def used_bytes(self) -> int:
        """Return the size of all contents; those that several names stand for count once."""
        with self._database.reading() as db:
            return int(db.execute("SELECT coalesce(sum(size_bytes), 0) FROM blob").fetchone()[0])

    def done(self, key: str) -> int | None:
        """Return what was noted when the request of this key was carried out, within a day; None if it was not."""
        with self._database.reading() as db:
            return _done(db, key)

    def adopt(self, path: str, descriptor: int, blob: Blob, name: str, key: str) -> None:
        """Make contents that are on disk in this file system those of a name, without copying them.

        Args:
            path: Where they are. Whoever wrote them there removes that name afterwards.
            descriptor: Of the file there.
            blob: What they are.
            name: Replaced if it exists.
            key: Of the request, see `done`.
        """
        check_file_name(name)
        self._sweep_once()
        with self._blobs.adopt(path, descriptor, blob) as second:
            self._publish_whole(blob, second, name, key)
        self.tidy()

    def put_once(self, contents: bytes, name: str, key: str) -> None:
        """As `putf`, unless the request of this key was carried out before; see `done`."""
        check_file_name(name)
        if key and self.done(key) is not None:
            return
        self._store(contents, name, key)

    def close(self) -> None:
        self._database.close()

    def _store(self, source: Readable | str | bytes, name: str, key: str = "") -> None:
        self._sweep_once()
        with self._blobs.receive(chunks(source)) as (blob, path):
            self._publish_whole(blob, path, name, key)
        self.tidy()

    def _sweep_once(self) -> None:
        if not self._swept:
            self.sweep()
            self._swept = True

    def _publish_whole(self, blob: Blob, path: str, name: str, key: str) -> None:
        try:
            self._publish(blob, path, name, key)
        except BaseException:
            # The blob may be in place with nobody to refer to it.
            self._collect([blob.digest])
            raise

    def _publish(self, blob: Blob, path: str, name: str, key: str) -> None:
        with self._database.writing() as db:
            self._blobs.publish(blob, path)
            db.execute(
                "INSERT OR REPLACE INTO blob VALUES (?, ?, ?, ?)",
                (blob.digest, blob.size_bytes, blob.md5, blob.chunk_digests),
            )
            db.execute(
                "INSERT OR IGNORE INTO garbage SELECT digest FROM file WHERE name = ? AND digest != ?",
                (name, blob.digest),
            )
            db.execute("INSERT OR REPLACE INTO file VALUES (?, ?, ?)", (name, blob.digest, time.time()))
            _note_done(db, key, 1)

    def _collect(self, digests: Iterable[str] = ()) -> None:
        with self._database.alone() as db:
            garbage = {digest for (digest,) in db.execute("SELECT digest FROM garbage")}
            for digest in garbage.union(digests):
                if db.execute("SELECT 1 FROM file WHERE digest = ?", (digest,)).fetchone() is None:
                    if digest in garbage and self._is_leased(digest):
                        continue
                    db.execute("DELETE FROM blob WHERE digest = ?", (digest,))
                    self._blobs.remove(digest)
                db.execute("DELETE FROM garbage WHERE digest = ?", (digest,))

    def _has_garbage(self) -> bool:
        with self._database.reading() as db:
            return db.execute("SELECT 1 FROM garbage").fetchone() is not None

    def tidy(self) -> None:
        """Remove contents without a name that are kept for no reader any more; what fails is logged."""
        try:
            if self._has_garbage():
                self._collect()
        except (OSError, BackendError) as exc:
            # The user's change is made and on disk; to report it as failed would be wrong.
            logger("Cloud.files").warning("unused contents are kept for now: %s", exc)


def _blob(row: tuple[str, int, str, bytes]) -> Blob:
    return Blob(digest=row[0], size_bytes=row[1], md5=row[2], chunk_digests=row[3])


def _done(db: sqlite3.Connection, key: str) -> int | None:
    row = db.execute("SELECT reply FROM done WHERE key = ?", (key,)).fetchone()
    return None if row is None else int(row[0])


def _note_done(db: sqlite3.Connection, key: str, reply: int) -> None:
    if key:
        now = time.time()
        db.execute("DELETE FROM done WHERE at_s < ?", (now - _DONE_S,))
        db.execute("INSERT OR REPLACE INTO done VALUES (?, ?, ?)", (key, reply, now))
