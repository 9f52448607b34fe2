"""Memory that is got before there is anything to write to it: getting it takes longer than writing to it."""

from __future__ import annotations

import os
from collections.abc import Callable

from cloud.serialization.memory import MemoryFile

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

__all__ = ["MAX_BYTES", "Spare"]

MAX_BYTES: Final = 1 << 28
"""A process holds so much for nothing."""

_PART_BYTES: Final = 1 << 22
"""Got at a time, about a millisecond: between two parts it is seen whether somebody is waiting."""

_PART_OF_FREE: Final = 1 / 4
_CGROUP: Final = b"/sys/fs/cgroup"


class Spare:
    """A file with memory and nothing written to it, or none.

    Attributes:
        file: The file.
    """

    def __init__(self) -> None:
        self.file: MemoryFile | None = None

    def get(self, n_bytes: int, go_on: Callable[[], bool]) -> None:
        """Have one of that length, or of as much as is got while ``go_on()``; none where memory is short."""
        if self.file is not None or not hasattr(os, "posix_fallocate") or n_bytes > _PART_OF_FREE * _n_free():
            return
        self.file = file = MemoryFile.create()
        if file is None:
            return
        try:
            for start in range(0, n_bytes, _PART_BYTES):
                if not go_on():
                    if not start:
                        self.file = None
                    return
                os.posix_fallocate(file.fd, start, min(_PART_BYTES, n_bytes - start))
        except OSError:
            self.file = None  # the limit for files is met, or no memory left

    def take(self, n_bytes: int) -> MemoryFile | None:
        """The file, for the caller to write so much to; none if there is none."""
        file, self.file = self.file, None
        if file is None or not file.is_ours():
            return None
        try:
            if os.fstat(file.fd).st_size > n_bytes:
                os.ftruncate(file.fd, n_bytes)
        except OSError:
            return None
        return file

    def give_back(self) -> None:
        """Hold it no longer."""
        self.file = None


def _n_free() -> float:
    """Bytes of memory that are free, as far as this process may have them; 0 if that is not known."""
    try:
        with open("/proc/meminfo", "rb") as file:
            free: float = next(1024 * int(line.split()[1]) for line in file if line.startswith(b"MemAvailable:"))
        with open("/proc/self/cgroup", "rb") as file:
            groups = [line.rstrip(b"\n").split(b":", 2)[1:] for line in file]
    except (OSError, ValueError, StopIteration):
        return 0.0
    for kinds, path in groups:
        if not kinds:
            free = min(free, _n_left_of_group(_CGROUP, path, b"memory.max", b"memory.current"))
        elif b"memory" in kinds.split(b","):  # version 1
            names = b"memory.limit_in_bytes", b"memory.usage_in_bytes"
            free = min(free, _n_left_of_group(_CGROUP + b"/memory", path, *names))
    return free


def _n_left_of_group(mount: bytes, path: bytes, limit: bytes, usage: bytes) -> float:
    """As for those that it is in: a container may see its own group as the root."""
    left = float("inf")
    parts = [part for part in path.split(b"/") if part]
    for depth in range(len(parts) + 1):
        folder = b"/".join((mount, *parts[:depth]))
        try:
            left = min(left, _number(folder + b"/" + limit) - _number(folder + b"/" + usage))
        except (OSError, ValueError):
            continue  # "max", or there is no such limit here
    return left


def _number(path: bytes) -> int:
    with open(path, "rb") as file:
        return int(file.read())
