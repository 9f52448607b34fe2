"""What Linux tells about processes: memory, processor time, descendants, and who carries a mark."""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path

PROC = Path("/proc")


def peak_memory_mb() -> float:
    """Most memory that this process had resident at once."""
    try:
        # Not ru_maxrss: it begins with what the parent had when it started this process.
        for line in (PROC / "self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1000
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def family() -> list[int]:
    """This process and its descendants."""
    parents = {}
    for folder in PROC.glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue  # it has ended meanwhile
    found = [os.getpid()]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def cpu_seconds(pids: list[int]) -> float:
    """Processor time of all their threads, to the nanosecond."""
    total_ns = 0
    for pid in pids:
        for thread in (PROC / str(pid) / "task").glob("*/schedstat"):
            try:
                total_ns += int(thread.read_text().split()[0])
            except (OSError, ValueError, IndexError):
                continue  # it has ended meanwhile
    return total_ns / 1e9


def marked(mark: str) -> list[int]:
    """Processes whose environment has this text; the present one is none of them."""
    found = []
    for folder in PROC.glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue  # it has ended, or is somebody else's
    return [pid for pid in found if pid != os.getpid()]


def end_marked(mark: str, grace_s: float = 0.5) -> int:
    """End the processes that carry the mark, for certain; how many had not ended by themselves within the grace."""
    deadline = time.monotonic() + grace_s
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.02)
    for _ in range(50):
        # More than once: what is being killed may start others.
        running = marked(mark)
        if not running:
            break
        for pid in running:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.02)
    return len(left)
