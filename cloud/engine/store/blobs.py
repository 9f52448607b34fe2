"""Large payloads and outcomes: one file each, named by the SHA-256 of its content.

A file is whole and on disk before a row refers to it, and is removed after no row does: what a crash leaves over are
files without rows, which ``sweep`` removes at the next start. Only the journal's thread writes and removes.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from hashlib import sha256

from cloud.errors import BackendError


class BlobFolder:
    """Files by the SHA-256 of their content.

    Args:
        path: The folder; made, for its owner only, when missing.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        os.makedirs(path, mode=0o700, exist_ok=True)

    def put(self, content: bytes) -> tuple[bytes, bool]:
        """Keep the bytes; their name is on disk after ``sync``.

        Returns:
            The digest that names them, and whether the file is new.

        Raises:
            OSError: The disk is full or failed; nothing was kept.
        """
        digest = sha256(content).digest()
        path = self._file(digest)
        # A file that was damaged meanwhile is replaced: whoever refers to the same bytes is healed as well.
        if self._holds(path, digest):
            return digest, False
        descriptor, part = tempfile.mkstemp(dir=self._path, prefix=".part-")
        try:
            with open(descriptor, "wb", buffering=0) as file:
                view = memoryview(content)
                while view:
                    view = view[file.write(view) :]
                os.fsync(descriptor)
            is_new = not os.path.exists(path)
            os.replace(part, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(part)
            raise
        return digest, is_new

    def sync(self) -> None:
        """Block until the names of all files put so far are on disk."""
        sync_folder(self._path)

    def read(self, digest: bytes, n_bytes: int = -1) -> bytes:
        """The bytes of that digest; only the first so many, which are then compared with nothing.

        Raises:
            BackendError: The file is missing, cannot be read, or holds something else.
        """
        path = self._file(digest)
        try:
            with open(path, "rb") as file:
                content = file.read(n_bytes)
        except OSError as exc:
            raise BackendError(f"{path} cannot be read: {exc.strerror}") from exc
        if n_bytes < 0 and sha256(content).digest() != digest:
            raise BackendError(f"{path} is damaged: its content does not match its name")
        return content

    def remove(self, digests: Iterable[bytes]) -> None:
        """Remove files; those that are gone already are no error."""
        for digest in digests:
            with suppress(FileNotFoundError):
                os.unlink(self._file(digest))

    def sweep(self, known: set[bytes]) -> int:
        """Remove whatever is not one of these; returns how many files that were."""
        names = {digest.hex() for digest in known}
        unknown = [name for name in os.listdir(self._path) if name not in names]
        for name in unknown:
            with suppress(FileNotFoundError):
                os.unlink(os.path.join(self._path, name))
        return len(unknown)

    def _file(self, digest: bytes) -> str:
        return os.path.join(self._path, digest.hex())

    def _holds(self, path: str, digest: bytes) -> bool:
        try:
            with open(path, "rb") as file:
                return sha256(file.read()).digest() == digest
        except OSError:
            return False


def sync_folder(path: str) -> None:
    """Block until the names in a folder are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


__all__ = ["BlobFolder", "sync_folder"]
