"""Waits for events at descriptors, or until another thread wakes it; where a core is to spare, first without sleep."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable

from cloud.engine.descriptors import off_stdio
from cloud.engine.executor.load import MachineLoad, has_cpu_quota

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    Events = list[tuple[int, int]]

_SPIN_S: Final = 0.0002
_MAX_CREDIT: Final = 3
_LOOK_AT_LOAD_S: Final = 0.02
_MAX_POLL_S: Final = 86_400.0
"""poll() counts milliseconds in a C int; who waits longer polls again."""


class Poller:
    """Descriptors that one thread at a time waits for.

    Args:
        n_cores: That this process may use.

    Attributes:
        spin_s: How long to look again and again before sleeping; 0.0 where that takes a core from others.
        asleep: True while a thread sleeps in it.
        woken: The descriptor at which interrupts are seen.
    """

    def __init__(self, n_cores: int) -> None:
        self.spin_s = _SPIN_S if n_cores > 1 and not has_cpu_quota(n_cores) else 0.0
        self.asleep = False
        self._credit = _MAX_CREDIT
        self._quiet = False
        self._look_at_load = 0.0
        self._load = MachineLoad()
        self._poll = select.poll()
        self.woken, self._wake = (off_stdio(fd) for fd in os.pipe())
        os.set_blocking(self.woken, False)
        os.set_blocking(self._wake, False)
        self._poll.register(self.woken, select.POLLIN)

    def watch(self, fd: int, *, writes: bool = False) -> None:
        """Wait for what comes from a descriptor, from now on; with ``writes`` also for room to write to it."""
        self._poll.register(fd, select.POLLIN | select.POLLOUT if writes else select.POLLIN)
        if self.asleep:
            self.interrupt()  # whoever sleeps does so without it

    def forget(self, fd: int) -> None:
        """Wait for it no more."""
        self._poll.unregister(fd)

    def interrupt(self) -> None:
        """Wake the thread that sleeps, or that goes to sleep next."""
        try:
            os.write(self._wake, b"x")
        except OSError:
            pass  # full: it wakes anyway; closed: nobody waits

    def is_quiet(self, n_busy: Callable[[], int]) -> bool:
        """Whether spinning costs nobody a core; looked up now and then.

        Args:
            n_busy: Counts the workers of ours that have something to do.
        """
        now = time.perf_counter()
        if now > self._look_at_load and self.spin_s:
            self._look_at_load = now + _LOOK_AT_LOAD_S
            self._quiet = self._load.is_quiet(n_busy())
        return self._quiet

    def look(self) -> Events:
        """(descriptor, event) of those that are there now."""
        return self._poll.poll(0)

    def spin(self) -> Events:
        """Look again and again for a moment, unless that was in vain the last few times."""
        if not self._credit:
            return []
        poll, clock = self._poll.poll, time.perf_counter
        until = clock() + self.spin_s
        while not (events := poll(0)):
            if clock() > until:
                self._credit -= 1
                return []
        return events

    def sleep(self, timeout_s: float | None) -> Events:
        """Sleep until there are some, or the timeout."""
        began = time.perf_counter()
        self.asleep = True
        try:
            events = self._poll.poll(None if timeout_s is None else max(1, int(min(timeout_s, _MAX_POLL_S) * 1000)))
        finally:
            self.asleep = False
        if time.perf_counter() - began < 2 * _SPIN_S:
            self._credit = _MAX_CREDIT
        return events

    def heed(self) -> None:
        """Note an interrupt: ``woken`` was among the events."""
        os.read(self.woken, 4096)

    def close(self) -> None:
        """Idempotent."""
        self._load.close()
        woken, wake, self.woken, self._wake = self.woken, self._wake, -1, -1
        for fd in (woken, wake):
            if fd >= 0:
                os.close(fd)
