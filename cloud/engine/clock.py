"""Real and virtual time."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod


class Clock(ABC):
    """What the engine takes its times from."""

    @abstractmethod
    def now(self) -> float:
        """Seconds since the epoch, for people."""

    @abstractmethod
    def monotonic(self) -> float:
        """Seconds that never go back, for deadlines."""


class RealClock(Clock):
    """The machine's clocks."""

    def now(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()


class VirtualClock(Clock):
    """A clock that can jump ahead, and never runs slower than the real one.

    Args:
        real: Source of real time; tests and seeded runs pass a frozen one.
    """

    def __init__(self, real: Clock | None = None) -> None:
        self._real = real if real is not None else _UNPATCHED
        self._ahead = 0.0

    def now(self) -> float:
        return self._real.now() + self._ahead

    def monotonic(self) -> float:
        return self._real.monotonic() + self._ahead

    def jump_to(self, moment: float) -> None:
        """Make ``monotonic`` at least ``moment``."""
        behind = moment - self.monotonic()
        if behind > 0:
            self._ahead += behind


class _Unpatched(Clock):
    # The simulator replaces time.time and friends inside jobs; its own clock must keep the real ones.
    _time = staticmethod(time.time)
    _monotonic = staticmethod(time.monotonic)

    def now(self) -> float:
        return self._time()

    def monotonic(self) -> float:
        return self._monotonic()


_UNPATCHED = _Unpatched()
