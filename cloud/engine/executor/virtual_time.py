"""Lets the functions of ``time`` follow a virtual clock inside simulated jobs, and nowhere else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from cloud.engine.clock import VirtualClock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

_REAL: Final = {
    name: getattr(time, name)
    for name in ("sleep", "time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns")
}
_NS: Final = 1_000_000_000


class _Here(threading.local):
    """Of the thread that asks: the clock and the sleep of the job it runs, if it runs one."""

    clock: VirtualClock | None = None
    sleep: Callable[[float], None] | None = None


_here = _Here()
_n_installed = [0]
_lock = threading.Lock()


def enter_job(clock: VirtualClock, sleep: Callable[[float], None]) -> None:
    """From now on this thread's time is the clock's, and its sleeps are the scheduler's."""
    _here.clock, _here.sleep = clock, sleep


def install() -> None:
    """Replace the functions of ``time``, until as many calls of ``uninstall``."""
    with _lock:
        _n_installed[0] += 1
        if _n_installed[0] == 1:
            for name, function in _virtual().items():
                setattr(time, name, function)


def uninstall() -> None:
    """Put the functions of ``time`` back."""
    with _lock:
        _n_installed[0] -= 1
        if not _n_installed[0]:
            for name, function in _REAL.items():
                setattr(time, name, function)


def _virtual() -> dict[str, Callable[..., Any]]:
    def sleep(seconds: float, /) -> None:
        """As the real one; in a simulated job virtual time passes, and other jobs run."""
        if _here.sleep is None:
            _REAL["sleep"](seconds)
            return
        if seconds < 0:
            raise ValueError("sleep length must be non-negative")
        _here.sleep(seconds)

    def now() -> float:
        clock = _here.clock
        return float(_REAL["time"]() if clock is None else clock.now())

    def steady() -> float:
        clock = _here.clock
        return float(_REAL["monotonic"]() if clock is None else clock.monotonic())

    def counter() -> float:
        clock = _here.clock
        return float(_REAL["perf_counter"]() if clock is None else clock.monotonic())

    replacements: dict[str, Callable[..., Any]] = {
        "sleep": sleep,
        "time": now,
        "time_ns": lambda: int(now() * _NS),
        "monotonic": steady,
        "monotonic_ns": lambda: int(steady() * _NS),
        "perf_counter": counter,
        "perf_counter_ns": lambda: int(counter() * _NS),
    }
    for name, function in replacements.items():
        # Pickled as what they stand for.
        function.__module__, function.__name__, function.__qualname__ = "time", name, name
    return replacements
