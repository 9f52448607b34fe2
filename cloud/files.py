"""Named files that programs and jobs share: put them once, read them anywhere.

The functions work on the current backend's store: the files of the user's workgroup on the server, also from inside
its jobs; without a server the data folder of this machine (``~/.cloud`` or ``CLOUD_HOME``). Files stay until deleted.
All functions block, and may be called from any thread. To and from a server files go in pieces; one that the network
or the server's end cuts off goes on where it was.

::

    import cloud

    cloud.files.put("data/names.txt")        # stored as 'names.txt'
    cloud.files.get("names.txt", "copy.txt")

A name is any Unicode text of 1 to 1024 characters without NUL; ``TypeError`` or ``ValueError`` for anything else. It
is only a name: ``'../x'`` or ``'/etc/passwd'`` touches no such path.

Source: PiCloud client 2.1.1, ``cloud.files``; byte ranges and ``get_md5`` from later ones.
"""

from __future__ import annotations

import builtins
import os
from typing import TYPE_CHECKING

from cloud import current

if TYPE_CHECKING:
    from cloud.resources.blobs import Readable
    from cloud.resources.files import StoredFile

__all__ = ["delete", "exists", "get", "get_md5", "getf", "list", "put", "putf"]


def put(file_path: str | os.PathLike[str], name: str | None = None) -> None:
    """Store the file at `file_path`, by default under the last part of that path. Replaces a file of that name.

    Args:
        file_path: A file of this machine; any size, since it is read in pieces.
        name: The name to store it under.

    Raises:
        OSError: The file cannot be read, or this machine's disk is full. What had the name before is kept.
        PayloadTooLarge: It is larger than a file on the server may be.
        BackendError: The server cannot be reached, or has no room for it.
    """
    current.resources().files.put(file_path, name)


def putf(f: Readable | str | bytes, name: str) -> None:
    """Store what an open file gives, or a str or bytes as contents. Replaces a file of that name.

    Args:
        f: A file object, read from its current position in pieces, then closed. Text is stored as UTF-8.
        name: The name to store it under.

    Raises:
        OSError: Reading failed, or this machine's disk is full. What had the name before is kept.
        PayloadTooLarge, BackendError: As `put`.
        TypeError: `f` is none of these.
    """
    current.resources().files.putf(f, name)


def get(
    file_name: str,
    save_path: str | os.PathLike[str] | None = None,
    start_byte: int = 0,
    end_byte: int | None = None,
) -> None:
    """Copy the stored file `file_name`, or a range of its bytes, to `save_path`.

    Args:
        file_name: The name in the store.
        save_path: Where to; by default the last part of the name, in the current directory. Replaced in one step,
            once all bytes were verified.
        start_byte: First byte to copy.
        end_byte: The byte after the last one, as in slices; None for the end of the file.

    Raises:
        StoredFileNotFound: No stored file has this name.
        StoredFileCorrupt: The stored bytes do not match their checksum; `save_path` is unchanged.
        ValueError: The range is not one, or no `save_path` is given and the name ends in none.
        OSError: `save_path` cannot be written.
    """
    current.resources().files.get(file_name, save_path, start_byte, end_byte)


def getf(file_name: str, start_byte: int = 0, end_byte: int | None = None) -> StoredFile:
    """Open the stored file `file_name`, or a range of its bytes, for reading as a binary file.

    The file object has ``read``, ``readline``, ``readlines``, iteration, ``seek``, ``tell``, ``close`` and ``with``;
    its ``md5`` and ``filesize`` are those of the whole file. Reading raises `StoredFileCorrupt` where the bytes do
    not match their checksum.

    Args:
        file_name: The name in the store.
        start_byte: First byte of the range; position 0 of the file object.
        end_byte: The byte after its last one, as in slices; None for the end of the file.

    Raises:
        StoredFileNotFound: No stored file has this name.
        StoredFileCorrupt: Its contents are missing.
        ValueError: A byte number is negative, or the range ends before it starts.
    """
    return current.resources().files.getf(file_name, start_byte, end_byte)


def list(prefix: str = "") -> builtins.list[str]:
    """Return the names of all stored files, sorted; only those that start with `prefix`, if given."""
    return current.resources().files.list(prefix)


def exists(file_name: str) -> bool:
    """Return whether a stored file has this name."""
    return current.resources().files.exists(file_name)


def delete(file_name: str) -> bool:
    """Delete the stored file `file_name`; return whether there was one."""
    return current.resources().files.delete(file_name)


def get_md5(file_name: str) -> str:
    """Return the MD5 of the stored file `file_name`, in hex.

    Raises:
        StoredFileNotFound: No stored file has this name.
    """
    return current.resources().files.get_md5(file_name)
