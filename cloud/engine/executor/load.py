"""How busy the machine is: whether a process may look again and again instead of sleeping until it is woken."""

from __future__ import annotations

import os

from cloud.engine.descriptors import off_stdio


class MachineLoad:
    """The number of runnable tasks of the whole machine, against its cores.

    Spinning saves the wake-up of a sleeping process on an idle machine. On a busy one it makes everybody slower,
    ourselves first: who is woken finds no free core, and waits for the spinning one's time slice to end.
    """

    def __init__(self) -> None:
        self._n_cores = os.cpu_count() or 1
        self._quiet = False
        try:
            self._fd = off_stdio(os.open("/proc/loadavg", os.O_RDONLY | os.O_CLOEXEC))
        except OSError:
            self._fd = -1

    def is_quiet(self, n_busy: int) -> bool:
        """True when there is a core to spare. False where the system does not tell.

        Args:
            n_busy: Workers of ours that have something to do: they are not others.
        """
        if self._fd < 0:
            return False
        n_runnable = int(os.pread(self._fd, 64, 0).split()[3].partition(b"/")[0])
        # Others, besides our own thread; while we spin, a worker without work spins too.
        n_others = n_runnable - 1 - max(n_busy, 1 if self._quiet else 0)
        self._quiet = n_others <= 0
        return self._quiet

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def has_cpu_quota(n_cores: int) -> bool:
    """True when a cgroup grants less CPU time than the cores there are: spinning would use it up."""
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
        return quota != "max" and int(quota) < n_cores * int(period)
    except (OSError, ValueError):
        pass
    try:
        with open("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") as file:
            quota_us = int(file.read())
        with open("/sys/fs/cgroup/cpu/cpu.cfs_period_us") as file:
            return 0 < quota_us < n_cores * int(file.read())
    except (OSError, ValueError):
        return False
