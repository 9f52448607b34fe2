"""Large buffers handed from process to process without copying them through a socket.

Pickle protocol 5 leaves large buffers (arrays) out of the pickle. Here they are written once into an anonymous memory
file, and the file's descriptor travels. The reader maps it privately: what it changes stays its own. Nothing has a
name, so nothing is left behind by a crash.

::

    SharedBytes   b"S" · n · lengths · pickle          the bytes that travel as bytes
       .segment ──► buffer 0 | buffer 1 | …            the memory file that travels beside them, each at a page's start
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Sequence
from mmap import ACCESS_COPY, ACCESS_READ, PAGESIZE, mmap

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar, Final

SHARE_BYTES: Final = 1 << 18
"""Buffers from this size on travel beside the pickle."""

_MARK: Final = b"S"
_INLINE: Final = b"I"
_COUNT: Final = struct.Struct("<I")
_WRITE_BYTES: Final = 1 << 30
_COMPARE_BYTES: Final = 1 << 17
_N_STDIO: Final = 3


class Segment:
    """Bytes in a memory file, or in memory when there are too many files open.

    Attributes:
        fd: Descriptor of the file; -1 when ``data`` holds the bytes, or when it was lost on the way.
        n_bytes: Its size.
    """

    __slots__ = ("data", "fd", "n_bytes")

    n_open: ClassVar[list[int]] = [0]

    def __init__(self, fd: int, n_bytes: int, data: bytes | None = None) -> None:
        self.fd = fd
        self.n_bytes = n_bytes
        self.data = data
        if fd >= 0:
            self.n_open[0] += 1

    @classmethod
    def write(cls, buffers: Sequence[memoryview]) -> Segment | None:
        """Copy buffers into a new segment; None when this process should open no more files."""
        if cls.n_open[0] >= max_segments():
            return None
        try:
            fd = memory_file()
        except OSError:
            return None  # others hold all the descriptors there are
        segment = cls(fd, 0)
        offset = 0
        for buffer in buffers:
            written = 0
            while written < buffer.nbytes:
                written += os.pwrite(fd, buffer[written : written + _WRITE_BYTES], offset + written)
            offset += _page_aligned(buffer.nbytes)
        os.ftruncate(fd, offset)
        segment.n_bytes = offset
        return segment

    def views(self, lengths: Sequence[int]) -> list[memoryview]:
        """The buffers, writable; what is written to them is seen by nobody else."""
        if self.data is not None:
            whole = memoryview(bytearray(self.data))
        elif self.fd < 0:
            raise OSError(errno.EMFILE, "large buffers were lost on the way: this process has too many open files")
        else:
            whole = memoryview(mapped(self.fd, self.n_bytes, access=ACCESS_COPY))
        found = []
        offset = 0
        for length in lengths:
            found.append(whole[offset : offset + length])
            offset += _page_aligned(length)
        return found

    def settle(self) -> None:
        """Take the bytes into memory if this process holds too many open files."""
        if self.fd >= 0 and self.n_open[0] > max_segments():
            with mapped(self.fd, self.n_bytes, access=ACCESS_COPY) as content:
                self.data = content[:]
            self.close()

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            self.n_open[0] -= 1
            os.close(fd)

    def __del__(self) -> None:
        try:
            self.close()
        except (OSError, TypeError):
            pass  # a job closed it with all other descriptors, or the interpreter is going down


class SharedBytes(bytes):
    """Bytes with a segment beside them. Slices and copies are plain bytes, without it."""

    segment: Segment

    @property
    def n_bytes(self) -> int:
        """Size including the segment."""
        return len(self) + self.segment.n_bytes


def attach(content: bytes, segment: Segment) -> SharedBytes:
    """The same bytes, with a segment."""
    shared = SharedBytes(content)
    shared.segment = segment
    return shared


def payload_from(body: Any, offset: int) -> Any:
    """The payload that ends a frame's body; with the segment, if one came with it."""
    if isinstance(body, SharedBytes):
        return attach(body[offset:], body.segment)
    return body[offset:]


def size_of(payload: bytes) -> int:
    """Bytes of a payload, its segment included."""
    return payload.n_bytes if isinstance(payload, SharedBytes) else len(payload)


def pack_shared(
    content: bytes, buffers: list[memoryview], sent: Sent | None = None, proven: int = 0
) -> SharedBytes | None:
    """A pickle and the buffers left out of it; None when they must go into it after all.

    Args:
        content: The pickle.
        buffers: The buffers.
        sent: What was packed in their place before: the same object again, if nothing has changed.
        proven: How many of the last buffers are what they were if the pickle is.
    """
    lengths = struct.pack(f"<{len(buffers)}Q", *(buffer.nbytes for buffer in buffers))
    packed = b"".join((_MARK, _COUNT.pack(len(buffers)), lengths, content))
    if sent is not None and (before := sent.payload_if(packed, buffers[: len(buffers) - proven])) is not None:
        return before
    segment = Segment.write(buffers)
    if segment is None:
        return None
    shared = attach(packed, segment)
    if sent is not None:
        sent.replace(shared, buffers)
    return shared


class Copy:
    """Buffers as they were when they were written to a segment.

    Args:
        segment: That.
        start: Index of the first of them among the segment's.
        buffers: All of the segment's.
        n: How many, None for the rest.
    """

    def __init__(self, segment: Segment, buffers: list[memoryview], start: int = 0, n: int | None = None) -> None:
        self._offset = sum(_page_aligned(buffer.nbytes) for buffer in buffers[:start])
        mine = buffers[start : None if n is None else start + n]
        # Held, so that no other object can take its place.
        self._constants = [buffer.obj if _is_constant(buffer.obj) else None for buffer in mine]
        self._lengths = [buffer.nbytes for buffer in mine]
        self._whole = memoryview(mapped(segment.fd, segment.n_bytes, access=ACCESS_READ))

    def equals(self, buffers: list[memoryview]) -> bool:
        """Whether these buffers, or the first of them if there are fewer, have the same content.

        An object that is read-only and the same as before is taken at its word. All others are compared.
        """
        whole, offset = self._whole, self._offset
        for buffer, constant, length in zip(buffers, self._constants, self._lengths, strict=False):
            if buffer.nbytes != length:
                return False
            if constant is None or buffer.obj is not constant or not _is_constant(constant):
                for start in range(0, length, _COMPARE_BYTES):
                    part = buffer[start : start + _COMPARE_BYTES]
                    # Of all that Python offers, comparing with a bytearray is what ends in memcmp.
                    if bytearray(part) != whole[offset + start : offset + start + len(part)]:
                        return False
            offset += _page_aligned(length)
        return True


class Sent:
    """What was packed last in one place, to be compared with what is to be packed there next.

    Attributes:
        payload: That; None before the first.
    """

    def __init__(self) -> None:
        self.payload: SharedBytes | None = None
        self._copy: Copy | None = None

    def replace(self, payload: SharedBytes, buffers: list[memoryview]) -> None:
        """Remember this one."""
        self.payload, self._copy = None, Copy(payload.segment, buffers)
        self.payload = payload

    def payload_if(self, packed: bytes, buffers: list[memoryview]) -> SharedBytes | None:
        """The payload, if its bytes are these and its first buffers have the content of these."""
        payload, copy = self.payload, self._copy
        if payload is None or copy is None or payload != packed or not copy.equals(buffers):
            return None
        # Another thread may have replaced both while we compared.
        return payload if self.payload is payload else None


def _is_constant(owner: Any) -> bool:
    """True for an object whose buffer nobody can write to, short of first making it writable again."""
    while type(owner) is not bytes:
        flags = getattr(owner, "flags", None)
        if getattr(flags, "writeable", True):
            return False
        owner = owner.base
        if owner is None:
            return True
    return True


def inline(payload: bytes) -> bytes:
    """The same payload with its buffers inside: for where only bytes can go."""
    if not isinstance(payload, SharedBytes):
        return payload
    content, buffers = unpack_shared(payload)
    head = payload[: len(payload) - len(content)]
    return b"".join(
        (_INLINE, len(head).to_bytes(8, "little"), head, len(content).to_bytes(8, "little"), content, *buffers)
    )


def is_shared(payload: Any) -> bool:
    """True for the bytes of ``pack_shared`` and ``inline``."""
    return payload[0] in (83, 73)


def unpack_shared(payload: Any) -> tuple[memoryview, list[memoryview]]:
    """(pickle, buffers) of ``pack_shared`` or ``inline``; the buffers are private to the caller."""
    view = memoryview(payload)
    if payload[:1] == _INLINE:
        return _unpack_inline(view)
    lengths, offset = _lengths(view)
    return view[offset:], payload.segment.views(lengths)


def _unpack_inline(view: memoryview) -> tuple[memoryview, list[memoryview]]:
    at = 9 + int.from_bytes(view[1:9], "little")
    lengths, _ = _lengths(view[9:at])
    content = view[at + 8 : at + 8 + int.from_bytes(view[at : at + 8], "little")]
    at += 8 + len(content)
    buffers = []
    for length in lengths:
        buffers.append(memoryview(bytearray(view[at : at + length])))
        at += length
    return content, buffers


def _lengths(view: memoryview) -> tuple[Sequence[int], int]:
    n = _COUNT.unpack_from(view, 1)[0]
    offset = 1 + _COUNT.size
    return struct.unpack_from(f"<{n}Q", view, offset), offset + 8 * n


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


def mapped(fd: int, n_bytes: int, **options: Any) -> mmap:
    """``mmap``, which keeps a copy of the descriptor under the lowest number that is free; but none of stdio's.

    Where the program runs with its stdout closed, what it or C code in it prints would change the content.
    """
    taken = []
    try:
        while (copy := os.dup(fd)) < _N_STDIO:
            taken.append(copy)
        os.close(copy)
        return mmap(fd, n_bytes, **options)
    finally:
        for each in taken:
            os.close(each)


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


def _page_aligned(n_bytes: int) -> int:
    return -(-n_bytes // PAGESIZE) * PAGESIZE


def max_segments() -> int:
    """How many files for large buffers this process keeps open at most."""
    try:
        import resource
    except ImportError:  # Windows
        return 256
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 256 if soft == resource.RLIM_INFINITY else min(256, soft // 4)
