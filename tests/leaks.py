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
        self._processes = set(_processes())
        self._threads = set(_threads())
        self._descriptors = _descriptors()
        self._entries = set(_entries())

    def found(self) -> list[str]:
        """Describe what has come since and is still there, one line each; look once."""
        return [
            *(f"process {pid}: {what}" for pid, what in _processes().items() if pid not in self._processes),
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
        for pid in _processes():
            if pid not in self._processes:
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


def _processes() -> dict[int, str]:
    found = {process.pid: process for process in psutil.Process().children(recursive=True)}
    for pid in SHARED:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
                found.pop(process.pid, None)
    for pid in _marked():
        if pid not in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                found[pid] = psutil.Process(pid)
    described = {}
    for pid, process in found.items():
        with contextlib.suppress(psutil.NoSuchProcess):
            described[pid] = _described(process)
    return described


def _described(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.AccessDenied, psutil.ZombieProcess):
        return f"{process.status()}, {' '.join(process.cmdline())[:200]}"
    return process.status()


def _marked() -> list[int]:
    # Only Linux shows the environment of a process that is no child of ours.
    mark = os.environ.get(MARK)
    if mark is None:
        return []
    wanted = f"{MARK}={mark}".encode()
    found = []
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if name.isdecimal() and int(name) != os.getpid():
            with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb", buffering=0) as environ:
                if wanted in environ.read():
                    found.append(int(name))
    return found


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
