"""Stored files as users see them: what can be done with a name, wherever its contents are kept.

Owns how contents come from files, file objects and bytes of this machine, and how they get back there whole. Where
they are kept is a subclass's part: `cloud.resources.files` keeps them in a folder, `cloud.backends.files` on a server.
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
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import BinaryIO

from cloud.errors import StoredFileNotFound
from cloud.resources import check_text
from cloud.resources.blobs import CHUNK_BYTES, Blob, Readable

__all__ = ["FileInfo", "Files", "StoredFile", "check_file_name", "check_range", "not_found"]


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

    def __init__(self, reader: io.RawIOBase, blob: Blob) -> None:
        super().__init__(reader, buffer_size=1 << 16)
        self._blob = blob

    @property
    def md5(self) -> str:
        """MD5 of the whole file in hex, also when a range was opened."""
        return self._blob.md5

    @property
    def filesize(self) -> int:
        """Size of the whole file in bytes, also when a range was opened."""
        return self._blob.size_bytes


class Files(ABC):
    """Named files. All methods block, and are safe in threads and in forked children.

    A name is any Unicode text of 1 to 1024 characters without NUL; ``TypeError`` or ``ValueError`` for anything else.
    Memory use does not grow with the size of the files.
    """

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
        check_file_name(name)
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
        check_file_name(name)
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

    @abstractmethod
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

    @abstractmethod
    def list(self, prefix: str = "") -> builtins.list[str]:
        """Return the names of all stored files, sorted; only those that start with `prefix`, if given."""

    @abstractmethod
    def exists(self, file_name: str) -> bool:
        """Return whether a stored file has this name."""

    @abstractmethod
    def delete(self, file_name: str) -> bool:
        """Delete a stored file; return whether there was one. Who has it open can read on."""

    def get_md5(self, file_name: str) -> str:
        """Return the MD5 of a stored file, in hex.

        Raises:
            StoredFileNotFound: No stored file has this name.
        """
        return self.info(file_name).md5

    @abstractmethod
    def info(self, file_name: str) -> FileInfo:
        """Return what is known of a stored file.

        Raises:
            StoredFileNotFound: No stored file has this name.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of connections. Idempotent; open files stay open, and a later use connects anew."""

    @abstractmethod
    def _store(self, source: Readable | str | bytes, name: str) -> None:
        """Make what a source gives the contents of a name. On disk when this returns."""


def check_file_name(name: str) -> None:
    """Raise TypeError or ValueError unless this can be the name of a stored file."""
    if "\0" in check_text("the name of a stored file", name, 1, 1024):
        raise ValueError(f"the name of a stored file must not contain NUL: {name!r}")


def check_range(start_byte: int, end_byte: int | None) -> tuple[int, int]:
    """Return a byte range as integers, its end as a large one if it is open; ValueError if it is none."""
    start = operator.index(start_byte)
    end = sys.maxsize if end_byte is None else operator.index(end_byte)
    if start < 0 or end < start:
        raise ValueError(f"byte range {start_byte!r} to {end_byte!r} is not one: 0 <= start_byte <= end_byte")
    return start, end


def not_found(name: str) -> StoredFileNotFound:
    """For a name that stands for nothing."""
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
