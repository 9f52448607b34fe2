"""Uploads: contents that arrive in pieces, each in a request of its own, until they are given a name.

Owns ``<files>/uploads``, where they grow, and what they may take up. They survive this process: an upload goes on
where it ended.

::

    begin ──► uploads/<id> ◄── append, append …      each piece is on disk when it is answered
                   │
                commit ──► a second name for the same file, as a blob ──► the entry in the books ──► the first name goes

The bytes are hashed as they pass by, and written once. Who commits again, because the answer was lost, is told so.
"""

from __future__ import annotations

import os
import re
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from cloud.errors import BackendError, PayloadTooLarge, StoredFileCorrupt, StoredFileNotFound
from cloud.resources import make_folder
from cloud.resources.blobs import CHUNK_BYTES, Hashes
from cloud.resources.files import FileStore
from cloud.resources.stored import check_file_name

__all__ = ["Uploads"]

MAX_UPLOADS: Final = 1024
KEPT_S: Final = 86_400.0
_ID: Final = re.compile(r"[0-9a-f]{32}")
_SWEEP_EVERY_S: Final = 600.0


class _Upload:
    """What is known of one upload in this process.

    Attributes:
        lock: Held while it is changed: a client that lost its connection may ask again before the first try is over.
        hashes: Of its first bytes; after a restart of none.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.hashes = Hashes()


class Uploads:
    """The uploads to one store. Thread-safe; one process at a time.

    Args:
        store: Where they end.
        max_file_bytes: Of one upload; None is without limit.
        max_storage_bytes: Of the store and all uploads together; None is without limit.
    """

    def __init__(
        self, store: FileStore, *, max_file_bytes: int | None = None, max_storage_bytes: int | None = None
    ) -> None:
        self._store = store
        self._folder = os.path.join(store.folder, "uploads")
        self.max_file_bytes = max_file_bytes
        self.max_storage_bytes = max_storage_bytes
        self._lock = threading.Lock()
        self._uploads: dict[str, _Upload] = {}
        self._sweep_at = 0.0

    def begin(self) -> str:
        """Begin an upload; its id.

        Raises:
            BackendError: There are too many.
            OSError: The disk is full or failed.
        """
        make_folder(self._folder)
        with self._lock:
            due = time.monotonic() >= self._sweep_at
        if due:
            self.sweep()
        if len(os.listdir(self._folder)) >= MAX_UPLOADS:
            raise BackendError(
                f"{MAX_UPLOADS} uploads are unfinished, and there may be no more",
                retry=True,
                hint="Uploads that nobody goes on with are given up after a day.",
            )
        upload = secrets.token_hex(16)
        os.close(os.open(self._path(upload), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        return upload

    def append(self, upload: str, offset: int, piece: bytes) -> int:
        """Add a piece where the upload ends; on disk when this returns. A piece for another place changes nothing.

        Returns:
            How many bytes there are then: ``offset + len(piece)``, or where to go on.

        Raises:
            StoredFileNotFound: There is no such upload.
            PayloadTooLarge: The file would have more bytes than it may.
            BackendError: The store would.
            OSError: The disk is full or failed; nothing was added.
        """
        with self._opened(upload) as (known, descriptor):
            found = os.fstat(descriptor)
            # Two names: it was about to be committed when the server ended, and is complete.
            if found.st_size != offset or found.st_nlink > 1:
                return found.st_size
            self.check_room(offset + len(piece), len(piece))
            try:
                _write(descriptor, piece, offset)
                os.fdatasync(descriptor)
            except OSError:
                os.ftruncate(descriptor, offset)
                raise
            if known.hashes.n_bytes == offset:
                known.hashes.update(piece)
            return offset + len(piece)

    def commit(self, upload: str, name: str, sha256: str) -> None:
        """Make an upload the contents of a name, which is replaced if it exists. On disk when this returns.

        Raises:
            StoredFileNotFound: There is no such upload.
            StoredFileCorrupt: What arrived has another checksum; the upload is given up.
            OSError: The disk is full or failed; the upload is kept.
        """
        check_file_name(name)
        with self._opened(upload, name) as (known, descriptor):
            if descriptor < 0:
                return
            size = os.fstat(descriptor).st_size
            while known.hashes.n_bytes < size:
                piece = os.pread(descriptor, CHUNK_BYTES, known.hashes.n_bytes)
                if not piece:
                    raise OSError(f"upload {upload} became shorter while it was read")
                known.hashes.update(piece)
            blob = known.hashes.blob()
            if blob.digest != sha256:
                self._forget(upload)
                raise StoredFileCorrupt(
                    f"the {size:,} bytes that arrived for {name!r} do not have the SHA-256 that was sent; put it again",
                    name,
                )
            os.fsync(descriptor)
            self._store.adopt(self._path(upload), descriptor, blob, name, _key(upload))
            self._forget(upload)

    def abort(self, upload: str) -> None:
        """Give an upload up; nothing happens if there is none."""
        with suppress(StoredFileNotFound), self._opened(upload):
            self._forget(upload)

    def check_room(self, file_bytes: int, more_bytes: int) -> None:
        """Raise unless a file may have so many bytes and the store so many more; errors as `append`."""
        if self.max_file_bytes is not None and file_bytes > self.max_file_bytes:
            error = PayloadTooLarge(
                f"a stored file may have {self.max_file_bytes:,} bytes here, and this one has {file_bytes:,} or more",
                hint="Store it in parts, or ask the operator to raise the limit.",
            )
            error.size_bytes, error.limit_bytes = file_bytes, self.max_file_bytes
            raise error
        if self.max_storage_bytes is not None:
            used = self._store.used_bytes() + self._partial_bytes()
            if used + more_bytes > self.max_storage_bytes:
                raise BackendError(
                    f"the stored files have {used:,} bytes, and may have {self.max_storage_bytes:,}: "
                    f"there is no room for {more_bytes:,} more",
                    retry=True,
                    hint="Delete files that are not needed, or ask the operator to raise the limit.",
                )

    def sweep(self) -> None:
        """Remove uploads that had no new piece for a day."""
        with self._lock:
            self._sweep_at = time.monotonic() + _SWEEP_EVERY_S
        oldest = time.time() - KEPT_S
        for upload in self._names():
            with suppress(FileNotFoundError):
                if os.stat(self._path(upload)).st_mtime < oldest:
                    self.abort(upload)

    def _names(self) -> list[str]:
        try:
            return [name for name in os.listdir(self._folder) if _ID.fullmatch(name)]
        except FileNotFoundError:
            return []

    def _partial_bytes(self) -> int:
        total = 0
        for upload in self._names():
            with suppress(FileNotFoundError):
                total += os.stat(self._path(upload)).st_size
        return total

    @contextmanager
    def _opened(self, upload: str, name: str | None = None) -> Iterator[tuple[_Upload, int]]:
        """Be alone with an upload and its open file; with ``name`` -1 for one that was committed already."""
        if not _ID.fullmatch(upload):
            raise _none(upload, name)
        with self._lock:
            known = self._uploads.setdefault(upload, _Upload())
        with known.lock:
            if self._store.done(_key(upload)) is not None:
                # Killed between the entry in the books and the end of the first name, which then is all that is left.
                self._forget(upload)
                if name is None:
                    raise _none(upload, name)
                yield known, -1
                return
            try:
                descriptor = os.open(self._path(upload), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                self._forget(upload)
                raise _none(upload, name) from None
            try:
                yield known, descriptor
            finally:
                os.close(descriptor)

    def _forget(self, upload: str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self._path(upload))
        with self._lock:
            self._uploads.pop(upload, None)

    def _path(self, upload: str) -> str:
        return os.path.join(self._folder, upload)


def _key(upload: str) -> str:
    return f"upload:{upload}"


def _none(upload: str, name: str | None) -> StoredFileNotFound:
    return StoredFileNotFound(
        f"there is no upload {upload[:64]!r}: it was committed, given up, or left alone for a day", name or ""
    )


def _write(descriptor: int, piece: bytes, offset: int) -> None:
    rest = memoryview(piece)
    while rest:
        n = os.pwrite(descriptor, rest, offset)
        offset += n
        rest = rest[n:]
