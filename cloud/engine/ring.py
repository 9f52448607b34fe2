"""A ring of shared memory in which a worker leaves outcomes while it goes on: no system call, and nobody is woken.

The engine looks into it now and then (``WorkerHandle.looks``), and what a worker has left there outlives it. The
socket is for what must wake the engine, and for what comes with a descriptor. Between the two, order is kept by this:
a worker leaves nothing here while the engine has not received all that was sent.
"""

from __future__ import annotations

import errno
import os
from _thread import allocate_lock

from cloud.engine.channel import FRAME, READ, WRITTEN

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

RING_BYTES: Final = 1 << 18


class Ring:
    """One end of it: whole frames in order, by one writer for one reader.

    Args:
        memory: Of ``RING_BYTES``.
        slots: Of the page beside it; bytes written and read so far are there.
    """

    def __init__(self, memory: memoryview, slots: Any) -> None:
        self._memory = memory
        self._slots = slots
        self._read = 0
        self._fence = allocate_lock()
        self._fence.acquire()

    def _order(self) -> None:
        # Some processors let others see later writes first, and read ahead. Releasing a lock keeps what stands before
        # it before it; taking the same one keeps what follows behind.
        self._fence.release()
        self._fence.acquire()

    def put(self, frames: bytes) -> bool:
        """Leave whole frames; False if there is no room."""
        slots, n = self._slots, len(frames)
        written = slots[WRITTEN]
        if n > RING_BYTES - (written - slots[READ]):
            return False
        at = written % RING_BYTES
        first = min(n, RING_BYTES - at)
        self._memory[at : at + first] = frames[:first] if first < n else frames
        if first < n:
            self._memory[: n - first] = frames[first:]
        self._order()
        slots[WRITTEN] = written + n
        return True

    @property
    def has_unread(self) -> bool:
        """True until the reader has taken everything."""
        slots = self._slots
        return bool(slots[WRITTEN] != slots[READ])

    def take(self) -> list[tuple[int, bytes]]:
        """(kind, body) of the frames left since the last call.

        Raises:
            OSError: This is not what a worker writes: a job has written into our memory.
        """
        slots, read = self._slots, self._read
        written = slots[WRITTEN]
        if written == read:
            return []
        n = written - read
        if not 0 < n <= RING_BYTES:
            raise OSError(errno.EBADMSG, os.strerror(errno.EBADMSG))
        self._order()
        at = read % RING_BYTES
        data = bytes(self._memory[at : at + n])
        if len(data) < n:
            data += bytes(self._memory[: n - len(data)])
        self._order()
        slots[READ] = self._read = written
        frames = []
        offset, head = 0, FRAME.size
        while offset + head <= n:
            length, kind = FRAME.unpack_from(data, offset)
            offset += head
            frames.append((kind, data[offset : offset + length]))
            offset += length
        if offset != n:
            raise OSError(errno.EBADMSG, os.strerror(errno.EBADMSG))
        return frames
