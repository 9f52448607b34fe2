"""Files in memory: made, kept off the numbers that programs use, mapped, and counted, since descriptors are few."""

from __future__ import annotations

import errno
import os
from _weakref import ref
from mmap import ACCESS_COPY, mmap

from cloud.serialization.addresses import address, has_addresses, map_privately

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar, Final

_N_STDIO: Final = 3
HIGH_FD: Final = 512
"""From here on: code that closes every low descriptor, or that files are opened by, misses them."""

_IO_BYTES: Final = 1 << 30
_MAX_FILES: Final = 4096
_MAX_MAPPINGS: Final = 256
"""Mappings have the lowest numbers, and programs that ``select`` need those below 1024 themselves."""


class MemoryFile:
    """A file in memory that this process has open; it is closed with its last user.

    Attributes:
        fd: Its descriptor; -1 once closed.
        end: Where what is written next begins.
        n_parts: How many segments were put into it here.
        is_shared: What is written to its views is in the file, until it is frozen; else it is seen by nobody else.
    """

    __slots__ = ("__weakref__", "_inode", "_mapping", "_pid", "end", "fd", "is_shared", "n_parts")

    n_open: ClassVar[list[int]] = [0]
    _received: ClassVar[dict[tuple[int, int], ref[MemoryFile]]] = {}

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.end = self.n_parts = 0
        self.is_shared = False
        self._pid = os.getpid()
        self._inode = _inode(fd)
        self._mapping: ref[_Mapping] | None = None
        self.n_open[0] += 1

    @classmethod
    def create(cls) -> MemoryFile | None:
        """A new one; None when this process should open no more."""
        if cls.n_open[0] >= max_files():
            return None
        try:
            return cls(move_out_of_reach(memory_file()))
        except OSError:
            return None  # others hold all the descriptors there are

    @classmethod
    def received(cls, fd: int) -> MemoryFile:
        """The file of a descriptor that another process sent, and that is ours now: one, however often it was sent."""
        inode = _inode(fd)
        known = cls._received.get(inode)
        file = None if known is None else known()
        if file is not None and file.is_ours():
            os.close(fd)
            return file

        def forget(gone: ref[MemoryFile]) -> None:
            if cls._received.get(inode) is gone:
                del cls._received[inode]

        file = cls(fd)
        cls._received[inode] = ref(file, forget)
        return file

    def is_ours(self) -> bool:
        """False if a job closed it and may have opened another under its number, or if this process is a copy."""
        try:
            return self._pid == os.getpid() and self.fd >= 0 and _inode(self.fd) == self._inode
        except OSError:
            return False

    def write(self, content: memoryview, offset: int) -> int:
        """Write all of it there; where it ends."""
        written = 0
        while written < content.nbytes:
            written += os.pwrite(self.fd, content[written : written + _IO_BYTES], offset + written)
        return offset + written

    def read(self, offset: int, n_bytes: int) -> bytearray:
        """A copy of a part."""
        content = bytearray(n_bytes)
        view, n_read = memoryview(content), 0
        while n_read < n_bytes:
            n = os.preadv(self.fd, [view[n_read : n_read + _IO_BYTES]], offset + n_read)
            if not n:
                break  # the end: the file's last page need not be full
            n_read += n
        return content

    def view(self, offset: int, n_bytes: int) -> memoryview:
        """A part, writable; who gets the same part next does not see what is written to it, unless it is shared.

        One mapping serves all parts, since each takes a descriptor.
        """
        mapping = self._mapped()
        if mapping is None or not mapping.take(offset, n_bytes):
            if _Mapping.n_open[0] >= max_mappings():
                return memoryview(self.read(offset, n_bytes))
            try:
                options = _shared_at_once() if self.is_shared else {"access": ACCESS_COPY}
                mapping = mapped(self.fd, 0, _Mapping, **options)
            except OSError:
                return memoryview(self.read(offset, n_bytes))
            mapping.take(offset, n_bytes)
            self._mapping = ref(mapping)
        return memoryview(mapping)[offset : offset + n_bytes]

    def offset_of(self, view: memoryview) -> int | None:
        """Where in it a view begins whose memory is that of its views; None for any other."""
        mapping = self._mapped()
        if mapping is None or view.readonly or not has_addresses():
            return None
        offset = address(view) - address(mapping)
        return offset if 0 <= offset <= len(mapping) - view.nbytes else None

    def freeze(self) -> None:
        """Change it no more: what is written to its views is seen by nobody else from now on. Idempotent.

        Raises:
            OSError: The system does not let us.
        """
        mapping = self._mapped()
        if self.is_shared and mapping is not None:
            map_privately(mapping, self.fd)
        self.is_shared = False

    def _mapped(self) -> _Mapping | None:
        return None if self._mapping is None else self._mapping()

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            self.n_open[0] -= 1
            os.close(fd)

    def __del__(self) -> None:
        try:
            self.close()
        except (AttributeError, OSError, TypeError):
            pass  # it was never open, a job closed it with all others, or the interpreter is going down


class _Mapping(mmap):
    """A mapping of a whole file. Its users are views of it: it ends with the last of them."""

    n_open: ClassVar[list[int]] = [0]

    def __init__(self, *_: Any, **__: Any) -> None:
        self._taken: dict[int, object] = {}
        self.n_open[0] += 1

    def take(self, offset: int, n_bytes: int) -> bool:
        """True for who asks first for this part; two threads may."""
        me = object()
        return offset + n_bytes <= len(self) and self._taken.setdefault(offset, me) is me

    def __del__(self) -> None:
        self.n_open[0] -= 1


def memory_file() -> int:
    """Descriptor of an empty file that no folder lists and that vanishes with its last descriptor."""
    fd = _memory_file()
    taken = []
    while fd < _N_STDIO:
        taken.append(fd)
        fd = os.dup(fd)
    for each in taken:
        os.close(each)
    return fd


def _memory_file() -> int:
    if hasattr(os, "memfd_create"):
        try:
            return os.memfd_create("cloud", os.MFD_CLOEXEC)
        except OSError as exc:
            if exc.errno in (errno.EMFILE, errno.ENFILE):
                raise
            # Some sandboxes refuse it.
    # Imported here: it imports random, and programs do have a random.py of their own beside them.
    import tempfile

    with tempfile.TemporaryFile(prefix="cloud-", buffering=0) as file:
        return os.dup(file.fileno())


def _inode(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def mapped(fd: int, n_bytes: int, kind: type[mmap] = mmap, **options: Any) -> Any:
    """``kind(fd, n_bytes, **options)``; what stdio prints never ends up in it."""
    # The map keeps a copy of the descriptor under the lowest number that is free. Where the program runs with its
    # stdout closed, what it or C code in it prints would change the content.
    taken = []
    try:
        while (copy := os.dup(fd)) < _N_STDIO:
            taken.append(copy)
        os.close(copy)
        return kind(fd, n_bytes, **options)
    finally:
        for each in taken:
            os.close(each)


def _shared_at_once() -> dict[str, int]:
    """Options of a shared mapping that is all written to: its pages are mapped together."""
    import mmap

    return {"flags": mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)}


def move_out_of_reach(fd: int) -> int:
    """The same open file under a high number, in place of ``fd``; which stays if there are no such numbers."""
    try:
        import fcntl

        copy = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, HIGH_FD)
    except (ImportError, OSError):
        return fd
    os.close(fd)
    return copy


def max_files() -> int:
    """How many memory files this process keeps open at most."""
    return _share_of_descriptors(_MAX_FILES)


def max_mappings() -> int:
    """How many of them it maps at most."""
    return _share_of_descriptors(_MAX_MAPPINGS)


def _share_of_descriptors(most: int) -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 256
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return most if soft == resource.RLIM_INFINITY else min(most, soft // 4)
