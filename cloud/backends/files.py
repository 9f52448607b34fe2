"""Stored files of a server, from its clients and from inside its jobs: in pieces, each one request of the table.

::

    put   one piece: files.put | more: files.begin, append, append …, commit
    getf  files.open (with the first bytes) | files.read, read …, by the digest: what the name stands for may change

Each piece that is read is compared with its SHA-256 before any byte of it is given to the user, and all of an upload is
compared when it is committed.
"""

from __future__ import annotations

import builtins
import hashlib
import io
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING

from cloud.errors import StoredFileCorrupt, StoredFileNotFound
from cloud.resources import check_text
from cloud.resources.blobs import Blob, Readable, chunks
from cloud.resources.stored import FileInfo, Files, StoredFile, check_file_name, check_range

if TYPE_CHECKING:
    from typing import Any, Final

    from _typeshed import WriteableBuffer

__all__ = ["Ask", "RemoteFiles"]

Ask = Callable[..., "tuple[dict[str, Any], list[bytes]]"]
"""Called with the name of an operation, its blobs and, by name, its content; gives content and blobs of the reply."""

PIECE_BYTES: Final = 4 << 20
"""Of one request, either way."""

_FIRST_BYTES: Final = 256 << 10
_MAX_TRIES: Final = 8
_MAX_INT: Final = 2**63 - 1


class RemoteFiles(Files):
    """The files of the user's workgroup on a server.

    Args:
        ask: Asks the server.
    """

    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    def getf(self, file_name: str, start_byte: int = 0, end_byte: int | None = None) -> StoredFile:
        check_file_name(file_name)
        start, end = check_range(start_byte, end_byte)
        n = min(_FIRST_BYTES, end - start)
        # Beyond what the server may be asked for there is no file.
        facts, blobs = self._ask("files.open", name=file_name, start=min(start, _MAX_INT), n=n)
        blob = Blob(digest=facts["sha256"], size_bytes=facts["size"], md5=facts["md5"], chunk_digests=b"")
        reader = _Reader(self._ask, blob, file_name, start, end)
        with suppress(StoredFileCorrupt):  # what is read of it is asked for again
            reader.take(start, n, facts, blobs[0])
        return StoredFile(reader, blob)

    def list(self, prefix: str = "") -> builtins.list[str]:
        check_text("prefix", prefix, 0, 1024)
        names: builtins.list[str] = []
        more = True
        while more:
            reply, _ = self._ask("files.list", prefix=prefix, after=names[-1] if names else "")
            names += reply["names"]
            more = reply["more"]
        return names

    def exists(self, file_name: str) -> bool:
        check_file_name(file_name)
        return bool(self._ask("files.exists", name=file_name)[0]["exists"])

    def delete(self, file_name: str) -> bool:
        check_file_name(file_name)
        return bool(self._ask("files.delete", name=file_name)[0]["deleted"])

    def info(self, file_name: str) -> FileInfo:
        check_file_name(file_name)
        facts, _ = self._ask("files.info", name=file_name)
        return FileInfo(
            name=file_name,
            size_bytes=facts["size"],
            md5=facts["md5"],
            sha256=facts["sha256"],
            modified=datetime.fromisoformat(facts["modified"]),
        )

    def close(self) -> None:
        """Nothing: the connection is the backend's."""

    def _store(self, source: Readable | str | bytes, name: str) -> None:
        begun = _place(source)
        try:
            self._send(source, name)
        except (StoredFileNotFound, StoredFileCorrupt):
            # The server gave the upload up, or lost a part of it with its power: all is sent once more, if it can be.
            if begun is None:
                raise
            begun()
            self._send(source, name)

    def _send(self, source: Readable | str | bytes, name: str) -> None:
        pieces = _pieces(source)
        first, second = next(pieces, b""), next(pieces, None)
        whole = hashlib.sha256(first)
        if second is None:
            self._ask("files.put", first, name=name, sha256=whole.hexdigest())
            return
        upload: str = self._ask("files.begin")[0]["upload"]
        try:
            size = self._append(upload, 0, first)
            while second is not None:
                whole.update(second)
                size = self._append(upload, size, second)
                second = next(pieces, None)
            self._ask("files.commit", upload=upload, name=name, sha256=whole.hexdigest())
        except BaseException:
            self._give_up(upload)
            raise

    def _append(self, upload: str, offset: int, piece: bytes) -> int:
        """Send a piece, or what the server lacks of it; the size of the upload after it."""
        end = offset + len(piece)
        has = offset
        for _try in range(_MAX_TRIES):
            reply, _ = self._ask("files.append", piece[has - offset :], upload=upload, offset=has)
            has = reply["size"]
            if has == end:
                return end
            if not offset <= has < end:
                break
        raise StoredFileCorrupt(f"the server has {has:,} bytes of an upload of which {end:,} were sent", "")

    def _give_up(self, upload: str) -> None:
        try:
            self._ask("files.abort", upload=upload)
        except Exception:  # noqa: BLE001, S110 - a courtesy: the server sweeps, and the user is told why it came to this
            pass


def _pieces(source: Readable | str | bytes) -> Iterator[bytes]:
    """Contents in pieces of ``PIECE_BYTES``, the last one shorter."""
    pending: list[bytes | memoryview] = []
    n_bytes = 0
    for chunk in chunks(source):
        pending.append(chunk)
        n_bytes += len(chunk)
        if n_bytes >= PIECE_BYTES:
            yield b"".join(pending)
            pending, n_bytes = [], 0
    if pending:
        yield b"".join(pending)


def _place(source: Readable | str | bytes) -> Callable[[], object] | None:
    """How to go back to where a source stands now; None if it cannot."""
    if isinstance(source, str | bytes | bytearray | memoryview):
        return lambda: None
    seek, tell = getattr(source, "seek", None), getattr(source, "tell", None)
    if not callable(seek) or not callable(tell):
        return None
    try:
        position = tell()
        seek(position)
    except (OSError, ValueError):
        return None
    return lambda: seek(position)


class _Reader(io.RawIOBase):
    """Reads a window of contents on the server, in pieces that grow while it is read from front to back.

    Args:
        ask: Asks the server.
        blob: What the contents are.
        name: The stored file's name, for errors.
        start: First byte of the window.
        end: The byte after its last; may lie beyond the end of the contents, as in slices.
    """

    def __init__(self, ask: Ask, blob: Blob, name: str, start: int, end: int) -> None:
        self._ask = ask
        self._blob = blob
        self.name = name
        self._end = min(end, blob.size_bytes)
        self._start = min(start, self._end)
        self._position = self._start
        self._piece, self._piece_start = b"", 0
        self._next_bytes = _FIRST_BYTES

    def take(self, start: int, n: int, facts: dict[str, Any], piece: bytes) -> None:
        """Keep a piece of the contents, asked for by ``start`` and ``n``.

        Raises:
            StoredFileCorrupt: It is not what the server sent, or not all of it.
        """
        wanted = max(0, min(n, self._blob.size_bytes - start))
        if len(piece) != wanted or hashlib.sha256(piece).hexdigest() != facts["piece_sha256"]:
            raise StoredFileCorrupt(
                f"bytes {start} to {start + wanted} of stored file {self.name!r} were damaged on their way", self.name
            )
        self._piece, self._piece_start = piece, start

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        self._refuse_if_closed()
        view = memoryview(buffer).cast("B")
        if not len(view) or self._position >= self._end:
            return 0
        offset = self._position - self._piece_start
        if not 0 <= offset < len(self._piece):
            self._fetch(len(view))
            offset = 0
        n = min(len(view), len(self._piece) - offset, self._end - self._position)
        view[:n] = memoryview(self._piece)[offset : offset + n]
        self._position += n
        return n

    def _fetch(self, asked: int) -> None:
        in_order = self._position == self._piece_start + len(self._piece)
        self._next_bytes = min(PIECE_BYTES, self._next_bytes * 4) if in_order else _FIRST_BYTES
        n = min(max(self._next_bytes, min(asked, PIECE_BYTES)), self._end - self._position)
        self._piece = b""
        for last in (False, True):
            facts, blobs = self._ask("files.read", sha256=self._blob.digest, name=self.name, start=self._position, n=n)
            try:
                self.take(self._position, n, facts, blobs[0])
                return
            except StoredFileCorrupt:
                if last:
                    raise

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
        self._piece = b""
        super().close()

    def _refuse_if_closed(self) -> None:
        if self.closed:
            raise ValueError(f"stored file {self.name!r} is closed")
