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
_CGROUP: Final = "/sys/fs/cgroup"


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
        if os.fstat(file.fd).st_size > n_bytes:
            os.ftruncate(file.fd, n_bytes)
        return file

    def give_back(self) -> None:
        """Hold it no longer."""
        self.file = None


def _n_free() -> int:
    """Bytes of memory that nobody uses, as far as this process may have them."""
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 0
    try:
        with open("/proc/self/cgroup", encoding="utf-8") as file:
            path = next((line.split(":", 2)[2].strip() for line in file if line.startswith("0::")), "")
    except OSError:
        return free
    # A container may see its own group as the root.
    for folder in {f"{_CGROUP}{path}", _CGROUP}:
        try:
            most, used = (_number(f"{folder}/memory.{what}") for what in ("max", "current"))
        except (OSError, ValueError):
            continue  # "max", or there is no such limit here
        free = min(free, most - used)
    return free


def _number(path: str) -> int:
    with open(path, encoding="ascii") as file:
        return int(file.read())
