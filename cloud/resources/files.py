"""Stored files, embedded: names for blobs. Used by `cloud.files`, directly and, later, by the server.

Owns the names, the books of the blobs, and when a blob may go. A name is a key in the database and never a path.

Who may do what at which moment::

    put      contents -> disk (no lock held) | writing: blob in place, name -> blob | alone: collect what it replaced
    delete                                   | writing: name gone                   | alone: collect it
    getf                                     | reading: name -> blob, open          | read (no lock held)

Blobs are removed only in `alone` blocks, and looked up and opened in one `reading` block: a reader that found a name
finds its blob. They are put in place only by `writing` ones, which re-enter them in the books: a blob that is
being put again while its last name goes is either seen as referenced or is put in place anew.
"""

from __future__ import annotations

import builtins
import io
import operator
import os
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import BinaryIO

from cloud.errors import BackendError, StoredFileNotFound
from cloud.logs import logger
from cloud.resources import Database, check_text
from cloud.resources.blobs import CHUNK_BYTES, Blob, BlobFolder, BlobReader, Readable, chunks

__all__ = ["FileInfo", "FileStore", "StoredFile"]

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
]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileInfo:
    """What is known of one stored file."""

    name: str
    size_bytes: int
    #: MD5 of the contents, in hex.
    md5: str
    #: SHA-256 of the contents, in hex.
    sha256: str
    #: When it was last put.
    modified: datetime


class StoredFile(io.BufferedReader):
    """A stored file, or a range of it, open for reading as bytes; verified piece by piece as it is read.

    ``read``, ``readline``, ``readlines``, iteration, ``seek``, ``tell``, ``close`` and ``with`` work as for any
    binary file; positions count from the start of the range. Goes on reading the same contents when the file is
    replaced or deleted meanwhile. Each read raises `StoredFileCorrupt` where the bytes do not match their checksum.
    """

    def __init__(self, reader: BlobReader) -> None:
        super().__init__(reader, buffer_size=1 << 16)
        self._blob = reader.blob

    @property
    def md5(self) -> str:
        """MD5 of the whole file in hex, also when a range was opened."""
        return self._blob.md5

    @property
    def filesize(self) -> int:
        """Size of the whole file in bytes, also when a range was opened."""
        return self._blob.size_bytes


class FileStore:
    """The files of one user or workgroup, kept under ``<home>/files``.

    Safe in threads, in forked children, and beside other processes on the same folder. A name is any Unicode text
    of 1 to 1024 characters without NUL; ``TypeError`` or ``ValueError`` for anything else. Nothing is created on
    disk before the first put, and memory use does not grow with the size of the files.

    Args:
        home: The data folder; need not exist.
    """

    def __init__(self, home: str) -> None:
        folder = os.path.join(os.path.abspath(home), "files")
        self._database = Database(os.path.join(folder, "names.sqlite3"), _MIGRATIONS)
        self._blobs = BlobFolder(folder)
        self._swept = False

    def put(self, file_path: str | os.PathLike[str], name: str | None = None) -> None:
        """Store a file of this machine. Blocks until it is on disk.

        Args:
            file_path: The file to read.
            name: Its name in the store, replaced if it exists; the last part of `file_path` by default.

        Raises:
            OSError: It cannot be read, or the disk is full; the store is unchanged.
        """
        path = os.fspath(file_path)
        if not isinstance(path, str):
            raise TypeError(f"file_path must be a str or a path, not {type(path).__name__}")
        if name is None:
            name = os.path.basename(path)
        _check_name(name)
        with open(path, "rb", buffering=0) as source:
            self._store(source, name)

    def putf(self, f: Readable | str | bytes, name: str) -> None:
        """Store what a file object gives, or a str or bytes as contents. Blocks until it is on disk.

        Args:
            f: Read from its current position to its end in pieces, and closed afterwards. Text is stored as UTF-8.
            name: Its name in the store, replaced if it exists.

        Raises:
            OSError: Reading failed, or the disk is full; the store is unchanged.
            TypeError: `f` is none of these.
        """
        _check_name(name)
        if isinstance(f, str | bytes | bytearray | memoryview):
            self._store(f, name)
            return
        if not callable(getattr(f, "read", None)):
            raise TypeError(f"f must be a file object, str or bytes, not {type(f).__name__}; for a path use put()")
        try:
            self._store(f, name)
        finally:
            getattr(f, "close", lambda: None)()

    def get(
        self,
        file_name: str,
        save_path: str | os.PathLike[str] | None = None,
        start_byte: int = 0,
        end_byte: int | None = None,
    ) -> None:
        """Copy a stored file, or a range of it, to this machine.

        `save_path` is replaced in one step, once every byte was verified and written beside it: on any error it keeps
        what it had. A pipe or device is written to directly.

        Args:
            file_name: The name in the store.
            save_path: Where to; by default the last part of the name, in the current directory.
            start_byte: First byte to copy.
            end_byte: The byte after the last one, as in slices; None for the end of the file.

        Raises:
            StoredFileNotFound: No stored file has this name.
            StoredFileCorrupt: The stored bytes do not match their checksum.
            ValueError: No `save_path` is given and the name ends in none; or the range is not one.
            OSError: `save_path` cannot be written.
        """
        with self.getf(file_name, start_byte, end_byte) as source:
            if save_path is None:
                save_path = os.path.basename(file_name)
                if save_path in ("", os.curdir, os.pardir):
                    raise ValueError(f"stored file {file_name!r} suggests no local name; give save_path")
            with _replacing(os.fspath(save_path)) as target:
                shutil.copyfileobj(source, target, CHUNK_BYTES)

    def getf(self, file_name: str, start_byte: int = 0, end_byte: int | None = None) -> StoredFile:
        """Open a stored file, or a range of it, for reading.

        Args:
            file_name: The name in the store.
            start_byte: First byte of the range.
            end_byte: The byte after its last one, as in slices; None for the end of the file.

        Raises:
            StoredFileNotFound: No stored file has this name.
            StoredFileCorrupt: Its contents are missing.
            ValueError: A byte number is negative, or the range ends before it starts.
        """
        _check_name(file_name)
        start, end = _check_range(start_byte, end_byte)
        with self._database.reading() as db:
            row = db.execute(
                "SELECT digest, size_bytes, md5, chunk_digests FROM file JOIN blob USING (digest) WHERE name = ?",
                (file_name,),
            ).fetchone()
            if row is None:
                raise _not_found(file_name)
            blob = Blob(digest=row[0], size_bytes=row[1], md5=row[2], chunk_digests=row[3])
            descriptor = self._blobs.open(blob, file_name)
        return StoredFile(BlobReader(descriptor, blob, file_name, start, end))

    def list(self, prefix: str = "") -> builtins.list[str]:
        """Return the names of all stored files, sorted; only those that start with `prefix`, if given."""
        check_text("prefix", prefix, 0, 1024)
        with self._database.reading() as db:
            rows = db.execute(
                "SELECT name FROM file WHERE name >= :prefix AND substr(name, 1, length(:prefix)) = :prefix"
                " ORDER BY name",
                {"prefix": prefix},
            ).fetchall()
        return [name for (name,) in rows]

    def exists(self, file_name: str) -> bool:
        """Return whether a stored file has this name."""
        _check_name(file_name)
        with self._database.reading() as db:
            return db.execute("SELECT 1 FROM file WHERE name = ?", (file_name,)).fetchone() is not None

    def delete(self, file_name: str) -> bool:
        """Delete a stored file; return whether there was one. Who has it open can read on."""
        if not self.exists(file_name):
            return False
        with self._database.writing() as db:
            found = db.execute("DELETE FROM file WHERE name = ? RETURNING digest", (file_name,)).fetchall()
            db.executemany("INSERT OR IGNORE INTO garbage VALUES (?)", found)
        self._tidy()
        return bool(found)

    def get_md5(self, file_name: str) -> str:
        """Return the MD5 of a stored file, in hex.

        Raises:
            StoredFileNotFound: No stored file has this name.
        """
        return self.info(file_name).md5

    def info(self, file_name: str) -> FileInfo:
        """Return what is known of a stored file.

        Raises:
            StoredFileNotFound: No stored file has this name.
        """
        _check_name(file_name)
        with self._database.reading() as db:
            row = db.execute(
                "SELECT size_bytes, md5, digest, modified_s FROM file JOIN blob USING (digest) WHERE name = ?",
                (file_name,),
            ).fetchone()
        if row is None:
            raise _not_found(file_name)
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

    def close(self) -> None:
        """Close the database connections. Idempotent; open files stay open, and a later use connects anew."""
        self._database.close()

    def _store(self, source: Readable | str | bytes, name: str) -> None:
        if not self._swept:
            self.sweep()
            self._swept = True
        with self._blobs.receive(chunks(source)) as (blob, path):
            try:
                self._publish(blob, path, name)
            except BaseException:
                # The blob may be in place with nobody to refer to it.
                self._collect([blob.digest])
                raise
        self._tidy()

    def _publish(self, blob: Blob, path: str, name: str) -> None:
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

    def _collect(self, digests: Iterable[str] = ()) -> None:
        with self._database.alone() as db:
            garbage = [digest for (digest,) in db.execute("SELECT digest FROM garbage")]
            for digest in {*garbage, *digests}:
                if db.execute("SELECT 1 FROM file WHERE digest = ?", (digest,)).fetchone() is None:
                    db.execute("DELETE FROM blob WHERE digest = ?", (digest,))
                    self._blobs.remove(digest)
            db.execute("DELETE FROM garbage")

    def _has_garbage(self) -> bool:
        with self._database.reading() as db:
            return db.execute("SELECT 1 FROM garbage").fetchone() is not None

    def _tidy(self) -> None:
        try:
            if self._has_garbage():
                self._collect()
        except (OSError, BackendError) as exc:
            # The user's change is made and on disk; to report it as failed would be wrong.
            logger("Cloud.files").warning("unused contents are kept for now: %s", exc)


def _check_name(name: str) -> None:
    if "\0" in check_text("the name of a stored file", name, 1, 1024):
        raise ValueError(f"the name of a stored file must not contain NUL: {name!r}")


def _check_range(start_byte: int, end_byte: int | None) -> tuple[int, int]:
    start = operator.index(start_byte)
    end = sys.maxsize if end_byte is None else operator.index(end_byte)
    if start < 0 or end < start:
        raise ValueError(f"byte range {start_byte!r} to {end_byte!r} is not one: 0 <= start_byte <= end_byte")
    return start, end


def _not_found(name: str) -> StoredFileNotFound:
    return StoredFileNotFound(f"no stored file is named {name!r}; list() tells which there are", name)


@contextmanager
def _replacing(path: str) -> Iterator[BinaryIO]:
    """Open a file for writing that takes the place of `path` at the end of the block, if nothing was raised."""
    path = os.path.realpath(path)  # a link stays a link
    mode: int | None = None
    with suppress(FileNotFoundError):
        mode = os.stat(path).st_mode
    if mode is not None and not stat.S_ISREG(mode):
        with open(path, "wb") as device:
            yield device
        return
    part = os.path.join(os.path.dirname(path), f".cloud-{secrets.token_hex(8)}.part")
    try:
        target = open(part, "xb")  # noqa: SIM115  # its errors are told apart from those of the block
    except OSError as exc:
        raise OSError(exc.errno, exc.strerror, path) from exc
    try:
        with target:
            yield target
        if mode is not None:
            os.chmod(part, stat.S_IMODE(mode))
        os.replace(part, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(part)
