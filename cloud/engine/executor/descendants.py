"""The processes of a job, as /proc tells them: its worker and all below."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


def tree(pid: int, most: int) -> list[int]:
    """A process and its descendants, no more than ``most`` of them; just the process where /proc does not tell."""
    found = [pid]
    for each in found:
        if len(found) >= most:
            break
        found += _children(each)
    return found[:most]


def _children(pid: int) -> list[int]:
    found: list[int] = []
    try:
        # A thread's children are told with the thread.
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as file:
                found += map(int, file.read().split())
    except OSError:
        pass  # it has ended meanwhile
    return found


def private_bytes(pids: list[int]) -> int:
    """Resident memory of processes, without what they may share with others."""
    n_pages = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/statm") as file:
                _, resident, shared = file.read().split()[:3]
                n_pages += int(resident) - int(shared)
        except (OSError, ValueError):
            pass  # it has ended meanwhile
    return n_pages * _PAGE_BYTES
