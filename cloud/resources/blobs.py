"""Blobs: immutable bytes in a folder, each named by its SHA-256.

Owns how contents reach the disk whole and come back verified. Knows no file names and keeps no books: which blobs
exist and which are still needed is the database of `cloud.resources.files`.

::

    <folder>/incoming/*.part       being written; its writer holds a lock (flock) on it
    <folder>/incoming/<digest>     a note: this blob is being put in place
    <folder>/blobs/<digest>        contents, complete and on disk

Memory is constant: contents pass through in pieces of `CHUNK_BYTES`, and each piece has its own checksum, so that a
range can be verified without reading the rest.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from cloud.errors import StoredFileCorrupt
from cloud.resources import make_folder, sync

if TYPE_CHECKING:
    from tempfile import _TemporaryFileWrapper

    from _typeshed import WriteableBuffer

__all__ = ["CHUNK_BYTES", "Blob", "BlobFolder", "BlobReader", "Hashes", "Readable", "chunks"]

#: Size of the pieces that are read, hashed and verified. Part of the stored format.
CHUNK_BYTES = 1 << 20

_DIGEST_BYTES = hashlib.sha256().digest_size


class Readable(Protocol):
    """A binary or text file, as far as it is needed here."""

    def read(self, size: int, /) -> bytes | str | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """What is known of one blob beside its contents."""

    #: SHA-256 of the contents in hex; also the name of the file that holds them.
    digest: str
    size_bytes: int
    #: MD5 of the contents in hex, for users; nothing here relies on it.
    md5: str
    #: SHA-256 (32 bytes) of each piece of `CHUNK_BYTES`, end to end.
    chunk_digests: bytes


class Hashes:
    """What becomes a `Blob`, as its contents pass by in pieces of any size.

    Attributes:
        n_bytes: How much has passed.
    """

    def __init__(self) -> None:
        self.n_bytes = 0
        self._whole, self._chunk = hashlib.sha256(), hashlib.sha256()
        self._md5 = hashlib.md5(usedforsecurity=False)
        self._chunk_digests = bytearray()

    def update(self, piece: bytes | bytearray | memoryview) -> None:
        """Take the next piece."""
        self._whole.update(piece)
        self._md5.update(piece)
        rest = memoryview(piece)
        while rest:
            part = rest[: CHUNK_BYTES - self.n_bytes % CHUNK_BYTES]
            self._chunk.update(part)
            self.n_bytes += len(part)
            if not self.n_bytes % CHUNK_BYTES:
                self._chunk_digests += self._chunk.digest()
                self._chunk = hashlib.sha256()
            rest = rest[len(part) :]

    def blob(self) -> Blob:
        """The record of what has passed."""
        last = self._chunk.digest() if self.n_bytes % CHUNK_BYTES else b""
        return Blob(
            digest=self._whole.hexdigest(),
            size_bytes=self.n_bytes,
            md5=self._md5.hexdigest(),
            chunk_digests=bytes(self._chunk_digests) + last,
        )


def chunks(source: Readable | str | bytes | bytearray | memoryview) -> Iterator[bytes | memoryview]:
    """Yield contents in pieces of exactly `CHUNK_BYTES`, the last one shorter; nothing for empty contents.

    Text is encoded as UTF-8.

    Raises:
        TypeError: The source has no ``read``, or its ``read`` gave neither bytes nor str.
        ValueError: Text holds a lone surrogate, which UTF-8 cannot express.
    """
    if isinstance(source, str):
        source = source.encode()
    if isinstance(source, bytes | bytearray | memoryview):
        whole = memoryview(source).cast("B")
        yield from (whole[start : start + CHUNK_BYTES] for start in range(0, len(whole), CHUNK_BYTES))
        return
    pending = bytearray()
    # Raw files, sockets and text give less or more bytes than were asked for.
    while True:
        data = source.read(CHUNK_BYTES)
        if not isinstance(data, str | bytes | bytearray | memoryview):
            # None means that a non-blocking file has nothing yet; to stop there would store half a file.
            raise TypeError(f"read() of {source!r} returned {type(data).__name__}, not bytes or str")
        if not data:
            break
        pending += data.encode() if isinstance(data, str) else data
        while len(pending) >= CHUNK_BYTES:
            yield bytes(pending[:CHUNK_BYTES])
            del pending[:CHUNK_BYTES]
    if pending:
        yield bytes(pending)


class BlobFolder:
    """The folder that holds the blobs. Safe in threads and beside other processes, as far as each method says."""

    def __init__(self, folder: str) -> None:
        self._incoming = os.path.join(folder, "incoming")
        self._blobs = os.path.join(folder, "blobs")

    @contextmanager
    def receive(self, pieces: Iterator[bytes | memoryview]) -> Iterator[tuple[Blob, str]]:
        """Write contents to disk beside the blobs; yield what they are and the path they wait at.

        `publish` makes a blob of them; what is not published by the end of the block is removed.

        Args:
            pieces: As `chunks` yields them.

        Raises:
            OSError: The disk is full or failed; nothing is left behind.
        """
        make_folder(self._incoming)
        make_folder(self._blobs)
        part = self._new_part()
        try:
            with part:
                hashes = Hashes()
                for piece in pieces:
                    part.write(piece)
                    hashes.update(piece)
                part.flush()
                os.fsync(part.fileno())
                blob = hashes.blob()
                with self._noted(blob.digest):
                    yield blob, part.name
        finally:
            with suppress(FileNotFoundError):
                os.unlink(part.name)

    @contextmanager
    def adopt(self, path: str, descriptor: int, blob: Blob) -> Iterator[str]:
        """Give contents that are on disk elsewhere in this file system a second name beside the blobs.

        Yields the path for `publish`. The first name stays, so that nothing is lost when this process ends half way,
        unless the file system has no hard links.

        Args:
            path: Where the contents are.
            descriptor: Of the file there.
            blob: What they are.
        """
        make_folder(self._incoming)
        make_folder(self._blobs)
        # A sweeper removes what nobody holds a lock on.
        _lock(descriptor)
        second = os.path.join(self._incoming, f"{secrets.token_hex(8)}.part")
        try:
            try:
                os.link(path, second)
            except OSError:
                os.rename(path, second)
            with self._noted(blob.digest):
                yield second
        finally:
            with suppress(FileNotFoundError):
                os.unlink(second)

    def publish(self, blob: Blob, path: str) -> None:
        """Turn received contents into a blob, on disk when this returns.

        An existing blob is replaced by the same bytes, fresh: this heals a damaged one, and its readers keep theirs.
        Only for the holder of the lock under which `remove` is called too.
        """
        os.replace(path, os.path.join(self._blobs, blob.digest))
        sync(self._blobs)

    def open(self, blob: Blob, name: str) -> int:
        """Return a descriptor of the blob's contents, which stay readable when the blob is removed.

        Raises:
            StoredFileCorrupt: The contents are missing or have another length; `name` tells whose they are.
        """
        try:
            descriptor = os.open(os.path.join(self._blobs, blob.digest), os.O_RDONLY)
        except FileNotFoundError as exc:
            raise StoredFileCorrupt(f"the contents of stored file {name!r} are missing; put it again", name) from exc
        if (size := os.fstat(descriptor).st_size) != blob.size_bytes:
            os.close(descriptor)
            raise StoredFileCorrupt(
                f"stored file {name!r} has {size} bytes instead of {blob.size_bytes}; put it again", name
            )
        return descriptor

    def remove(self, digest: str) -> None:
        """Remove a blob, if it exists."""
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(self._blobs, digest))

    def sweep(self) -> Iterator[str]:
        """Remove what writers that died left unfinished.

        Yields:
            Digests of blobs that may be in place and in no books, for the caller to look at and remove. The note of
            each is kept until the caller asks for the next.
        """
        try:
            entries = os.listdir(self._incoming)
        except FileNotFoundError:
            return
        for entry in entries:
            path = os.path.join(self._incoming, entry)
            if not entry.endswith(".part"):
                # The note of a living writer may go too: it matters only if that writer dies.
                yield entry
            elif self._is_written(path):
                continue
            with suppress(FileNotFoundError):
                os.unlink(path)

    def _new_part(self) -> _TemporaryFileWrapper[bytes]:
        while True:
            part = tempfile.NamedTemporaryFile(dir=self._incoming, suffix=".part", delete=False)  # noqa: SIM115  # the caller closes it
            _lock(part.fileno())
            # A sweeper may have come between making and locking, and removed it.
            if os.fstat(part.fileno()).st_nlink:
                return part
            part.close()

    def _is_written(self, path: str) -> bool:
        # The kernel drops the writer's lock whichever way it ends.
        try:
            descriptor = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            return True
        try:
            return not _lock(descriptor)
        finally:
            os.close(descriptor)

    @contextmanager
    def _noted(self, digest: str) -> Iterator[None]:
        # A writer killed between `publish` and its commit leaves a blob in no books; the note lets `sweep` find it
        # without listing all blobs.
        note = os.path.join(self._incoming, digest)
        with open(note, "wb"):
            pass
        try:
            yield
        finally:
            with suppress(FileNotFoundError):
                os.unlink(note)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        # Held by its writer; or the file system has no locks, and then nothing is swept rather than too much.
        return False
    return True


class BlobReader(io.RawIOBase):
    """Reads a window of a blob; no byte is returned before the piece it lies in was verified.

    Positions count from the start of the window. Not thread-safe by itself; ``io.BufferedReader`` makes it so.

    Args:
        descriptor: From `BlobFolder.open`; closed with this object.
        blob: Its record.
        name: The stored file's name, for errors.
        start: First byte of the window.
        end: The byte after its last; may lie beyond the end of the contents, as in slices.
    """

    def __init__(self, descriptor: int, blob: Blob, name: str, start: int, end: int) -> None:
        self.blob = blob
        self.name = name
        self._descriptor = descriptor
        self._end = min(end, blob.size_bytes)
        self._start = min(start, self._end)
        self._position = self._start
        self._index = -1
        self._chunk = b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Read at most up to the end of the current piece.

        Raises:
            StoredFileCorrupt: The piece does not match its checksum; the buffer is untouched.
        """
        self._refuse_if_closed()
        view = memoryview(buffer).cast("B")
        if not len(view) or self._position >= self._end:
            return 0
        index, offset = divmod(self._position, CHUNK_BYTES)
        chunk = self._verified(index)
        n = min(len(view), len(chunk) - offset, self._end - self._position)
        view[:n] = memoryview(chunk)[offset : offset + n]
        self._position += n
        return n

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._refuse_if_closed()
        bases = {os.SEEK_SET: self._start, os.SEEK_CUR: self._position, os.SEEK_END: self._end}
        if whence not in bases:
            raise ValueError(f"whence must be 0, 1 or 2, not {whence!r}")
        position = bases[whence] + offset
        if position < self._start:
            raise ValueError(f"cannot seek to {position - self._start}, before the start")
        self._position = position
        return position - self._start

    def tell(self) -> int:
        self._refuse_if_closed()
        return self._position - self._start

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
            self._chunk = b""
        super().close()

    def _refuse_if_closed(self) -> None:
        if self.closed:
            raise ValueError(f"stored file {self.name!r} is closed")

    def _verified(self, index: int) -> bytes:
        if index != self._index:
            start = index * CHUNK_BYTES
            wanted = min(CHUNK_BYTES, self.blob.size_bytes - start)
            # pread: forked children share the descriptor's own position.
            data = os.pread(self._descriptor, wanted, start)
            expected = self.blob.chunk_digests[index * _DIGEST_BYTES : (index + 1) * _DIGEST_BYTES]
            if hashlib.sha256(data).digest() != expected:
                raise StoredFileCorrupt(
                    f"stored file {self.name!r} does not match its checksum at bytes {start} to {start + wanted}; "
                    "put it again",
                    self.name,
                )
            self._index, self._chunk = index, data
        return self._chunk
