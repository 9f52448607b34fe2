"""Large buffers handed from process to process without copying them through a socket.

Pickle protocol 5 leaves large buffers (arrays) out of the pickle. Here they are written once into an anonymous memory
file, and the file's descriptor travels. The reader maps it privately: what it changes stays its own. Nothing has a
name, so nothing is left behind by a crash.

::

    SharedBytes   b"S" · n · lengths · pickle          the bytes that travel as bytes
       .segment ──► buffer 0 | buffer 1 | …            the part of a memory file that travels beside them, each at a
                                                       page's start; a large pickle is the last of them itself
"""

from __future__ import annotations

import errno
import struct
from _thread import _local
from _weakref import ref
from collections.abc import Callable, Sequence
from mmap import ACCESS_COPY, PAGESIZE
from os import getpid

from cloud.serialization.comparing import alike
from cloud.serialization.memory import MemoryFile, mapped, max_files

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final, TypeAlias

    from cloud.serialization.ahead import Ahead

    FindSegment: TypeAlias = Callable[[list[memoryview]], "Segment | None"]
    """Gives the segment that buffers of a result lie in already; None if there is none that can be sent."""

SHARE_BYTES: Final = 1 << 18
"""Buffers from this size on travel beside the pickle."""

_MARK: Final = b"S"
_INLINE: Final = b"I"
_COUNT: Final = struct.Struct("<I")
_MAX_TOGETHER: Final = 8
_TOGETHER_BYTES: Final = 8 << 20
"""So many segments, and so much, lie in one file at most: all of it is kept while somebody uses any of it."""


class Segment:
    """Bytes in a part of a memory file, or in memory when there are too many files open.

    Attributes:
        file: The file; None when the bytes are in memory, or were lost on the way.
        offset: Where in it they begin.
        n_bytes: How many.
    """

    __slots__ = ("_data", "file", "n_bytes", "offset")

    def __init__(self, file: MemoryFile | None, offset: int, n_bytes: int) -> None:
        self.file = file
        self.offset = offset
        self.n_bytes = n_bytes
        self._data: bytearray | None = None

    @classmethod
    def write(cls, buffers: Sequence[Sequence[Any]], *, together: bool = False) -> Segment | None:
        """Copy buffers into a new segment; None when they do not fit into a file, or there can be no more files.

        Args:
            buffers: Those, each in pieces.
            together: It may share a file with others, which then lasts until the last of them is gone.
        """
        *others, last = (sum(memoryview(piece).nbytes for piece in pieces) for pieces in buffers)
        n_bytes = sum(map(_page_aligned, others)) + last
        ahead = None if together else _ahead_for(n_bytes)
        if ahead is not None:
            file = ahead.take(n_bytes) or MemoryFile.create()
        else:
            file = _file_for(n_bytes) if together else MemoryFile.create()
        if file is None:
            return None
        segment = cls(file, file.end, n_bytes)
        # First: this may be broken off anywhere, by a signal that ends the job.
        file.end += _page_aligned(n_bytes)
        file.n_parts += 1
        at = segment.offset
        try:
            for pieces in buffers:
                for piece in pieces:
                    at = file.write(memoryview(piece), at)
                at = _page_aligned(at)
        except OSError:
            return None  # no memory left, or the limit for files is met: whatever else can be said is said without it
        if ahead is not None:
            ahead.wrote(n_bytes)
        return segment

    @property
    def fd(self) -> int:
        """Descriptor of the file."""
        if self.file is None:
            raise OSError(errno.EBADF, "this segment has no file")
        return self.file.fd

    def views(self, lengths: Sequence[int]) -> list[memoryview]:
        """The buffers, writable; what is written to them is seen by nobody else."""
        if self._data is not None:
            whole = memoryview(bytearray(self._data))
        elif self.file is None:
            raise OSError(errno.EMFILE, "large buffers were lost on the way: this process has too many open files")
        else:
            whole = self.file.view(self.offset, self.n_bytes)
        found = []
        offset = 0
        for length in lengths:
            found.append(whole[offset : offset + length])
            offset += _page_aligned(length)
        return found

    def part_of(self, buffers: Sequence[memoryview]) -> Segment | None:
        """The segment of just these buffers, if they are most of this one and lie in it as in one of their own."""
        if self.file is None:
            return None
        places = [self.file.offset_of(buffer) for buffer in buffers]
        start = end = places[0] or 0
        n_bytes = 0
        for place, buffer in zip(places, buffers, strict=True):
            if place != end:
                return None
            n_bytes = end - start + buffer.nbytes
            end += _page_aligned(buffer.nbytes)
        return Segment(self.file, start, n_bytes) if 2 * n_bytes > self.n_bytes else None

    def whole(self) -> memoryview:
        """All of it as it was written, to be compared with."""
        # Nobody writes to it. But the address of a buffer can be had only if one could.
        return memoryview(mapped(self.fd, self.offset + self.n_bytes, access=ACCESS_COPY))[self.offset :]

    def settle(self) -> None:
        """Take the bytes into memory if this process holds too many open files."""
        if self.file is not None and MemoryFile.n_open[0] > max_files():
            self._data, self.file = self.file.read(self.offset, self.n_bytes), None


def get_memory_ahead() -> None:
    """From now on, in this process and not in those forked from it, for the next large buffers. Idempotent."""
    _gets_ahead[0] = getpid()


_gets_ahead: Final = [0]
_AHEAD_BYTES: Final = 8 << 20
"""For less it is not worth a thread."""


def _ahead_for(n_bytes: int) -> Ahead | None:
    if n_bytes < _AHEAD_BYTES or _gets_ahead[0] != getpid():
        return None
    from cloud.serialization.ahead import ahead

    return ahead


class _Growing(_local):
    # The file that segments are put into together, while one of them is held: until they have been sent.
    file: ref[MemoryFile] | None = None


_growing = _Growing()


def _file_for(n_bytes: int) -> MemoryFile | None:
    file = None if _growing.file is None else _growing.file()
    if file is None or file.n_parts >= _MAX_TOGETHER or file.end + n_bytes > _TOGETHER_BYTES or not file.is_ours():
        file = MemoryFile.create()
        _growing.file = None if file is None else ref(file)
    return file


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
    pieces: Sequence[Any],
    buffers: list[memoryview],
    sent: Sent | None = None,
    proven: int = 0,
    *,
    together: bool = False,
    in_place: FindSegment | None = None,
) -> SharedBytes | None:
    """A pickle and the buffers left out of it; None when they must go into it after all.

    Args:
        pieces: The pickle.
        buffers: The buffers.
        sent: What was packed in their place before: the same object again, if nothing has changed.
        proven: How many of the last buffers are what they were if the pickle is.
        together: As for ``Segment.write``.
        in_place: Gives a segment that holds these buffers already.
    """
    lengths = [buffer.nbytes for buffer in buffers]
    content: list[Sequence[Any]] = [[buffer] for buffer in buffers]
    if sent is None and (n_bytes := sum(map(len, pieces))) >= SHARE_BYTES:
        lengths.append(n_bytes)
        # While the file is written other threads run, which may change a bytearray.
        content.append([bytes(piece) for piece in pieces])
        pieces = ()
    packed = b"".join((_MARK, _COUNT.pack(len(lengths)), struct.pack(f"<{len(lengths)}Q", *lengths), *pieces))
    if sent is not None and (before := sent.payload_if(packed, buffers[: len(buffers) - proven])) is not None:
        return before
    segment = None if in_place is None or pieces == () else in_place(buffers)
    if segment is None:
        segment = Segment.write(content, together=together)
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
        self._whole = segment.whole()

    def equals(self, buffers: list[memoryview]) -> bool:
        """Whether these buffers, or the first of them if there are fewer, have the same content.

        An object that is read-only and the same as before is taken at its word. All others are compared.
        """
        whole, offset = self._whole, self._offset
        for buffer, constant, length in zip(buffers, self._constants, self._lengths, strict=False):
            if buffer.nbytes != length:
                return False
            is_known = constant is not None and buffer.obj is constant and _is_constant(constant)
            if not is_known and not alike(buffer, whole[offset : offset + length]):
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
    lengths, offset = _lengths(memoryview(payload))
    head, content = payload[:offset], payload[offset:]
    buffers = payload.segment.views(lengths)
    return b"".join(
        (_INLINE, len(head).to_bytes(8, "little"), head, len(content).to_bytes(8, "little"), content, *buffers)
    )


def is_shared(payload: Any) -> bool:
    """True for the bytes of ``pack_shared`` and ``inline``."""
    return payload[0] in (83, 73)


def unpack_shared(payload: Any) -> tuple[memoryview, list[memoryview]]:
    """(pickle, buffers) of ``pack_shared`` or ``inline``; the buffers are private to the caller."""
    content = memoryview(payload)
    if payload[:1] == _INLINE:
        content, buffers = _unpack_inline(content)
    else:
        lengths, offset = _lengths(content)
        content, buffers = content[offset:], payload.segment.views(lengths)
    return (content, buffers) if content else (buffers.pop(), buffers)


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


def _page_aligned(n_bytes: int) -> int:
    return -(-n_bytes // PAGESIZE) * PAGESIZE
