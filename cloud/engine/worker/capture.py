"""Captures a job's stdout and stderr at descriptor level, in two files shared with the engine.

The files are opened for appending and only ever grow at their end, so that C code and child programs write to them
too, and the engine can read what a running job has printed so far.
"""

from __future__ import annotations

import fcntl
import io
import os
import sys

from cloud.engine import channel as ch
from cloud.engine.descriptors import out_of_reach

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

_PUNCH_BYTES: Final = 8 << 20
_NOTHING: Final = (b"", b"")


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

    def close(self) -> None:
        self._dirty[0] = True
        super().close()


class _Buffer(io.BufferedWriter):
    """Bytes over ``_Raw``; notes a write even while it is still buffered."""

    dirty: list[bool]

    def write(self, data: Any) -> int:
        self.dirty[0] = True
        return super().write(data)

    def detach(self) -> io.RawIOBase:
        self.dirty[0] = True
        return super().detach()


class _Text(io.TextIOWrapper):
    """Text over ``_Raw``; notes a write even while it is still buffered."""

    dirty: list[bool]

    def write(self, text: str) -> int:
        self.dirty[0] = True
        return super().write(text)

    def detach(self) -> Any:
        self.dirty[0] = True
        return super().detach()


class Capture:
    """The captured output of one worker, cut into jobs.

    Args:
        dirty: A one-item list set to True by whatever the next look between jobs must notice.
        limit_bytes: How much of the end of each stream is kept per job.
        captured: False when descriptors 1 and 2 are the program's own, which nobody reads here.
    """

    def __init__(self, dirty: list[bool], limit_bytes: int, *, captured: bool) -> None:
        self._dirty = dirty
        self.limit_bytes = limit_bytes
        self._captured = captured
        self._foreign = False  #: streams of an initializer's, which leave no note
        self._starts = [ch.CAPTURE_START, ch.CAPTURE_START]
        # A job may close 1 and 2, or put other files in their place.
        self._files = [out_of_reach(1), out_of_reach(2)]
        self._ids = [_id_of(file) for file in self._files]
        self._input = out_of_reach(0)
        self._streams: list[Any] = [self._stream(0), self._stream(1)]
        self._install_streams()

    def _stream(self, index: int) -> _Text:
        raw = _Raw(index + 1, self._dirty, ("<stdout>", "<stderr>")[index])
        buffer = _Buffer(raw, 8192)
        stream = _Text(buffer, encoding="utf-8", errors="backslashreplace", line_buffering=True)
        stream.dirty = buffer.dirty = self._dirty
        return stream

    def _install_streams(self) -> None:
        sys.stdout, sys.stderr = self._streams
        vars(sys).update(__stdout__=sys.stdout, __stderr__=sys.stderr)

    def keep(self) -> None:
        """What stands in the place of our streams now stays: an initializer put it there."""
        for index, stream in enumerate((sys.stdout, sys.stderr)):
            if hasattr(stream, "flush"):
                self._streams[index] = stream
                self._foreign = True

    def is_in_place(self) -> bool:
        """True while our streams are in their places: what is printed leaves a note."""
        streams = self._streams
        return not self._foreign and sys.stdout is streams[0] and sys.stderr is streams[1]

    def is_silent(self) -> bool:
        """True when nothing was printed since the last ``take``, and all streams are in their places."""
        if self._dirty[0] or not self.is_in_place():
            return False
        try:
            if self._captured:
                starts = self._starts
                return os.lseek(1, 0, os.SEEK_END) == starts[0] and os.lseek(2, 0, os.SEEK_END) == starts[1]
            fcntl.fcntl(1, fcntl.F_GETFD)
            fcntl.fcntl(2, fcntl.F_GETFD)
            return True  # what they print is not ours; it is enough that they are there
        except OSError:
            return False

    def take(self) -> tuple[bytes, bytes]:
        """Output since the last call, at most ``limit_bytes`` of the end of each stream."""
        if self.is_silent():
            return _NOTHING
        streams = self._streams
        noted = self._dirty[0] or self._foreign
        for index in (0, 1) if noted else ():
            try:
                streams[index].flush()
            except (OSError, ValueError):
                # The job closed, broke or detached its stream; what reached the file is still there.
                streams[index] = self._stream(index)
        try:
            taken = self._since(0), self._since(1)
        except OSError:
            taken = b"", b""  # the job closed every descriptor: nobody will hear of it from here
        now = vars(sys).get
        if now("stdout") is not streams[0] or now("stderr") is not streams[1] or now("__stderr__") is not streams[1]:
            self._install_streams()
        return taken

    def rewind(self) -> None:
        """Empty both files, between jobs."""
        for index, file in enumerate(self._files):
            os.ftruncate(file, ch.CAPTURE_START)
            self._starts[index] = ch.CAPTURE_START

    def restore_input(self) -> None:
        """Open stdin again, if a job closed it: the next file that is opened would become it."""
        if not _is_open(0):
            try:
                os.dup2(self._input, 0)
            except OSError:
                pass  # the job closed our copy as well

    def _since(self, index: int) -> bytes:
        if not self._captured:
            # What the job put in the place of the program's own descriptor is its business.
            if not _is_open(index + 1):
                os.dup2(self._files[index], index + 1)
            return b""
        start = self._starts[index]
        try:
            end = os.lseek(index + 1, 0, os.SEEK_END)
        except OSError:
            end = -1  # closed, or no longer a file
        if end == start:
            return b""
        file = self._files[index]
        if end < 0 or _id_of(index + 1) != self._ids[index]:
            os.dup2(file, index + 1)
            end = os.lseek(file, 0, os.SEEK_END)
        self._starts[index] = end
        if end < start:
            return b""  # the job truncated it
        return os.pread(file, min(end - start, self.limit_bytes), max(start, end - self.limit_bytes))

    @property
    def starts(self) -> list[int]:
        """Where the output of the running job begins in each file."""
        return self._starts


def _is_open(fd: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_GETFD)
    except OSError:
        return False
    return True


def _id_of(fd: int) -> tuple[int, int]:
    found = os.fstat(fd)
    return found.st_dev, found.st_ino


def tail(fd: int, start: int, limit_bytes: int, end: int | None = None) -> bytes:
    """The last ``limit_bytes`` of what stands in a capture file from ``start`` on, up to ``end``."""
    end = os.fstat(fd).st_size if end is None else end
    if end <= start:
        return b""
    return os.pread(fd, min(end - start, limit_bytes), max(start, end - limit_bytes))


def free_pages(fd: int, keep_bytes: int, freed: int) -> int:
    """Give back the memory of a capture file's beginning when a job floods it.

    Returns:
        The offset up to which the file is now a hole.
    """
    end = os.fstat(fd).st_size
    if end < freed:
        freed = 0  # it was emptied between jobs
    if end - freed < keep_bytes + _PUNCH_BYTES:
        return freed
    upto = (end - keep_bytes) & ~4095
    return upto if _punch_hole(fd, freed, upto - freed) else freed


def _punch_hole(fd: int, offset: int, length: int) -> bool:
    try:
        import ctypes

        fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    except (ImportError, OSError, AttributeError):
        return False
    keep_size_and_punch = 0x01 | 0x02
    result: int = fallocate(fd, keep_size_and_punch, ctypes.c_int64(offset), ctypes.c_int64(length))
    return result == 0
