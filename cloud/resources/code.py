"""The folder of one workgroup that keeps the users' modules: each set in a folder named by its digest.

Owns how sets reach the disk whole and leave it again. Nothing that a client says is believed: paths are checked before
anything is touched, contents are hashed when they come and when a set is made of them, and the digest is computed here.

::

    <folder>/contents/<sha256>     received files; a cache, so that an edited file alone is sent again
    <folder>/<digest>/pkg/mod.py   a set, complete and on disk: what a worker puts in front of sys.path
    <folder>/.part-*               a set being made, or being removed

A set is a copy, not links to the contents: what a job changes in its own modules reaches no other set. Folders of sets
may be entered and read by any user of the machine, since jobs may run as another one; nobody but the server can list
which sets there are. One process uses a folder at a time, in any number of threads.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Collection, Iterable
from contextlib import suppress

from cloud.errors import BackendError
from cloud.resources import make_folder, sync
from cloud.serialization.manifest import MAX_TOTAL_BYTES, CodeRefused, FileEntry, check_manifest, digest_of, is_digest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

__all__ = ["CodeFolder"]

_PART: Final = ".part-"
#: The last component must not be a link; the folders above it were made by this process.
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class CodeFolder:
    """Keeps sets of modules. Thread-safe.

    Args:
        path: The folder; made when the first file comes. Jobs that run as another user need the right to pass through
            the folders above it.
    """

    def __init__(self, path: str) -> None:
        self._path = os.path.abspath(path)
        self._contents = os.path.join(self._path, "contents")
        # Guards the names in the folder: no set is removed between being looked up and being marked as used, and no
        # part that is being written is taken for one that a killed server left.
        self._lock = threading.Lock()
        self._parts: set[str] = set()

    def has(self, digest: str) -> bool:
        """True when the set is complete here; it then counts as used now."""
        return digest == "" or self._use(digest)

    def folder(self, digest: str) -> str:
        """Return the folder that a worker puts in front of ``sys.path``; it counts as used now.

        Raises:
            CodeRefused: There is no such set, or no set has such a name.
        """
        if not is_digest(digest) or not self._use(digest):
            raise CodeRefused(
                f"the server does not have the modules {ascii(digest)[:80]}", hint="Submit again: they are sent anew."
            )
        return self._set(digest)

    def missing(self, files: Iterable[Any]) -> list[str]:
        """Tell which contents have to be stored before ``publish`` can make this set; none if it exists.

        Args:
            files: Triples (path, sha256, size in bytes).

        Returns:
            SHA-256 of each, once, in the order of their paths.

        Raises:
            CodeRefused: The manifest is not acceptable; nothing was touched.
        """
        entries = check_manifest(files)
        if self.has(digest_of(entries)):
            return []
        wanted = {entry.sha256: entry for entry in entries}
        return [sha256 for sha256, entry in wanted.items() if not self._is_stored(entry)]

    def store(self, sha256: str, content: bytes) -> None:
        """Keep the contents of one file for ``publish``. They are a cache: not on disk when this returns.

        Raises:
            CodeRefused: The contents have another hash or no set may have them; nothing was kept.
            OSError: The disk is full or failed; nothing is left behind.
        """
        if len(content) > MAX_TOTAL_BYTES:
            raise CodeRefused(f"a file of a set of modules may have {MAX_TOTAL_BYTES:,} bytes, not {len(content):,}")
        if not is_digest(sha256) or hashlib.sha256(content).hexdigest() != sha256:
            raise CodeRefused(f"these {len(content):,} bytes do not have the SHA-256 {ascii(sha256)[:80]}")
        self._make_folders()
        with self._lock:
            descriptor, part = tempfile.mkstemp(dir=self._contents, prefix=_PART)
            self._parts.add(os.path.basename(part))
        try:
            with open(descriptor, "wb") as file:
                file.write(content)
            os.replace(part, self._content(sha256))
        except BaseException:
            os.unlink(part)
            raise
        finally:
            self._parts.discard(os.path.basename(part))

    def publish(self, manifest: Iterable[Any]) -> str:
        """Make a set of stored contents, unless it exists; complete and on disk when this returns.

        Returns:
            Its digest, as computed from the manifest; "" for an empty one, which needs no folder.

        Raises:
            CodeRefused: The manifest is not acceptable; nothing was touched.
            BackendError: Contents are missing or damaged, naming the path; ``missing`` then asks for them. Nothing
                was made; ``retry`` is True.
            OSError: The disk is full or failed; nothing was made.
        """
        entries = check_manifest(manifest)
        digest = digest_of(entries)
        if self.has(digest):
            return digest
        self._make_folders()
        part = self._new_part()
        try:
            self._write(part, entries)
            self._put_in_place(part, digest)
        finally:
            self._remove_part(part)
        return digest

    def sweep(self, unused_since: float, keep: Collection[str] = ()) -> list[str]:
        """Remove sets and contents that nobody used since a moment, and what a killed server left unfinished.

        Args:
            unused_since: Seconds since the epoch, by this machine's clock.
            keep: Digests that stay in any case: jobs still need them.

        Returns:
            Digests of the sets removed.
        """
        removed: list[str] = []
        for name in _names(self._path):
            if is_digest(name) and name not in keep:
                part = self._take_away(name, unused_since)
                if part:
                    self._remove_part(part)
                    removed.append(name)
            elif self._is_abandoned(name) and self._is_older(self._path, name, unused_since):
                self._remove_part(os.path.join(self._path, name))
        for name in _names(self._contents):
            kept = not is_digest(name) and not self._is_abandoned(name)
            if not kept and self._is_older(self._contents, name, unused_since):
                with suppress(FileNotFoundError):
                    os.unlink(os.path.join(self._contents, name))
        return removed

    def _set(self, digest: str) -> str:
        return os.path.join(self._path, digest)

    def _content(self, sha256: str) -> str:
        return os.path.join(self._contents, sha256)

    def _make_folders(self) -> None:
        if not os.path.isdir(self._contents):
            make_folder(self._contents)
            os.chmod(self._path, 0o711)  # noqa: S103  # to pass through, not to list

    def _use(self, digest: str) -> bool:
        if not is_digest(digest):
            return False
        with self._lock:
            try:
                os.utime(self._set(digest), follow_symlinks=False)
            except FileNotFoundError:
                return False
        return True

    def _is_stored(self, entry: FileEntry) -> bool:
        path = self._content(entry.sha256)
        try:
            if os.lstat(path).st_size != entry.size_bytes:
                return False
            os.utime(path, follow_symlinks=False)  # so that sweep leaves it to publish
        except FileNotFoundError:
            return False
        return True

    def _new_part(self) -> str:
        with self._lock:
            part = tempfile.mkdtemp(dir=self._path, prefix=_PART)
            self._parts.add(os.path.basename(part))
        return part

    def _is_abandoned(self, name: str) -> bool:
        with self._lock:
            return name.startswith(_PART) and name not in self._parts

    def _remove_part(self, part: str) -> None:
        shutil.rmtree(part, ignore_errors=True)
        self._parts.discard(os.path.basename(part))

    def _write(self, part: str, entries: Iterable[FileEntry]) -> None:
        folders, paths = {part}, []
        for entry in entries:
            content = self._verified(entry)
            path = os.path.join(part, *entry.path.split("/"))
            self._make_parents(os.path.dirname(path), folders)
            paths.append(path)
            descriptor = os.open(path, _CREATE, 0o600)
            with open(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fchmod(descriptor, 0o444)
                _begin_to_sync(descriptor)
        # Only now: to wait for each before the next is written takes three times as long.
        for path in paths:
            sync(path)
        for folder in sorted(folders, reverse=True):
            os.chmod(folder, 0o755)  # noqa: S103  # jobs may run as another user
            sync(folder)

    def _make_parents(self, folder: str, made: set[str]) -> None:
        if folder not in made:
            self._make_parents(os.path.dirname(folder), made)
            os.mkdir(folder, 0o700)
            made.add(folder)

    def _verified(self, entry: FileEntry) -> bytes:
        path = self._content(entry.sha256)
        content = None
        with suppress(OSError), open(os.open(path, _READ), "rb") as file:
            content = file.read(entry.size_bytes + 1)
        if content is None or hashlib.sha256(content).hexdigest() != entry.sha256:
            with suppress(FileNotFoundError):
                os.unlink(path)
            raise BackendError(f"the contents of module path {entry.path!r} are missing on the server", retry=True)
        if len(content) != entry.size_bytes:
            raise CodeRefused(
                f"module path {entry.path!r} has {len(content)} bytes, not {entry.size_bytes}", entry.path
            )
        return content

    def _put_in_place(self, part: str, digest: str) -> None:
        with self._lock:
            try:
                os.rename(part, self._set(digest))
            except OSError:
                # Another thread was faster, and its set is the same.
                if not os.path.isdir(self._set(digest)):
                    raise
        sync(self._path)

    def _take_away(self, digest: str, unused_since: float) -> str:
        """Rename a set out of sight, if it is unused; removing it takes time and may be interrupted."""
        with self._lock:
            if not self._is_older(self._path, digest, unused_since):
                return ""
            part = tempfile.mkdtemp(dir=self._path, prefix=_PART)
            self._parts.add(os.path.basename(part))
            os.rename(self._set(digest), os.path.join(part, digest))
        return part

    def _is_older(self, folder: str, name: str, moment: float) -> bool:
        try:
            return os.lstat(os.path.join(folder, name)).st_mtime < moment
        except FileNotFoundError:
            return False


def _begin_to_sync(descriptor: int) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # what it does not need it writes, without blocking


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []
