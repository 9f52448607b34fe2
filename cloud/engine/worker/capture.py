"""Captures a job's stdout and stderr at descriptor level, in two files shared with the engine.

The files are opened for appending and only ever grow at their end, so that C code and child programs write to them
too, and the engine can read what a running job has printed so far.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Any, Final

_PUNCH_BYTES: Final = 8 << 20


class _Raw(io.RawIOBase):
    """Descriptor 1 or 2 as a raw stream that notes when it is written to."""

    def __init__(self, fd: int, dirty: list[bool], name: str) -> None:
        self._fd = fd
        self._dirty = dirty
        self.name = name

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def write(self, data: Any) -> int:
        self._dirty[0] = True
        return os.write(self._fd, data)


class _Text(io.TextIOWrapper):
    """Text over ``_Raw``; notes a write even while it is still buffered."""

    dirty: list[bool]

    def write(self, text: str) -> int:
        self.dirty[0] = True
        return super().write(text)


class Capture:
    """The captured output of one worker, cut into jobs.

    Args:
        dirty: A one-item list set to True by whatever the next look between jobs must notice.
        limit_bytes: How much of the end of each stream is kept per job.
    """

    def __init__(self, dirty: list[bool], limit_bytes: int) -> None:
        self._dirty = dirty
        self.limit_bytes = limit_bytes
        self._starts = [0, 0]
        self._streams: list[_Text] = []
        for fd, name in ((1, "<stdout>"), (2, "<stderr>")):
            raw = _Raw(fd, dirty, name)
            stream = _Text(io.BufferedWriter(raw, 8192), encoding="utf-8", errors="backslashreplace", line_buffering=True)
            stream.dirty = dirty
            self._streams.append(stream)
        sys.stdout, sys.stderr = self._streams
        vars(sys).update(__stdout__=sys.stdout, __stderr__=sys.stderr)

    def take(self) -> tuple[bytes, bytes]:
        """Output since the last call, at most ``limit_bytes`` of the end of each stream."""
        taken = []
        for index, fd in ((0, 1), (1, 2)):
            try:
                self._streams[index].flush()
            except (OSError, ValueError):
                pass  # the job closed or broke its stream; what reached the file is still there
            taken.append(self._since(index, fd))
        if sys.stdout is not self._streams[0] or sys.stderr is not self._streams[1]:
            sys.stdout, sys.stderr = self._streams
        return taken[0], taken[1]

    def _since(self, index: int, fd: int) -> bytes:
        start = self._starts[index]
        try:
            end = os.lseek(fd, 0, os.SEEK_END)
            if end == start:
                return b""
            self._starts[index] = end
            return os.pread(fd, min(end - start, self.limit_bytes), max(start, end - self.limit_bytes))
        except OSError:
            return b""  # the job closed descriptor 1 or 2

    @property
    def starts(self) -> list[int]:
        """Where the output of the running job begins in each file."""
        return self._starts


def tail(fd: int, start: int, limit_bytes: int) -> bytes:
    """The last ``limit_bytes`` of what stands in a capture file from ``start`` on."""
    end = os.fstat(fd).st_size
    if end <= start:
        return b""
    return os.pread(fd, min(end - start, limit_bytes), max(start, end - limit_bytes))


def free_pages(fd: int, keep_bytes: int, freed: int) -> int:
    """Give back the memory of a capture file's beginning when a job floods it.

    Returns:
        The offset up to which the file is now a hole.
    """
    end = os.fstat(fd).st_size
    if end - freed < keep_bytes + _PUNCH_BYTES:
        return freed
    upto = (end - keep_bytes) & ~4095
    return upto if _punch_hole(fd, freed, upto - freed) else freed


def _punch_hole(fd: int, offset: int, length: int) -> bool:
    import ctypes

    try:
        fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    except AttributeError:
        return False
    keep_size_and_punch = 0x01 | 0x02
    result: int = fallocate(fd, keep_size_and_punch, ctypes.c_int64(offset), ctypes.c_int64(length))
    return result == 0
