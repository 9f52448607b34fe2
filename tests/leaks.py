"""What a test may leave behind by mistake: processes, threads, descriptors, temporary files.

A `Leaks` remembers what was there when it was made; `found()` lists what has come since. Processes are known by
descent and by a mark in the environment they were started with, so that an orphan whose parent has died is found too.
"""

from __future__ import annotations

import contextlib
import gc
import os
import tempfile
import threading
import time

import psutil

MARK = "TEST_RUN_MARK"
PREFIX = "cloud-"


class Leaks:
    """The difference between two looks at this process and what it started."""

    def __init__(self) -> None:
        # All there are: to ask each whose it is takes some milliseconds, and every test begins with this.
        self._pids = _pids()
        self._threads = set(_threads())
        self._descriptors = _descriptors()
        self._entries = set(_entries())

    def found(self) -> list[str]:
        """Describe what has come since and is still there, one line each; look once."""
        return [
            *(f"process {pid}: {what}" for pid, what in _processes(self._pids).items()),
            *(f"thread {name}" for ident, name in _threads().items() if ident not in self._threads),
            *self._new_descriptors(),
            *(f"temporary file {name}" for name in _entries() if name not in self._entries),
        ]

    def found_after(self, grace_s: float) -> list[str]:
        """Describe what is still there after at most ``grace_s`` seconds in which it may end by itself."""
        deadline = time.monotonic() + grace_s
        while (left := self.found()) and time.monotonic() < deadline:
            gc.collect()
            time.sleep(0.01)
        return left

    def end_processes(self) -> None:
        """Kill the processes that have come since, so that the next test starts clean."""
        for pid in _processes(self._pids):
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                process.kill()
                process.wait(timeout=5)

    def _new_descriptors(self) -> list[str]:
        now = _descriptors()
        if len(now) <= len(self._descriptors):
            return []
        return [f"descriptor {fd}: {what}" for fd, what in now.items() if self._descriptors.get(fd) != what]


SHARED: set[int] = set()
"""Processes that several tests use, such as servers: they, and what they start, are no leaks."""


def _pids() -> set[int]:
    if os.path.isdir("/proc"):
        return {int(name) for name in os.listdir("/proc") if name.isdecimal()}
    return set(psutil.pids())


def _processes(besides: set[int]) -> dict[int, str]:
    """Those of this run, described, that are not among the others."""
    found = {}
    for pid in _pids() - besides:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if _is_marked(pid) or _is_ours(process):
                found[pid] = _described(process)
    return found


def _is_ours(process: psutil.Process) -> bool:
    line = {process.pid, *(parent.pid for parent in process.parents())}
    return os.getpid() in line and not line & SHARED


def _described(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.AccessDenied, psutil.ZombieProcess):
        return f"{process.status()}, {' '.join(process.cmdline())[:200]}"
    return process.status()


def _is_marked(pid: int) -> bool:
    # Only Linux shows the environment of a process that is no child of ours.
    mark = os.environ.get(MARK)
    if mark is None:
        return False
    with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb", buffering=0) as environ:
        return f"{MARK}={mark}".encode() in environ.read()
    return False


def _threads() -> dict[int | None, str]:
    return {thread.ident: thread.name for thread in threading.enumerate() if thread.name.startswith(PREFIX)}


def _descriptors() -> dict[int, str]:
    folder = "/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"
    found = {}
    for name in os.listdir(folder):
        # The descriptor of the listing itself is gone by now.
        with contextlib.suppress(OSError):
            os.fstat(int(name))
            found[int(name)] = os.path.realpath(f"{folder}/{name}")
    return found


def _entries() -> list[str]:
    return [name for name in os.listdir(tempfile.gettempdir()) if name.startswith(PREFIX)]
