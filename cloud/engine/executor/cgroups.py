"""Control groups (v2) for workers, where the system lets this process make them: limits that no job can get around."""

from __future__ import annotations

import os

from cloud.engine.worker.limits import Limits, n_events

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

_ROOT: Final = "/sys/fs/cgroup"
_LEAF: Final = "cloud-server"
_NEEDED: Final = frozenset({"memory", "pids"})


def delegated(root: str = _ROOT, own: str = "/proc/self/cgroup") -> str:
    """The folder of this process's cgroup, made ready for one cgroup a worker; "" where that cannot be had.

    This process moves to a leaf of it, as a cgroup with processes of its own cannot limit others below. To be called
    once, before templates are started. Under systemd it needs ``Delegate=yes``.
    """
    try:
        with open(own) as file:
            path = next((line[3:].strip() for line in file if line.startswith("0::")), "")
        base = os.path.join(root, path.lstrip("/")) if path else ""
        if os.path.basename(base) == _LEAF:
            base = os.path.dirname(base)
        if not base or not _names(f"{base}/cgroup.controllers") >= _NEEDED:
            return ""
        os.makedirs(f"{base}/{_LEAF}", exist_ok=True)
        _write(f"{base}/{_LEAF}/cgroup.procs", str(os.getpid()))
        _write(f"{base}/cgroup.subtree_control", "+memory +pids")
        return base if _names(f"{base}/cgroup.subtree_control") >= _NEEDED else ""
    except OSError:
        return ""


class WorkerGroup:
    """The cgroup of one worker.

    Args:
        base: From ``delegated``.
        name: Of the worker, unique there.
        limits: Of its memory and processes.
    """

    def __init__(self, base: str, name: str, limits: Limits) -> None:
        self.path = os.path.join(base, name)
        os.mkdir(self.path)
        if limits.memory_bytes:
            _write(f"{self.path}/memory.max", str(limits.memory_bytes))
            _write(f"{self.path}/memory.oom.group", "1")
        if limits.n_processes:
            _write(f"{self.path}/pids.max", str(limits.n_processes))

    @property
    def ran_out_of_memory(self) -> bool:
        """True when the kernel has killed it for its memory."""
        return n_events(self.path, "memory", "oom_kill") > 0

    def remove(self) -> bool:
        """End what is left in it and remove it; False when that must be tried again, as something is still ending."""
        try:
            _write(f"{self.path}/cgroup.kill", "1")
            os.rmdir(self.path)
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return True


def _names(path: str) -> set[str]:
    with open(path) as file:
        return {name.lstrip("+") for name in file.read().split()}


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
