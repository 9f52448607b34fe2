"""Frames over a socket that does not block, with descriptors beside some of them.

Both ends of a worker's channel use it. A frame whose kind has ``WITH_SEGMENT`` set comes with one descriptor: of the
file with the segment that belongs to its payload (see ``serialization.shared``). A small frame before it, which only
this module sees, says where in the file that is.

Of ``socket`` only the half in C is used: see ``passing``.
"""

from __future__ import annotations

import _socket as socket
import os
import struct
from collections import deque

from cloud.engine.channel import FRAME
from cloud.engine.descriptors import full
from cloud.engine.passing import NO_SIGNAL, descriptors_of, send_with
from cloud.serialization.memory import MemoryFile, move_out_of_reach
from cloud.serialization.shared import Segment, attach

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final, TypeAlias

WITH_SEGMENT: Final = 0x80
_PLACE_KIND: Final = 0xFF
_PLACE: Final = struct.Struct("<QQ")
_PLACE_FRAME: Final = struct.Struct(FRAME.format + "QQ")
_READ_BYTES: Final = 1 << 18
_LARGE_BYTES: Final = 1 << 17
_MAX_DESCRIPTORS: Final = 64
_ANCILLARY_BYTES: Final = socket.CMSG_SPACE(_MAX_DESCRIPTORS * 4)
# As plain ints: operators of enums cost as much as a system call.
_CLOEXEC: Final = int(getattr(socket, "MSG_CMSG_CLOEXEC", 0))
_LOST: Final = int(socket.MSG_CTRUNC)

Frame: TypeAlias = "tuple[int, Any]"
"""(kind, body): bytes, SharedBytes if a segment came with it, or a memoryview of its own memory if it is large."""


class FrameStream:
    """One end of the socket.

    Args:
        fd: Its descriptor; owned from now on.

    Attributes:
        descriptors: Received and not yet claimed, in the order of the frames they came with.
    """

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(False)
        self.fd = fd
        self.descriptors: deque[int] = deque()
        self._places: deque[tuple[int, int]] = deque()
        self._unsent: deque[tuple[memoryview, Segment | None]] = deque()
        # Allocated once: memory of this size for each message would be mapped and unmapped by the system.
        self._buffer = memoryview(bytearray(_READ_BYTES))
        self._rest = b""
        self._large: bytearray | None = None
        self._large_kind = 0
        self._filled = 0

    # --- sending ------------------------------------------------------------------------------------------------------

    @property
    def has_unsent(self) -> bool:
        """True while something waits for room in the socket."""
        return bool(self._unsent)

    def send(self, data: bytes, segment: Segment | None = None) -> bool:
        """Send, or keep what the socket does not take now; False if something is kept.

        Args:
            data: Whole frames.
            segment: Its descriptor goes with the first byte of ``data``.

        Raises:
            OSError: The other end is gone.
        """
        if not self._unsent and segment is None:
            try:
                sent = self._socket.send(data, NO_SIGNAL)
            except BlockingIOError:
                sent = 0
            if sent == len(data):
                return True
            self._unsent.append((memoryview(data)[sent:], None))
            return False
        if segment is not None:
            data = b"".join((_PLACE_FRAME.pack(_PLACE.size, _PLACE_KIND, segment.offset, segment.n_bytes), data))
        self._unsent.append((memoryview(data), segment))
        return self.send_rest()

    def send_rest(self) -> bool:
        """Send more of what was kept; True when nothing is left."""
        unsent = self._unsent
        while unsent:
            view, segment = unsent[0]
            try:
                if segment is None:
                    sent = self._socket.send(view, NO_SIGNAL)
                else:
                    sent = send_with(self._socket, view, [segment.fd])
            except OSError as exc:
                if not full(exc):
                    raise
                return False
            if sent == len(view):
                unsent.popleft()
            else:
                unsent[0] = view[sent:], None
        return True

    # --- receiving ----------------------------------------------------------------------------------------------------

    def receive(self) -> list[Frame]:
        """Frames that have arrived whole, as (kind, body); none if nothing has.

        Raises:
            EOFError: The other end is closed.
            OSError: It is gone.
        """
        if self._large is not None:
            return self._receive_large(self._large)
        try:
            n, ancillary, flags, _ = self._socket.recvmsg_into((self._buffer,), _ANCILLARY_BYTES, _CLOEXEC)
        except BlockingIOError:
            return []
        if not n:
            raise EOFError
        if ancillary or flags & _LOST:
            self._take_descriptors(ancillary, flags)
        data = bytes(self._buffer[:n])
        if self._rest:
            data, self._rest = self._rest + data, b""
        return self._cut(data)

    def _cut(self, data: bytes) -> list[Frame]:
        frames: list[Frame] = []
        offset, end, head = 0, len(data), FRAME.size
        while end - offset >= head:
            length, kind = FRAME.unpack_from(data, offset)
            offset += head
            if end - offset < length:
                if length < _LARGE_BYTES:
                    offset -= head
                    break
                # The rest of it is read to where it belongs: joining pieces would copy it again and again.
                self._large, self._large_kind, self._filled = bytearray(length), kind, end - offset
                self._large[: end - offset] = memoryview(data)[offset:]
                return frames
            body = data[offset : offset + length]
            if kind == _PLACE_KIND:
                self._places.append(_PLACE.unpack(body))
            else:
                frames.append((kind, body) if kind < WITH_SEGMENT else self._frame(kind, body))
            offset += length
        self._rest = data[offset:]
        return frames

    def _receive_large(self, large: bytearray) -> list[Frame]:
        view = memoryview(large)
        while self._filled < len(large):
            try:
                # No further than this frame: descriptors then always arrive with frames cut above.
                target = [view[self._filled :]]
                n, ancillary, flags, _ = self._socket.recvmsg_into(target, _ANCILLARY_BYTES, _CLOEXEC)
            except BlockingIOError:
                return []
            if not n:
                raise EOFError
            if ancillary or flags & _LOST:
                self._take_descriptors(ancillary, flags)
            self._filled += n
        self._large = None
        return [self._frame(self._large_kind, view)]

    def _frame(self, kind: int, body: Any) -> Frame:
        if kind < WITH_SEGMENT:
            return kind, body
        fd = self.descriptors.popleft()
        segment = Segment(MemoryFile.received(fd) if fd >= 0 else None, *self._places.popleft())
        segment.settle()
        return kind - WITH_SEGMENT, attach(bytes(body), segment)

    def _take_descriptors(self, ancillary: list[tuple[int, int, bytes]], flags: int) -> None:
        if flags & _LOST:
            # This process has no number left to give it. The frame that it belongs to must not take the next one.
            self.descriptors.append(-1)
        for sent in ancillary:
            self.descriptors.extend(map(move_out_of_reach, descriptors_of(*sent)))

    def close(self) -> None:
        """Close the socket. Idempotent."""
        self._socket.close()
        while self.descriptors:
            fd = self.descriptors.popleft()
            if fd >= 0:
                os.close(fd)
